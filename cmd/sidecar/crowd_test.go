//go:build linux && !race

package main

// crowd is how many ask at once: more than the sidecar takes connections, and more than the kernel queues.
const crowd = 10_000
