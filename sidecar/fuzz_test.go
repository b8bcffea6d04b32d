package sidecar_test

import (
	"bufio"
	"bytes"
	"context"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/credence-iam/credence/broker/policy"
	"github.com/credence-iam/credence/sidecar"
)

// ready runs a sidecar until it has credentials, and returns it and its address.
func ready(f *testing.F, metadata policy.Metadata, log io.Writer) (*sidecar.Sidecar, string) {
	f.Helper()
	s, err := sidecar.New(sidecar.Config{
		Source: yields(f, time.Hour, time.Hour), Authorization: authorization, Metadata: metadata, Zone: "eu-central-1a",
		Logger: slog.New(slog.NewJSONHandler(log, nil)),
	})
	if err != nil {
		f.Fatal(err)
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		f.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		if err := s.Run(f.Context(), listener); err != nil {
			f.Errorf("Run = %v", err)
		}
	}()
	f.Cleanup(func() { <-ended }) // f.Context ends first
	if err := sidecar.Probe(f.Context(), listener.Addr().String(), authorization); err != nil {
		f.Fatal(err)
	}
	return s, listener.Addr().String()
}

func containsSecret(body string) bool {
	return strings.Contains(body, secretText) || strings.Contains(body, tokenText) || strings.Contains(body, authorization)
}

// Whatever a client sends to the container-credentials endpoint, it gets a secret only with the authorization and a
// loopback address as Host.
func FuzzCredentials(f *testing.F) {
	for _, seed := range []struct{ method, path, host, authorization string }{
		{"GET", "/v1/credentials", "127.0.0.1:9779", "Bearer x"},
		{"GET", "/v1/credentials", "127.0.0.1:9779", authorization},
		{"GET", "/v1/credentials", "evil.example", authorization},
		{"GET", "/v1/credentials", "127.0.0.1.evil.example:80", authorization},
		{"POST", "/v1/credentials/", "localhost", authorization},
		{"GET", "/v1/ready", "[::1]:1", ""},
		{"HEAD", "*", "", "\x00"},
	} {
		f.Add(seed.method, seed.path, seed.host, seed.authorization)
	}
	s, _ := ready(f, policy.MetadataOff, io.Discard)
	handler := s.Handler()
	f.Fuzz(func(t *testing.T, method, path, host, value string) {
		request := httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/", http.NoBody)
		request.Method, request.URL.Path, request.Host = method, path, host
		request.Header.Set("Authorization", value)
		w := httptest.NewRecorder()
		handler.ServeHTTP(w, request)
		if w.Code < 200 || w.Code > 599 {
			t.Errorf("status %d", w.Code)
		}
		name := host
		if bare, _, err := net.SplitHostPort(host); err == nil {
			name = bare
		}
		address, err := netip.ParseAddr(strings.Trim(name, "[]"))
		ours := strings.EqualFold(name, "localhost") || err == nil && address.IsLoopback()
		if containsSecret(w.Body.String()) && (value != authorization || !ours || method != http.MethodGet) {
			t.Errorf("%q %q of host %q gave a secret to authorization %q", method, path, host, value)
		}
	})
}

// In mode v2, a client gets a secret only with a token. It gets no token through a proxy. A token is valid as long as the
// client requested.
func FuzzMetadata(f *testing.F) {
	for _, seed := range []struct{ method, path, name, value string }{
		{"PUT", tokenPath, headerTTL, "21600"},
		{"PUT", tokenPath, headerTTL, "-1"},
		{"PUT", tokenPath, "X-Forwarded-For", ""},
		{"GET", rolesPath + "app", headerToken, strings.Repeat("\n", 54)},
		{"GET", rolesPath + "%2e%2e/app", headerToken, strings.Repeat("A", 54)},
		{"GET", "/latest/dynamic/instance-identity/document", "X-Forwarded-For", "10.0.0.1"},
		{"GET", "/latest/meta-data/placement/availability-zone/", headerToken, ""},
	} {
		f.Add(seed.method, seed.path, seed.name, seed.value)
	}
	s, _ := ready(f, policy.MetadataV2, io.Discard)
	handler := s.Handler()
	send := func(ctx context.Context, method, path, name, value string) *httptest.ResponseRecorder {
		request := httptest.NewRequestWithContext(ctx, http.MethodGet, "/", http.NoBody)
		request.Method, request.URL.Path, request.Host = method, path, "127.0.0.1:9779"
		request.Header.Set(headerTTL, "60")
		request.Header.Set(name, value)
		w := httptest.NewRecorder()
		handler.ServeHTTP(w, request)
		return w
	}
	f.Fuzz(func(t *testing.T, method, path, name, value string) {
		w := send(t.Context(), method, path, name, value)
		if containsSecret(w.Body.String()) && value != authorization {
			t.Errorf("%q %q gave a secret", method, path)
		}
		if w.Code != http.StatusOK || strings.TrimSuffix(path, "/") != tokenPath {
			return
		}
		ttl := "60"
		switch http.CanonicalHeaderKey(name) {
		case http.CanonicalHeaderKey(headerTTL):
			ttl = value
		case "X-Forwarded-For":
			t.Errorf("a request with %q got a token", name)
		}
		if seconds, err := strconv.Atoi(ttl); err != nil || seconds < 1 || seconds > 21600 || w.Header().Get(headerTTL) != strconv.Itoa(seconds) {
			t.Errorf("the response to a TTL of %q has the TTL %q", ttl, w.Header().Get(headerTTL))
		}
		if got := send(t.Context(), http.MethodGet, rolesPath, headerToken, w.Body.String()); got.Code != http.StatusOK {
			t.Errorf("a new token is refused: status %d", got.Code)
		}
	})
}

// syncBuffer is a log that can be read while it is written.
type syncBuffer struct {
	mu sync.Mutex // guards buffer
	bytes.Buffer
}

func (b *syncBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.Buffer.Write(p)
}

func (b *syncBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.Buffer.String()
}

// Whatever bytes arrive, the server responds with HTTP or closes the connection, reveals no secret, and keeps serving.
func FuzzConnection(f *testing.F) {
	for _, seed := range []string{
		"", "\r\n\r\n", "GET", "GET / HTTP/1.1\r\n\r\n", "GET / HTTP/1.0\r\n\r\n",
		"GET /v1/ready HTTP/1.1\r\nHost: localhost\r\n\r\nGET /v1/ready HTTP/1.1\r\nHost: localhost\r\n\r\n",
		"GET /v1/credentials HTTP/1.1\r\nHost: localhost\r\nAuthorization: x\r\nAuthorization: y\r\n\r\n",
		"POST /v1/credentials HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
		"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
	} {
		f.Add([]byte(seed))
	}
	var log syncBuffer
	_, address := ready(f, policy.MetadataV2, &log)
	f.Fuzz(func(t *testing.T, sent []byte) {
		conn, err := new(net.Dialer).DialContext(t.Context(), "tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		_, _ = conn.Write(sent)
		_ = conn.(*net.TCPConn).CloseWrite() // no more bytes follow
		got, _ := io.ReadAll(conn)
		if containsSecret(string(got)) && !bytes.Contains(sent, []byte(authorization)) {
			t.Errorf("%q got a secret", sent)
		}
		if len(got) > 0 {
			response, err := http.ReadResponse(bufio.NewReader(bytes.NewReader(got)), nil)
			if err != nil {
				t.Fatalf("%q got the response %q: %v", sent, got, err)
			}
			response.Body.Close()
		}
		if containsSecret(log.String()) {
			t.Error("a secret was logged")
		}
		if err := sidecar.Probe(t.Context(), address, authorization); err != nil {
			t.Errorf("after %q: %v", sent, err)
		}
	})
}
