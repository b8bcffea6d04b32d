// Package twoprocessors makes a program that imports it use at most two processors for Go code. It is for a program that
// does little and has no CPU limit: Go would use all processors of a node, with memory for each. System calls do not
// count.
//
// It is a package so that it runs early. It imports only runtime, so it is initialized before nearly all other packages.
// Otherwise their allocations would be spread over the memory of all processors.
package twoprocessors

import "runtime"

func init() { runtime.GOMAXPROCS(min(2, runtime.GOMAXPROCS(0))) }
