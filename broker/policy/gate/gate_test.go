package gate

import (
	"context"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
)

// callers enter a gate, and stay in it until leave ends their turn.
type callers struct {
	t    *testing.T
	gate *Gate
	mu   sync.Mutex
	came []string                 // callers in the order of their turns; guarded by mu
	stay map[string]chan struct{} // :: caller → closed to end its turn; guarded by mu
}

// enter starts a caller TENANT/NAME, and returns when it waits or has its turn.
func (c *callers) enter(ctx context.Context, caller string) {
	tenant, _, _ := strings.Cut(caller, "/")
	go func() {
		if !c.gate.Enter(ctx.Done(), tenant) {
			return
		}
		stay := make(chan struct{})
		c.mu.Lock()
		c.came, c.stay[caller] = append(c.came, caller), stay
		c.mu.Unlock()
		<-stay
		c.gate.Leave(tenant)
	}()
	synctest.Wait()
}

// leave ends the turn of a caller, and returns when all others wait or have their turn.
func (c *callers) leave(caller string) {
	c.mu.Lock()
	stay := c.stay[caller]
	delete(c.stay, caller)
	c.mu.Unlock()
	if stay == nil {
		c.t.Fatalf("%s does not have its turn: %v came", caller, c.came)
	}
	close(stay)
	synctest.Wait()
}

// want checks which callers had their turn, and that the gate holds nothing when none is left.
func (c *callers) want(came ...string) {
	c.t.Helper()
	c.mu.Lock()
	defer c.mu.Unlock()
	if !slices.Equal(c.came, came) {
		c.t.Errorf("turns were %v, want %v", c.came, came)
	}
	c.gate.mu.Lock()
	defer c.gate.mu.Unlock()
	if n := len(c.stay); c.gate.running != n || n == 0 && (len(c.gate.queues) != 0 || len(c.gate.ready) != 0) {
		c.t.Errorf("the gate counts %d running, want %d, and has %d queues, %d of them ready", c.gate.running, n, len(c.gate.queues), len(c.gate.ready))
	}
}

func withCallers(t *testing.T, limit int, f func(*callers)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		f(&callers{t: t, gate: &Gate{limit: limit}, stay: map[string]chan struct{}{}})
	})
}

// A tenant with many callers and tenants with few get one turn each.
func TestTenantsTakeTurns(t *testing.T) {
	withCallers(t, 1, func(c *callers) {
		for i := range 32 {
			c.enter(c.t.Context(), fmt.Sprintf("hog/%d", i))
		}
		c.enter(c.t.Context(), "shop/a")
		c.enter(c.t.Context(), "shop/b")
		c.enter(c.t.Context(), "team/a")
		order := []string{"hog/0", "shop/a", "team/a", "hog/1", "shop/b", "hog/2", "hog/3", "hog/4"}
		for i, caller := range order {
			c.want(order[:i+1]...)
			c.leave(caller)
		}
		for i := 5; i < 32; i++ {
			c.leave(fmt.Sprintf("hog/%d", i))
		}
		c.want(c.came...)
	})
}

// A tenant runs one computation at a time, however many the gate admits; other tenants use the rest.
func TestOneComputationPerTenant(t *testing.T) {
	withCallers(t, 2, func(c *callers) {
		c.enter(c.t.Context(), "hog/0")
		c.enter(c.t.Context(), "hog/1")
		c.want("hog/0")
		c.enter(c.t.Context(), "shop/a")
		c.want("hog/0", "shop/a")
		c.enter(c.t.Context(), "team/a")
		c.want("hog/0", "shop/a")
		c.leave("hog/0")
		c.want("hog/0", "shop/a", "team/a")
		c.leave("shop/a")
		c.want("hog/0", "shop/a", "team/a", "hog/1")
		c.leave("hog/1")
		c.leave("team/a")
		c.want("hog/0", "shop/a", "team/a", "hog/1")
	})
}

// A caller stops waiting when its context ends, and takes no turn, whether its tenant has other callers or not.
func TestCallersThatGiveUp(t *testing.T) {
	withCallers(t, 1, func(c *callers) {
		ctx, end := context.WithCancel(c.t.Context())
		c.enter(c.t.Context(), "team/a")
		c.enter(ctx, "hog/0")
		c.enter(ctx, "shop/a")
		c.enter(c.t.Context(), "shop/b")
		c.enter(c.t.Context(), "team/b")
		end()
		synctest.Wait()
		c.enter(c.t.Context(), "hog/1") // has the place in the order that its tenant had
		c.leave("team/a")
		c.leave("hog/1")
		c.leave("shop/b")
		c.leave("team/b")
		c.want("team/a", "hog/1", "shop/b", "team/b")

		c.enter(c.t.Context(), "team/a")
		ctx, end = context.WithCancel(c.t.Context())
		c.enter(ctx, "hog/0")
		end()
		synctest.Wait()
		c.leave("team/a")
		c.want("team/a", "hog/1", "shop/b", "team/b", "team/a")
	})
	ended, end := context.WithCancel(t.Context())
	end()
	g := &Gate{limit: 1, running: 1}
	if g.Enter(ended.Done(), "shop") {
		t.Error("a caller whose context had ended got a turn")
	}
}

// Under contention, the gate never exceeds its limit or one computation of a tenant, and ends empty.
func TestContention(t *testing.T) {
	g := &Gate{limit: 3}
	var running atomic.Int64
	var each [8]atomic.Int64
	var wg sync.WaitGroup
	for i := range 64 {
		wg.Go(func() {
			tenant := fmt.Sprint(i % len(each))
			for j := range 50 {
				ctx, cancel := context.WithCancel(t.Context())
				if j%3 == 0 {
					go cancel()
				}
				if g.Enter(ctx.Done(), tenant) {
					if n := running.Add(1); n > 3 {
						t.Errorf("%d computations run, the limit is 3", n)
					}
					if n := each[i%len(each)].Add(1); n > 1 {
						t.Errorf("%d computations of one tenant run", n)
					}
					each[i%len(each)].Add(-1)
					running.Add(-1)
					g.Leave(tenant)
				}
				cancel()
			}
		})
	}
	wg.Wait()
	if g.running != 0 || len(g.queues) != 0 || len(g.ready) != 0 {
		t.Errorf("at the end the gate counts %d running, and has %d queues, %d of them ready", g.running, len(g.queues), len(g.ready))
	}
}

// Computations take half of the processors, at least one.
func TestHalfOfTheProcessors(t *testing.T) {
	before := runtime.GOMAXPROCS(0)
	defer runtime.GOMAXPROCS(before)
	done := make(chan struct{})
	close(done) // Enter gives up unless the turn comes immediately
	for processors, want := range map[int]int{1: 1, 2: 1, 3: 1, 4: 2, 7: 3, 8: 4} {
		runtime.GOMAXPROCS(processors)
		g, n := &Gate{}, 0
		for i := range 10 {
			if g.Enter(done, fmt.Sprint(i)) {
				n++
			}
		}
		if n != want {
			t.Errorf("%d computations run on %d processors, want %d", n, processors, want)
		}
	}
}
