package certs_test

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/credentials"

	"github.com/credence-iam/credence/certs"
	"github.com/credence-iam/credence/certs/certstest"
)

const name = "broker.credence.svc"

// serve accepts TLS connections until the test ends, and returns its address.
func serve(t testing.TB, cfg *tls.Config) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	t.Cleanup(wg.Wait)
	t.Cleanup(func() { l.Close() })
	wg.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer conn.Close()
				// A write after the handshake sends the client its session ticket.
				if _, err := tls.Server(conn, cfg).Write([]byte("hello")); err == nil {
					_, _ = io.Copy(io.Discard, conn)
				}
			})
		}
	})
	return l.Addr().String()
}

// dial connects once, reads the server's text and returns the state of the connection.
func dial(t testing.TB, addr string, cfg *tls.Config) (tls.ConnectionState, error) {
	t.Helper()
	// Much longer than a real handshake; it ends one that hangs.
	raw, err := (&net.Dialer{Timeout: 30 * time.Second}).DialContext(t.Context(), "tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer raw.Close()
	conn := tls.Client(raw, cfg)
	if err := conn.HandshakeContext(t.Context()); err != nil {
		return tls.ConnectionState{}, err
	}
	if _, err := io.ReadFull(conn, make([]byte, len("hello"))); err != nil {
		return tls.ConnectionState{}, err
	}
	return conn.ConnectionState(), nil
}

func keyPair(t testing.TB, certFile, keyFile string, log *slog.Logger) *certs.KeyPair {
	t.Helper()
	pair, err := certs.NewKeyPair(certFile, keyFile, log)
	if err != nil {
		t.Fatal(err)
	}
	return pair
}

func newRoots(t testing.TB, file string, log *slog.Logger) *certs.Roots {
	t.Helper()
	roots, err := certs.NewRoots(file, log)
	if err != nil {
		t.Fatal(err)
	}
	return roots
}

// served reports whether leaf was served on the connection.
func served(cs tls.ConnectionState, leaf *certstest.Leaf) bool {
	return len(cs.PeerCertificates) > 0 && cs.PeerCertificates[0].Equal(leaf.TLS().Leaf)
}

func TestRotationNeedsNoRestart(t *testing.T) {
	ca, next := certstest.NewCA(t), certstest.NewCA(t)
	pairDir, rootsDir := t.TempDir(), t.TempDir()
	first, second, third := ca.Leaf(name), ca.Leaf(name), next.Leaf(name)

	certFile, keyFile := first.WriteTo(pairDir)
	pair := keyPair(t, certFile, keyFile, nil)
	roots := newRoots(t, ca.WriteTo(rootsDir), nil)
	addr := serve(t, certs.ServerConfig(pair))
	client := certs.ClientConfig(roots, name)

	steps := []struct {
		what  string
		do    func()
		serve *certstest.Leaf
		trust bool
	}{
		{"as started", func() {}, first, true},
		{"leaf renewed", func() { second.WriteTo(pairDir) }, second, true},
		{"leaf of an unpublished root", func() { third.WriteTo(pairDir) }, third, false},
		{"both roots published", func() { ca.WriteTo(rootsDir, next) }, third, true},
		{"old leaf under both roots", func() { second.WriteTo(pairDir) }, second, true},
		{"old root dropped", func() { next.WriteTo(rootsDir) }, second, false},
		{"leaf of the new root", func() { third.WriteTo(pairDir) }, third, true},
	}
	for _, step := range steps {
		step.do()
		cs, err := dial(t, addr, client)
		if step.trust && err != nil {
			t.Fatalf("%s: %v", step.what, err)
		}
		if !step.trust {
			if _, ok := errors.AsType[x509.UnknownAuthorityError](err); !ok {
				t.Fatalf("%s: got error %v, want an unknown authority", step.what, err)
			}
			continue
		}
		if !served(cs, step.serve) {
			t.Errorf("%s: another leaf was served", step.what)
		}
		if got, want := pair.NotAfter(), step.serve.TLS().Leaf.NotAfter; !got.Equal(want) {
			t.Errorf("%s: NotAfter is %v, want %v", step.what, got, want)
		}
	}
	if err := errors.Join(pair.Err(), roots.Err()); err != nil {
		t.Errorf("after good rotations: %v", err)
	}
}

func TestIntermediate(t *testing.T) {
	ca := certstest.NewCA(t)
	certFile, keyFile := ca.Intermediate().Leaf(name).WriteTo(t.TempDir())
	addr := serve(t, certs.ServerConfig(keyPair(t, certFile, keyFile, nil)))
	cs, err := dial(t, addr, certs.ClientConfig(newRoots(t, ca.WriteTo(t.TempDir()), nil), name))
	if err != nil || len(cs.PeerCertificates) != 2 {
		t.Errorf("got %d certificates, error %v; want a leaf and an intermediate that verify", len(cs.PeerCertificates), err)
	}
}

// file is a file that a test writes; nil content means that it does not exist.
type file struct {
	name    string
	content []byte
}

// put replaces plain files, one after the other.
func put(t testing.TB, dir string, files ...file) {
	t.Helper()
	for _, f := range files {
		path := filepath.Join(dir, f.name)
		if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Fatal(err)
		}
		if f.content == nil {
			continue
		}
		if err := os.WriteFile(path, f.content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

func half(data []byte) []byte { return data[:len(data)/2] }

// long makes a file longer than 1 MiB and has no other effect.
var long = bytes.Repeat([]byte("\n"), 1<<20)

// badPairs returns contents of tls.crt and tls.key that must not be served.
func badPairs(t *testing.T) map[string][]file {
	ca := certstest.NewCA(t)
	leaf, other := ca.Intermediate().Leaf(name), ca.Leaf(name)
	crt := func(b []byte) file { return file{"tls.crt", b} }
	key := func(b []byte) file { return file{"tls.key", b} }
	return map[string][]file{
		"certificate half-written": {crt(leaf.CertPEM[:100]), key(leaf.KeyPEM)},
		"chain half-written":       {crt(leaf.CertPEM[:len(leaf.CertPEM)-30]), key(leaf.KeyPEM)},
		"key half-written":         {crt(leaf.CertPEM), key(half(leaf.KeyPEM))},
		"key empty":                {crt(leaf.CertPEM), key([]byte{})},
		"both empty":               {crt([]byte{}), key([]byte{})},
		"key of another":           {crt(leaf.CertPEM), key(other.KeyPEM)},
		"swapped":                  {crt(leaf.KeyPEM), key(leaf.CertPEM)},
		"no PEM":                   {crt([]byte("a\nb\n")), key([]byte("c"))},
		"certificate missing":      {crt(nil), key(leaf.KeyPEM)},
		"key missing":              {crt(leaf.CertPEM), key(nil)},
		"certificate too long":     {crt(append(bytes.Clone(leaf.CertPEM), long...)), key(leaf.KeyPEM)},
	}
}

func TestBadPairStopsStartup(t *testing.T) {
	for what, files := range badPairs(t) {
		t.Run(what, func(t *testing.T) {
			dir := t.TempDir()
			put(t, dir, files...)
			pair, err := certs.NewKeyPair(filepath.Join(dir, "tls.crt"), filepath.Join(dir, "tls.key"), nil)
			if err == nil || pair != nil {
				t.Fatalf("got %v and error %v; want only an error", pair, err)
			}
			if !strings.Contains(err.Error(), dir) {
				t.Errorf("error %q does not name the file", err)
			}
		})
	}
	if _, err := certs.NewKeyPair("", "", nil); err == nil {
		t.Error("empty file names were accepted")
	}
}

func TestBadPairKeepsTheLastGood(t *testing.T) {
	for what, files := range badPairs(t) {
		t.Run(what, func(t *testing.T) {
			dir := t.TempDir()
			ca := certstest.NewCA(t)
			good, better := ca.Leaf(name), ca.Leaf(name)
			put(t, dir, file{"tls.crt", good.CertPEM}, file{"tls.key", good.KeyPEM})
			var log bytes.Buffer
			pair := keyPair(t, filepath.Join(dir, "tls.crt"), filepath.Join(dir, "tls.key"), slog.New(slog.NewTextHandler(&log, nil)))
			addr := serve(t, certs.ServerConfig(pair))
			client := certs.ClientConfig(newRoots(t, ca.WriteTo(t.TempDir()), nil), name)

			put(t, dir, files...)
			for range 3 {
				cs, err := dial(t, addr, client)
				if err != nil || !served(cs, good) {
					t.Fatalf("with bad files: error %v; want the last good pair", err)
				}
			}
			if err := pair.Err(); err == nil || !strings.Contains(err.Error(), dir) {
				t.Errorf("Err is %v, want an error that names the file", err)
			}
			if got := strings.Count(log.String(), "level=WARN"); got != 1 {
				t.Errorf("%d warnings for one bad content, want 1:\n%s", got, &log)
			}

			put(t, dir, file{"tls.crt", better.CertPEM}, file{"tls.key", better.KeyPEM})
			if cs, err := dial(t, addr, client); err != nil || !served(cs, better) {
				t.Errorf("with good files again: error %v; want the new pair", err)
			}
			if err := pair.Err(); err != nil {
				t.Errorf("with good files again, Err is %v", err)
			}
		})
	}
}

func TestEachBadContentWarnsOnce(t *testing.T) {
	ca := certstest.NewCA(t)
	leaf := ca.Leaf(name)
	dir := t.TempDir()
	certFile, keyFile := leaf.WriteTo(dir)
	var log bytes.Buffer
	pair := keyPair(t, certFile, keyFile, slog.New(slog.NewTextHandler(&log, nil)))

	good, bad, worse := leaf.CertPEM, ca.Leaf(name).CertPEM, ca.Leaf(name).CertPEM
	for i, cert := range [][]byte{bad, worse, good, worse} {
		certstest.WriteVolume(t, dir, map[string][]byte{"tls.crt": cert, "tls.key": leaf.KeyPEM})
		_, _ = pair.Err(), pair.Err()
		if want := []int{1, 2, 2, 3}[i]; strings.Count(log.String(), "level=WARN") != want {
			t.Fatalf("after change %d, want %d warnings:\n%s", i, want, &log)
		}
	}
	if strings.Contains(log.String(), strings.Split(string(leaf.KeyPEM), "\n")[1]) {
		t.Error("the log contains the key")
	}
}

// badBundles returns contents of a roots file that must not be trusted.
func badBundles(t *testing.T) map[string][]byte {
	a, b := certstest.NewCA(t), certstest.NewCA(t)
	two := append(bytes.Clone(a.PEM), b.PEM...)
	return map[string][]byte{
		"missing":            nil,
		"empty":              {},
		"no PEM":             []byte("roots"),
		"first half-written": append(half(a.PEM), b.PEM...),
		"last half-written":  two[:len(two)-30],
		"not DER":            []byte("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"),
		"a private key":      append(bytes.Clone(two), a.Leaf(name).KeyPEM...),
		"too long":           append(two, long...),
	}
}

func TestBadRootsStopStartup(t *testing.T) {
	for what, bundle := range badBundles(t) {
		t.Run(what, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "ca.crt")
			put(t, filepath.Dir(path), file{"ca.crt", bundle})
			roots, err := certs.NewRoots(path, nil)
			if err == nil || roots != nil {
				t.Fatalf("got %v and error %v; want only an error", roots, err)
			}
			if !strings.Contains(err.Error(), path) {
				t.Errorf("error %q does not name the file", err)
			}
		})
	}
	if _, err := certs.NewRoots("", nil); err == nil {
		t.Error("an empty file name was accepted")
	}
}

func TestBadRootsKeepTheLastGood(t *testing.T) {
	for what, bundle := range badBundles(t) {
		t.Run(what, func(t *testing.T) {
			ca := certstest.NewCA(t)
			path := filepath.Join(t.TempDir(), "ca.crt")
			put(t, filepath.Dir(path), file{"ca.crt", append([]byte("# text is allowed\n"), ca.PEM...)})
			var log bytes.Buffer
			roots := newRoots(t, path, slog.New(slog.NewTextHandler(&log, nil)))
			certFile, keyFile := ca.Leaf(name).WriteTo(t.TempDir())
			addr := serve(t, certs.ServerConfig(keyPair(t, certFile, keyFile, nil)))

			put(t, filepath.Dir(path), file{"ca.crt", bundle})
			for range 3 {
				if _, err := dial(t, addr, certs.ClientConfig(roots, name)); err != nil {
					t.Fatalf("with a bad file: %v", err)
				}
			}
			if roots.Err() == nil {
				t.Error("Err does not report the bad file")
			}
			if got := strings.Count(log.String(), "level=WARN"); got != 1 {
				t.Errorf("%d warnings for one bad content, want 1:\n%s", got, &log)
			}
		})
	}
}

func TestClientRefuses(t *testing.T) {
	ca := certstest.NewCA(t)
	roots := newRoots(t, ca.WriteTo(t.TempDir()), nil)
	reason := func(want x509.InvalidReason) func(error) bool {
		return func(err error) bool {
			invalid, ok := errors.AsType[x509.CertificateInvalidError](err)
			return ok && invalid.Reason == want
		}
	}
	otherName := func(err error) bool { _, ok := errors.AsType[x509.HostnameError](err); return ok }
	unknown := func(err error) bool { _, ok := errors.AsType[x509.UnknownAuthorityError](err); return ok }

	tests := []struct {
		what string
		leaf *certstest.Leaf
		dial string
		want func(error) bool
	}{
		{"another name", ca.Leaf("webhook.credence.svc"), name, otherName},
		{"no name in the certificate", ca.Leaf(), name, otherName},
		{"another address", ca.Leaf("127.0.0.2"), "127.0.0.1", otherName},
		{"unknown root", certstest.NewCA(t).Leaf(name), name, unknown},
		{"expired", ca.LeafWith(func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) }, name), name, reason(x509.Expired)},
		{"not valid yet", ca.LeafWith(func(c *x509.Certificate) { c.NotBefore = time.Now().Add(time.Hour) }, name), name, reason(x509.Expired)},
		{"for clients only", ca.LeafWith(func(c *x509.Certificate) {
			c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
		}, name), name, reason(x509.IncompatibleUsage)},
	}
	for _, test := range tests {
		t.Run(test.what, func(t *testing.T) {
			certFile, keyFile := test.leaf.WriteTo(t.TempDir())
			addr := serve(t, certs.ServerConfig(keyPair(t, certFile, keyFile, nil)))
			_, err := dial(t, addr, certs.ClientConfig(roots, test.dial))
			if !test.want(err) {
				t.Errorf("got error %v", err)
			}
			if _, ok := errors.AsType[*tls.CertificateVerificationError](err); !ok {
				t.Errorf("the error has type %T, not the one of crypto/tls", err)
			}
		})
	}
}

func TestServerName(t *testing.T) {
	ca := certstest.NewCA(t)
	roots := newRoots(t, ca.WriteTo(t.TempDir()), nil)
	certFile, keyFile := ca.Leaf(name, "127.0.0.1").WriteTo(t.TempDir())
	addr := serve(t, certs.ServerConfig(keyPair(t, certFile, keyFile, nil)))

	// dialed is the name that a caller such as gRPC sets in its clone of the Config.
	tests := []struct {
		given, dialed string
		ok            bool
	}{
		{given: name, dialed: name, ok: true},
		{given: "127.0.0.1", dialed: "127.0.0.1", ok: true},
		{given: "", dialed: name, ok: true},
		{given: name, dialed: "10.0.0.7", ok: true}, // the given name decides
		{given: "other.svc", dialed: name, ok: false},
		{given: "", dialed: "other.svc", ok: false},
		{given: "", dialed: "127.0.0.1", ok: false}, // crypto/tls provides no name for it
		{given: "", dialed: "", ok: false},
	}
	for _, test := range tests {
		t.Run(fmt.Sprintf("%q dialed as %q", test.given, test.dialed), func(t *testing.T) {
			cfg := certs.ClientConfig(roots, test.given)
			cfg.ServerName = test.dialed
			if _, err := dial(t, addr, cfg); (err == nil) != test.ok {
				t.Errorf("got error %v, want success to be %v", err, test.ok)
			}
		})
	}
}

func TestOnlyTLS13(t *testing.T) {
	ca := certstest.NewCA(t)
	leaf := ca.Leaf(name)
	certFile, keyFile := leaf.WriteTo(t.TempDir())
	server := certs.ServerConfig(keyPair(t, certFile, keyFile, nil))
	client := certs.ClientConfig(newRoots(t, ca.WriteTo(t.TempDir()), nil), name)
	if _, err := dial(t, serve(t, server), client); err != nil {
		t.Fatal(err)
	}
	old := &tls.Config{RootCAs: ca.Pool(), ServerName: name, MaxVersion: tls.VersionTLS12, Certificates: []tls.Certificate{leaf.TLS()}}
	if _, err := dial(t, serve(t, server), old); err == nil {
		t.Error("the server accepted TLS 1.2")
	}
	if _, err := dial(t, serve(t, old), client); err == nil {
		t.Error("the client accepted TLS 1.2")
	}
}

func TestResumption(t *testing.T) {
	ca := certstest.NewCA(t)
	rootsDir := t.TempDir()
	roots := newRoots(t, ca.WriteTo(rootsDir), nil)
	certFile, keyFile := ca.Leaf(name).WriteTo(t.TempDir())
	server := certs.ServerConfig(keyPair(t, certFile, keyFile, nil))
	client := certs.ClientConfig(roots, name)
	client.ClientSessionCache = tls.NewLRUClientSessionCache(1)

	resumable := func(cfg *tls.Config) *tls.Config {
		cfg = cfg.Clone()
		cfg.SessionTicketsDisabled = false
		return cfg
	}
	for _, pair := range []struct {
		what           string
		server, client *tls.Config
	}{
		{"server", server, resumable(client)},
		{"client", resumable(server), client},
	} {
		addr := serve(t, pair.server)
		for range 2 {
			if cs, err := dial(t, addr, pair.client); err != nil || cs.DidResume {
				t.Errorf("our %s: resumed %v, error %v; want full handshakes", pair.what, cs.DidResume, err)
			}
		}
	}

	// If a caller enables resumption, removed roots are still not trusted.
	addr, client := serve(t, resumable(server)), resumable(client)
	for i, want := range []bool{false, true} {
		if cs, err := dial(t, addr, client); err != nil || cs.DidResume != want {
			t.Fatalf("connection %d: resumed %v, error %v; want resumed %v", i, cs.DidResume, err, want)
		}
	}
	certstest.NewCA(t).WriteTo(rootsDir)
	if _, err := dial(t, addr, client); err == nil {
		t.Error("a session was resumed after its root had been removed")
	}
}

func TestGRPC(t *testing.T) {
	ca := certstest.NewCA(t)
	certFile, keyFile := ca.Leaf(name).WriteTo(t.TempDir())
	server := credentials.NewTLS(certs.ServerConfig(keyPair(t, certFile, keyFile, nil)))
	client := credentials.NewTLS(certs.ClientConfig(newRoots(t, ca.WriteTo(t.TempDir()), nil), ""))
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()

	for authority, ok := range map[string]bool{name + ":443": true, name: true, "other.svc:443": false, "127.0.0.1:443": false} {
		done := make(chan struct{})
		go func() {
			defer close(done)
			if conn, err := l.Accept(); err == nil {
				_, _, _ = server.ServerHandshake(conn)
				conn.Close()
			}
		}()
		conn, err := (&net.Dialer{}).DialContext(t.Context(), "tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		if _, _, err = client.ClientHandshake(t.Context(), authority, conn); (err == nil) != ok {
			t.Errorf("authority %s: got error %v, want success to be %v", authority, err, ok)
		}
		conn.Close()
		<-done
	}
}

func TestZeroValuesRefuse(t *testing.T) {
	ca := certstest.NewCA(t)
	certFile, keyFile := ca.Leaf(name).WriteTo(t.TempDir())
	server := certs.ServerConfig(keyPair(t, certFile, keyFile, nil))
	client := certs.ClientConfig(newRoots(t, ca.WriteTo(t.TempDir()), nil), name)
	for _, pair := range []*certs.KeyPair{nil, {}} {
		pair.SetGate(func(*tls.Certificate, *tls.Certificate) error { return nil })
		if _, err := dial(t, serve(t, certs.ServerConfig(pair)), client); err == nil {
			t.Error("a server without a pair completed a handshake")
		}
		if pair.Err() == nil || !pair.NotAfter().IsZero() {
			t.Error("a zero KeyPair reports no error")
		}
	}
	for _, roots := range []*certs.Roots{nil, {}} {
		// "unknown authority" is not enough: the system's roots must not be used.
		if _, err := dial(t, serve(t, server), certs.ClientConfig(roots, name)); err == nil || !strings.Contains(err.Error(), "NewRoots") {
			t.Errorf("a client without roots: got error %v", err)
		}
		if roots.Err() == nil {
			t.Error("zero Roots report no error")
		}
	}
}

// TestRotationUnderLoad replaces files as the kubelet does while clients connect. The server never fails and never serves a
// key with another certificate.
func TestRotationUnderLoad(t *testing.T) {
	a, b := certstest.NewCA(t), certstest.NewCA(t)
	pairDir := t.TempDir()
	certFile, keyFile := a.Leaf(name).WriteTo(pairDir)
	pair := keyPair(t, certFile, keyFile, nil)
	addr := serve(t, certs.ServerConfig(pair))
	client := certs.ClientConfig(newRoots(t, a.WriteTo(t.TempDir(), b), nil), name)

	stop := make(chan struct{})
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				if _, err := dial(t, addr, client); err != nil {
					t.Errorf("during a rotation: %v", err)
					return
				}
			}
		})
	}
	var last *certstest.Leaf
	for i := range 50 {
		last = []*certstest.CA{a, b}[i%2].Leaf(name)
		last.WriteTo(pairDir)
		if cs, err := dial(t, addr, client); err != nil || !served(cs, last) {
			t.Errorf("rotation %d: error %v; want the newest leaf", i, err)
		}
	}
	close(stop)
	wg.Wait()
}

// BenchmarkKeyPair measures the read of the pair at each handshake, and the handshake itself.
func BenchmarkKeyPair(b *testing.B) {
	ca := certstest.NewCA(b)
	certFile, keyFile := ca.Leaf(name).WriteTo(b.TempDir())
	pair := keyPair(b, certFile, keyFile, nil)
	b.Run("reread", func(b *testing.B) {
		for b.Loop() {
			if _, err := pair.GetCertificate(nil); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("handshake", func(b *testing.B) {
		addr := serve(b, certs.ServerConfig(pair))
		client := certs.ClientConfig(newRoots(b, ca.WriteTo(b.TempDir()), nil), name)
		for b.Loop() {
			if _, err := dial(b, addr, client); err != nil {
				b.Fatal(err)
			}
		}
	})
}

func TestPendingPair(t *testing.T) {
	ca := certstest.NewCA(t)
	dir := t.TempDir()
	first, second, third := ca.Leaf(name), ca.Leaf(name), ca.Leaf(name)
	certFile, keyFile := first.WriteTo(dir)
	var log bytes.Buffer
	pair := keyPair(t, certFile, keyFile, slog.New(slog.NewTextHandler(&log, nil)))
	notYet := errors.New("its root is not published everywhere")
	reason := notYet
	pair.SetGate(func(serving, next *tls.Certificate) error {
		if !serving.Leaf.Equal(first.TLS().Leaf) || next.Leaf.Equal(first.TLS().Leaf) {
			t.Error("the gate does not receive the served and the new pair")
		}
		return reason
	})
	addr := serve(t, certs.ServerConfig(pair))
	client := certs.ClientConfig(newRoots(t, ca.WriteTo(t.TempDir()), nil), name)
	steps := []struct {
		what    string
		do      func()
		serve   *certstest.Leaf
		pending bool
	}{
		{"as started", func() {}, first, false},
		{"a new pair", func() { second.WriteTo(dir) }, first, true},
		{"another", func() { third.WriteTo(dir) }, first, true},
		{"the first again", func() { first.WriteTo(dir) }, first, false},
		{"the last one again", func() { third.WriteTo(dir) }, first, true},
		{"bad files", func() { put(t, dir, file{"tls.crt", nil}) }, first, false},
		{"a pair that the gate allows", func() { reason = nil; certstest.WriteVolume(t, dir, nil); second.WriteTo(dir) }, second, false},
	}
	for _, step := range steps {
		step.do()
		for range 2 {
			if cs, err := dial(t, addr, client); err != nil || !served(cs, step.serve) {
				t.Fatalf("%s: another leaf was served (error %v)", step.what, err)
			}
		}
		err := pair.Err()
		if errors.Is(err, certs.ErrPending) != step.pending || errors.Is(err, notYet) != step.pending {
			t.Errorf("%s: Err is %v, want ErrPending: %v", step.what, err, step.pending)
		}
	}
	if got := strings.Count(log.String(), "that are pending"); got != 3 {
		t.Errorf("%d lines about pending pairs, want one for each of 3:\n%s", got, &log)
	}
}
