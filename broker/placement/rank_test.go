package placement

import (
	"fmt"
	"math"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
)

// brokers returns n pod addresses as a cluster assigns them.
func brokers(random *rand.Rand, n int) []netip.Addr {
	var all []netip.Addr
	for len(all) < n {
		a := netip.AddrFrom4([4]byte{10, 244, byte(random.IntN(20)), byte(2 + random.IntN(250))})
		if !slices.Contains(all, a) {
			all = append(all, a)
		}
	}
	return all
}

func keys(random *rand.Rand, n int) []string {
	all := make([]string, n)
	for i := range all {
		all[i] = fmt.Sprintf("%016x%016x", random.Uint64(), random.Uint64())
	}
	return all
}

// Brokers own equal shares, up to chance. The random source is seeded: the share of one of 20 brokers has a standard
// deviation of 3 %, so one in 800 is off by a tenth.
func TestBalance(t *testing.T) {
	const grants = 10_000
	for n := 3; n <= 20; n++ {
		random := rand.New(rand.NewPCG(uint64(n), 1))
		addresses := brokers(random, n)
		owned := make(map[netip.Addr]int)
		for _, key := range keys(random, grants) {
			for _, owner := range Rank(key, addresses)[:Owners] {
				owned[owner]++
			}
		}
		fair := float64(Owners*grants) / float64(n)
		for _, a := range addresses {
			if off := float64(owned[a])/fair - 1; math.Abs(off) > 0.1 {
				t.Errorf("of %d brokers %s owns %d keys, %+.1f %% off its equal share of %.0f", n, a, owned[a], 100*off, fair)
			}
		}
	}
}

// A broker that joins or leaves moves only its own keys. The order of the others does not change.
func TestChangesMoveOnlyOwnKeys(t *testing.T) {
	random := rand.New(rand.NewPCG(7, 7))
	for n := 1; n <= 20; n++ {
		addresses := brokers(random, n)
		gone := addresses[random.IntN(n)]
		rest := slices.DeleteFunc(slices.Clone(addresses), func(a netip.Addr) bool { return a == gone })
		for _, key := range keys(random, 200) {
			before := Rank(key, addresses)
			after := Rank(key, rest)
			before = slices.DeleteFunc(before, func(a netip.Addr) bool { return a == gone })
			if !slices.Equal(before, after) {
				t.Fatalf("without %s, key %s has ranks %v, want %v", gone, key, after, before)
			}
		}
	}
}

func TestOrderOfAddressesDoesNotMatter(t *testing.T) {
	random := rand.New(rand.NewPCG(8, 8))
	addresses := brokers(random, 9)
	for _, key := range keys(random, 100) {
		want := Rank(key, addresses)
		random.Shuffle(len(addresses), func(i, j int) { addresses[i], addresses[j] = addresses[j], addresses[i] })
		if got := Rank(key, addresses); !slices.Equal(got, want) {
			t.Errorf("Rank(%s) = %v, want %v in any order of the addresses", key, got, want)
		}
		for i, a := range want {
			if n := rankOf(key, a, addresses); n != i {
				t.Errorf("rankOf = %d, want %d", n, i)
			}
		}
	}
}

// Sidecars and brokers of different versions must compute the same ranks, for both forms of an address.
func TestRankIsTheSameInEveryVersion(t *testing.T) {
	var addresses []netip.Addr
	for _, text := range []string{"10.0.0.1", "10.0.0.2", "10.0.0.3", "fd00::1", "fd00::2"} {
		addresses = append(addresses, netip.MustParseAddr(text))
	}
	for key, want := range map[string]string{
		"":                                 "[fd00::2 10.0.0.2 10.0.0.1 10.0.0.3 fd00::1]",
		"00112233445566778899aabbccddeeff": "[fd00::1 10.0.0.3 fd00::2 10.0.0.2 10.0.0.1]",
	} {
		if got := fmt.Sprint(Rank(key, addresses)); got != want {
			t.Errorf("Rank(%q) = %s, want %s", key, got, want)
		}
	}
	mapped := netip.MustParseAddr("::ffff:10.0.0.1")
	if score(1, mapped) != score(1, addresses[0]) {
		t.Errorf("%s and %s have different scores", mapped, addresses[0])
	}
}
