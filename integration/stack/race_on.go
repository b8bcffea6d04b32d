//go:build unix && race

package stack

// Race reports that programs are built with the race detector, as the tests are.
const Race = true
