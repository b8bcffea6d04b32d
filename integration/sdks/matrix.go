//go:build unix

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/credence-iam/credence/integration/stack"
)

const (
	// Roles that pods have.
	lifeRole    = "sdks"
	refusedRole = "untrusting"

	// sideBySide bounds how many clients are started at once, and how many answer at once where all do: some
	// take a second of a processor.
	sideBySide = 4
	// heavySideBySide is that for clients which take much of a processor at each call, while all others go on: a client
	// gives a sidecar a second, and so has to come by a processor in it.
	heavySideBySide = 2
)

// matrix is all that is tried.
type matrix struct {
	world    world
	life     time.Duration
	progress io.Writer

	began   time.Time
	gone    time.Time     // when the broker went away
	absence time.Duration // how long it was away
	rows    []*row
	heavy   chan struct{} // has a place for each that may call at once

	stsCalls, mostSTSCalls int // of the life scenarios

	mu   sync.Mutex // guards pods
	pods []*scenarioPod
}

// scenarioPod is a pod that was made for one scenario.
type scenarioPod struct {
	*pod
	report  Pod
	role    string
	created time.Time
}

// row is one client on one path.
type row struct {
	client client
	path   Path
	found  installation
	report Row

	created time.Time // when its pod was
	pod     *pod
	env     []string
	driver  *driver
	heavy   chan struct{} // in which a place has to be had; nil: none has
	key     string        // of its first session; empty if the client does not tell
	counted int           // how many calls of its sidecar cells have so far
	left    bool          // nothing more is to be tried, since the client cannot use the path

	mu sync.Mutex // guards report.Cells
}

// name is the row's in the cluster and in folders.
func (r *row) name() string { return r.client.name + "-" + string(r.path) }

// out says whether the row is not tried, or no further.
func (r *row) out() bool { return r.report.NotRun != "" || r.report.Failed != "" || r.left }

// add adds the rows of a client. One that is not installed, or that fails to build, is no reason to end the run.
func (m *matrix) add(ctx context.Context, c client, f *finder) error {
	found, err := c.find(f, ctx)
	if ctx.Err() != nil {
		return ctx.Err()
	}
	var proto Row
	reason, missing := errors.AsType[notRun](err)
	switch {
	case missing:
		proto.NotRun = string(reason)
		m.tell("%s is NOT RUN: %s", c.name, reason)
	case err != nil:
		proto.Failed = firstLine(err)
		m.tell("%s CANNOT BE RUN: %v", c.name, err)
	default:
		m.tell("%s: %s, version %s", c.name, c.about, found.version)
	}
	for _, path := range c.paths {
		report := proto
		report.Client, report.Path = c.name, path
		r := &row{client: c, path: path, found: found, report: report}
		if c.sessions != 0 {
			r.heavy = m.heavy
		}
		m.rows = append(m.rows, r)
	}
	return nil
}

// firstLine is what a report has of an error whose whole text was told.
func firstLine(err error) string {
	line, _, _ := strings.Cut(err.Error(), "\n")
	return line
}

// fail notes that the row's driver cannot be run. It returns nil, for callers to return.
func (m *matrix) fail(r *row, err error) error {
	r.report.Failed = firstLine(err)
	m.tell("%s, %s, CANNOT BE RUN: %v", r.client.name, r.path, err)
	return nil
}

// tell says how far it is.
func (m *matrix) tell(format string, args ...any) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.began.IsZero() {
		m.began = time.Now()
	}
	_, _ = fmt.Fprintf(m.progress, "%4.0f s  %s\n", time.Since(m.began).Seconds(), fmt.Sprintf(format, args...))
}

// each calls do for all rows that are run, side by side.
func (m *matrix) each(ctx context.Context, do func(context.Context, *row) error) error {
	return m.few(ctx, -1, do)
}

// few calls do for all rows that are run, so many at once. What ctx interrupted is an error.
func (m *matrix) few(ctx context.Context, limit int, do func(context.Context, *row) error) error {
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(limit)
	for _, r := range m.rows {
		if r.out() {
			continue
		}
		group.Go(func() error {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			if err := do(ctx, r); err != nil {
				return fmt.Errorf("%s, %s: %w", r.client.name, r.path, err)
			}
			return ctx.Err()
		})
	}
	return group.Wait()
}

// set records what was found. It returns nil, for callers to return.
func (r *row) set(c Cell) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.report.Cells = append(r.report.Cells, c)
	return nil
}

// close ends the drivers and the pods.
func (m *matrix) close() {
	for _, r := range m.rows {
		if r.driver != nil {
			r.driver.stop()
		}
		if r.pod != nil {
			r.pod.stop()
		}
	}
}

// report is what was found.
func (m *matrix) report() *Report {
	report := &Report{Schema: Schema, Started: m.began.UTC().Truncate(time.Second), Life: m.life.Seconds(), STSCalls: m.stsCalls, MostSTSCalls: m.mostSTSCalls}
	for _, r := range m.rows {
		slices.SortStableFunc(r.report.Cells, func(a, b Cell) int { return order(a.Scenario) - order(b.Scenario) })
		report.Rows = append(report.Rows, r.report)
	}
	for _, p := range m.pods {
		report.Pods = append(report.Pods, p.report)
	}
	slices.SortFunc(report.Pods, func(a, b Pod) int { return strings.Compare(a.Pod, b.Pod) })
	return report
}

func order(name string) int {
	return slices.IndexFunc(scenarios, func(s scenario) bool { return s.name == name })
}

// start starts the row's pod and driver.
func (m *matrix) start(ctx context.Context, r *row) (err error) {
	r.created = time.Now()
	if r.pod, err = m.world.pod(ctx, r.name(), lifeRole, r.path); err != nil {
		return err
	}
	r.env = env(r.pod.env, r.path)
	if r.driver, err = m.world.driver(ctx, r.found.command, r.env, r.name()); err != nil {
		return m.fail(r, err)
	}
	if err := r.found.is(r.client, r.driver.hello); err != nil {
		return m.fail(r, err)
	}
	r.report.Version = r.found.version
	return nil
}

// restart starts the row's driver anew.
func (m *matrix) restart(ctx context.Context, r *row) error {
	r.driver.stop()
	var err error
	if r.driver, err = m.world.driver(ctx, r.found.command, r.env, r.name()); err != nil {
		return m.fail(r, err)
	}
	return nil
}

// once tries one command with a driver made for it.
func (m *matrix) once(ctx context.Context, r *row, name string, env []string, command, role string, refusal *refusal) error {
	d, err := m.world.driver(ctx, r.found.command, env, name+"-"+r.name())
	if err != nil {
		return r.set(failed(r, name, err))
	}
	defer d.stop()
	t := newTrial(r, name)
	a := t.ask(ctx, d, command)
	c := t.outcome(role, refusal)
	switch {
	case name == token && c.Outcome == Works && value(env, metadataVariable) != "":
		c.Outcome = Metadata // which asks for no token of this kind
	case refusal != nil && c.Outcome == Works:
		c.Outcome, c.Error = Fails, "it has credentials, as "+a.ARN
	case name == region && c.Error == "unsupported":
		c.Outcome = Unsupported
	case name == region && t.err == nil && c.Outcome == Fails:
		c.Outcome = NotFound
	case name == region && c.Outcome == Works && a.Region != stack.Region:
		c.Outcome, c.Error = Fails, "it found "+a.Region
	}
	return r.set(c)
}

// podFor makes a pod for one scenario, whose calls are counted until leave.
func (m *matrix) podFor(ctx context.Context, scenario, name, role string, path Path) (*scenarioPod, error) {
	p := &scenarioPod{report: Pod{Pod: scenario + "-" + name, Role: role}, role: role, created: time.Now()}
	var err error
	if p.pod, err = m.world.pod(ctx, p.report.Pod, role, path); err != nil {
		return nil, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.pods = append(m.pods, p)
	return p, nil
}

// leave ends a pod that was made for one scenario, and counts its calls. A sidecar asks no more often than once in every,
// after the first time.
func (m *matrix) leave(p *scenarioPod, every time.Duration) error {
	p.stop()
	calls, err := m.world.brokerCalls()
	if err != nil {
		return err
	}
	p.report.BrokerCalls = calls[p.report.Pod]
	p.report.MostCalls = most(time.Since(p.created), every)
	p.report.STSCalls = m.world.stsCalls(p.role)
	return nil
}

// noMetadata keeps clients from instance metadata.
const noMetadata = "AWS_EC2_METADATA_DISABLED=true"

// env is the environment of a client on a path: that of the pod, without what the path does without.
func env(pod []string, path Path) []string {
	env := slices.Clone(pod)
	if path == Container {
		// Or a client whose container credentials fail goes on to instance metadata, and nobody sees it.
		env = append(env, noMetadata)
	} else {
		env = slices.DeleteFunc(env, func(e string) bool { return strings.HasPrefix(e, "AWS_CONTAINER_") })
	}
	if path == MetadataV1 {
		env = append(env, "IMDS_VERSION=1")
	}
	return env
}

// withToken returns env with another token for container credentials.
func withToken(env []string, token string) []string {
	return append(without(env, authorizationVariable), authorizationVariable+"="+token)
}

// without returns env without these variables.
func without(env []string, names ...string) []string {
	return slices.DeleteFunc(slices.Clone(env), func(e string) bool {
		name, _, _ := strings.Cut(e, "=")
		return slices.Contains(names, name)
	})
}

// value returns a variable of env.
func value(env []string, name string) string {
	for _, e := range env {
		if v, ok := strings.CutPrefix(e, name+"="); ok {
			return v
		}
	}
	return ""
}

// refused asks a sidecar, which has to refuse with that status and code, and returns what it says.
func (m *matrix) refused(ctx context.Context, env []string, role, wrong string, status int, code string) (*refusal, error) {
	r, until, err := m.world.ask(ctx, env, role, wrong)
	switch {
	case err != nil:
		return nil, err
	case r == nil:
		return nil, fmt.Errorf("the sidecar gives credentials, valid until %v, want %d %s", until, status, code)
	case r.Status != status || r.Code != code:
		return nil, fmt.Errorf("the sidecar answers %d %s, want %d %s", r.Status, r.Code, status, code)
	}
	return r, nil
}
