//go:build unix

package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
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
	// Roles that pods have.
	lifeRole    = "sdks"
	refusedRole = "untrusting"

	// shortest is the shortest session that STS gives; asked for it, the double gives one of -life.
	shortest = 15 * time.Minute
	// sideBySide bounds how many clients are started at once, and how many answer at once where all do: some
	// take a second of a processor.
	sideBySide = 4
	// stopGrace lets a sidecar end by itself.
	stopGrace = 5 * time.Second

	authorizationVariable = "AWS_CONTAINER_AUTHORIZATION_TOKEN"
	fullURIVariable       = "AWS_CONTAINER_CREDENTIALS_FULL_URI"
	metadataVariable      = "AWS_EC2_METADATA_SERVICE_ENDPOINT"
)

func arn(role string) string { return "arn:aws:iam::" + stack.Account + ":role/" + role }

// assumed is the ARN that STS knows a session of role by.
func assumed(role string) string {
	return "arn:aws:sts::" + stack.Account + ":assumed-role/" + role + "/credence"
}

// matrix is all that is tried.
type matrix struct {
	stack    *stack.Stack
	life     time.Duration
	gone     time.Time     // when the broker went away
	absence  time.Duration // how long it was away
	dir      string        // for homes
	logs     string        // for what drivers say besides
	progress io.Writer
	began    time.Time
	rows     []*row
	stsCalls int

	namespaceMade sync.Once
	namespaceErr  error
}

// row is one client on one path.
type row struct {
	client  client
	path    Path
	command []string // of its driver
	report  Row

	created time.Time // when its pod was
	sidecar *stack.Sidecar
	env     []string
	driver  *driver
	key     string // of its first session; empty if the client does not tell
	left    bool   // nothing more is to be tried, since the client cannot use the path

	mu sync.Mutex // guards report.Cells
}

// name is the row's in the cluster and in folders.
func (r *row) name() string { return r.client.name + "-" + string(r.path) }

// add adds the rows of a client.
func (m *matrix) add(ctx context.Context, c client, f *finder) error {
	command, err := c.find(f, ctx)
	if ctx.Err() != nil {
		return ctx.Err()
	}
	reason, missing := errors.AsType[notRun](err)
	if err != nil && !missing {
		return err
	}
	for _, path := range c.paths {
		m.rows = append(m.rows, &row{client: c, path: path, command: command, report: Row{Client: c.name, Path: path, NotRun: string(reason)}})
	}
	if missing {
		m.tell("not run: %s: %s", c.name, reason)
	}
	return nil
}

// tell says how far it is.
func (m *matrix) tell(format string, args ...any) {
	if m.began.IsZero() {
		m.began = time.Now()
	}
	_, _ = fmt.Fprintf(m.progress, "%4.0f s  %s\n", time.Since(m.began).Seconds(), fmt.Sprintf(format, args...))
}

// each calls do for all rows that are run, side by side.
func (m *matrix) each(ctx context.Context, do func(context.Context, *row) error) error {
	return m.few(ctx, -1, do)
}

// few calls do for all rows that are run, so many at once.
func (m *matrix) few(ctx context.Context, limit int, do func(context.Context, *row) error) error {
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(limit)
	for _, r := range m.rows {
		if r.report.NotRun != "" || r.left {
			continue
		}
		group.Go(func() error {
			if err := do(ctx, r); err != nil {
				return fmt.Errorf("%s, %s: %w", r.client.name, r.path, err)
			}
			return nil
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

// close ends the drivers.
func (m *matrix) close() {
	for _, r := range m.rows {
		if r.driver != nil {
			r.driver.stop()
		}
		if r.sidecar != nil {
			r.sidecar.Stop(stopGrace)
		}
	}
}

// report is what was found.
func (m *matrix) report() *Report {
	report := &Report{Schema: Schema, Started: m.began.UTC().Truncate(time.Second), Life: m.life.Seconds(), STSCalls: m.stsCalls}
	for _, r := range m.rows {
		slices.SortStableFunc(r.report.Cells, func(a, b Cell) int { return order(a.Scenario) - order(b.Scenario) })
		report.Rows = append(report.Rows, r.report)
	}
	return report
}

func order(name string) int {
	return slices.IndexFunc(scenarios, func(s scenario) bool { return s.name == name })
}

// start starts the row's pod and driver.
func (m *matrix) start(ctx context.Context, r *row) (err error) {
	r.created = time.Now()
	if r.sidecar, err = m.pod(ctx, r.name(), lifeRole, r.path); err != nil {
		return err
	}
	if r.env, err = m.env(r.sidecar, r.path); err != nil {
		return err
	}
	if r.driver, err = m.driver(ctx, r, r.name(), r.env); err != nil {
		return err
	}
	r.report.Version = strings.TrimPrefix(r.driver.Version, "v")
	return nil
}

// restart starts the row's driver anew.
func (r *row) restart(ctx context.Context, m *matrix) (err error) {
	r.driver.stop()
	r.driver = nil
	r.driver, err = m.driver(ctx, r, r.name(), r.env)
	return err
}

// once tries one command with a driver made for it.
func (r *row) once(ctx context.Context, m *matrix, name string, env []string, command, role string, refusal *refusal) error {
	d, err := m.driver(ctx, r, name+"-"+r.name(), env)
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

// pod makes a pod with that role and runs its sidecar, which may not have credentials yet.
func (m *matrix) pod(ctx context.Context, name, role string, path Path) (*stack.Sidecar, error) {
	m.namespaceMade.Do(func() {
		m.namespaceErr = m.stack.Namespace(ctx, namespace, map[string]string{"iam.amazonaws.com/permitted": ".*"})
	})
	if m.namespaceErr != nil {
		return nil, m.namespaceErr
	}
	annotations := map[string]string{"iam.amazonaws.com/role": role, "iam.amazonaws.com/duration": shortest.String()}
	if role != lifeRole {
		// The application begins before there are credentials.
		annotations["iam.amazonaws.com/start-timeout"] = "1s"
	}
	if path == MetadataV1 {
		annotations["iam.amazonaws.com/imds"] = "v1"
	}
	pod := stack.Pod(name, annotations)
	// As Kubernetes does when a pod is bound to a node, from 1.35 on. There are no nodes here.
	pod.Labels = map[string]string{corev1.LabelTopologyZone: stack.Region + "a"}
	pod, err := m.stack.Client.CoreV1().Pods(namespace).Create(ctx, pod, metav1.CreateOptions{})
	if err != nil {
		return nil, fmt.Errorf("making pod %s: %w", name, err)
	}
	return m.stack.RunSidecar(ctx, pod)
}

// podForEach makes a pod for each kind of metadata, and returns what tells the environment of a path.
func (m *matrix) podForEach(ctx context.Context, name, role string) (func(Path) ([]string, error), error) {
	sidecars := make(map[Path]*stack.Sidecar)
	for _, path := range []Path{MetadataV2, MetadataV1} {
		sidecar, err := m.pod(ctx, name+"-"+string(path), role, path)
		if err != nil {
			return nil, err
		}
		sidecars[path] = sidecar
	}
	sidecars[Container] = sidecars[MetadataV2]
	return func(path Path) ([]string, error) { return m.env(sidecars[path], path) }, nil
}

// noMetadata keeps clients from instance metadata.
const noMetadata = "AWS_EC2_METADATA_DISABLED=true"

// env is the environment of a client in the pod of that sidecar: what the pod has, without what the path does
// without, the search path of this machine, and where STS is.
func (m *matrix) env(sidecar *stack.Sidecar, path Path) ([]string, error) {
	env, err := sidecar.AppEnv()
	if err != nil {
		return nil, err
	}
	if path == Container {
		// Or a client whose container credentials fail goes on to instance metadata, and nobody sees it.
		env = append(env, noMetadata)
	} else {
		env = slices.DeleteFunc(env, func(e string) bool { return strings.HasPrefix(e, "AWS_CONTAINER_") })
	}
	if path == MetadataV1 {
		env = append(env, "IMDS_VERSION=1")
	}
	return append(env, "PATH="+os.Getenv("PATH"), "STS_ENDPOINT="+m.stack.STS.URL(),
		"AWS_REGION="+stack.Region, "AWS_DEFAULT_REGION="+stack.Region), nil
}

// driver starts the row's driver, with a home of its own.
func (m *matrix) driver(ctx context.Context, r *row, name string, env []string) (*driver, error) {
	home := filepath.Join(m.dir, "homes", name)
	if err := os.MkdirAll(home, 0o700); err != nil {
		return nil, fmt.Errorf("making a home: %w", err)
	}
	return startDriver(ctx, r.command, append(slices.Clone(env), "HOME="+home), home, filepath.Join(m.logs, "driver-"+name+".log"))
}

// replace returns env with another value of a variable.
func replace(env []string, name, value string) []string {
	return append(without(env, name), name+"="+value)
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

// refusal is an error that a sidecar answers.
type refusal struct {
	Status  int    `json:"-"`
	Code    string `json:"code"`
	Message string `json:"message"`
}

// shows says whether a client's error has the code, or the message.
func (r refusal) shows(a answer) bool {
	return strings.Contains(a.Error+"\n"+a.Code, r.Code) || strings.Contains(a.Error, r.Message)
}

// askSidecar asks the sidecar that env belongs to for the credentials of role, with a wrong token unless that is
// empty, and returns the error that it answers. An answer with credentials is an error here.
func askSidecar(ctx context.Context, env []string, role, wrong string) (*refusal, error) {
	target := value(env, fullURIVariable)
	header, token := "Authorization", value(env, authorizationVariable)
	if wrong != "" {
		token = wrong
	}
	if target == "" {
		target = value(env, metadataVariable) + "/latest/meta-data/iam/security-credentials/" + role
		var err error
		if header, token, err = metadataToken(ctx, env); err != nil {
			return nil, err
		}
	}
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, target, nil)
	if err != nil {
		return nil, fmt.Errorf("asking the sidecar: %w", err)
	}
	request.Header.Set(header, token)
	status, body, err := send(request)
	if err != nil {
		return nil, err
	}
	var r refusal
	if status == http.StatusOK || json.Unmarshal(body, &r) != nil || r.Code == "" || r.Message == "" {
		return nil, fmt.Errorf("asking the sidecar: it answers %d without a reason", status)
	}
	r.Status = status
	return &r, nil
}

// is returns an error unless the sidecar refuses with that status and code, which no client can make good.
func (r refusal) is(status int, code string) error {
	if r.Status != status || r.Code != code {
		return fmt.Errorf("the sidecar answers %d %s, want %d %s", r.Status, r.Code, status, code)
	}
	return nil
}

// metadataToken gets a session token of the metadata service.
func metadataToken(ctx context.Context, env []string) (header, token string, err error) {
	request, err := http.NewRequestWithContext(ctx, http.MethodPut, value(env, metadataVariable)+"/latest/api/token", nil)
	if err != nil {
		return "", "", fmt.Errorf("asking the sidecar for a session token: %w", err)
	}
	request.Header.Set("X-Aws-Ec2-Metadata-Token-Ttl-Seconds", "60")
	status, body, err := send(request)
	if err == nil && status != http.StatusOK {
		err = fmt.Errorf("asking the sidecar for a session token: it answers %d", status)
	}
	return "X-Aws-Ec2-Metadata-Token", string(body), err
}

func send(request *http.Request) (status int, body []byte, err error) {
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		return 0, nil, fmt.Errorf("asking the sidecar: %w", err)
	}
	defer response.Body.Close()
	body, err = io.ReadAll(io.LimitReader(response.Body, 1<<20))
	if err != nil {
		return 0, nil, fmt.Errorf("asking the sidecar: %w", err)
	}
	return response.StatusCode, body, nil
}

// auditedCalls counts the decisions of an audit log by the name of the pod in our namespace.
func auditedCalls(log string) (map[string]int, error) {
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

// door stands before a sidecar and tells when the first request comes.
type door struct {
	env   []string      // with the door's address in place of the sidecar's
	first chan struct{} // closed at the first connection

	listener net.Listener
	all      sync.WaitGroup
	mu       sync.Mutex
	closed   bool
	conns    []net.Conn
}

// openDoor opens one for the sidecar that env names.
func openDoor(ctx context.Context, env []string) (*door, error) {
	target, err := url.Parse(value(env, metadataVariable))
	if err != nil {
		return nil, fmt.Errorf("reading the sidecar's address: %w", err)
	}
	listener, err := new(net.ListenConfig).Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return nil, fmt.Errorf("opening a door: %w", err)
	}
	d := &door{first: make(chan struct{}), listener: listener}
	for _, e := range env {
		d.env = append(d.env, strings.ReplaceAll(e, target.Host, listener.Addr().String()))
	}
	d.all.Go(func() { d.serve(ctx, target.Host) })
	return d, nil
}

func (d *door) serve(ctx context.Context, target string) {
	tell := sync.OnceFunc(func() { close(d.first) })
	for {
		client, err := d.listener.Accept()
		if err != nil {
			return // closed
		}
		tell()
		server, err := new(net.Dialer).DialContext(ctx, "tcp", target)
		if err != nil {
			_ = client.Close()
			continue
		}
		if !d.keep(client, server) {
			_, _ = client.Close(), server.Close()
			return
		}
		for _, pair := range [][2]net.Conn{{client, server}, {server, client}} {
			d.all.Go(func() {
				_, _ = io.Copy(pair[0], pair[1])
				_, _ = pair[0].Close(), pair[1].Close()
			})
		}
	}
}

// keep remembers connections to be closed; false if the door is closed already.
func (d *door) keep(conns ...net.Conn) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.conns = append(d.conns, conns...)
	return !d.closed
}

// close closes the door and all connections through it.
func (d *door) close() {
	_ = d.listener.Close()
	d.mu.Lock()
	d.closed = true
	for _, conn := range d.conns {
		_ = conn.Close()
	}
	d.mu.Unlock()
	d.all.Wait()
}
