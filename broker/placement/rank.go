// Package placement decides which brokers keep a session warm. Brokers and sidecars compute the same result from a key
// and the brokers' addresses.
//
// It guarantees: brokers own equal shares, up to chance; a joining or leaving broker moves only its own keys; the order
// of addresses does not matter. It only advises: any broker serves any key.
package placement

import (
	"cmp"
	"net/netip"
	"slices"
)

// Owners is how many brokers keep each session warm: the first owner, which sidecars call, and the second owner, in case
// the first is lost.
const Owners = 2

// Rank returns the addresses in the order in which to call the brokers for key. The first [Owners] own it.
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

// rankOf returns how many of the addresses rank before self for key.
func rankOf(key string, self netip.Addr, addresses []netip.Addr) (n int) {
	prefix := hash(offset, []byte(key))
	own := score(prefix, self)
	for _, a := range addresses {
		if s := score(prefix, a); s > own || s == own && a.Less(self) {
			n++
		}
	}
	return n
}

// score is FNV-1a of key and address with the finalizer of MurmurHash3: brokers' addresses differ in their last bits, and
// FNV-1a alone does not carry these into the first bits of the result.
func score(prefix uint64, a netip.Addr) uint64 {
	bytes := a.Unmap().As16()
	h := hash(prefix, bytes[:])
	h ^= h >> 33
	h *= 0xff51afd7ed558ccd
	h ^= h >> 33
	h *= 0xc4ceb9fe1a85ec53
	return h ^ h>>33
}

// offset and prime are the constants of 64-bit FNV-1a.
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
