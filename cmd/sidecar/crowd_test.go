//go:build linux && !race

package main

// crowd is how many clients call at once: more than the sidecar accepts and the kernel's queue holds.
const crowd = 10_000
