//go:build unix && !race

package stack

// raceFlags build our programs as the tests themselves are built.
var raceFlags []string

// Race is whether programs are built with the race detector.
const Race = false
