// Package placement says which brokers have a session warm. Every broker and every sidecar finds the same
// answer by itself: from a key, and from the addresses of the brokers.
//
// It promises that
//   - each broker owns its part of the keys, as even as chance makes it;
//   - a broker that comes or goes moves the keys that it owns, and no other;
//   - nothing depends on the order in which addresses are listed.
//
// It is no more than advice: any broker answers for any key.
package placement

import (
	"cmp"
	"net/netip"
	"slices"
)

// Owners is how many brokers have each session warm: the one that is asked, and one for the time when that one is gone.
const Owners = 2

// Rank returns the addresses in the order in which they should be asked for key; the first [Owners] own it.
//
// It is rendezvous hashing (Thaler and Ravishankar, 1998): each address has a score for each key, and the highest wins.
func Rank(key string, addresses []netip.Addr) []netip.Addr {
	type scored struct {
		addr  netip.Addr
		score uint64
	}
	prefix := hash(offset, []byte(key))
	all := make([]scored, 0, len(addresses))
	for _, a := range addresses {
		all = append(all, scored{a, score(prefix, a)})
	}
	slices.SortFunc(all, func(a, b scored) int {
		return cmp.Or(cmp.Compare(b.score, a.score), a.addr.Compare(b.addr))
	})
	ranked := make([]netip.Addr, len(all))
	for i, s := range all {
		ranked[i] = s.addr
	}
	return ranked
}

// above counts how many of the addresses stand before self for key.
func above(key string, self netip.Addr, addresses []netip.Addr) (n int) {
	prefix := hash(offset, []byte(key))
	own := score(prefix, self)
	for _, a := range addresses {
		if s := score(prefix, a); s > own || s == own && a.Less(self) {
			n++
		}
	}
	return n
}

// score is FNV-1a of key and address, finished as MurmurHash3 does: addresses of brokers differ in their last bits,
// and FNV-1a alone does not carry those into the first bits of the result.
func score(prefix uint64, a netip.Addr) uint64 {
	bytes := a.Unmap().As16()
	h := hash(prefix, bytes[:])
	h ^= h >> 33
	h *= 0xff51afd7ed558ccd
	h ^= h >> 33
	h *= 0xc4ceb9fe1a85ec53
	return h ^ h>>33
}

// offset and prime are those of FNV-1a with 64 bits.
const (
	offset = 0xcbf29ce484222325
	prime  = 0x100000001b3
)

func hash(h uint64, data []byte) uint64 {
	for _, b := range data {
		h = (h ^ uint64(b)) * prime
	}
	return h
}
