// Package scale lets fleets of brokers live through hours and accidents in virtual time, and counts what they ask of
// STS and what pods are told. Cache, placement, prefetching, policy and the RPC are those of the program; Kubernetes,
// sidecars, and in the large runs STS, are doubles that are simpler than the real ones: STS always takes as long, brokers
// know of a pod at once, and pods of a node that is lost are gone at once.
//
// It promises that the figures of docs/scale.md come from a run of it. It says nothing of CPU, memory or the network:
// an answer that needs no STS takes no time here. Chance is not seeded: a run cannot be repeated, and a check that fails once
// in a hundred runs is wrong.
package scale

import (
	"flag"
	"os"
)

var (
	update = flag.Bool("update", false, "write the results of a full run into docs/scale.md")
	// full runs take minutes, and have the sizes of docs/scale.md.
	full = os.Getenv("CREDENCE_SCALE") == "full"
)
