package placement

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"testing/synctest"
	"time"
)

// fleet is a number of brokers, each of which is told the same of them.
type fleet struct {
	t      *testing.T
	all    map[netip.Addr]*Placement
	states map[netip.Addr]state
	keys   []string
}

type state int

const (
	starting state = iota
	ready
	ending
)

func newFleet(t *testing.T) *fleet {
	return &fleet{t: t, all: map[netip.Addr]*Placement{}, states: map[netip.Addr]state{}, keys: keys(rand.New(rand.NewPCG(3, 3)), 2000)}
}

func addr(n int) netip.Addr { return netip.AddrFrom4([4]byte{10, 0, 0, byte(n)}) }

// set changes the state of a broker, starting it if need be.
func (f *fleet) set(n int, s state) {
	f.t.Helper()
	a := addr(n)
	if f.all[a] == nil {
		p := New(DefaultSettleTime)
		f.all[a] = p
		ctx, cancel := context.WithCancel(f.t.Context())
		ended := make(chan struct{})
		go func() { defer close(ended); _ = p.Run(ctx) }()
		f.t.Cleanup(func() { cancel(); <-ended })
	}
	f.states[a] = s
	f.tell()
}

func (f *fleet) gone(n int) {
	delete(f.all, addr(n))
	delete(f.states, addr(n))
	f.tell()
}

func (f *fleet) tell() {
	for self, p := range f.all {
		m := Members{Self: self, Ending: f.states[self] == ending}
		for a, s := range f.states {
			switch s {
			case ready:
				m.Ready = append(m.Ready, a)
			case starting:
				m.Starting = append(m.Starting, a)
			case ending:
			}
		}
		p.Update(m)
	}
	synctest.Wait()
}

// share is the part of the keys that a broker owns.
func (f *fleet) share(n int) float64 { return float64(len(f.owned(n))) / float64(len(f.keys)) }

func (f *fleet) owned(n int) (owned []string) {
	for _, key := range f.keys {
		if f.all[addr(n)].Owns(key) {
			owned = append(owned, key)
		}
	}
	return owned
}

func (f *fleet) wantShare(n int, want float64) {
	f.t.Helper()
	if got := f.share(n); got < want-0.04 || got > want+0.04 {
		f.t.Errorf("broker %d owns %.2f of the keys, want %.2f", n, got, want)
	}
}

// asked are the ready brokers, in whose order sidecars ask for the key.
func (f *fleet) asked(key string) []netip.Addr {
	var all []netip.Addr
	for a, s := range f.states {
		if s == ready {
			all = append(all, a)
		}
	}
	return Rank(key, all)
}

// wantFirstWarm checks that whoever is asked first has the session.
func (f *fleet) wantFirstWarm() {
	f.t.Helper()
	for _, key := range f.keys {
		if first := f.asked(key)[0]; !f.all[first].Owns(key) {
			f.t.Fatalf("%s is asked first for %s, and does not own it", first, key)
		}
	}
}

// wantTwoOwners checks that exactly the first two have the session.
func (f *fleet) wantTwoOwners() {
	f.t.Helper()
	for _, key := range f.keys {
		want := f.asked(key)[:Owners]
		for a, p := range f.all {
			if owns := p.Owns(key); owns != slices.Contains(want, a) {
				f.t.Fatalf("%s is for %v; %s says that it owns it: %v", key, want, a, owns)
			}
		}
	}
}

func TestNothingIsOwnedBeforeItIsKnown(t *testing.T) {
	p := New(DefaultSettleTime)
	if p.Known() || p.Owns("k") || p.Brokers() != 0 {
		t.Errorf("a new one: known %v, owns %v, of %d", p.Known(), p.Owns("k"), p.Brokers())
	}
	var told []bool
	p.OnChange(func() { told = append(told, p.Known()) })
	p.Update(Members{Self: addr(1), Ready: []netip.Addr{addr(1)}})
	if !p.Known() || !p.Owns("k") || p.Brokers() != 1 {
		t.Errorf("the only one: known %v, owns %v, of %d", p.Known(), p.Owns("k"), p.Brokers())
	}
	// Whoever waits for it to be known finds done what was to be done then.
	if !slices.Equal(told, []bool{false}) {
		t.Errorf("told %v", told)
	}
	p.Update(Members{Self: addr(1), Ready: []netip.Addr{netip.MustParseAddr("::ffff:10.0.0.1"), addr(1)}})
	if len(told) != 1 {
		t.Errorf("told %d times of nothing", len(told))
	}
}

func TestFleetStarts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFleet(t)
		for n := 1; n <= 3; n++ {
			f.set(n, starting)
		}
		for n := 1; n <= 3; n++ {
			f.wantShare(n, 1./3)
			f.set(n, ready)
			if got := f.all[addr(n)].Brokers(); got != 3 {
				t.Errorf("broker %d shares with %d", n, got)
			}
		}
		f.wantFirstWarm()
		time.Sleep(DefaultSettleTime - time.Second)
		f.wantShare(1, 1./3)
		time.Sleep(time.Second)
		synctest.Wait()
		f.wantTwoOwners()
	})
}

// A rolling update is many changes; each session is to be fetched by those two alone who have it at the end.
func TestRollingUpdate(t *testing.T) {
	for _, n := range []int{2, 3, 10} {
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFleet(t)
				for i := 1; i <= n; i++ {
					f.set(i, ready)
				}
				time.Sleep(DefaultSettleTime)
				synctest.Wait()
				f.wantTwoOwners()
				before := map[int][]string{}
				for i := 1; i <= n; i++ {
					before[i] = f.owned(i)
				}
				had := map[netip.Addr]map[string]bool{}
				fetched := 0
				look := func() {
					for a, p := range f.all {
						if had[a] == nil {
							had[a] = map[string]bool{}
						}
						for _, key := range f.keys {
							if !had[a][key] && p.Owns(key) {
								had[a][key] = true
								fetched++
							}
						}
					}
				}
				look()
				fetched = 0
				for i := 1; i <= n; i++ {
					f.set(100+i, starting)
					look()
					time.Sleep(10 * time.Second)
					f.set(100+i, ready)
					look()
					f.wantFirstWarm()
					time.Sleep(2 * time.Second)
					f.set(i, ending)
					if kept := f.owned(i); i == 1 && !slices.Equal(kept, before[i]) {
						t.Errorf("a broker that ends let go of sessions, or took some up: it owned %d and owns %d", len(before[i]), len(kept))
					}
					look()
					f.wantFirstWarm()
					time.Sleep(25 * time.Second)
					f.gone(i)
				}
				time.Sleep(DefaultSettleTime)
				synctest.Wait()
				look()
				f.wantTwoOwners()
				perKey := float64(fetched) / float64(len(f.keys))
				t.Logf("%.2f fetches per session", perKey)
				if perKey > 2.4 { // see DefaultSettleTime
					t.Errorf("a rolling update of %d brokers fetches each session %.2f times", n, perKey)
				}
			})
		})
	}
}

func TestLossAndGrowth(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFleet(t)
		for i := 1; i <= 3; i++ {
			f.set(i, ready)
		}
		time.Sleep(DefaultSettleTime)
		synctest.Wait()
		f.gone(2)
		f.wantFirstWarm() // the second owner is the first now
		time.Sleep(DefaultSettleTime)
		synctest.Wait()
		f.wantTwoOwners()
		for i := 4; i <= 11; i++ {
			f.set(i, starting)
		}
		f.wantShare(4, 1./10)
		f.wantShare(1, 1) // nobody asks the others yet
		for i := 4; i <= 11; i++ {
			f.set(i, ready)
			f.wantFirstWarm()
		}
		f.wantShare(1, 1)
		time.Sleep(DefaultSettleTime)
		synctest.Wait()
		f.wantTwoOwners()
	})
}
