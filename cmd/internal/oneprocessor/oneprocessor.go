// Package oneprocessor makes a program that imports it run Go code on one processor at a time, for one that does
// little: no thread is woken to look for work that the first has done by then. It changes nothing else, and
// system calls do not count.
//
// It is a package because of when: it imports nothing but runtime, and is initialized before nearly all others, which
// otherwise spread what they allocate over the memory of several processors.
package oneprocessor

import "runtime"

func init() { runtime.GOMAXPROCS(1) }
