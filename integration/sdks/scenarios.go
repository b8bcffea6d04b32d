//go:build unix

package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/credence-iam/credence/broker/assume/ststest"
)

// scenario is a column of the matrix.
type scenario struct {
	name  string // in the report
	title string // in the page's table
	about string // what is done, and what counts as working, for a reader
	usual Outcome
	paths []Path // nil: all
}

// Names of the scenarios.
const (
	first    = "first"
	sessions = "sessions"
	renewal  = "renewal"
	away     = "away"
	expired  = "expired"
	back     = "back"
	refused  = "refused"
	slow     = "slow"
	token    = "token"
	region   = "region"
)

// scenarios are the columns, in the order of the page. The first six are the life scenarios: one pod and one
// driver lives through them, while the same happens to all.
var scenarios = []scenario{
	{name: first, title: "first credentials", usual: Works, about: "the first call of a program"},
	{name: sessions, title: "new sessions", usual: Works, about: "fifty calls, each with a session, a configuration and a client made for it, " +
		"as careless programs do (five with the AWS CLI, which starts anew each time anyway)"},
	{name: renewal, title: "renewal", usual: Works, about: "calls of one client across the end of its first session"},
	{name: away, title: "broker away", usual: Works, about: "the broker has gone, and the sidecar holds valid credentials: calls of the client that " +
		"is kept, and of new sessions, every few seconds for as long as that is sure"},
	{name: expired, title: "away for longer", usual: Reason, about: "the broker is away until the credentials have expired; a call of the client that is kept has to fail"},
	{name: back, title: "broker back", usual: Works, about: "the broker comes back, and the client that is kept recovers by itself within half a minute"},
	{name: refused, title: "role refused", usual: Reason, about: "STS does not let the broker assume the role"},
	{name: slow, title: "slow start", usual: Works, about: "the first credentials arrive 1.1 s after the client's first request"},
	{name: token, title: "wrong token", usual: Reason, paths: []Path{Container}, about: "`AWS_CONTAINER_AUTHORIZATION_TOKEN` is not the pod's"},
	{name: region, title: "region", usual: Works, about: "no variable names a region, and the client's own look-up in instance metadata is asked"},
}

// on says whether the scenario is tried on a path.
func (s scenario) on(path Path) bool {
	return s.paths == nil || slices.Contains(s.paths, path)
}

const (
	// manySessions is how many new sessions are made in a row.
	manySessions = 50
	// margin is waited beyond the end of a session: expirations are whole seconds, and judged by one clock.
	margin = 2 * time.Second
	// recovery is how long a client may take to see that the broker is back: the sidecar comes back within 5 s.
	recovery = 30 * time.Second
	// slowness is how long after a client's first request its first credentials arrive: more than the second
	// after which many give up one request.
	slowness = 1100 * time.Millisecond
	// pause is between calls that are repeated.
	pause = time.Second
	// calmPause is between calls of a renewal: there are many clients, and each call of some takes a second of a
	// processor.
	calmPause = 5 * time.Second
)

// run runs all scenarios. The error is of what they need; what a client does is in its cells.
func (m *matrix) run(ctx context.Context) error {
	m.tell("starting a pod and a driver for each")
	if err := m.few(ctx, sideBySide, m.start); err != nil {
		return err
	}
	m.tell("first credentials")
	if err := m.each(ctx, m.first); err != nil {
		return err
	}
	end := time.Now().Add(m.life + margin) // of what anybody holds now
	m.tell("new sessions")
	if err := m.each(ctx, m.sessions); err != nil {
		return err
	}
	m.tell("renewal, for %v; meanwhile a refused role, a wrong token, the region, and a slow start", time.Until(end).Round(time.Second))
	if err := m.both(ctx,
		func(ctx context.Context) error { return m.each(ctx, m.renewal(end)) },
		m.others,
	); err != nil {
		return err
	}
	if err := m.each(ctx, m.renewIfExpired); err != nil {
		return err
	}
	m.tell("the broker goes away")
	m.stack.StopBroker()
	m.gone = time.Now()
	if err := m.each(ctx, m.away); err != nil {
		return err
	}
	if held := time.Since(m.gone); held > m.life*2/5 {
		return fmt.Errorf("trying all clients with the broker away took %v, and sidecars may hold credentials for %v only: this machine is too slow for this -life", held, m.life*2/5)
	}
	m.tell("waiting for the end of all sessions, for %v", (m.life + margin - time.Since(m.gone)).Round(time.Second))
	if err := sleep(ctx, m.life+margin-time.Since(m.gone)); err != nil {
		return err
	}
	if err := m.each(ctx, m.expired); err != nil {
		return err
	}
	m.tell("the broker comes back")
	if err := m.stack.StartBroker(ctx); err != nil {
		return err
	}
	m.absence = time.Since(m.gone)
	if err := m.each(ctx, m.back); err != nil {
		return err
	}
	return m.storm()
}

// both runs two things side by side.
func (m *matrix) both(ctx context.Context, a, b func(context.Context) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var all sync.WaitGroup
	errs := make([]error, 2)
	for i, f := range []func(context.Context) error{a, b} {
		all.Go(func() {
			if errs[i] = f(ctx); errs[i] != nil {
				cancel()
			}
		})
	}
	all.Wait()
	return errors.Join(errs...)
}

// sleep waits, unless ctx ends.
func sleep(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (m *matrix) first(ctx context.Context, r *row) error {
	t := newTrial(r, first)
	r.key = t.ask(ctx, r.driver, "call").Key
	c := t.outcome(lifeRole, nil)
	if text, ok := r.client.unusable[r.path]; ok {
		r.left = true
		if c.Outcome == Fails && strings.Contains(c.Error, text) {
			c.Outcome = Unusable
		}
	}
	return r.set(c)
}

func (m *matrix) sessions(ctx context.Context, r *row) error {
	t := newTrial(r, sessions)
	for range cmp.Or(r.client.sessions, manySessions) {
		if t.ask(ctx, r.driver, "fresh"); t.outcome(lifeRole, nil).Outcome != Works {
			break
		}
	}
	return r.set(t.outcome(lifeRole, nil))
}

// renewal calls now and then until end, by when the first session has expired.
func (m *matrix) renewal(end time.Time) func(context.Context, *row) error {
	return func(ctx context.Context, r *row) error {
		t := newTrial(r, renewal)
		for over := false; ; {
			a := t.ask(ctx, r.driver, "call")
			if t.outcome(lifeRole, nil).Outcome == Expired {
				// A call can be signed in the last millisecond of a session; then the next one is not.
				a = t.again(ctx, r.driver, "call")
			}
			c := t.outcome(lifeRole, nil)
			if c.Outcome == Works && over && a.Key != "" && a.Key == r.key {
				c.Outcome, c.Error = Fails, "the key is still the first one's"
			}
			if c.Outcome != Works || over {
				return r.set(c)
			}
			if err := sleep(ctx, max(0, min(calmPause, time.Until(end)))); err != nil {
				return err
			}
			over = !time.Now().Before(end)
		}
	}
}

// renewIfExpired gives a client that is stuck with expired credentials a new start, so that what comes next is
// tried by itself.
func (m *matrix) renewIfExpired(ctx context.Context, r *row) error {
	if c, _ := r.report.cell(renewal); c.Outcome != Expired {
		return nil
	}
	if err := r.restart(ctx, m); err != nil {
		return err
	}
	t := newTrial(r, first)
	t.ask(ctx, r.driver, "call")
	return nil
}

func (m *matrix) away(ctx context.Context, r *row) error {
	t := newTrial(r, away)
	// What a sidecar holds has 0.45 of its life left at least, and calls of some clients take seconds.
	for end := m.gone.Add(m.life * 3 / 10); ; {
		t.ask(ctx, r.driver, "call")
		if t.outcome(lifeRole, nil).Outcome == Works {
			t.ask(ctx, r.driver, "fresh")
		}
		c := t.outcome(lifeRole, nil)
		if c.Outcome != Works || time.Now().Add(calmPause).After(end) {
			return r.set(c)
		}
		if err := sleep(ctx, calmPause); err != nil {
			return err
		}
	}
}

func (m *matrix) expired(ctx context.Context, r *row) error {
	refusal, err := askSidecar(ctx, r.env, lifeRole, "")
	if err == nil {
		err = refusal.is(http.StatusServiceUnavailable, "BROKER_UNREACHABLE")
	}
	if err != nil {
		return err
	}
	t := newTrial(r, expired)
	t.ask(ctx, r.driver, "call")
	c := t.outcome(lifeRole, refusal)
	if c.Outcome == Works {
		c.Outcome, c.Error = Fails, "it has credentials that are valid"
	}
	return r.set(c)
}

func (m *matrix) back(ctx context.Context, r *row) error {
	t := newTrial(r, back)
	for end := time.Now().Add(recovery); ; {
		t.again(ctx, r.driver, "call")
		c := t.outcome(lifeRole, nil)
		if c.Outcome == Works || t.err != nil {
			return r.set(c)
		}
		if time.Now().After(end) {
			break
		}
		if err := sleep(ctx, pause); err != nil {
			return err
		}
	}
	t.again(ctx, r.driver, "fresh")
	c := t.outcome(lifeRole, nil)
	if c.Outcome == Works {
		c.Outcome = NewSession
	}
	return r.set(c)
}

// others tries what needs no life of its own.
func (m *matrix) others(ctx context.Context) error {
	if err := m.refusals(ctx); err != nil {
		return err
	}
	if err := m.wrongTokens(ctx); err != nil {
		return err
	}
	if err := m.regions(ctx); err != nil {
		return err
	}
	return m.few(ctx, 2, m.slow)
}

// refusals lets all clients meet a role that STS refuses.
func (m *matrix) refusals(ctx context.Context) error {
	m.stack.STS.SetRole(arn(refusedRole), ststest.Behavior{Deny: true})
	pods, err := m.podForEach(ctx, "refused", refusedRole)
	if err != nil {
		return err
	}
	return m.few(ctx, sideBySide, func(ctx context.Context, r *row) error {
		env, err := pods(r.path)
		if err != nil {
			return err
		}
		refusal, err := askSidecar(ctx, env, refusedRole, "")
		if err == nil {
			err = refusal.is(http.StatusForbidden, "STS_ACCESS_DENIED")
		}
		if err != nil {
			return err
		}
		return r.once(ctx, m, refused, env, "call", refusedRole, refusal)
	})
}

// wrongTokens lets clients ask a healthy sidecar with a token that is not the pod's.
func (m *matrix) wrongTokens(ctx context.Context) error {
	const wrong = "not-the-token-of-this-pod"
	return m.few(ctx, sideBySide, func(ctx context.Context, r *row) error {
		if r.path != Container {
			return nil
		}
		refusal, err := askSidecar(ctx, r.env, lifeRole, wrong)
		if err == nil {
			err = refusal.is(http.StatusForbidden, "AUTHORIZATION_INVALID")
		}
		if err != nil {
			return err
		}
		// With instance metadata, as pods have it: that a client goes on to that is worth knowing.
		env := without(replace(r.env, authorizationVariable, wrong), "AWS_EC2_METADATA_DISABLED")
		return r.once(ctx, m, token, env, "call", lifeRole, refusal)
	})
}

// regions lets clients look for the region.
func (m *matrix) regions(ctx context.Context) error {
	return m.few(ctx, sideBySide, func(ctx context.Context, r *row) error {
		return r.once(ctx, m, region, without(r.env, "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_EC2_METADATA_DISABLED"), "region", "", nil)
	})
}

// slow starts a client whose first credentials are still on their way.
func (m *matrix) slow(ctx context.Context, r *row) error {
	role := "slow-" + r.name()
	gate := make(chan struct{})
	open := sync.OnceFunc(func() { close(gate) })
	defer open()
	m.stack.STS.SetRole(arn(role), ststest.Behavior{Hold: gate})
	sidecar, err := m.pod(ctx, role, role, r.path)
	if err != nil {
		return err
	}
	defer sidecar.Stop(stopGrace)
	env, err := m.env(sidecar, r.path)
	if err != nil {
		return err
	}
	door, err := openDoor(ctx, env)
	if err != nil {
		return err
	}
	defer door.close()
	d, err := m.driver(ctx, r, role, door.env)
	if err != nil {
		return r.set(failed(r, slow, err))
	}
	defer d.stop()
	done := make(chan struct{})
	defer close(done)
	go func() {
		select {
		case <-door.first:
			timer := time.NewTimer(slowness)
			defer timer.Stop()
			select {
			case <-timer.C:
			case <-done:
			}
		case <-done:
		}
		open()
	}()
	t := newTrial(r, slow)
	t.ask(ctx, d, "call")
	c := t.outcome(role, nil)
	for range 5 {
		if c.Outcome == Works || t.err != nil {
			break
		}
		if err := sleep(ctx, pause); err != nil {
			return err
		}
		t.again(ctx, d, "call")
		if next := t.outcome(role, nil); next.Outcome == Works {
			c.Outcome, c.Calls, c.Took, c.Slowest = NextCall, next.Calls, next.Took, next.Slowest
			return r.set(c)
		}
	}
	if c.Outcome != Works && t.err == nil {
		t.again(ctx, d, "fresh")
		if t.outcome(role, nil).Outcome == Works {
			c.Outcome = NewSession
		}
	}
	return r.set(c)
}

// callEvery is how often in the life of a session a sidecar may ask the broker, after a first time and one more when a
// broker is back: a broker renews
// when 0.6 of the life is left at the earliest, and a sidecar comes back when 0.5 is left at the earliest. That leaves
// 0.4 between two calls.
const callEvery = 1 / 0.4

// storm counts how often each pod's sidecar asked the broker.
func (m *matrix) storm() error {
	calls, err := auditedCalls(m.stack.BrokerLog())
	if err != nil {
		return err
	}
	for _, r := range m.rows {
		if r.report.NotRun == "" {
			r.report.BrokerCalls = calls[r.name()]
			// While the broker is away nobody counts.
			r.report.MostCalls = int(callEvery*float64(time.Since(r.created)-m.absence)/float64(m.life)) + 2
		}
	}
	m.stsCalls = m.stack.STS.Count("AssumeRole", arn(lifeRole))
	return nil
}

// trial is what a client does in one scenario.
type trial struct {
	cell Cell
	last answer
	err  error // of a driver that does not answer
	bad  *answer
	row  *row
}

func newTrial(r *row, name string) *trial {
	s := scenarioOf(name)
	return &trial{row: r, cell: Cell{Scenario: name, Expected: r.client.expected(r.path, s)}}
}

func scenarioOf(name string) scenario {
	for _, s := range scenarios {
		if s.name == name {
			return s
		}
	}
	return scenario{name: name}
}

// ask sends a command and remembers how it went. Of several, the first that failed counts.
func (t *trial) ask(ctx context.Context, d *driver, command string) answer {
	if t.err != nil {
		return answer{}
	}
	a, err := d.ask(ctx, command)
	t.err = err
	t.cell.Calls++
	ms := float64(a.took.Microseconds()) / 1000
	t.cell.Took += ms
	t.cell.Slowest = max(t.cell.Slowest, ms)
	t.last = a
	if t.bad == nil && a.Error != "" {
		t.bad = &a
	}
	return a
}

// again is ask after a failure that is forgiven if this call succeeds.
func (t *trial) again(ctx context.Context, d *driver, command string) answer {
	t.bad = nil
	return t.ask(ctx, d, command)
}

// outcome judges what has been answered so far: with role as it should, or with an error, in which refusal, what
// the sidecar answered, shows or not.
func (t *trial) outcome(role string, refusal *refusal) Cell {
	c := t.cell
	a := t.last
	if t.bad != nil {
		a = *t.bad
	}
	c.Error, c.Code = a.Error, a.Code
	switch {
	case t.err != nil:
		c.Outcome, c.Error = Fails, t.err.Error()
	case a.Error == "" && role != "" && a.ARN != assumed(role):
		c.Outcome, c.Error = Fails, "it is "+a.ARN
	case a.Error == "":
		c.Outcome = Works
	case strings.Contains(a.Error+a.Code, "ExpiredToken"):
		c.Outcome = Expired
	case refusal != nil && refusal.shows(a):
		c.Outcome = Reason
	case refusal != nil:
		c.Outcome = Hidden
	default:
		c.Outcome = Fails
	}
	return c
}

// failed is the cell of a scenario that could not be begun.
func failed(r *row, name string, err error) Cell {
	t := newTrial(r, name)
	t.err = err
	return t.outcome("", nil)
}
