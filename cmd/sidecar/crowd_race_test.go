//go:build linux && race

package main

// crowd is smaller with the race detector, which stops a program with more than 8,128 goroutines. It is still larger
// than the kernel's queue.
const crowd = 6_000
