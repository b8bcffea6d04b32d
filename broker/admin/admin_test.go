package admin_test

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/credence-iam/credence/broker/admin"
)

func TestReadyzListsFailedChecks(t *testing.T) {
	missing := errors.New("not listed yet")
	var informers, keys error
	handler := admin.Handler(nil,
		admin.Check{Name: "informers", Err: func() error { return informers }},
		admin.Check{Name: "signing keys", Err: func() error { return keys }},
	)
	get := func(method, path string) (int, string) {
		w := httptest.NewRecorder()
		handler.ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), method, path, nil))
		return w.Code, w.Body.String()
	}
	if code, text := get(http.MethodGet, "/readyz"); code != http.StatusOK {
		t.Errorf("ready: %d %q", code, text)
	}
	informers = missing
	if code, text := get(http.MethodGet, "/readyz"); code != http.StatusServiceUnavailable || text != "informers: not listed yet\n" {
		t.Errorf("not ready: %d %q", code, text)
	}
	keys = missing
	if _, text := get(http.MethodGet, "/readyz"); strings.Count(text, "\n") != 2 {
		t.Errorf("not ready for two reasons: %q", text)
	}
	if code, _ := get(http.MethodGet, "/healthz"); code != http.StatusOK {
		t.Errorf("healthz while not ready: %d", code)
	}
	if code, _ := get(http.MethodPost, "/healthz"); code != http.StatusMethodNotAllowed {
		t.Errorf("POST: %d", code)
	}
	if code, _ := get(http.MethodGet, "/debug/pprof/"); code != http.StatusNotFound {
		t.Errorf("a path without a page: %d", code)
	}
}

func TestServeEndsWithItsContext(t *testing.T) {
	listener, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- admin.Serve(ctx, listener, admin.Handler(nil)) }()
	request, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+listener.Addr().String()+"/healthz", nil)
	if err != nil {
		t.Fatal(err)
	}
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		t.Fatal(err)
	}
	body, err := io.ReadAll(response.Body)
	_ = response.Body.Close()
	if err != nil || string(body) != "ok\n" {
		t.Errorf("response %q, %v", body, err)
	}
	cancel()
	if err := <-ended; err != nil {
		t.Errorf("Serve returned %v", err)
	}
}
