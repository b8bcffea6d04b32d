//go:build linux && race

package main

// crowd is smaller than without the race detector, which ends a program with more than 8,128 goroutines. It is still
// more than the kernel queues.
const crowd = 6_000
