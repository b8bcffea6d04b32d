package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
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

// wiring has at least one row for each flag. A row runs the program against a real broker, calls it like an SDK, and shows
// what the flag changes. So a row fails if the program parses the flag but does not use it. A new flag needs a row.
var wiring = []struct {
	flag, shows string
	run         func(w *world)
}{
	{"broker-dns-name", "the name is looked up, and brokers must prove the host of --broker", func(w *world) {
		const host, full = "brokers.test", "brokers.test.svc.corp.example"
		listener := listen(w.T, "127.0.0.1:0")
		w.broker(host, listener)
		target := net.JoinHostPort(host, portOf(listener.Addr().String()))
		w.startWith("127.0.0.1 "+full+"\n", "--broker="+target, "--broker-dns-name="+full+".").mustServe("cart")
	}},
	{"broker", "brokers are called at this address, and must prove its name", func(w *world) {
		w.start("--broker=" + w.target).mustServe("cart")
		other := w.start("--broker=127.0.0.1" + strings.TrimPrefix(w.target, brokerHost))
		other.Logged(w.T, "Could not get credentials")
		if status, _ := other.credentials(authorization); status == http.StatusOK {
			w.Error("the sidecar accepted a broker that has not proved its name")
		}
	}},
	{"listen", "SDKs are served at this address", func(w *world) {
		address := processtest.FreeAddress(w)
		s := w.start("--listen=" + address)
		if s.address != address {
			w.Errorf("the sidecar serves on %s, want %s", s.address, address)
		}
		s.mustServe("cart")
	}},
	{"token-file", "its token identifies the pod", func(w *world) {
		file := filepath.Join(w.TempDir(), "other-token")
		processtest.Must(w, os.WriteFile(file, []byte("till-token"), 0o600))
		w.start("--token-file=" + file).mustServe("till")
	}},
	{"roots-file", "its roots verify the brokers", func(w *world) {
		w.start("--roots-file=" + w.rootsFile).mustServe("cart")
		s := w.start("--roots-file=" + certstest.NewCA(w).WriteTo(w.TempDir()))
		s.Logged(w.T, "Could not get credentials")
		if status, _ := s.credentials(authorization); status == http.StatusOK {
			w.Error("the sidecar accepted a broker whose root is not in the file")
		}
	}},
	{"authorization", "requests without this text are refused", func(w *world) {
		s := w.start("--authorization=the-pods-uid")
		s.Await(w.T, "a request with the text is served", func() bool { status, _ := s.credentials("the-pods-uid"); return status == http.StatusOK })
		if status, _ := s.credentials(authorization); status != http.StatusForbidden {
			w.Errorf("a request with another text got status %d, want 403", status)
		}
	}},
	{"authorization", "with it, the probe reports why there are no credentials", func(w *world) {
		s := w.start("--broker=" + net.JoinHostPort(brokerHost, portOf(processtest.FreeAddress(w))))
		probe := processtest.Start(w.T, processtest.Command{Args: []string{"--listen=" + s.address, "--authorization=" + authorization, "probe"}})
		probe.MustFail(w.T, 1, "no credentials yet: BROKER_UNREACHABLE: ")
	}},
	{"metadata", "v1 serves instance metadata without a token", func(w *world) {
		s := w.start("--metadata=v1")
		s.mustServe("cart")
		if status, text := s.get("/latest/meta-data/iam/security-credentials/", ""); status != http.StatusOK {
			w.Errorf("the response is %d: %s", status, text)
		}
	}},
	{"metadata", "v2 requires a token", func(w *world) {
		s := w.start("--metadata=v2")
		s.mustServe("cart")
		if status, text := s.get("/latest/meta-data/iam/security-credentials/", ""); status != http.StatusUnauthorized {
			w.Errorf("the response is %d: %s", status, text)
		}
	}},
	{"metadata", "off serves no instance metadata", func(w *world) {
		s := w.start("--metadata=off")
		s.mustServe("cart")
		if status, text := s.get("/latest/meta-data/iam/security-credentials/", ""); status != http.StatusNotFound {
			w.Errorf("the response is %d: %s", status, text)
		}
	}},
	{"zone", "instance metadata reports it", func(w *world) {
		s := w.start("--zone=eu-central-1b", "--metadata=v1")
		s.mustServe("cart")
		if status, text := s.get("/latest/meta-data/placement/availability-zone", ""); status != http.StatusOK || text != "eu-central-1b" {
			w.Errorf("the response is %d: %s", status, text)
		}
	}},
	{"start-timeout", "after it, the application starts without credentials", func(w *world) {
		s := w.start("--broker="+net.JoinHostPort(brokerHost, portOf(processtest.FreeAddress(w))), "--start-timeout=1ms")
		s.Await(w.T, "the sidecar is ready", func() bool { status, _ := s.get("/v1/ready", ""); return status == http.StatusNoContent })
		processtest.Must(w, processtest.Start(w.T, processtest.Command{Args: []string{"--listen=" + s.address, "probe"}}).Wait())
	}},
	{"log-level", "warn does not log received credentials", func(w *world) {
		address := processtest.FreeAddress(w)
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
	{"pod-uid", "it is part of the key of a pod that does not share its session", func(w *world) {
		w.callsTheOwner(func(key policy.RoutingKey) (args []string, owned policy.RoutingKey) {
			return []string{"--routing-key=" + string(key), "--pod-uid=uid-1"}, key.ForPod("uid-1")
		})
	}},
}

// exempt are the flags without a row, with the reason.
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

// TestVariablesAreWired: environment variables set flags, as the webhook does.
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
		t.Errorf("the response for the zone is %d: %s", status, text)
	}
}

const (
	// brokerHost is the name of the broker that most rows use.
	brokerHost    = "localhost"
	authorization = "a-pods-uid"
)

// world has a broker that knows two pods by their tokens. Sidecars call it.
type world struct {
	*testing.T
	ca        *certstest.CA
	rootsFile string
	target    string // HOST:PORT of the broker
	args      []string

	mu    sync.Mutex
	calls []netip.Addr // broker addresses in the order of calls; guarded by mu
}

func newWorld(t *testing.T) *world {
	t.Helper()
	w := &world{T: t, ca: certstest.NewCA(t)}
	w.rootsFile = w.ca.WriteTo(t.TempDir())
	tokenFile := filepath.Join(t.TempDir(), "token")
	processtest.Must(t, os.WriteFile(tokenFile, []byte("cart-token"), 0o600))
	listener := listen(t, "127.0.0.1:0")
	w.broker(brokerHost, listener)
	w.target = net.JoinHostPort(brokerHost, portOf(listener.Addr().String()))
	w.args = []string{
		"--broker=" + w.target, "--token-file=" + tokenFile, "--roots-file=" + w.rootsFile, "--authorization=" + authorization, "--listen=127.0.0.1:0",
	}
	return w
}

// broker starts a broker with a certificate for name on the listener.
func (w *world) broker(name string, listener net.Listener) {
	w.Helper()
	certFile, keyFile := w.ca.Leaf(name).WriteTo(w.TempDir())
	pair, err := certs.NewKeyPair(certFile, keyFile, nil)
	processtest.Must(w, err)
	b := brokertest.Start(w, func(context.Context, policy.Grant) (credential.Credential, error) {
		return credential.Credential{
			AccessKeyID:     "ASIAEXAMPLE", // the secrets have usual lengths
			SecretAccessKey: credential.NewSecret(strings.Repeat("s", 40)), SessionToken: credential.NewSecret(strings.Repeat("t", 1000)),
			Issued: time.Now(), Expiration: time.Now().Add(time.Hour),
		}, nil
	}, io.Discard, func(_ *broker.Config, server *broker.ServerConfig) {
		server.Listener, server.TLS = listener, certs.ServerConfig(pair)
		server.Interceptors = []grpc.UnaryServerInterceptor{w.recordCall}
	})
	for _, role := range []string{"cart", "till"} {
		b.Set(brokertest.Pod{
			Token:       role + "-token",
			Identity:    identity.Pod{Namespace: "shop", Name: role, UID: "uid-" + role, ServiceAccount: "default", ServiceAccountUID: "uid-1"},
			Annotations: map[string]string{"iam.amazonaws.com/role": role},
		})
	}
}

// recordCall records the address of the called broker.
func (w *world) recordCall(ctx context.Context, request any, _ *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	if p, ok := peer.FromContext(ctx); ok {
		if at, err := netip.ParseAddrPort(p.LocalAddr.String()); err == nil {
			w.mu.Lock()
			w.calls = append(w.calls, at.Addr().Unmap())
			w.mu.Unlock()
		}
	}
	return handler(ctx, request)
}

// callsTheOwner checks that sidecars with sixteen brokers call an owner first. arguments returns the arguments of a sidecar
// for a key, and the key whose owner it must call.
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
			w.Skip("not run: this machine does not permit listening on all of 127.0.0.0/8: ", err)
		}
		port = portOf(listener.Addr().String())
		w.broker(name, listener)
		addresses = append(addresses, address)
		_, _ = fmt.Fprintln(&hosts, address, name)
	}
	// A sidecar without the key calls one of the two owners by chance in one of eight cases. So four sidecars run.
	for i := range 4 {
		args, owned := arguments(policy.RoutingKey(fmt.Sprintf("0011223344556677889900aabbccdd%02d", i)))
		w.mu.Lock()
		w.calls = nil
		w.mu.Unlock()
		w.startWith(hosts.String(), append(args, "--broker="+net.JoinHostPort(name, port))...).mustServe("cart")
		w.mu.Lock()
		first := w.calls[0]
		w.mu.Unlock()
		// On a busy machine, the first owner may take so long that the second one records its call first.
		if want := placement.Rank(string(owned), addresses)[:placement.Owners]; !slices.Contains(want, first) {
			w.Errorf("%q: the broker at %s was called first, want an owner, %s", args, first, want)
		}
	}
}

// process starts the program with more flags. They override flags of the same name.
func (w *world) process(args ...string) *processtest.Process {
	w.Helper()
	return processtest.Start(w.T, processtest.Command{Args: slices.Concat(w.args, args)})
}

// start starts a sidecar with more flags and waits until it listens.
func (w *world) start(args ...string) *running {
	w.Helper()
	return w.await(w.process(args...))
}

// startWith is start with the given text as /etc/hosts.
func (w *world) startWith(hosts string, args ...string) *running {
	w.Helper()
	file := filepath.Join(w.TempDir(), "hosts")
	processtest.Must(w, os.WriteFile(file, []byte(hosts), 0o644))
	return w.await(processtest.Start(w.T, processtest.Command{Args: slices.Concat(w.args, args), Hosts: file}))
}

func (w *world) await(p *processtest.Process) *running {
	w.Helper()
	return &running{Process: p, w: w, address: fmt.Sprint(p.Logged(w.T, "Listening")["address"])}
}

// running is a running sidecar.
type running struct {
	*processtest.Process
	w       *world
	address string
}

// get sends a request. The status is 0 if there is no response.
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

// mustServe waits until the sidecar serves credentials, and checks their role.
func (s *running) mustServe(role string) {
	s.w.Helper()
	var response struct{ RoleArn string }
	s.Await(s.w.T, "credentials are served", func() bool {
		status, text := s.credentials(authorization)
		return status == http.StatusOK && json.Unmarshal([]byte(text), &response) == nil
	})
	if want := "arn:aws:iam::123456789012:role/" + role; response.RoleArn != want {
		s.w.Errorf("credentials are for %s, want %s", response.RoleArn, want)
	}
}

func listen(t *testing.T, address string) net.Listener {
	t.Helper()
	listener, err := new(net.ListenConfig).Listen(t.Context(), "tcp", address)
	processtest.Must(t, err)
	return listener
}

func portOf(address string) string {
	_, port, _ := net.SplitHostPort(address)
	return port
}
