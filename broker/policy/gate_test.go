package policy

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

// callers enter a gate, and stay in it until they are let go.
type callers struct {
	t    *testing.T
	gate *gate
	mu   sync.Mutex
	came []string                 // in the order of their turns; guarded by mu
	stay map[string]chan struct{} // :: caller → closed to let it go; guarded by mu
}

// enter has a caller NAMESPACE/NAME enter, and returns when it waits or is in.
func (c *callers) enter(ctx context.Context, caller string) {
	namespace, _, _ := strings.Cut(caller, "/")
	go func() {
		if !c.gate.enter(ctx.Done(), namespace) {
			return
		}
		stay := make(chan struct{})
		c.mu.Lock()
		c.came, c.stay[caller] = append(c.came, caller), stay
		c.mu.Unlock()
		<-stay
		c.gate.leave(namespace)
	}()
	synctest.Wait()
}

// leave lets the one that is in go, and returns when all others wait or are in.
func (c *callers) leave(caller string) {
	c.mu.Lock()
	stay := c.stay[caller]
	delete(c.stay, caller)
	c.mu.Unlock()
	if stay == nil {
		c.t.Fatalf("%s is not in: %v came", caller, c.came)
	}
	close(stay)
	synctest.Wait()
}

// want checks who came, and that nobody is remembered at the end.
func (c *callers) want(came ...string) {
	c.t.Helper()
	c.mu.Lock()
	defer c.mu.Unlock()
	if !slices.Equal(c.came, came) {
		c.t.Errorf("came %v, want %v", c.came, came)
	}
	c.gate.mu.Lock()
	defer c.gate.mu.Unlock()
	if n := len(c.stay); c.gate.running != n || n == 0 && (len(c.gate.queues) != 0 || len(c.gate.ready) != 0) {
		c.t.Errorf("the gate has %d running of %d, %d queues, %d ready", c.gate.running, n, len(c.gate.queues), len(c.gate.ready))
	}
}

func withCallers(t *testing.T, limit int, f func(*callers)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		f(&callers{t: t, gate: &gate{limit: limit}, stay: map[string]chan struct{}{}})
	})
}

// Of a namespace with many callers and others with few, each has one turn at a time.
func TestGateServesNamespacesInTurn(t *testing.T) {
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

// However much room there is, a namespace has one evaluation at a time, and others use the rest.
func TestGateRunsOneOfANamespace(t *testing.T) {
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

// A caller whose context ends waits no longer, and takes no turn of others, whether it was the only one or not.
func TestGateCallersThatLeave(t *testing.T) {
	withCallers(t, 1, func(c *callers) {
		ctx, end := context.WithCancel(c.t.Context())
		c.enter(c.t.Context(), "team/a")
		c.enter(ctx, "hog/0")
		c.enter(ctx, "shop/a")
		c.enter(c.t.Context(), "shop/b")
		c.enter(c.t.Context(), "team/b")
		end()
		synctest.Wait()
		c.enter(c.t.Context(), "hog/1") // keeps the place in the order that its namespace had
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
	g := &gate{limit: 1, running: 1}
	if g.enter(ended.Done(), "shop") {
		t.Error("a caller whose context has ended has its turn")
	}
}

// Under contention, no more run than may, one of each namespace, and all are served or have left.
func TestGateUnderContention(t *testing.T) {
	g := &gate{limit: 3}
	var running atomic.Int64
	var each [8]atomic.Int64
	var wg sync.WaitGroup
	for i := range 64 {
		wg.Go(func() {
			namespace := fmt.Sprint(i % len(each))
			for j := range 50 {
				ctx, cancel := context.WithCancel(t.Context())
				if j%3 == 0 {
					go cancel()
				}
				if g.enter(ctx.Done(), namespace) {
					if n := running.Add(1); n > 3 {
						t.Errorf("%d run", n)
					}
					if n := each[i%len(each)].Add(1); n > 1 {
						t.Errorf("%d of one namespace run", n)
					}
					each[i%len(each)].Add(-1)
					running.Add(-1)
					g.leave(namespace)
				}
				cancel()
			}
		})
	}
	wg.Wait()
	if g.running != 0 || len(g.queues) != 0 || len(g.ready) != 0 {
		t.Errorf("the gate has %d running, %d queues, %d ready", g.running, len(g.queues), len(g.ready))
	}
}

// Decide waits in its namespace's turn, and calls of Grant in one of their own, for whatever namespace.
func TestDecisionsWaitInTurn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		keys, err := NewKeys(DefaultPrefix)
		if err != nil {
			t.Fatal(err)
		}
		rules, err := New(Config{Keys: keys})
		if err != nil {
			t.Fatal(err)
		}
		rules.gate = gate{limit: 1, running: 1}
		var wg sync.WaitGroup
		defer wg.Wait()
		decide := func(namespace, role string, by func(Pod, Namespace) (Grant, error)) {
			pod := Pod{Namespace: namespace, Request: keys.Request(map[string]string{keys.Name(Role): "arn:aws:iam::123456789012:role/" + role})}
			ns := Namespace{Name: namespace, Labels: map[string]string{keys.Name(Inject): Enabled}, Annotations: map[string]string{keys.Name(Permitted): ".*"}}
			wg.Go(func() {
				if _, err := by(pod, ns); err != nil {
					t.Errorf("%s of %s: %v", role, namespace, err)
				}
			})
			synctest.Wait()
		}
		inTurn := func(pod Pod, ns Namespace) (Grant, error) { return rules.Decide(t.Context(), pod, ns) }
		for i := range 32 {
			decide("hog", fmt.Sprint("role-", i), inTurn)
		}
		decide("shop", "cart", inTurn)
		decide("shop", "ahead", rules.Grant)
		decide("hog", "ahead", rules.Grant)
		waiting := map[string]int{}
		rules.gate.mu.Lock()
		for namespace, q := range rules.gate.queues {
			waiting[namespace] = q.waiting.Len()
		}
		var order []string
		for _, q := range rules.gate.ready {
			order = append(order, q.namespace)
		}
		rules.gate.running = 0
		rules.gate.serve(rules.gate.queues["hog"])
		rules.gate.mu.Unlock()
		if want := map[string]int{"hog": 32, "shop": 1, noNamespace: 2}; fmt.Sprint(waiting) != fmt.Sprint(want) {
			t.Errorf("%v wait, want %v", waiting, want)
		}
		if want := []string{"hog", "shop", noNamespace}; !slices.Equal(order, want) {
			t.Errorf("the turns are %q, want %q", order, want)
		}
	})
}

// Evaluations take half of the processors, and one at least.
func TestGateTakesHalfOfTheProcessors(t *testing.T) {
	before := runtime.GOMAXPROCS(0)
	defer runtime.GOMAXPROCS(before)
	given := make(chan struct{})
	close(given) // enter gives up unless the turn comes at once
	for processors, want := range map[int]int{1: 1, 2: 1, 3: 1, 4: 2, 7: 3, 8: 4} {
		runtime.GOMAXPROCS(processors)
		g, n := &gate{}, 0
		for i := range 10 {
			if g.enter(given, fmt.Sprint(i)) {
				n++
			}
		}
		if n != want {
			t.Errorf("%d run on %d processors, want %d", n, processors, want)
		}
	}
}
