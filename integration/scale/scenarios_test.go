package scale

import (
	"fmt"
	"math"
	"os"
	"testing"
	"testing/synctest"
	"time"

	"github.com/credence-iam/credence/broker/cache"
	"github.com/credence-iam/credence/broker/policy"
)

// bound is the promise of package cache: no answer has less of its life left.
const bound = 0.45

// settled is longer than it takes until placement has settled, and what moves then is fetched.
const settled = 2*time.Minute + 30*time.Second

const (
	burst      = 64 // of package cache
	maxBrokers = 11
)

// run is what the scenarios of one run share.
type run struct {
	rows    []row
	least   float64
	perHour map[string]float64 // :: steady scenario → calls of STS
}

type scenario struct {
	name string
	run  func(t *testing.T, r *run) row
}

// scenarios are all that there are, in the order of the page.
var scenarios = []scenario{
	{"steady, 3 brokers", steady(3, 10, sized(500, 5000))},
	{"steady, 10 brokers", steady(10, 10, sized(500, 5000))},
	{"steady, 10 brokers, many nodes", steady(10, 1000, sized(500, 5000))},
	{"steady, 10 brokers, many nodes and pods", steady(10, 1000, sized(5000, 100_000))},
	{"steady, 3 brokers, many nodes and pods", steady(3, 1000, sized(2000, 100_000))},
	{"steady, scope service-account", serviceAccounts},
	{"steady, scope pod", scopePod},
	{"rolling update of 2 brokers", rollingUpdate(2)},
	{"rolling update of 3 brokers", rollingUpdate(3)},
	{"rolling update of 10 brokers", rollingUpdate(10)},
	{"3 brokers become 10, and 3 again", rescale},
	{"one of 3 brokers restarts in its place", restartBroker},
	{"one of 2 brokers crashes", loseBroker(2, (*instance).crash, 0, false)},
	{"one of 3 brokers crashes", loseBroker(3, (*instance).crash, 0, false)},
	{"one of 3 brokers is lost with its node", loseBroker(3, (*instance).lose, 250*time.Millisecond, !full)},
	{"one of 3 zones is lost", loseZone},
	{"all brokers are slow", slowBrokers},
	{"all pods are replaced", rollout},
	{"STS throttles at half of what is needed", throttled},
}

// sized is the one number or the other.
func sized(reduced, whole int) int {
	if full {
		return whole
	}
	return reduced
}

func TestScale(t *testing.T) {
	if *update && !full {
		t.Fatal("the page has the results of a full run: set CREDENCE_SCALE=full")
	}
	r := &run{least: 1, perHour: make(map[string]float64)}
	for _, s := range scenarios {
		t.Run(s.name, func(t *testing.T) {
			progress("%s …", s.name)
			began := time.Now()
			synctest.Test(t, func(t *testing.T) {
				result := s.run(t, r)
				result.scenario = s.name
				r.rows = append(r.rows, result)
			})
			progress("%s took %s", s.name, time.Since(began).Round(100*time.Millisecond))
		})
	}
	// These lines are read by make bench.
	for _, brokers := range []int{3, 10} {
		t.Logf("scale_sts_calls_per_hour_%d_brokers=%.0f", brokers, r.perHour[fmt.Sprintf("%d brokers", brokers)])
	}
	t.Logf("scale_min_remaining_fraction=%.4f", r.least)
	if *update && !t.Failed() {
		writeTable(t, r.rows)
	}
}

// progress tells who waits for a full run.
func progress(format string, args ...any) {
	if full {
		fmt.Fprintf(os.Stderr, format+"\n", args...)
	}
}

// check says what happened, and checks what must hold in every scenario.
func (r *run) check(t *testing.T, part string, s summary) {
	t.Helper()
	t.Logf("%s: %s", part, s)
	progress("  %s: %s", part, s)
	if s.failed > 0 {
		t.Errorf("%s: %d of %d calls failed, one with %v", part, s.failed, s.asks, s.failure)
	}
	if s.without > 0 {
		t.Errorf("%s: %d times a pod's session had ended before it had the next", part, s.without)
	}
	if s.asks == 0 {
		t.Errorf("%s: nobody asked", part)
	}
}

// promised is check where STS takes what it is asked for.
func (r *run) promised(t *testing.T, part string, s summary) {
	t.Helper()
	r.check(t, part, s)
	r.least = min(r.least, s.least)
	if s.least < bound {
		t.Errorf("%s: a pod was given a session with %.3f of its life left", part, s.least)
	}
	// Brokers differ for seconds in how many share the rate, and a whole number of each one's burst is more than its part.
	if most := cache.DefaultRate + burst + 2*maxBrokers; s.busiest > most {
		t.Errorf("%s: %d calls of STS in a second, and at most %d are allowed", part, s.busiest, most)
	}
}

// unnoticed is promised where no broker comes or goes: pods do not even wait, but the few that ask just when half of a
// session's life is over, for the renewal that is under way.
func (r *run) unnoticed(t *testing.T, part string, s summary) {
	t.Helper()
	r.promised(t, part, s)
	if s.longest > latency || s.calls[caller] > 0 {
		t.Errorf("%s: pods waited up to %s, and %d times for a session that nobody held", part, s.longest, s.calls[caller])
	}
}

func steady(brokers, nodes, pods int) func(t *testing.T, r *run) row {
	return func(t *testing.T, r *run) row {
		roles := sized(500, 5000)
		f := newFleet(t, shape{brokers: brokers, nodes: nodes, roles: roles, pods: pods})
		s := f.steady()
		r.unnoticed(t, "hours", s)
		if limit := 2 * 2.25 * float64(roles); s.perHour() > limit || s.perHour() < 0.98*f.perHour() {
			t.Errorf("%.0f calls per hour, and %.0f to %.0f are wanted", s.perHour(), 0.98*f.perHour(), limit)
		}
		for name, other := range r.perHour {
			if math.Abs(s.perHour()/other-1) > 0.02 {
				t.Errorf("%.0f calls per hour, and %.0f with %s", s.perHour(), other, name)
			}
		}
		r.perHour[fmt.Sprintf("%d brokers", brokers)] = s.perHour() // of the last such scenario, which has the most pods
		return f.row(number(s.perHour())+" per hour", s)
	}
}

// steady measures nine renewals of each session on average, while a tenth of the pods is replaced per hour.
func (f *fleet) steady() summary {
	time.Sleep(57 * time.Minute)
	return f.measure(func() {
		const turns = 9 * 27
		replaced := 0.
		for range turns {
			for replaced += float64(f.pods) / 600; replaced >= 1; replaced-- {
				f.replace()
			}
			time.Sleep(time.Minute)
		}
	})
}

// replace ends one pod and starts its successor on another node, where it asks some seconds later.
func (f *fleet) replace() {
	f.podsMu.RLock()
	var p *pod
	for _, p = range f.live {
		break
	}
	f.podsMu.RUnlock()
	f.remove(p)
	f.addAfter(within(time.Second, 5*time.Second), p.spec, f.nodeBut(func(node int) bool { return node == p.node }))
}

func serviceAccounts(t *testing.T, r *run) row {
	f := newFleet(t, shape{
		brokers: 3, nodes: 100, roles: sized(50, 500), accounts: 10, scope: policy.ScopeServiceAccount, pods: sized(1000, 20_000),
	})
	s := f.steady()
	r.unnoticed(t, "hours", s)
	if want := f.perHour(); math.Abs(s.perHour()/want-1) > 0.02 {
		t.Errorf("%.0f calls per hour, want %.0f", s.perHour(), want)
	}
	return f.row(number(s.perHour())+" per hour", s)
}

// scopePod has enough sessions on each broker for renewals to be kept even: below one per second it is not worth it.
func scopePod(t *testing.T, r *run) row {
	began := time.Now()
	f := newFleet(t, shape{brokers: sized(3, 10), nodes: sized(100, 1000), roles: 500, pods: sized(5000, 100_000), scope: policy.ScopePod})
	time.Sleep(10 * time.Minute)
	start := f.cold
	start.longest = 0 // Pods do wait while there are more of them than the rate allows.
	r.promised(t, "start", f.since(began, start))
	s := f.measure(func() { time.Sleep(time.Duration(sized(2, 3)) * time.Hour) })
	r.unnoticed(t, "hours", s)
	most, mean := s.peak()
	if float64(most) > 1.3*mean {
		t.Errorf("%d renewals in a minute, and %.0f on average", most, mean)
	}
	return f.row(fmt.Sprintf("%s per hour; renewals in a minute: %s on average, at most %s",
		number(s.perHour()), number(mean), number(float64(most))), s)
}

// eventful is a cluster to which something happens.
func eventful(brokers int) shape {
	return shape{brokers: brokers, nodes: 99, roles: sized(500, 5000), pods: sized(2000, 20_000), gradual: true}
}

func rollingUpdate(brokers int) func(t *testing.T, r *run) row {
	return func(t *testing.T, r *run) row {
		is := eventful(brokers)
		is.wire = !full && brokers == 3
		f := newFleet(t, is)
		s := f.measure(func() {
			for _, old := range f.up() {
				step := time.Now()
				f.start(old.zone)
				f.awaitReady(brokers + 1) // not until sidecars know it: a Deployment does not wait for that
				old.end()
				time.Sleep(max(0, 35*time.Second-time.Since(step)))
			}
			time.Sleep(settled)
		})
		r.promised(t, "update", s)
		if s.extra() > 2 || s.fetched() > 2.4 || s.fetched() < 1.9 {
			t.Errorf("%.2f calls per session more than without the update, %.2f fetched", s.extra(), s.fetched())
		}
		after := f.measure(func() { time.Sleep(time.Hour) })
		r.unnoticed(t, "hour after", after)
		return f.row(perSession(s), s, after)
	}
}

func rescale(t *testing.T, r *run) row {
	f := newFleet(t, eventful(3))
	const moved = 2 * 7. / 10 // of each session's two owners
	check := func(part string, s summary) {
		t.Helper()
		r.promised(t, part, s)
		if s.fetched() > 1.05*moved {
			t.Errorf("%s: %.3f times each session was fetched, and %.3f moved", part, s.fetched(), moved)
		}
		if s.fetched() < 0.9*moved {
			t.Errorf("%s: %.3f times each session was fetched, and %.3f moved: somebody does not hold what is its own", part, s.fetched(), moved)
		}
	}
	up := f.measure(func() {
		for i := range 7 {
			f.start(i % zones)
		}
		f.await(10)
		time.Sleep(settled)
	})
	check("up", up)
	// Longer than a session lives, so that none is left over from before.
	between := f.measure(func() { time.Sleep(2 * time.Hour) })
	r.unnoticed(t, "between", between)
	down := f.measure(func() {
		for _, b := range f.up()[3:] {
			b.end()
		}
		f.await(3)
		time.Sleep(settled)
	})
	check("down", down)
	return f.row(fmt.Sprintf("up %.2f, down %.2f fetched per session", up.fetched(), down.fetched()), up, between, down)
}

// perSession is what an event cost.
func perSession(s summary) string {
	return fmt.Sprintf("%+.2f per session, %.2f fetched", s.extra(), s.fetched())
}

// noticing is how long it takes until everybody knows that a node is lost.
const noticing = noticed + published + dnsDelay

// loss measures the time until everybody knows of a loss, and what follows it. Pods ask as they always do, and no pod waits for
// longer than longest.
func (r *run) loss(t *testing.T, f *fleet, longest time.Duration, lose, replace func()) (soon, later summary) {
	t.Helper()
	soon = f.measure(func() {
		lose()
		time.Sleep(noticing)
	})
	r.promised(t, "loss", soon)
	// A zone takes a third of the pods along, and in the small run chance takes its part.
	if usual := f.asksIn(noticing); float64(soon.asks) < usual/3 {
		t.Errorf("in the time of the loss there are %d asks, and %.0f as a rule", soon.asks, usual)
	}
	if soon.longest > longest {
		t.Errorf("a pod waited %s", soon.longest)
	}
	later = f.measure(func() {
		time.Sleep(evicted - noticing)
		replace()
		time.Sleep(settled)
	})
	r.promised(t, "replacement", later)
	return soon, later
}

// wantFetched checks how often each session was fetched, within a tenth.
func wantFetched(t *testing.T, want float64, parts ...summary) {
	t.Helper()
	got := 0.
	for _, s := range parts {
		got += s.fetched()
	}
	if math.Abs(got-want) > 0.1*want {
		t.Errorf("each session was fetched %.2f times, want %.2f", got, want)
	}
}

// total is the sum of two spans of time.
func total(a, b summary) summary {
	a.took += b.took
	a.expected += b.expected
	for i := range a.calls {
		a.calls[i] += b.calls[i]
	}
	return a
}

func loseBroker(brokers int, how func(*instance), longest time.Duration, wire bool) func(t *testing.T, r *run) row {
	return func(t *testing.T, r *run) row {
		is := eventful(brokers)
		is.wire = wire
		f := newFleet(t, is)
		lost := f.up()[0]
		soon, later := r.loss(t, f, longest, func() { how(lost) }, func() {
			f.start(lost.zone)
			f.await(brokers)
		})
		if n := soon.calls[caller] + later.calls[caller]; n > 0 {
			t.Errorf("%d times nobody who was asked had the session", n)
		}
		// What the lost one had is taken up by the others, where there are more than two, and then by its successor.
		part := 2 / float64(brokers)
		if brokers > 2 {
			part *= 2
		}
		wantFetched(t, part, soon, later)
		return f.row(perSession(total(soon, later)), soon, later)
	}
}

// restartBroker: the sessions of one broker are lost, and it is asked again as soon as it has what it is first for.
func restartBroker(t *testing.T, r *run) row {
	f := newFleet(t, eventful(3))
	s := f.measure(func() {
		f.up()[0].restart()
		f.await(2)
		f.await(3)
		time.Sleep(settled)
	})
	r.promised(t, "restart", s)
	// Some sidecars ask it while it is not ready yet, for DNS still names it.
	if n := s.calls[caller]; n > max(5, s.asks/100) || s.longest > hedgeAfter+latency {
		t.Errorf("%d times nobody who was asked had the session, and pods waited up to %s", n, s.longest)
	}
	wantFetched(t, 2./3, s)
	return f.row(perSession(s), s)
}

// loseZone loses a third of the brokers and of the pods, which come again elsewhere.
func loseZone(t *testing.T, r *run) row {
	f := newFleet(t, eventful(9))
	var lost []int
	soon, later := r.loss(t, f, hedgeAfter+2*laterAfter+2*latency, func() { // STS may have to be waited for
		for _, b := range f.up() {
			if b.zone == 0 {
				b.lose()
			}
		}
		for node := 0; node < f.nodes; node += zones {
			lost = append(lost, f.drain(node)...)
		}
	}, func() {
		for i := range 3 {
			f.start(1 + i%2)
		}
		inZone := func(node int) bool { return node%zones == 0 }
		for _, spec := range lost {
			f.addAfter(within(0, time.Minute), spec, f.nodeBut(inZone))
		}
		f.await(9)
	})
	wantFetched(t, 4./3, soon, later)
	return f.row(perSession(total(soon, later)), soon, later)
}

// slowBrokers: sidecars ask a second broker at first, and then wait, so that brokers are not asked twice for everything.
func slowBrokers(t *testing.T, r *run) row {
	f := newFleet(t, eventful(3))
	s := f.measure(func() {
		for _, b := range f.up() {
			b.set(slow)
		}
		time.Sleep(3 * time.Hour)
	})
	r.promised(t, "slow", s)
	if most := f.pods + s.asks*5/4; s.attempts > most {
		t.Errorf("%d calls asked %d brokers, want %d at most", s.asks, s.attempts, most)
	}
	return f.row(fmt.Sprintf("%s per hour; %.2f brokers are asked per call", number(s.perHour()), float64(s.attempts)/float64(s.asks)), s)
}

// rollout replaces node after node, with all of its pods at once. Each role has one pod, so that nobody wants its
// session for some seconds.
func rollout(t *testing.T, r *run) row {
	is := eventful(3)
	is.pods = is.roles
	f := newFleet(t, is)
	s := f.measure(func() {
		for node := range f.nodes {
			for _, spec := range f.drain(node) {
				f.addAfter(within(time.Second, 5*time.Second), spec, f.nodeBut(func(n int) bool { return n == node }))
			}
			time.Sleep(30 * time.Minute / time.Duration(f.nodes))
		}
	})
	r.unnoticed(t, "rollout", s)
	if float64(s.all()) > 1.05*s.expected {
		t.Errorf("%d calls of STS, and %.0f in the steady state", s.all(), s.expected)
	}
	return f.row(number(s.perHour())+" per hour", s)
}

// throttled has enough sessions that half of their renewals are more than brokers try at the least.
func throttled(t *testing.T, r *run) row {
	f := newFleet(t, shape{
		brokers: sized(2, 3), nodes: sized(100, 1000), roles: 500, pods: sized(10_000, 100_000), scope: policy.ScopePod,
		life: time.Duration(sized(15, 60)) * time.Minute, gradual: true,
	})
	s := f.measure(func() {
		f.sts.take(f.perHour() / 3600 / 2)
		time.Sleep(5 * time.Minute)
		for range 5 {
			began := time.Now()
			time.Sleep(time.Minute)
			f.ordered(began)
		}
		f.sts.take(accountRate)
		time.Sleep(5 * time.Minute)
	})
	r.check(t, "throttled", s)
	after := f.measure(func() { time.Sleep(3 * time.Minute) })
	r.promised(t, "after", after)
	return f.row(number(f.perHour()/60)+" per minute are needed", s, after)
}

// ordered checks that those who expire first were renewed first: of those that were renewed in the last minute nobody
// had much less left than another. In any order they would differ by the whole of what has piled up.
func (f *fleet) ordered(since time.Time) {
	f.t.Helper()
	least, most := 1., 0.
	for _, c := range f.sts.between(since, time.Now()) {
		if c.cause == renewal && !c.throttled {
			least, most = min(least, c.left), max(most, c.left)
		}
	}
	f.t.Logf("renewed with %.3f to %.3f of their lives left", least, most)
	if most > 1-bound || most-least > 0.06 {
		f.t.Errorf("while STS throttled, sessions were renewed with %.3f to %.3f of their lives left", least, most)
	}
}
