//go:build unix

package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/credence-iam/credence/integration/stack"
)

const (
	namespace = "sdks"

	// Roles of pods.
	lifeRole    = "sdks"
	refusedRole = "untrusting"

	// shortest is the shortest session duration of STS. If it is requested, the STS double grants sessionDuration.
	shortest = 15 * time.Minute
	// sessionDuration leaves time for a renewal: a broker makes a sidecar wait at least half a minute.
	sessionDuration = 90 * time.Second

	// Minimum times between two calls of a sidecar to the broker, see storms. The first is the general one: a broker
	// renews with at most 0.6 of the session left, and a sidecar returns with at least 0.5 left. The second applies if
	// the broker refuses. The third applies if STS does not respond, for which a broker waits 10 s.
	renewEvery   = sessionDuration * 2 / 5
	refusedEvery = 5 * time.Second
	heldEvery    = 10 * time.Second

	// stopGrace lets a sidecar shut down.
	stopGrace = 5 * time.Second

	fullURIVariable       = "AWS_CONTAINER_CREDENTIALS_FULL_URI"
	authorizationVariable = "AWS_CONTAINER_AUTHORIZATION_TOKEN"
	metadataVariable      = "AWS_EC2_METADATA_SERVICE_ENDPOINT"
	noMetadataVariable    = "AWS_EC2_METADATA_DISABLED"
)

// lab runs clients against a control plane with Credence.
type lab struct {
	stack *stack.Stack
	dir   string // for homes and programs
	logs  string
	began time.Time
	out   io.Writer
	slow  chan struct{} // turns of slow clients: while all clients run, a call needs a CPU within the second that SDKs wait
	rows  []*row

	brokerStopped time.Time
	brokerAbsence time.Duration

	mu   sync.Mutex // guards out and pods
	pods []*pod
}

func newLab(s *stack.Stack, dir, logs string, out io.Writer) *lab {
	return &lab{stack: s, dir: dir, logs: logs, began: time.Now(), out: out, slow: make(chan struct{}, 2)}
}

// pod is a stored pod whose sidecar runs.
type pod struct {
	name, role string
	env        []string // of its application
	sidecar    *stack.Sidecar
	callEvery  time.Duration // the minimum time between two calls to the broker
	created    time.Time
	stopped    time.Time
	stsCalls   int // for the role, when the pod was stopped: later the broker prefetches for the stored pods
}

// row is one client on one path.
type row struct {
	sdk     sdk
	path    string
	command []string
	version string

	pod      *pod
	script   *script
	firstKey string // empty if the client does not report its key
	over     bool   // the remaining scenarios are not tried

	mu      sync.Mutex
	results map[string]result // by scenario
}

func (r *row) name() string { return r.sdk.name + "-" + r.path }

// faults returns a line for each result that is not as expected.
func (r *row) faults() (lines []string) {
	for _, s := range scenarios {
		want, got := r.sdk.expected(r.path, s.name), r.results[s.name]
		if want != "" && !want.met(got.outcome) {
			lines = append(lines, fmt.Sprintf("%s, %s: %s: got %q, want %q: %s %s", r.sdk.name, r.path, s.name, got.outcome, want, got.code, got.text))
		}
	}
	return lines
}

// set stores the result of a scenario. It returns nil, for callers to return.
func (r *row) set(scenario string, got result) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.results[scenario] = got
	return nil
}

// close stops all scripts and sidecars.
func (l *lab) close() {
	for _, r := range l.rows {
		if r.script != nil {
			r.script.stop()
		}
	}
	for _, p := range l.pods {
		l.stop(p)
	}
}

// stop stops a sidecar, and counts the STS calls for its role.
func (l *lab) stop(p *pod) {
	if p.stopped.IsZero() {
		p.sidecar.Stop(stopGrace)
		p.stopped, p.stsCalls = time.Now(), l.stack.STS.Count("AssumeRole", arn(p.role))
	}
}

func (l *lab) report(format string, args ...any) {
	l.mu.Lock()
	defer l.mu.Unlock()
	_, _ = fmt.Fprintf(l.out, "%4.0f s  %s\n", time.Since(l.began).Seconds(), fmt.Sprintf(format, args...))
}

// each calls do for all rows that are not over, at most limit at a time; -1: all.
func (l *lab) each(ctx context.Context, limit int, do func(context.Context, *row) error) error {
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(limit)
	for _, r := range l.rows {
		if r.over {
			continue
		}
		group.Go(func() error {
			if err := ctx.Err(); err != nil {
				return err
			}
			if err := do(ctx, r); err != nil {
				return fmt.Errorf("%s, %s: %w", r.sdk.name, r.path, err)
			}
			return ctx.Err() // a result of an interrupted call is none
		})
	}
	return group.Wait()
}

// sleep waits for d, or until ctx ends.
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

// newPod creates a pod with a role for a path, and starts its sidecar.
func (l *lab) newPod(ctx context.Context, name, role, path string, callEvery time.Duration) (*pod, error) {
	annotations := map[string]string{"iam.amazonaws.com/role": role, "iam.amazonaws.com/duration": shortest.String()}
	if role != lifeRole {
		annotations["iam.amazonaws.com/start-timeout"] = "1s" // the application starts before its first credentials
	}
	if path == metadataV1 {
		annotations["iam.amazonaws.com/imds"] = "v1"
	}
	object := stack.Pod(name, annotations)
	// Kubernetes sets the label when it binds a pod to a node, from 1.35 on. There are no nodes here.
	object.Labels = map[string]string{corev1.LabelTopologyZone: stack.Region + "a"}
	p := &pod{name: name, role: role, callEvery: callEvery, created: time.Now()}
	object, err := l.stack.Client.CoreV1().Pods(namespace).Create(ctx, object, metav1.CreateOptions{})
	if err != nil {
		return nil, fmt.Errorf("creating pod %s: %w", name, err)
	}
	if p.sidecar, err = l.stack.RunSidecar(ctx, object); err != nil {
		return nil, err
	}
	l.mu.Lock()
	l.pods = append(l.pods, p)
	l.mu.Unlock()
	env, err := p.sidecar.AppEnv()
	if err != nil {
		return nil, err
	}
	p.env = append(env, "PATH="+os.Getenv("PATH"), "STS_ENDPOINT="+l.stack.STS.URL(),
		"AWS_REGION="+stack.Region, "AWS_DEFAULT_REGION="+stack.Region)
	return p, nil
}

// on returns the environment of p's application as a client has it on a path.
func (p *pod) on(path string) []string {
	if path == container {
		// Otherwise a client whose container credentials fail can use instance metadata unnoticed.
		return append(slices.Clone(p.env), noMetadataVariable+"=true")
	}
	env := slices.DeleteFunc(slices.Clone(p.env), func(e string) bool { return strings.HasPrefix(e, "AWS_CONTAINER_") })
	if path == metadataV1 {
		env = append(env, "IMDS_VERSION=1") // for curl's script
	}
	return env
}

// without returns a copy of env without some variables.
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

// start starts r's script with an environment. The name is that of its home and its log.
func (l *lab) start(ctx context.Context, r *row, env []string, name string) (*script, error) {
	home := filepath.Join(l.dir, "homes", name)
	if err := os.MkdirAll(home, 0o700); err != nil {
		return nil, fmt.Errorf("making a home: %w", err)
	}
	var turns chan struct{}
	if r.sdk.slow {
		turns = l.slow
	}
	return startScript(ctx, r.command, append(slices.Clone(env), "HOME="+home), home, filepath.Join(l.logs, "client-"+name+".log"), turns)
}

func arn(role string) string { return "arn:aws:iam::" + stack.Account + ":role/" + role }

// assumed returns the ARN by which STS knows a session of role.
func assumed(role string) string {
	return "arn:aws:sts::" + stack.Account + ":assumed-role/" + role + "/credence"
}

// refusal is an error response of a sidecar.
type refusal struct {
	Code    string `json:"code"`
	Message string `json:"message"`
}

// requestCredentials requests credentials from the container endpoint in env. It returns the refusal, or the
// expiration that the sidecar states.
func requestCredentials(ctx context.Context, env []string) (*refusal, time.Time, error) {
	var body struct {
		refusal
		Expiration time.Time `json:"Expiration"`
	}
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, value(env, fullURIVariable), nil)
	if err != nil {
		return nil, body.Expiration, fmt.Errorf("requesting credentials from the sidecar: %w", err)
	}
	request.Header.Set("Authorization", value(env, authorizationVariable))
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		return nil, body.Expiration, fmt.Errorf("requesting credentials from the sidecar: %w", err)
	}
	defer response.Body.Close()
	_ = json.NewDecoder(response.Body).Decode(&body) // the error could quote a secret; without it, the fields are empty
	switch ok := response.StatusCode == http.StatusOK; {
	case ok && !body.Expiration.IsZero():
		return nil, body.Expiration, nil
	case !ok && body.Code != "" && body.Message != "":
		return &body.refusal, body.Expiration, nil
	}
	return nil, body.Expiration, fmt.Errorf("the sidecar responds with status %d and neither expiration nor reason", response.StatusCode)
}

// wantRefusal requests credentials and returns the refusal, whose code must be the given one.
func wantRefusal(ctx context.Context, env []string, code string) (*refusal, error) {
	r, expiration, err := requestCredentials(ctx, env)
	switch {
	case err != nil:
		return nil, err
	case r == nil:
		return nil, fmt.Errorf("the sidecar serves credentials until %v, want %s", expiration, code)
	case r.Code != code:
		return nil, fmt.Errorf("the sidecar refuses with %s, want %s", r.Code, code)
	}
	return r, nil
}

// door is a proxy before a sidecar. It reports the first connection.
type door struct {
	env   []string // with the proxy's address
	first chan struct{}
	close func()
}

// newDoor starts a door before the sidecar that env names.
func newDoor(ctx context.Context, env []string) (*door, error) {
	target, err := url.Parse(value(env, metadataVariable))
	if err != nil {
		return nil, fmt.Errorf("parsing the sidecar's address: %w", err)
	}
	listener, err := new(net.ListenConfig).Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return nil, fmt.Errorf("starting a proxy: %w", err)
	}
	d := &door{first: make(chan struct{})}
	opened := sync.OnceFunc(func() { close(d.first) })
	server := &http.Server{
		Handler:           &httputil.ReverseProxy{Rewrite: func(r *httputil.ProxyRequest) { r.SetURL(target) }},
		ReadHeaderTimeout: responseTimeout,
		ConnState:         func(net.Conn, http.ConnState) { opened() },
	}
	go func() { _ = server.Serve(listener) }()
	d.close = func() { _ = server.Close() }
	for _, e := range env {
		d.env = append(d.env, strings.ReplaceAll(e, target.Host, listener.Addr().String()))
	}
	return d, nil
}

// brokerCalls counts the decisions of an audit log by the name of the pod in our namespace.
func brokerCalls(log string) (map[string]int, error) {
	file, err := os.Open(log)
	if err != nil {
		return nil, fmt.Errorf("reading the audit log: %w", err)
	}
	defer file.Close()
	calls := make(map[string]int)
	lines := bufio.NewScanner(file)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		var line struct{ Decision, Namespace, Pod string }
		if json.Unmarshal(lines.Bytes(), &line) == nil && line.Decision != "" && line.Namespace == namespace {
			calls[line.Pod]++
		}
	}
	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("reading the audit log: %w", err)
	}
	return calls, nil
}

// storms returns a line for each sidecar that called the broker too often, and for each role for which the broker
// called STS too often. It also returns a line if there was no call, because then the count is wrong. It stops all
// pods.
func (l *lab) storms() ([]string, error) {
	for _, p := range l.pods {
		l.stop(p)
	}
	calls, err := brokerCalls(l.stack.Broker.Log())
	if err != nil {
		return nil, err
	}
	return storms(l.pods, calls, l.brokerAbsence), nil
}

// storms allows each sidecar one call per p.callEvery while there was a broker, one at the start, and one when the
// broker returned. The pods of a role share a session: the broker calls STS no more often than one of them calls it,
// and for a refused or slow role, no more often than all of them call it.
func storms(pods []*pod, calls map[string]int, absence time.Duration) (lines []string) {
	limits, stsCalls := make(map[string]int), make(map[string]int) // by role
	for _, p := range pods {
		lived, least := p.stopped.Sub(p.created), 1
		if p.role == lifeRole {
			lived, least = lived-absence, 2 // it renews
		}
		n, limit := calls[p.name], int(lived/p.callEvery)+2
		if n < least || n > limit {
			lines = append(lines, fmt.Sprintf("pod %s: the sidecar called the broker %d times, want %d to %d", p.name, n, least, limit))
		}
		if p.role == lifeRole {
			limits[p.role] = max(limits[p.role], limit)
		} else {
			limits[p.role] += n
		}
		stsCalls[p.role] = max(stsCalls[p.role], p.stsCalls)
	}
	for role, limit := range limits {
		if n := stsCalls[role]; n < 1 || n > limit {
			lines = append(lines, fmt.Sprintf("role %s: the broker called STS %d times, want 1 to %d", role, n, limit))
		}
	}
	return lines
}
