//go:build race

package connections

// raceDetector makes stacks larger, and keeps less in pools.
const raceDetector = true
