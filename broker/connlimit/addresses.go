package connlimit

import (
	"net"
	"net/netip"
	"time"
)

// networkBits is the length of the part of an IPv6 address that a machine cannot choose (RFC 4291, section 2.5.4).
const networkBits = 64

// addressOf returns the address that a connection counts for. All connections without an IP address count for one.
func addressOf(addr net.Addr) netip.Addr {
	tcp, ok := addr.(*net.TCPAddr)
	if !ok {
		return netip.Addr{}
	}
	return tcp.AddrPort().Addr().Unmap().WithZone("")
}

// networkOf returns the network that shares connections with others: an IPv4 address, or the network of an IPv6 address.
func networkOf(address netip.Addr) netip.Prefix {
	bits := address.BitLen()
	if address.Is6() {
		bits = networkBits
	}
	network, _ := address.Prefix(bits)
	return network
}

// addresses has connections by address. Networks share in the way of a pool, and then the addresses in each network. The zero
// value is empty. Limiter.mu guards it.
type addresses struct {
	networks pool[netip.Prefix] // counts only
	within   map[netip.Prefix]*pool[netip.Addr]
}

func (s *addresses) total() int { return s.networks.total }

func (s *addresses) add(c *Conn, at stage) {
	network := networkOf(c.address)
	s.networks.grow(network)
	if s.within[network] == nil {
		if s.within == nil {
			s.within = make(map[netip.Prefix]*pool[netip.Addr])
		}
		s.within[network] = new(pool[netip.Addr])
	}
	s.within[network].add(c.address, c, at)
}

func (s *addresses) remove(c *Conn) {
	network := networkOf(c.address)
	s.networks.shrink(network)
	s.within[network].remove(c.address, c)
	if s.within[network].total == 0 {
		delete(s.within, network)
	}
}

func (s *addresses) move(c *Conn, to stage) { s.within[networkOf(c.address)].move(c.address, c, to) }

// victim is [pool.victim]. If the largest network is not that of c, its largest address gives way that can. Otherwise a
// machine with a network of its own would keep all of its connections if the server always responded to one address of it.
func (s *addresses) victim(c *Conn, now time.Time, equal bool) *Conn {
	own := networkOf(c.address)
	largest := s.networks.largestFor(own)
	inside := s.within[largest.key]
	if largest.key == own {
		return inside.victim(c.address, now, equal)
	}
	return inside.anyVictim(largest.count <= s.networks.count(own)+1, now, equal)
}

// newest returns the newest connection of the largest address in the largest network.
func (s *addresses) newest() *Conn { return s.within[s.networks.largest().key].newest() }

// least returns the oldest connection of the network with the fewest connections elsewhere, and in it of the address with
// the fewest.
func (s *addresses) least(elsewhere *addresses) *Conn {
	network := s.networks.least(elsewhere.networks.count).key
	there := elsewhere.within[network]
	if there == nil {
		there = new(pool[netip.Addr])
	}
	return s.within[network].least(there.count).oldest()
}

// all returns the connections that match.
func (s *addresses) all(match func(*Conn) bool) (found []*Conn) {
	for _, inside := range s.within {
		found = append(found, inside.all(match)...)
	}
	return found
}
