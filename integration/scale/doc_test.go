// Package scale simulates fleets of brokers through hours and accidents in virtual time, and counts their STS calls and
// the results of pods' calls. Cache, placement, prefetching, policy and the RPC are the product's. Kubernetes, the sidecars
// and, in the large runs, STS are doubles that are simpler than the real ones: STS always takes the same time, brokers know
// a pod at once, and the pods of a lost node end at once.
//
// It guarantees that the figures of docs/scale.md come from a run of it. It says nothing about CPU, memory or the network:
// a response that needs no STS call takes no time here. Random numbers have no seed, so a run cannot be repeated, and a
// check that fails once in a hundred runs is wrong.
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
