package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/peer"

	"github.com/credence-iam/credence/broker"
	"github.com/credence-iam/credence/broker/brokertest"
	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/identity"
	"github.com/credence-iam/credence/broker/placement"
	"github.com/credence-iam/credence/broker/policy"
	"github.com/credence-iam/credence/certs"
	"github.com/credence-iam/credence/certs/certstest"
	"github.com/credence-iam/credence/cmd/internal/program/processtest"
	"github.com/credence-iam/credence/sidecar/contract"
)

// wiring has a row for each flag: what changes when it is given. A flag can have several. Each row runs the program
// against a real broker, and asks it as an SDK does; so a row fails when a flag is parsed and then forgotten. A new flag
// needs a row here.
var wiring = []struct {
	flag, shows string
	run         func(w *world)
}{
	{"broker-dns-name", "brokers are looked up by it, and prove the host of --broker", func(w *world) {
		const host, full = "brokers.test", "brokers.test.svc.corp.example"
		listener := listen(w.T, "127.0.0.1:0")
		w.broker(host, listener)
		target := net.JoinHostPort(host, portOf(listener.Addr().String()))
		w.startWith("127.0.0.1 "+full+"\n", "--broker="+target, "--broker-dns-name="+full+".").mustServe("cart")
	}},
	{"broker", "brokers are called there, and must prove that name", func(w *world) {
		w.start("--broker=" + w.target).mustServe("cart")
		other := w.start("--broker=127.0.0.1" + strings.TrimPrefix(w.target, brokerHost))
		other.Logged(w.T, "Could not get credentials")
		if status, _ := other.credentials(authorization); status == http.StatusOK {
			w.Error("a broker that has not proved its name was believed")
		}
	}},
	{"listen", "SDKs are served there", func(w *world) {
		address := freeAddress(w.T)
		s := w.start("--listen=" + address)
		if s.address != address {
			w.Errorf("the sidecar serves on %s, want %s", s.address, address)
		}
		s.mustServe("cart")
	}},
	{"token-file", "the token in it says who the pod is", func(w *world) {
		file := filepath.Join(w.TempDir(), "other-token")
		must(w, os.WriteFile(file, []byte("till-token"), 0o600))
		w.start("--token-file=" + file).mustServe("till")
	}},
	{"roots-file", "brokers are verified by the roots in it", func(w *world) {
		w.start("--roots-file=" + w.rootsFile).mustServe("cart")
		s := w.start("--roots-file=" + certstest.NewCA(w).WriteTo(w.TempDir()))
		s.Logged(w.T, "Could not get credentials")
		if status, _ := s.credentials(authorization); status == http.StatusOK {
			w.Error("a broker was believed whose root is not in the file")
		}
	}},
	{"authorization", "requests without it are refused", func(w *world) {
		s := w.start("--authorization=the-pods-uid")
		s.Await(w.T, "one with it is served", func() bool { status, _ := s.credentials("the-pods-uid"); return status == http.StatusOK })
		if status, _ := s.credentials(authorization); status != http.StatusForbidden {
			w.Errorf("one with another is answered with %d", status)
		}
	}},
	{"metadata", "v1 serves instance metadata without a session", func(w *world) {
		s := w.start("--metadata=v1")
		s.mustServe("cart")
		if status, text := s.get("/latest/meta-data/iam/security-credentials/", ""); status != http.StatusOK {
			w.Errorf("the answer is %d: %s", status, text)
		}
	}},
	{"metadata", "v2 serves it with one only", func(w *world) {
		s := w.start("--metadata=v2")
		s.mustServe("cart")
		if status, text := s.get("/latest/meta-data/iam/security-credentials/", ""); status != http.StatusUnauthorized {
			w.Errorf("the answer is %d: %s", status, text)
		}
	}},
	{"metadata", "off serves none", func(w *world) {
		s := w.start("--metadata=off")
		s.mustServe("cart")
		if status, text := s.get("/latest/meta-data/iam/security-credentials/", ""); status != http.StatusNotFound {
			w.Errorf("the answer is %d: %s", status, text)
		}
	}},
	{"zone", "instance metadata names it", func(w *world) {
		s := w.start("--zone=eu-central-1b", "--metadata=v1")
		s.mustServe("cart")
		if status, text := s.get("/latest/meta-data/placement/availability-zone", ""); status != http.StatusOK || text != "eu-central-1b" {
			w.Errorf("the answer is %d: %s", status, text)
		}
	}},
	{"start-timeout", "after it, the application may start without credentials", func(w *world) {
		s := w.start("--broker="+net.JoinHostPort(brokerHost, portOf(freeAddress(w.T))), "--start-timeout=1ms")
		s.Await(w.T, "the sidecar says that it is ready", func() bool { status, _ := s.get("/v1/ready", ""); return status == http.StatusNoContent })
		must(w, processtest.Start(w.T, processtest.Command{Args: []string{"--listen=" + s.address, "probe"}}).Wait())
	}},
	{"log-level", "warn leaves out that credentials came", func(w *world) {
		address := freeAddress(w.T)
		s := &running{Process: w.process("--log-level=warn", "--listen="+address), w: w, address: address}
		s.mustServe("cart")
		if len(s.Stderr.Lines("level", "INFO")) > 0 {
			w.Errorf("the log is %s", s.Stderr)
		}
	}},
	{"routing-key", "a broker that owns it is called first", func(w *world) {
		w.callsTheOwner(func(key policy.RoutingKey) (args []string, owned policy.RoutingKey) {
			return []string{"--routing-key=" + string(key)}, key
		})
	}},
	{"pod-uid", "the key of a pod with a session of its own has it", func(w *world) {
		w.callsTheOwner(func(key policy.RoutingKey) (args []string, owned policy.RoutingKey) {
			return []string{"--routing-key=" + string(key), "--pod-uid=uid-1"}, key.ForPod("uid-1")
		})
	}},
}

// exempt are the flags whose effect no row shows, with the reason.
var exempt = map[string]string{}

// TestFlagsAreWired runs the rows.
func TestFlagsAreWired(t *testing.T) {
	t.Parallel()
	var rows []string
	for _, row := range wiring {
		rows = append(rows, row.flag)
		t.Run(row.flag+": "+row.shows, func(t *testing.T) {
			t.Parallel()
			row.run(newWorld(t))
		})
	}
	processtest.CheckFlags(t, flags, rows, exempt)
}

// TestVariablesAreWired: what the webhook sets instead of flags.
func TestVariablesAreWired(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	var env []string
	for _, arg := range w.args {
		name, value, _ := strings.Cut(strings.TrimPrefix(arg, "--"), "=")
		env = append(env, contract.Env(name)+"="+value)
	}
	s := w.await(processtest.Start(t, processtest.Command{Env: append(env, "CREDENCE_METADATA=v1", "CREDENCE_ZONE=eu-central-1c")}))
	s.mustServe("cart")
	if status, text := s.get("/latest/meta-data/placement/availability-zone", ""); status != http.StatusOK || text != "eu-central-1c" {
		t.Errorf("the zone is answered with %d: %s", status, text)
	}
}

// TestProbeWaits: the probe asks the sidecar at --listen until that has credentials.
func TestProbeWaits(t *testing.T) {
	t.Parallel()
	var asked atomic.Int64
	sidecar := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		status := http.StatusServiceUnavailable
		if asked.Add(1) == 3 && r.URL.Path == "/v1/ready" {
			status = http.StatusNoContent
		}
		w.WriteHeader(status)
	}))
	defer sidecar.Close()
	address := strings.TrimPrefix(sidecar.URL, "http://")
	must(t, processtest.Start(t, processtest.Command{Args: []string{"--listen=" + address, "probe"}}).Wait())
	if n := asked.Load(); n != 3 {
		t.Errorf("the probe has asked %d times, want 3", n)
	}
}

const (
	// brokerHost is the name of the broker that most rows use.
	brokerHost    = "localhost"
	authorization = "a-pods-uid"
)

// world is what a sidecar runs in: a broker that knows two pods by their tokens.
type world struct {
	*testing.T
	ca        *certstest.CA
	rootsFile string
	target    string // HOST:PORT of the broker
	args      []string

	mu    sync.Mutex
	calls []netip.Addr // addresses at which the broker was called, in that order; guarded by mu
}

func newWorld(t *testing.T) *world {
	t.Helper()
	w := &world{T: t, ca: certstest.NewCA(t)}
	w.rootsFile = w.ca.WriteTo(t.TempDir())
	tokenFile := filepath.Join(t.TempDir(), "token")
	must(t, os.WriteFile(tokenFile, []byte("cart-token"), 0o600))
	listener := listen(t, "127.0.0.1:0")
	w.broker(brokerHost, listener)
	w.target = net.JoinHostPort(brokerHost, portOf(listener.Addr().String()))
	w.args = []string{
		"--broker=" + w.target, "--token-file=" + tokenFile, "--roots-file=" + w.rootsFile, "--authorization=" + authorization, "--listen=127.0.0.1:0",
	}
	return w
}

// broker serves one of that name on the listener.
func (w *world) broker(name string, listener net.Listener) {
	w.Helper()
	certFile, keyFile := w.ca.Leaf(name).WriteTo(w.TempDir())
	pair, err := certs.NewKeyPair(certFile, keyFile, nil)
	must(w, err)
	b := brokertest.Start(w, func(context.Context, policy.Grant) (credential.Credential, error) {
		return credential.Credential{
			AccessKeyID: "ASIAEXAMPLE", SecretAccessKey: credential.NewSecret("secret"), SessionToken: credential.NewSecret("token"),
			Issued: time.Now(), Expiration: time.Now().Add(time.Hour),
		}, nil
	}, io.Discard, func(_ *broker.Config, server *broker.ServerConfig) {
		server.Listener, server.TLS = listener, certs.ServerConfig(pair)
		server.Interceptors = []grpc.UnaryServerInterceptor{w.note}
	})
	for _, role := range []string{"cart", "till"} {
		b.Set(brokertest.Pod{
			Token:       role + "-token",
			Identity:    identity.Pod{Namespace: "shop", Name: role, UID: "uid-" + role, ServiceAccount: "default", ServiceAccountUID: "uid-1"},
			Annotations: map[string]string{"iam.amazonaws.com/role": role},
		})
	}
}

// note notes where the broker was called.
func (w *world) note(ctx context.Context, request any, _ *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	if p, ok := peer.FromContext(ctx); ok {
		if at, err := netip.ParseAddrPort(p.LocalAddr.String()); err == nil {
			w.mu.Lock()
			w.calls = append(w.calls, at.Addr().Unmap())
			w.mu.Unlock()
		}
	}
	return handler(ctx, request)
}

// callsTheOwner runs sidecars that find sixteen brokers, and looks which of them each calls. arguments returns what a
// sidecar is given for a key, and the key whose owner it must call.
func (w *world) callsTheOwner(arguments func(policy.RoutingKey) (args []string, owned policy.RoutingKey)) {
	const name, brokers = "brokers.test", 16
	var (
		addresses []netip.Addr
		hosts     strings.Builder
		port      = "0"
	)
	for i := range brokers {
		address := netip.AddrFrom4([4]byte{127, 0, 7, byte(1 + i)})
		listener, err := new(net.ListenConfig).Listen(w.Context(), "tcp", net.JoinHostPort(address.String(), port))
		if err != nil {
			w.Skip("not run: this machine lets nobody listen on all of 127.0.0.0/8: ", err)
		}
		port = portOf(listener.Addr().String())
		w.broker(name, listener)
		addresses = append(addresses, address)
		_, _ = fmt.Fprintln(&hosts, address, name)
	}
	// A sidecar without the key calls one of the two owners by chance, once in eight times. So there are four of them.
	for i := range 4 {
		args, owned := arguments(policy.RoutingKey(fmt.Sprintf("0011223344556677889900aabbccdd%02d", i)))
		w.mu.Lock()
		w.calls = nil
		w.mu.Unlock()
		w.startWith(hosts.String(), append(args, "--broker="+net.JoinHostPort(name, port))...).mustServe("cart")
		w.mu.Lock()
		first := w.calls[0]
		w.mu.Unlock()
		// The second one where this machine is so busy that the first one seems silent.
		if want := placement.Rank(string(owned), addresses)[:placement.Owners]; !slices.Contains(want, first) {
			w.Errorf("%q: the broker at %s was called first, want one of %s", args, first, want)
		}
	}
}

// process starts the program with more flags; the last of one name counts.
func (w *world) process(args ...string) *processtest.Process {
	w.Helper()
	return processtest.Start(w.T, processtest.Command{Args: slices.Concat(w.args, args)})
}

// start starts a sidecar with more flags, and waits until it listens.
func (w *world) start(args ...string) *running {
	w.Helper()
	return w.await(w.process(args...))
}

// startWith is start with another /etc/hosts, by its text.
func (w *world) startWith(hosts string, args ...string) *running {
	w.Helper()
	file := filepath.Join(w.TempDir(), "hosts")
	must(w, os.WriteFile(file, []byte(hosts), 0o644))
	return w.await(processtest.Start(w.T, processtest.Command{Args: slices.Concat(w.args, args), Hosts: file}))
}

func (w *world) await(p *processtest.Process) *running {
	w.Helper()
	return &running{Process: p, w: w, address: fmt.Sprint(p.Logged(w.T, "Listening")["address"])}
}

// running is a sidecar that runs.
type running struct {
	*processtest.Process
	w       *world
	address string
}

// get is a request. Its status is 0 if nobody answers.
func (s *running) get(path, authorization string) (status int, body string) {
	request, err := http.NewRequestWithContext(s.w.Context(), http.MethodGet, "http://"+s.address+path, nil)
	if err != nil {
		return 0, err.Error()
	}
	if authorization != "" {
		request.Header.Set("Authorization", authorization)
	}
	response, err := (&http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: processtest.Patience}).Do(request)
	if err != nil {
		return 0, err.Error()
	}
	defer response.Body.Close()
	text, err := io.ReadAll(io.LimitReader(response.Body, 1<<20))
	if err != nil {
		return 0, err.Error()
	}
	return response.StatusCode, string(text)
}

func (s *running) credentials(authorization string) (status int, body string) {
	return s.get("/v1/credentials", authorization)
}

// mustServe waits for credentials, which must be of that role.
func (s *running) mustServe(role string) {
	s.w.Helper()
	var answer struct{ RoleArn string }
	s.Await(s.w.T, "credentials are served", func() bool {
		status, text := s.credentials(authorization)
		return status == http.StatusOK && json.Unmarshal([]byte(text), &answer) == nil
	})
	if want := "arn:aws:iam::123456789012:role/" + role; answer.RoleArn != want {
		s.w.Errorf("credentials are of %s, want %s", answer.RoleArn, want)
	}
}

func listen(t *testing.T, address string) net.Listener {
	t.Helper()
	listener, err := new(net.ListenConfig).Listen(t.Context(), "tcp", address)
	must(t, err)
	return listener
}

func portOf(address string) string {
	_, port, _ := net.SplitHostPort(address)
	return port
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
