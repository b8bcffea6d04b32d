package placement_test

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/credence-iam/credence/broker/placement"
)

// Brokers and sidecars compute the same owners of a key. A broker that leaves moves only its own keys.
func Example() {
	const key = "the routing key of a pod"
	brokers := []netip.Addr{
		netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("10.0.0.2"),
		netip.MustParseAddr("10.0.0.3"), netip.MustParseAddr("10.0.0.4"),
	}
	owners := placement.Rank(key, brokers)[:placement.Owners]
	fmt.Println("owners:", owners)

	remaining := slices.DeleteFunc(brokers, func(a netip.Addr) bool { return a == owners[0] })
	fmt.Println("after the first owner has left:", placement.Rank(key, remaining)[:placement.Owners])
	// Output:
	// owners: [10.0.0.4 10.0.0.1]
	// after the first owner has left: [10.0.0.1 10.0.0.2]
}
