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
	"syscall"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/credence-iam/credence/broker/assume/ststest"
	"github.com/credence-iam/credence/integration/stack"
)

const (
	namespace = "sdks"

	// shortest is the shortest session that STS gives; asked for it, the double gives one of -life.
	shortest = 15 * time.Minute
	// stopGrace lets a sidecar end by itself.
	stopGrace = 5 * time.Second
	// dialTimeout is for a connection on this machine.
	dialTimeout = 5 * time.Second

	authorizationVariable = "AWS_CONTAINER_AUTHORIZATION_TOKEN"
	fullURIVariable       = "AWS_CONTAINER_CREDENTIALS_FULL_URI"
	metadataVariable      = "AWS_EC2_METADATA_SERVICE_ENDPOINT"
)

// world is where clients are tried. There is the real one, which is a stack, and that of the tests, which is in memory and
// has virtual time.
type world interface {
	// pod makes a pod with that role and runs its sidecar, which may not have credentials yet.
	pod(ctx context.Context, name, role string, path Path) (*pod, error)
	// ask asks the sidecar that env belongs to for the credentials of role, with a wrong token unless that is empty. It
	// returns what the sidecar refuses with, or until when the credentials are valid as it states.
	ask(ctx context.Context, env []string, role, wrong string) (*refusal, time.Time, error)
	// door opens a door before the sidecar that env belongs to.
	door(ctx context.Context, env []string) (*door, error)
	// driver starts a driver; name is that of its home and its log.
	driver(ctx context.Context, command, env []string, name string) (*driver, error)
	// behave tells STS what to do with a role.
	behave(role string, b ststest.Behavior)
	// stopBroker takes the broker away, and sees that it is.
	stopBroker(ctx context.Context) error
	startBroker(ctx context.Context) error
	// brokerCalls is how often the broker was asked, by the name of the pod.
	brokerCalls() (map[string]int, error)
	// stsCalls is how often STS was asked for a session of role.
	stsCalls(role string) int
}

// pod is a pod with a sidecar that runs.
type pod struct {
	env  []string // of its application
	stop func()
}

// real is a world that is a stack.
type real struct {
	stack *stack.Stack
	dir   string // for homes
	logs  string // for what drivers say besides

	namespaceMade sync.Once
	namespaceErr  error
}

func arn(role string) string { return "arn:aws:iam::" + stack.Account + ":role/" + role }

// assumed is the ARN that STS knows a session of role by.
func assumed(role string) string {
	return "arn:aws:sts::" + stack.Account + ":assumed-role/" + role + "/credence"
}

func (w *real) pod(ctx context.Context, name, role string, path Path) (*pod, error) {
	w.namespaceMade.Do(func() {
		w.namespaceErr = w.stack.Namespace(ctx, namespace, map[string]string{"iam.amazonaws.com/permitted": ".*"})
	})
	if w.namespaceErr != nil {
		return nil, w.namespaceErr
	}
	annotations := map[string]string{"iam.amazonaws.com/role": role, "iam.amazonaws.com/duration": shortest.String()}
	if role != lifeRole {
		// The application begins before there are credentials.
		annotations["iam.amazonaws.com/start-timeout"] = "1s"
	}
	if path == MetadataV1 {
		annotations["iam.amazonaws.com/imds"] = "v1"
	}
	p := stack.Pod(name, annotations)
	// As Kubernetes does when a pod is bound to a node, from 1.35 on. There are no nodes here.
	p.Labels = map[string]string{corev1.LabelTopologyZone: stack.Region + "a"}
	p, err := w.stack.Client.CoreV1().Pods(namespace).Create(ctx, p, metav1.CreateOptions{})
	if err != nil {
		return nil, fmt.Errorf("making pod %s: %w", name, err)
	}
	sidecar, err := w.stack.RunSidecar(ctx, p)
	if err != nil {
		return nil, err
	}
	env, err := sidecar.AppEnv()
	if err != nil {
		sidecar.Stop(stopGrace)
		return nil, err
	}
	env = append(env, "PATH="+os.Getenv("PATH"), "STS_ENDPOINT="+w.stack.STS.URL(),
		"AWS_REGION="+stack.Region, "AWS_DEFAULT_REGION="+stack.Region)
	return &pod{env: env, stop: func() { sidecar.Stop(stopGrace) }}, nil
}

func (w *real) driver(ctx context.Context, command, env []string, name string) (*driver, error) {
	home := filepath.Join(w.dir, "homes", name)
	if err := os.MkdirAll(home, 0o700); err != nil {
		return nil, fmt.Errorf("making a home: %w", err)
	}
	return startDriver(ctx, command, append(slices.Clone(env), "HOME="+home), home, filepath.Join(w.logs, "driver-"+name+".log"))
}

func (w *real) behave(role string, b ststest.Behavior) { w.stack.STS.SetRole(arn(role), b) }

func (w *real) stsCalls(role string) int { return w.stack.STS.Count("AssumeRole", arn(role)) }

func (w *real) stopBroker(ctx context.Context) error {
	w.stack.StopBroker()
	return nobodyAt(ctx, w.stack.BrokerAddress())
}

func (w *real) startBroker(ctx context.Context) error { return w.stack.StartBroker(ctx) }

func (w *real) brokerCalls() (map[string]int, error) { return auditedCalls(w.stack.BrokerLog()) }

// nobodyAt returns an error unless connections to the address are refused.
func nobodyAt(ctx context.Context, address string) error {
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	conn, err := new(net.Dialer).DialContext(ctx, "tcp", address)
	if err == nil {
		_ = conn.Close()
		return fmt.Errorf("somebody answers at %s, where the broker was stopped", address)
	}
	if !errors.Is(err, syscall.ECONNREFUSED) {
		return fmt.Errorf("seeing that the broker is away: %w", err)
	}
	return nil
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

func (w *real) ask(ctx context.Context, env []string, role, wrong string) (*refusal, time.Time, error) {
	return askSidecar(ctx, env, role, wrong)
}

func askSidecar(ctx context.Context, env []string, role, wrong string) (*refusal, time.Time, error) {
	target := value(env, fullURIVariable)
	header, token := "Authorization", value(env, authorizationVariable)
	if wrong != "" {
		token = wrong
	}
	if target == "" {
		target = value(env, metadataVariable) + "/latest/meta-data/iam/security-credentials/" + role
		var err error
		if header, token, err = metadataToken(ctx, env); err != nil {
			return nil, time.Time{}, err
		}
	}
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, target, nil)
	if err != nil {
		return nil, time.Time{}, fmt.Errorf("asking the sidecar: %w", err)
	}
	request.Header.Set(header, token)
	status, body, err := send(request)
	if err != nil {
		return nil, time.Time{}, err
	}
	if status == http.StatusOK {
		var given struct{ Expiration time.Time }
		if json.Unmarshal(body, &given) != nil || given.Expiration.IsZero() {
			return nil, time.Time{}, errors.New("asking the sidecar: it answers without an Expiration")
		}
		return nil, given.Expiration, nil
	}
	r := refusal{Status: status}
	if json.Unmarshal(body, &r) != nil || r.Code == "" || r.Message == "" {
		return nil, time.Time{}, fmt.Errorf("asking the sidecar: it answers %d without a reason", status)
	}
	return &r, time.Time{}, nil
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
	close func()        // closes the door and all connections through it
}

// opened says whether somebody has come.
func (d *door) opened() bool {
	select {
	case <-d.first:
		return true
	default:
		return false
	}
}

func (w *real) door(ctx context.Context, env []string) (*door, error) { return openDoor(ctx, env) }

func openDoor(ctx context.Context, env []string) (*door, error) {
	target, err := url.Parse(value(env, metadataVariable))
	if err != nil {
		return nil, fmt.Errorf("reading the sidecar's address: %w", err)
	}
	listener, err := new(net.ListenConfig).Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return nil, fmt.Errorf("opening a door: %w", err)
	}
	f := &forwarder{listener: listener, target: target.Host}
	d := &door{first: make(chan struct{}), close: f.close}
	for _, e := range env {
		d.env = append(d.env, strings.ReplaceAll(e, target.Host, listener.Addr().String()))
	}
	f.all.Go(func() { f.serve(ctx, sync.OnceFunc(func() { close(d.first) })) })
	return d, nil
}

// forwarder forwards connections, for a door.
type forwarder struct {
	listener net.Listener
	target   string

	all    sync.WaitGroup
	mu     sync.Mutex
	closed bool
	conns  []net.Conn
}

func (f *forwarder) serve(ctx context.Context, tell func()) {
	for {
		client, err := f.listener.Accept()
		if err != nil {
			return // closed
		}
		tell()
		server, err := new(net.Dialer).DialContext(ctx, "tcp", f.target)
		if err != nil {
			_ = client.Close()
			continue
		}
		if !f.keep(client, server) {
			_, _ = client.Close(), server.Close()
			return
		}
		for _, pair := range [][2]net.Conn{{client, server}, {server, client}} {
			f.all.Go(func() {
				_, _ = io.Copy(pair[0], pair[1])
				_, _ = pair[0].Close(), pair[1].Close()
			})
		}
	}
}

// keep remembers connections to be closed; false if it is closed already.
func (f *forwarder) keep(conns ...net.Conn) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.conns = append(f.conns, conns...)
	return !f.closed
}

func (f *forwarder) close() {
	_ = f.listener.Close()
	f.mu.Lock()
	f.closed = true
	for _, conn := range f.conns {
		_ = conn.Close()
	}
	f.mu.Unlock()
	f.all.Wait()
}
