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

// bound is the guarantee of package cache: every response has at least this fraction of its session left.
const bound = 0.45

// settled is longer than placement takes to settle and brokers take to fetch the sessions that move.
const settled = 2*time.Minute + 30*time.Second

const (
	burst      = 64 // of package cache
	maxBrokers = 11
)

// run is what the scenarios of one run share.
type run struct {
	*testing.T // of the scenario

	rows    map[string]string // :: scenario → its row of the page
	least   float64
	perHour map[string]float64 // :: steady scenario → STS calls
}

// scenarios are in the order of the page. Each returns its row.
var scenarios = []struct {
	name string
	run  func(*run) string
}{
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

// sized is the number for a reduced or a full run.
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
	r := &run{least: 1, rows: make(map[string]string), perHour: make(map[string]float64)}
	for _, s := range scenarios {
		t.Run(s.name, func(t *testing.T) {
			progress("%s …", s.name)
			began := time.Now()
			synctest.Test(t, func(t *testing.T) {
				r.T = t
				r.rows[s.name] = s.run(r)
			})
			progress("%s took %s", s.name, time.Since(began).Round(100*time.Millisecond))
		})
	}
	// make bench reads these lines.
	for _, brokers := range []int{3, 10} {
		t.Logf("scale_sts_calls_per_hour_%d_brokers=%.0f", brokers, r.perHour[fmt.Sprintf("%d brokers", brokers)])
	}
	t.Logf("scale_min_remaining_fraction=%.4f", r.least)
	if *update && !t.Failed() {
		writeTable(t, r.rows)
	}
}

// progress reports the progress of a full run.
func progress(format string, args ...any) {
	if full {
		fmt.Fprintf(os.Stderr, format+"\n", args...)
	}
}

// check logs a summary, and checks what must hold in every scenario.
func (r *run) check(part string, s summary) {
	r.Helper()
	r.Logf("%s: %s", part, s)
	progress("  %s: %s", part, s)
	if s.failed > 0 {
		r.Errorf("%s: %d of %d calls failed, one with %v", part, s.failed, s.calls, s.failure)
	}
	if s.without > 0 {
		r.Errorf("%s: %d times a pod's session expired before the pod had the next one", part, s.without)
	}
	if s.calls == 0 {
		r.Errorf("%s: no pod called", part)
	}
}

// guaranteed is check while STS is not throttled.
func (r *run) guaranteed(part string, s summary) {
	r.Helper()
	r.check(part, s)
	r.least = min(r.least, s.least)
	if s.least < bound {
		r.Errorf("%s: a pod got a session with %.3f of it left", part, s.least)
	}
	// For seconds, brokers see different numbers of brokers. And the burst of each is rounded up to a whole number.
	if limit := cache.DefaultRate + burst + 2*maxBrokers; s.busiest > limit {
		r.Errorf("%s: %d STS calls in a second, more than %d", part, s.busiest, limit)
	}
}

// unnoticed is guaranteed while no broker starts or ends: no pod waits. A few pods call just when half of their session
// has passed, and wait for the renewal in progress.
func (r *run) unnoticed(part string, s summary) {
	r.Helper()
	r.guaranteed(part, s)
	if s.longest > latency || s.byCause[waiting] > 0 {
		r.Errorf("%s: pods waited up to %s, and %d times no called broker had a session", part, s.longest, s.byCause[waiting])
	}
}

func steady(brokers, nodes, pods int) func(*run) string {
	return func(r *run) string {
		roles := sized(500, 5000)
		f := newFleet(r.T, shape{brokers: brokers, nodes: nodes, roles: roles, pods: pods})
		s := f.steady()
		r.unnoticed("hours", s)
		if limit := 2 * 2.25 * float64(roles); s.perHour() > limit || s.perHour() < 0.98*f.perHour() {
			r.Errorf("%.0f calls per hour, want %.0f to %.0f", s.perHour(), 0.98*f.perHour(), limit)
		}
		for name, other := range r.perHour {
			if math.Abs(s.perHour()/other-1) > 0.02 {
				r.Errorf("%.0f calls per hour, but %.0f with %s", s.perHour(), other, name)
			}
		}
		r.perHour[fmt.Sprintf("%d brokers", brokers)] = s.perHour() // the last such scenario has the most pods
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

func serviceAccounts(r *run) string {
	f := newFleet(r.T, shape{
		brokers: 3, nodes: 100, roles: sized(50, 500), accounts: 10, scope: policy.ScopeServiceAccount, pods: sized(1000, 20_000),
	})
	s := f.steady()
	r.unnoticed("hours", s)
	if want := f.perHour(); math.Abs(s.perHour()/want-1) > 0.02 {
		r.Errorf("%.0f calls per hour, want %.0f", s.perHour(), want)
	}
	return f.row(number(s.perHour())+" per hour", s)
}

// scopePod has enough sessions on each broker for even renewals, which need more than one renewal per second.
func scopePod(r *run) string {
	began := time.Now()
	f := newFleet(r.T, shape{brokers: sized(3, 10), nodes: sized(100, 1000), roles: 500, pods: sized(5000, 100_000), scope: policy.ScopePod})
	time.Sleep(10 * time.Minute)
	start := f.cold
	start.longest = 0 // pods wait while there are more of them than the rate allows
	r.guaranteed("start", f.since(began, start))
	s := f.measure(func() { time.Sleep(time.Duration(sized(2, 3)) * time.Hour) })
	r.unnoticed("hours", s)
	most, mean := s.peak()
	if float64(most) > 1.3*mean {
		r.Errorf("%d renewals in a minute, and %.0f on average", most, mean)
	}
	return f.row(fmt.Sprintf("%s per hour; renewals in a minute: %s on average, at most %s", number(s.perHour()), number(mean), number(most)), s)
}

// eventful is the cluster of scenarios with an event.
func eventful(brokers int) shape {
	return shape{brokers: brokers, nodes: 99, roles: sized(500, 5000), pods: sized(2000, 20_000), gradual: true}
}

func rollingUpdate(brokers int) func(*run) string {
	return func(r *run) string {
		is := eventful(brokers)
		is.wire = !full && brokers == 3
		f := newFleet(r.T, is)
		s := f.measure(func() {
			for _, old := range f.up() {
				step := time.Now()
				f.start(old.zone)
				f.awaitReady(brokers + 1) // a Deployment does not wait until sidecars know it
				old.shutDown()
				time.Sleep(max(0, 35*time.Second-time.Since(step)))
			}
			time.Sleep(settled)
		})
		r.guaranteed("update", s)
		if s.extra() > 2 || s.fetched() > 2.4 || s.fetched() < 1.9 {
			r.Errorf("%.2f calls per session more than without the update, %.2f fetched", s.extra(), s.fetched())
		}
		after := f.measure(func() { time.Sleep(time.Hour) })
		r.unnoticed("hour after", after)
		return f.row(perSession(s), s.add(after))
	}
}

func rescale(r *run) string {
	f := newFleet(r.T, eventful(3))
	const moves = 2 * 7. / 10 // 7 of 10 brokers are new, and each session has two owners
	moved := func(part string, s summary) {
		r.guaranteed(part, s)
		if r.wantFetched(moves, s); s.fetched() > 1.05*moves {
			r.Errorf("%s: each session was fetched %.3f times, but moved %.3f times", part, s.fetched(), moves)
		}
	}
	up := f.measure(func() {
		for i := range 7 {
			f.start(i % zones)
		}
		f.await(10)
		time.Sleep(settled)
	})
	moved("up", up)
	// Longer than a session, so that none is left from before.
	between := f.measure(func() { time.Sleep(2 * time.Hour) })
	r.unnoticed("between", between)
	down := f.measure(func() {
		for _, b := range f.up()[3:] {
			b.shutDown()
		}
		f.await(3)
		time.Sleep(settled)
	})
	moved("down", down)
	return f.row(fmt.Sprintf("up %.2f, down %.2f fetched per session", up.fetched(), down.fetched()), up.add(between).add(down))
}

// perSession is the cost of an event.
func perSession(s summary) string {
	return fmt.Sprintf("%+.2f per session, %.2f fetched", s.extra(), s.fetched())
}

// noticing is the time until all brokers and nodes know that a node is lost.
const noticing = noticed + published + dnsDelay

// loss measures the time until all brokers and nodes know of a loss, and then the time until the lost brokers are
// replaced. Pods call as always, and no pod waits longer than longest.
func (r *run) loss(f *fleet, longest time.Duration, lose, replace func()) summary {
	r.Helper()
	soon := f.measure(func() {
		lose()
		time.Sleep(noticing)
	})
	r.guaranteed("loss", soon)
	// A lost zone has a third of the pods, and a small run has random variation.
	if usual := f.callsIn(noticing); float64(soon.calls) < usual/3 {
		r.Errorf("pods made %d calls during the loss, usually %.0f", soon.calls, usual)
	}
	if soon.longest > longest {
		r.Errorf("a pod waited %s", soon.longest)
	}
	later := f.measure(func() {
		time.Sleep(evicted - noticing)
		replace()
		time.Sleep(settled)
	})
	r.guaranteed("replacement", later)
	return soon.add(later)
}

// wantFetched checks how often each session was fetched, within a tenth.
func (r *run) wantFetched(want float64, s summary) {
	r.Helper()
	if got := s.fetched(); math.Abs(got-want) > 0.1*want {
		r.Errorf("each session was fetched %.2f times, want %.2f", got, want)
	}
}

func loseBroker(brokers int, how func(*instance), longest time.Duration, wire bool) func(*run) string {
	return func(r *run) string {
		is := eventful(brokers)
		is.wire = wire
		f := newFleet(r.T, is)
		lost := f.up()[0]
		s := r.loss(f, longest, func() { how(lost) }, func() {
			f.start(lost.zone)
			f.await(brokers)
		})
		if n := s.byCause[waiting]; n > 0 {
			r.Errorf("%d times no called broker had the session", n)
		}
		// If there are more than two brokers, the others fetch the lost one's sessions. Then its successor fetches them.
		part := 2 / float64(brokers)
		if brokers > 2 {
			part *= 2
		}
		r.wantFetched(part, s)
		return f.row(perSession(s), s)
	}
}

// restartBroker loses the sessions of one broker, which is called again when it has those that it owns first.
func restartBroker(r *run) string {
	f := newFleet(r.T, eventful(3))
	s := f.measure(func() {
		f.up()[0].restart()
		f.await(2)
		f.await(3)
		time.Sleep(settled)
	})
	r.guaranteed("restart", s)
	// Some sidecars call it before it is ready, because DNS still names it.
	if n := s.byCause[waiting]; n > max(5, s.calls/100) || s.longest > hedgeAfter+latency {
		r.Errorf("%d times no called broker had the session, and pods waited up to %s", n, s.longest)
	}
	r.wantFetched(2./3, s)
	return f.row(perSession(s), s)
}

// loseZone loses a third of the brokers and of the pods, which are replaced in other zones.
func loseZone(r *run) string {
	f := newFleet(r.T, eventful(9))
	var lost []int
	s := r.loss(f, hedgeAfter+2*laterAfter+2*latency, func() { // a pod may have to wait for STS
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
	r.wantFetched(4./3, s)
	return f.row(perSession(s), s)
}

// slowBrokers makes sidecars hedge at first and then wait, so that they do not call two brokers each time.
func slowBrokers(r *run) string {
	f := newFleet(r.T, eventful(3))
	s := f.measure(func() {
		for _, b := range f.up() {
			b.set(slow, false)
		}
		time.Sleep(3 * time.Hour)
	})
	r.guaranteed("slow", s)
	if limit := f.pods + s.calls*5/4; s.attempts > limit {
		r.Errorf("for %d calls, sidecars called %d brokers, more than %d", s.calls, s.attempts, limit)
	}
	return f.row(fmt.Sprintf("%s per hour; %.2f brokers are asked per call", number(s.perHour()), float64(s.attempts)/float64(s.calls)), s)
}

// rollout replaces all pods of one node after the other. Each role has one pod, so that for some seconds no pod uses its
// session.
func rollout(r *run) string {
	is := eventful(3)
	is.pods = is.roles
	f := newFleet(r.T, is)
	s := f.measure(func() {
		for node := range f.nodes {
			for _, spec := range f.drain(node) {
				f.addAfter(within(time.Second, 5*time.Second), spec, f.nodeBut(func(n int) bool { return n == node }))
			}
			time.Sleep(30 * time.Minute / time.Duration(f.nodes))
		}
	})
	r.unnoticed("rollout", s)
	if float64(s.all()) > 1.05*s.expected {
		r.Errorf("%d STS calls, but %.0f in the steady state", s.all(), s.expected)
	}
	return f.row(number(s.perHour())+" per hour", s)
}

// throttled has so many sessions that half of their renewals exceed the lowest rate to which brokers reduce theirs.
func throttled(r *run) string {
	f := newFleet(r.T, shape{
		brokers: sized(2, 3), nodes: sized(100, 1000), roles: 500, pods: sized(10_000, 100_000), scope: policy.ScopePod,
		duration: time.Duration(sized(15, 60)) * time.Minute, gradual: true,
	})
	s := f.measure(func() {
		f.sts.limit(f.perHour() / 3600 / 2)
		time.Sleep(5 * time.Minute)
		for range 5 {
			began := time.Now()
			time.Sleep(time.Minute)
			f.ordered(began)
		}
		f.sts.limit(accountRate)
		time.Sleep(5 * time.Minute)
	})
	r.check("throttled", s)
	after := f.measure(func() { time.Sleep(3 * time.Minute) })
	r.guaranteed("after", after)
	return f.row(number(f.perHour()/60)+" per minute are needed", s.add(after))
}

// ordered checks that sessions were renewed in the order in which they expire: of those renewed in the last minute, none had
// much less left than another. In a random order they would differ by everything that is overdue.
func (f *fleet) ordered(since time.Time) {
	f.t.Helper()
	least, most := 1., 0.
	for _, c := range f.sts.since(since) {
		if c.cause == renewal && !c.throttled {
			least, most = min(least, c.left), max(most, c.left)
		}
	}
	f.t.Logf("renewed with %.3f to %.3f of the session left", least, most)
	if most > 1-bound || most-least > 0.06 {
		f.t.Errorf("while STS throttled, sessions were renewed with %.3f to %.3f of them left", least, most)
	}
}
