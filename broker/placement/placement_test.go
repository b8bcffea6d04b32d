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

// fleet is a number of brokers that all see the same members.
type fleet struct {
	t      *testing.T
	all    map[netip.Addr]*Placement
	states map[netip.Addr]state
	keys   []string
	had    map[netip.Addr]map[string]bool // :: broker → keys that it owned at some time
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

// set changes the state of a broker, and starts it if necessary.
func (f *fleet) set(n int, s state) {
	f.t.Helper()
	a := addr(n)
	if f.all[a] == nil {
		p := New(DefaultSettleTime)
		f.all[a] = p
		ctx, cancel := context.WithCancel(f.t.Context())
		done := make(chan struct{})
		go func() { defer close(done); _ = p.Run(ctx) }()
		f.t.Cleanup(func() { cancel(); <-done })
	}
	f.states[a] = s
	f.update()
}

func (f *fleet) gone(n int) {
	delete(f.all, addr(n))
	delete(f.states, addr(n))
	f.update()
}

func (f *fleet) update() {
	for self, p := range f.all {
		m := Members{Self: self, ShuttingDown: f.states[self] == ending}
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

// share returns the fraction of the keys that a broker owns.
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

// ranked returns the ready brokers in the order in which sidecars call them for key.
func (f *fleet) ranked(key string) []netip.Addr {
	var all []netip.Addr
	for a, s := range f.states {
		if s == ready {
			all = append(all, a)
		}
	}
	return Rank(key, all)
}

// fetches counts the keys that brokers own for the first time since the last call, and so must fetch.
func (f *fleet) fetches() (n int) {
	for a, p := range f.all {
		if f.had[a] == nil {
			f.had[a] = map[string]bool{}
		}
		for _, key := range f.keys {
			if !f.had[a][key] && p.Owns(key) {
				f.had[a][key] = true
				n++
			}
		}
	}
	return n
}

// wantFirstWarm checks that, after change, at most the fraction cold of the keys has a first owner that never owned it
// before.
func (f *fleet) wantFirstWarm(cold float64, change func()) {
	f.t.Helper()
	f.fetches()
	change()
	n := 0
	for _, key := range f.keys {
		if first := f.ranked(key)[0]; !f.had[first][key] {
			n++
		}
	}
	if part := float64(n) / float64(len(f.keys)); part > cold {
		f.t.Errorf("the first owners never had %.3f of the sessions, want at most %.3f", part, cold)
	}
}

// wantTwoOwners checks that the first and the second broker of each key own it, and no other.
func (f *fleet) wantTwoOwners() {
	f.t.Helper()
	for _, key := range f.keys {
		want := f.ranked(key)
		want = want[:min(Owners, len(want))]
		for a, p := range f.all {
			if owns := p.Owns(key); owns != slices.Contains(want, a) {
				f.t.Fatalf("the owners of %s are %v; Owns of %s returns %v", key, want, a, owns)
			}
		}
	}
}

func TestNothingIsOwnedBeforeUpdate(t *testing.T) {
	p := New(DefaultSettleTime)
	if p.Known() || p.Owns("k") || p.Brokers() != 0 {
		t.Errorf("before Update: known %v, owns %v, %d brokers", p.Known(), p.Owns("k"), p.Brokers())
	}
	var notified []bool // :: call → Known
	p.OnChange(func() { notified = append(notified, p.Known()) })
	p.Update(Members{Self: addr(1), Ready: []netip.Addr{addr(1)}})
	if !p.Known() || !p.Owns("k") || p.Brokers() != 1 {
		t.Errorf("a single broker: known %v, owns %v, %d brokers", p.Known(), p.Owns("k"), p.Brokers())
	}
	// Handlers run before Known returns true.
	if !slices.Equal(notified, []bool{false}) {
		t.Errorf("during the calls of the handler, Known returned %v, want one false", notified)
	}
	p.Update(Members{Self: addr(1), Ready: []netip.Addr{netip.MustParseAddr("::ffff:10.0.0.1"), addr(1)}})
	if len(notified) != 1 {
		t.Errorf("%d calls of the handler without a change", len(notified)-1)
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
				t.Errorf("broker %d sees %d brokers, want 3", n, got)
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

// A new pod may get the address of one that was shutting down.
func TestAddressIsReused(t *testing.T) {
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

// In a rolling update of many changes, few brokers other than the final two owners fetch a session.
func TestRollingUpdate(t *testing.T) {
	// cold is the fraction of keys whose first owner is new when a broker shuts down. It fetches them in that broker's last
	// seconds.
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
				f.fetches()
				fetched := 0
				for i := 1; i <= n; i++ {
					f.set(100+i, starting)
					fetched += f.fetches()
					time.Sleep(10 * time.Second)
					f.wantFirstWarm(0, func() { f.set(100+i, ready) })
					fetched += f.fetches()
					time.Sleep(2 * time.Second)
					f.wantFirstWarm(cold, func() { f.set(i, ending) })
					if owned := f.owned(i); i == 1 && !slices.Equal(owned, before[i]) {
						t.Errorf("a broker that is shutting down owned %d sessions, and owns %d", len(before[i]), len(owned))
					}
					fetched += f.fetches()
					time.Sleep(25 * time.Second)
					f.gone(i)
				}
				time.Sleep(DefaultSettleTime)
				synctest.Wait()
				fetched += f.fetches()
				f.wantTwoOwners()
				perKey := float64(fetched) / float64(len(f.keys))
				t.Logf("%.2f fetches per session", perKey)
				if perKey > 2.4 { // see DefaultSettleTime
					t.Errorf("a rolling update of %d brokers fetches each session %.2f times, want at most 2.4", n, perKey)
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
		f.wantFirstWarm(0, func() { f.gone(2) }) // the second owner becomes the first
		time.Sleep(DefaultSettleTime)
		synctest.Wait()
		f.wantTwoOwners()
		for i := 4; i <= 11; i++ {
			f.set(i, starting)
		}
		f.wantShare(4, 1./10)
		f.wantShare(1, 1) // sidecars do not call the others yet
		for i := 4; i <= 11; i++ {
			// Those that are ready first are called for sessions of the others, which they fetch then.
			f.wantFirstWarm(0.3, func() { f.set(i, ready) })
		}
		f.wantFirstWarm(0, func() {})
		f.wantShare(1, 1)
		time.Sleep(DefaultSettleTime)
		synctest.Wait()
		f.wantTwoOwners()
	})
}

// A broker that shuts down keeps its sessions and fetches no others: neither as second owner, nor after the loss of other
// brokers. Each would be an STS call for the broker's last seconds.
func TestShuttingDownBrokerFetchesNothing(t *testing.T) {
	for name, change := range map[string]func(f *fleet){
		"nothing else changes": func(*fleet) {},
		"another leaves":       func(f *fleet) { f.gone(3) },
		"all others leave":     func(f *fleet) { f.gone(3); f.gone(4); f.gone(5) },
		"others join":          func(f *fleet) { f.set(6, starting); f.set(6, ready) },
		"another shuts down":   func(f *fleet) { f.set(3, ending) },
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
				f.gone(2) // Its sessions get new second owners later.
				before := f.owned(1)
				f.set(1, ending)
				calls := 0
				f.all[addr(1)].OnChange(func() { calls++ })
				change(f)
				for range 3 {
					time.Sleep(DefaultSettleTime)
					synctest.Wait()
					if owned := f.owned(1); !slices.Equal(owned, before) {
						t.Fatalf("a broker that is shutting down owned %d sessions, and owns %d", len(before), len(owned))
					}
				}
				if calls != 0 {
					t.Errorf("%d calls of the handler, each of which looks at all pods", calls)
				}
			})
		})
	}
}
