//go:build unix

package cluster

import (
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
)

// family has the addresses of one IP family. Those of a cluster with nodes are in its own networks.
type family struct {
	name corev1.IPFamily
	// unused is the address in the kubernetes Service of a cluster without nodes. The API server refuses a loopback address,
	// and no other address of this machine is certain to exist. An RFC reserves it, and without pods nothing calls it.
	unused   netip.Addr
	services netip.Prefix
	nodes    netip.Prefix // also of the control plane
	pods     netip.Prefix
	podBits  int    // of a node's part of pods; its last byte is the node's number
	all      string // all addresses
}

var families = []family{
	{
		name: corev1.IPv4Protocol, unused: netip.MustParseAddr("192.0.2.1"), // RFC 5737
		services: netip.MustParsePrefix("10.96.0.0/16"), nodes: netip.MustParsePrefix("10.99.0.0/24"),
		pods: netip.MustParsePrefix("10.244.0.0/16"), podBits: 24, all: "0.0.0.0/0",
	},
	{
		name: corev1.IPv6Protocol, unused: netip.MustParseAddr("2001:db8::1"), // RFC 3849
		services: netip.MustParsePrefix("fd00:96::/112"), nodes: netip.MustParsePrefix("fd00:99::/64"),
		pods: netip.MustParsePrefix("fd00:244::/48"), podBits: 64, all: "::/0",
	},
}

// familiesOf returns the families with these names. Without a name, it returns that of IPv4.
func familiesOf(names []corev1.IPFamily) ([]family, error) {
	if len(names) == 0 {
		return families[:1], nil
	}
	var all []family
	for i, name := range names {
		at := slices.IndexFunc(families, func(f family) bool { return f.name == name })
		if at < 0 || slices.Contains(names[:i], name) {
			return nil, fmt.Errorf("the IP families %v are not IPv4, IPv6 or both", names)
		}
		all = append(all, families[at])
	}
	return all, nil
}

// kubernetes is the address of the kubernetes Service: the first, by Kubernetes' rule.
func (f family) kubernetes() netip.Addr { return nth(f.services, 1) }

// dns is the address of the Service of DNS, as in most clusters.
func (f family) dns() netip.Addr { return nth(f.services, 10) }

// hub is the control plane's address.
func (f family) hub() netip.Addr { return nth(f.nodes, 1) }

// node is the address of a node.
func (f family) node(number byte) netip.Addr { return nth(f.nodes, 10+number) }

// podsOf has the addresses of a node's pods.
func (f family) podsOf(number byte) netip.Prefix {
	bytes := f.pods.Addr().AsSlice()
	bytes[f.podBits/8-1] = number
	addr, _ := netip.AddrFromSlice(bytes)
	return netip.PrefixFrom(addr, f.podBits)
}

// on returns addr with the length of the network that it is in, as a network device needs it.
func on(network netip.Prefix, addr netip.Addr) netip.Prefix {
	return netip.PrefixFrom(addr, network.Bits())
}

// nth returns the address of a network with this last byte.
func nth(network netip.Prefix, last byte) netip.Addr {
	bytes := network.Addr().AsSlice()
	bytes[len(bytes)-1] = last
	addr, _ := netip.AddrFromSlice(bytes)
	return addr
}

// list joins a value of each family with commas, as flags of Kubernetes expect it.
func list[T fmt.Stringer](all []family, value func(family) T) string {
	var texts []string
	for _, f := range all {
		texts = append(texts, value(f).String())
	}
	return strings.Join(texts, ",")
}

func (f family) serviceRange() netip.Prefix { return f.services }
func (f family) podRange() netip.Prefix     { return f.pods }

// ips returns addresses for a certificate: the given one, and a value of each family.
func ips(first string, all []family, value func(family) netip.Addr) []net.IP {
	found := []net.IP{net.ParseIP(first)}
	for _, f := range all {
		found = append(found, value(f).AsSlice())
	}
	return found
}
