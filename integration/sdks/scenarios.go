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

	"golang.org/x/sync/errgroup"

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
		"is kept, and of new sessions, every few seconds until just before the Expiration that the sidecar states. A client that the renewal left with " +
		"expired credentials is started anew before, or this would show that once more"},
	{name: expired, title: "away for longer", usual: Reason, about: "the broker is away until the credentials have expired; a call of the client that is kept has to fail"},
	{name: back, title: "broker back", usual: Works, about: "the broker comes back, and the client that is kept recovers by itself within half a minute"},
	{name: refused, title: "role refused", usual: Reason, about: "STS does not let the broker assume the role"},
	{name: slow, title: "slow start", usual: Works, about: "the first credentials arrive 1.5 s after the client's first request"},
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
	// slowness is how long after a client's first request its first credentials arrive: well over the second
	// after which many give up one request, and the 0.9 s for which a sidecar lets one wait, on a busy machine too.
	slowness = 1500 * time.Millisecond
	// justBefore the end of a session a client that is kept calls for the last time.
	justBefore = 3 * time.Second
	// pause is between calls that are repeated.
	pause = time.Second
	// calmPause is between calls of a renewal: there are many clients, and each call of some takes a second of a
	// processor.
	calmPause = 5 * time.Second
)

// run runs all scenarios. The error is of what they need; what a client does is in its cells.
func (m *matrix) run(ctx context.Context) error {
	m.tell("starting a pod and a driver for each client on each path")
	if err := m.few(ctx, sideBySide, m.start); err != nil {
		return err
	}
	m.tell("each asks STS who it is, with its first credentials")
	if err := m.live(ctx, first, m.first); err != nil {
		return err
	}
	end := time.Now().Add(m.life + margin) // of what anybody holds now
	m.tell("each makes many sessions, one after the other")
	if err := m.live(ctx, sessions, m.sessions); err != nil {
		return err
	}
	m.tell("each goes on for %v, past the end of its first session; meanwhile a refused role, a wrong token, the region, and a slow start",
		time.Until(end).Round(time.Second))
	if err := m.both(ctx,
		func(ctx context.Context) error { return m.live(ctx, renewal, m.renewal(end)) },
		m.others,
	); err != nil {
		return err
	}
	if err := m.each(ctx, m.renewIfExpired); err != nil {
		return err
	}
	m.tell("the broker is stopped; each goes on until just before the end of what its sidecar holds")
	if err := m.world.stopBroker(ctx); err != nil {
		return err
	}
	m.gone = time.Now()
	if err := m.live(ctx, away, m.away); err != nil {
		return err
	}
	m.tell("all sessions will have ended in %v; then each tries once more", m.left().Round(time.Second))
	if err := sleep(ctx, m.left()); err != nil {
		return err
	}
	if err := m.live(ctx, expired, m.expired); err != nil {
		return err
	}
	m.tell("the broker is started again; each has %v to recover", recovery)
	if err := m.world.startBroker(ctx); err != nil {
		return err
	}
	m.absence = time.Since(m.gone)
	if err := m.live(ctx, back, m.back); err != nil {
		return err
	}
	m.judge()
	m.tell("done")
	return nil
}

// live runs one of the life scenarios for all, and counts for its cells how often each pod's sidecar asked the broker in it.
func (m *matrix) live(ctx context.Context, name string, do func(context.Context, *row) error) error {
	if err := m.each(ctx, do); err != nil {
		return err
	}
	calls, err := m.world.brokerCalls()
	if err != nil {
		return err
	}
	for _, r := range m.rows {
		n := calls[r.name()]
		r.mu.Lock() // others may try the row beside this
		if i := slices.IndexFunc(r.report.Cells, func(c Cell) bool { return c.Scenario == name }); i >= 0 {
			r.report.Cells[i].BrokerCalls = n - r.counted
		}
		r.mu.Unlock()
		r.counted, r.report.BrokerCalls = n, n
	}
	return nil
}

// left is how long it is until all sessions have ended, while the broker is away.
func (m *matrix) left() time.Duration { return max(0, m.life+margin-time.Since(m.gone)) }

// both runs two things side by side.
func (m *matrix) both(ctx context.Context, a, b func(context.Context) error) error {
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return a(ctx) })
	group.Go(func() error { return b(ctx) })
	return group.Wait()
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
	if text, ok := r.client.unusable[r.path]; ok {
		r.left = true
		return m.unusable(ctx, r, text)
	}
	t := newTrial(r, first)
	r.key = t.ask(ctx, r.driver, "call").Key
	return r.set(t.outcome(lifeRole, nil))
}

// unusable sees that a client cannot use a path: its call fails with an error of that text, and no connection of it has
// come to the sidecar.
func (m *matrix) unusable(ctx context.Context, r *row, text string) error {
	door, err := m.world.door(ctx, r.env)
	if err != nil {
		return err
	}
	defer door.close()
	d, err := m.world.driver(ctx, r.found.command, door.env, "unusable-"+r.name())
	if err != nil {
		return r.set(failed(r, first, err))
	}
	defer d.stop()
	t := newTrial(r, first)
	t.ask(ctx, d, "call")
	c := t.outcome(lifeRole, nil)
	switch {
	case c.Outcome != Fails || t.err != nil || !strings.Contains(c.Error, text):
	case door.opened():
		c.Error = "it knows the way to the sidecar: " + c.Error
	default:
		c.Outcome = Unusable
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
		t.heavy = r.heavy
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
	if err := m.restart(ctx, r); err != nil || r.out() {
		return err
	}
	t := newTrial(r, first)
	t.ask(ctx, r.driver, "call")
	return nil
}

// away calls every few seconds, the last time just before the end that the sidecar states. A call that the end
// overtakes is not judged.
func (m *matrix) away(ctx context.Context, r *row) error {
	refusal, end, err := m.world.ask(ctx, r.env, lifeRole, "")
	if err == nil && refusal != nil {
		err = fmt.Errorf("the sidecar answers %d %s right after the broker went, and has no credentials", refusal.Status, refusal.Code)
	}
	if err != nil {
		return err
	}
	latest := end.Add(-justBefore)
	t := newTrial(r, away)
	t.heavy = r.heavy
	for last := false; ; {
		before := *t
		t.ask(ctx, r.driver, "call")
		if t.outcome(lifeRole, nil).Outcome == Works {
			t.ask(ctx, r.driver, "fresh")
		}
		c := t.outcome(lifeRole, nil)
		switch {
		case c.Outcome == Works, t.err != nil, time.Now().Before(end):
		case before.cell.Calls > 0:
			return r.set(before.outcome(lifeRole, nil))
		default:
			c.Error = fmt.Sprintf("its first calls took longer than %v, which was left of the session: %s", end.Sub(m.gone).Round(time.Second), c.Error)
		}
		if c.Outcome != Works || last {
			return r.set(c)
		}
		next := time.Now().Add(calmPause)
		if last = !next.Before(latest); last {
			next = latest
		}
		if err := sleep(ctx, max(0, time.Until(next))); err != nil {
			return err
		}
	}
}

func (m *matrix) expired(ctx context.Context, r *row) error {
	refusal, err := m.refused(ctx, r.env, lifeRole, "", http.StatusServiceUnavailable, "BROKER_UNREACHABLE")
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
		if c.Outcome == Works || c.Outcome != Hangs && t.err != nil {
			return r.set(c)
		}
		if c.Outcome == Hangs {
			if err := m.restart(ctx, r); err != nil || r.out() {
				return err
			}
			t.err = nil
			break
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

// refusals lets all clients meet a role that STS refuses. They share a pod for each kind of metadata.
func (m *matrix) refusals(ctx context.Context) (err error) {
	m.world.behave(refusedRole, ststest.Behavior{Deny: true})
	pods := make(map[Path]*scenarioPod)
	defer func() {
		for _, p := range pods {
			err = errors.Join(err, m.leave(p, refusedEvery))
		}
	}()
	for _, path := range []Path{MetadataV2, MetadataV1} {
		if pods[path], err = m.podFor(ctx, refused, string(path), refusedRole, path); err != nil {
			delete(pods, path)
			return err
		}
	}
	return m.few(ctx, sideBySide, func(ctx context.Context, r *row) error {
		p := pods[MetadataV2]
		if r.path == MetadataV1 {
			p = pods[MetadataV1]
		}
		env := env(p.env, r.path)
		refusal, err := m.refused(ctx, env, refusedRole, "", http.StatusForbidden, "STS_ACCESS_DENIED")
		if err != nil {
			return err
		}
		return m.once(ctx, r, refused, env, "call", refusedRole, refusal)
	})
}

// wrongTokens lets clients ask a healthy sidecar with a token that is not the pod's.
func (m *matrix) wrongTokens(ctx context.Context) error {
	const wrong = "not-the-token-of-this-pod"
	return m.few(ctx, sideBySide, func(ctx context.Context, r *row) error {
		if r.path != Container {
			return nil
		}
		refusal, err := m.refused(ctx, r.env, lifeRole, wrong, http.StatusForbidden, "AUTHORIZATION_INVALID")
		if err != nil {
			return err
		}
		// With instance metadata, as pods have it: that a client goes on to that is worth knowing.
		env := without(withToken(r.env, wrong), "AWS_EC2_METADATA_DISABLED")
		return m.once(ctx, r, token, env, "call", lifeRole, refusal)
	})
}

// regions lets clients look for the region.
func (m *matrix) regions(ctx context.Context) error {
	return m.few(ctx, sideBySide, func(ctx context.Context, r *row) error {
		return m.once(ctx, r, region, without(r.env, "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_EC2_METADATA_DISABLED"), "region", "", nil)
	})
}

// slow starts a client whose first credentials are still on their way.
func (m *matrix) slow(ctx context.Context, r *row) (err error) {
	role := slow + "-" + r.name()
	gate := make(chan struct{})
	open := sync.OnceFunc(func() { close(gate) })
	m.world.behave(role, ststest.Behavior{Hold: gate})
	p, err := m.podFor(ctx, slow, r.name(), role, r.path)
	if err != nil {
		open()
		return err
	}
	defer func() { err = errors.Join(err, m.leave(p, heldEvery)) }()
	defer open()
	door, err := m.world.door(ctx, env(p.env, r.path))
	if err != nil {
		return err
	}
	defer door.close()
	d, err := m.world.driver(ctx, r.found.command, door.env, role)
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

// refusedEvery is how often a sidecar asks the broker again that refuses, at most.
const refusedEvery = 5 * time.Second

// heldEvery is how often a sidecar asks again while STS does not answer, at most: a broker gives that 10 s.
const heldEvery = 10 * time.Second

// callEvery is how often a sidecar asks the broker, at most, after a first time and one more when a broker is back: a
// broker renews when 0.6 of the life is left at the earliest, and a sidecar comes back when 0.5 is left at the
// earliest. That leaves 0.4 between two calls. A broker, which has one session for all these pods, asks STS no more often.
func (m *matrix) callEvery() time.Duration { return m.life * 2 / 5 }

// most is how many calls there may be in that time.
func most(in, every time.Duration) int { return int(in/every) + 2 }

// judge says how many calls of broker and STS there may have been. While the broker is away nobody counts.
func (m *matrix) judge() {
	var longest time.Duration
	for _, r := range m.rows {
		if r.created.IsZero() {
			continue
		}
		there := time.Since(r.created) - m.absence
		r.report.MostCalls = most(there, m.callEvery())
		longest = max(longest, there)
	}
	m.stsCalls, m.mostSTSCalls = m.world.stsCalls(lifeRole), most(longest, m.callEvery())
}

// trial is what a client does in one scenario.
type trial struct {
	cell Cell
	last answer
	err  error // of a driver that does not answer
	bad  *answer
	// heavy is where a place has to be had for each call; nil: none has.
	heavy chan struct{}
}

func newTrial(r *row, name string) *trial {
	s := scenarioOf(name)
	return &trial{cell: Cell{Scenario: name, Expected: r.client.expected(r.path, s)}}
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
	if t.heavy != nil {
		select {
		case t.heavy <- struct{}{}:
			defer func() { <-t.heavy }()
		case <-ctx.Done():
			t.err = ctx.Err()
			return answer{}
		}
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
	case errors.Is(t.err, errSilent):
		c.Outcome, c.Error = Hangs, t.err.Error()
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
