package main

import (
	"github.com/credence-iam/credence/broker/admin"
	"github.com/credence-iam/credence/broker/configfile"
)

// following tells the metrics of a file, and that there is none if f is nil.
func following(f *configfile.Follower) func() (admin.RulesFile, bool) {
	return func() (admin.RulesFile, bool) {
		if f == nil {
			return admin.RulesFile{}, false
		}
		status := f.Status()
		return admin.RulesFile{Loaded: status.Loaded, OK: status.Err == nil}, true
	}
}
