// Package twoprocessors makes a program that imports it run Go code on two processors at most, for one that does
// little and has no CPU limit: Go would take all of a node, with memory for each. It changes nothing else, and
// system calls do not count.
//
// It is a package because of when: it imports nothing but runtime, and is initialized before nearly all others, which
// otherwise spread what they allocate over the memory of all processors.
package twoprocessors

import "runtime"

func init() { runtime.GOMAXPROCS(min(2, runtime.GOMAXPROCS(0))) }
