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
	had    map[netip.Addr]map[string]bool // :: broker → keys that it has owned at some time
}

type state int

const (
	starting state = iota
	ready
	ending
)

func newFleet(t *testing.T) *fleet {
	return &fleet{t: t, all: map[netip.Addr]*Placement{}, states: map[netip.Addr]state{}, had: map[netip.Addr]map[string]bool{}, keys: keys(rand.New(rand.NewPCG(3, 3)), 1000)}
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

// look notes who owns what, and returns how many have come to be owned since the last look.
func (f *fleet) look() (fetched int) {
	for a, p := range f.all {
		if f.had[a] == nil {
			f.had[a] = map[string]bool{}
		}
		for _, key := range f.keys {
			if !f.had[a][key] && p.Owns(key) {
				f.had[a][key] = true
				fetched++
			}
		}
	}
	return fetched
}

// wantFirstWarm checks how much of what brokers are asked first for after change they have not owned before, at most.
func (f *fleet) wantFirstWarm(cold float64, change func()) {
	f.t.Helper()
	f.look()
	change()
	found := 0
	for _, key := range f.keys {
		if first := f.asked(key)[0]; !f.had[first][key] {
			found++
		}
	}
	if part := float64(found) / float64(len(f.keys)); part > cold {
		f.t.Errorf("who is asked first has never had %.3f of the sessions, want %.3f at most", part, cold)
	}
}

// wantTwoOwners checks that exactly the first two have the session.
func (f *fleet) wantTwoOwners() {
	f.t.Helper()
	for _, key := range f.keys {
		want := f.asked(key)
		want = want[:min(Owners, len(want))]
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
		f.wantShare(3, 2./3)
		for n := 1; n <= 3; n++ {
			f.set(n, ready)
			if got := f.all[addr(n)].Brokers(); got != 3 {
				t.Errorf("broker %d shares with %d", n, got)
			}
		}
		time.Sleep(DefaultSettleTime)
		synctest.Wait()
		f.wantTwoOwners()
	})
	synctest.Test(t, func(t *testing.T) {
		f := newFleet(t)
		for n := 1; n <= 5; n++ {
			f.set(n, starting)
		}
		for n := 1; n <= 5; n++ {
			f.wantShare(n, 1./5)
			f.set(n, ready)
		}
		time.Sleep(DefaultSettleTime - time.Second)
		f.wantShare(5, 1./5)
		time.Sleep(time.Second)
		synctest.Wait()
		f.wantTwoOwners()
	})
}

// An address may be another pod's a moment later, and then it does not end.
func TestEndingEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFleet(t)
		for n := 1; n <= 4; n++ {
			f.set(n, ready)
		}
		f.set(1, ending)
		f.set(1, ready)
		time.Sleep(DefaultSettleTime)
		synctest.Wait()
		f.wantTwoOwners()
	})
}

// A rolling update is many changes; each session is to be fetched by those two alone who have it at the end.
func TestRollingUpdate(t *testing.T) {
	// What is first for the first time once a broker goes has that one's last seconds to be fetched in.
	for n, cold := range map[int]float64{1: 0, 2: 0, 3: 0.26, 10: 0.1} {
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
				f.look()
				fetched := 0
				for i := 1; i <= n; i++ {
					f.set(100+i, starting)
					fetched += f.look()
					time.Sleep(10 * time.Second)
					f.wantFirstWarm(0, func() { f.set(100+i, ready) })
					fetched += f.look()
					time.Sleep(2 * time.Second)
					f.wantFirstWarm(cold, func() { f.set(i, ending) })
					if kept := f.owned(i); i == 1 && !slices.Equal(kept, before[i]) {
						t.Errorf("a broker that ends let go of sessions, or took some up: it owned %d and owns %d", len(before[i]), len(kept))
					}
					fetched += f.look()
					time.Sleep(25 * time.Second)
					f.gone(i)
				}
				time.Sleep(DefaultSettleTime)
				synctest.Wait()
				fetched += f.look()
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
		f.wantFirstWarm(0, func() { f.gone(2) }) // the second owner is the first now
		time.Sleep(DefaultSettleTime)
		synctest.Wait()
		f.wantTwoOwners()
		for i := 4; i <= 11; i++ {
			f.set(i, starting)
		}
		f.wantShare(4, 1./10)
		f.wantShare(1, 1) // nobody asks the others yet
		for i := 4; i <= 11; i++ {
			// Those that are ready before the others are asked for what will be theirs; they fetch it when they are.
			f.wantFirstWarm(0.3, func() { f.set(i, ready) })
		}
		f.wantFirstWarm(0, func() {})
		f.wantShare(1, 1)
		time.Sleep(DefaultSettleTime)
		synctest.Wait()
		f.wantTwoOwners()
	})
}

// A broker that shuts down keeps its sessions and takes up none: neither those that it waited for, nor those that it would
// own after the loss of other brokers. Each would be a call of STS for the broker's last seconds.
func TestEndingTakesUpNothing(t *testing.T) {
	for name, change := range map[string]func(f *fleet){
		"nothing else changes": func(*fleet) {},
		"another one goes":     func(f *fleet) { f.gone(3) },
		"all others go":        func(f *fleet) { f.gone(3); f.gone(4); f.gone(5) },
		"others come":          func(f *fleet) { f.set(6, starting); f.set(6, ready) },
		"another one ends too": func(f *fleet) { f.set(3, ending) },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFleet(t)
				for i := 1; i <= 5; i++ {
					f.set(i, ready)
				}
				time.Sleep(DefaultSettleTime)
				synctest.Wait()
				f.wantTwoOwners()
				f.gone(2) // What that one had waits to be taken up.
				before := f.owned(1)
				f.set(1, ending)
				told := 0
				f.all[addr(1)].OnChange(func() { told++ })
				change(f)
				for range 3 {
					time.Sleep(DefaultSettleTime)
					synctest.Wait()
					if owned := f.owned(1); !slices.Equal(owned, before) {
						t.Fatalf("a broker that ends owned %d sessions and owns %d", len(before), len(owned))
					}
				}
				if told != 0 {
					t.Errorf("it had all pods looked at %d times", told)
				}
			})
		})
	}
}
