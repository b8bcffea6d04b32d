package main

import (
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/credence-iam/credence/cmd/internal/program/processtest"
)

// TestCheck runs the command against a sidecar, as the container of "helm test" does.
func TestCheck(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	s := w.start()
	s.mustServe("cart")
	uri := "http://" + s.address + "/v1/credentials"
	p := startCheck(t, uri, authorization)
	if err := p.Wait(); err != nil {
		t.Fatalf("%v: %s", err, p.Stderr)
	}
	text := p.Stdout.String()
	if !strings.HasPrefix(text, "The pod has credentials of arn:aws:iam::") || !strings.Contains(text, "role/cart, access key ID ...MPLE, expiration 20") {
		t.Errorf("the output is %q", text)
	}
	for _, secret := range []string{"ssss", "tttt", "ASIAEXA", authorization} {
		if strings.Contains(text, secret) {
			t.Errorf("the output has %q", secret)
		}
	}
	startCheck(t, uri, "another-text").MustFail(t, 1, "AUTHORIZATION_INVALID: the Authorization header must be")
	startCheck(t, "", "").MustFail(t, 1, "the pod is not injected; opt its namespace in")
	startCheck(t, "http://[", "").MustFail(t, 1, "AWS_CONTAINER_CREDENTIALS_FULL_URI: ")
}

// TestCheckOfOthers: a response that is not a sidecar's is a failure, and the output does not quote it.
func TestCheckOfOthers(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		status     int
		body, want string
	}{
		"another program": {http.StatusOK, "secret-page", "responded without credentials"},
		"no token":        {http.StatusOK, `{"AccessKeyId":"ASIAEXAMPLE","SecretAccessKey":"secret-key","Expiration":"2030-01-01T00:00:00Z"}`, "responded without credentials"},
		"no secret key":   {http.StatusOK, `{"AccessKeyId":"ASIAEXAMPLE","Token":"secret-token","Expiration":"2030-01-01T00:00:00Z"}`, "responded without credentials"},
		"no expiration":   {http.StatusOK, `{"AccessKeyId":"ASIAEXAMPLE","SecretAccessKey":"secret-key","Token":"secret-token"}`, "responded without credentials"},
		"another status":  {http.StatusTeapot, "secret-page", "responded with status 418"},
		"a refusal":       {http.StatusForbidden, `{"Code":"STS_ACCESS_DENIED","Message":"AWS refused"}`, "STS_ACCESS_DENIED: AWS refused (status 403)"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
				w.WriteHeader(tt.status)
				_, _ = w.Write([]byte(tt.body))
			}))
			defer server.Close()
			p := startCheck(t, server.URL, "x")
			p.MustFail(t, 1, tt.want)
			if strings.Contains(p.Stdout.String()+p.Stderr.String(), "secret-") {
				t.Errorf("the output quotes the response: %s", p.Stderr)
			}
		})
	}
}

// TestCheckRepeats: a request that may succeed later is repeated.
func TestCheckRepeats(t *testing.T) {
	t.Parallel()
	requests := make(chan struct{}, 2)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		select {
		case requests <- struct{}{}:
			w.WriteHeader(http.StatusServiceUnavailable)
			_, _ = w.Write([]byte(`{"Code":"STS_UNREACHABLE","Message":"not now"}`))
		default:
			_, _ = w.Write([]byte(`{"AccessKeyId":"ASIAEXAMPLE","SecretAccessKey":"s","Token":"t","Expiration":"2030-01-01T00:00:00Z","RoleArn":"r"}`))
		}
	}))
	defer server.Close()
	p := startCheck(t, server.URL, "x")
	if err := p.Wait(); err != nil || !strings.Contains(p.Stdout.String(), "expiration 2030-01-01T00:00:00Z") {
		t.Errorf("%v: %s%s", err, p.Stdout, p.Stderr)
	}
}

func startCheck(t *testing.T, uri, authorization string) *processtest.Process {
	t.Helper()
	return processtest.Start(t, processtest.Command{
		Args: []string{"check"},
		Env:  []string{"AWS_CONTAINER_CREDENTIALS_FULL_URI=" + uri, "AWS_CONTAINER_AUTHORIZATION_TOKEN=" + authorization},
	})
}
