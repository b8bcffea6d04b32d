package main

import "github.com/credence-iam/credence/broker/configfile"

// following returns the source of a metric that shows the state of a file. If f is nil, there is no such file.
func following(f *configfile.Follower) func() (ok, configured bool) {
	return func() (ok, configured bool) {
		if f == nil {
			return false, false
		}
		return f.Status().Err == nil, true
	}
}
