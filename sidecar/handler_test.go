package sidecar_test

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/policy"
	"github.com/credence-iam/credence/sidecar"
	"github.com/credence-iam/credence/sidecar/contract"
)

// SDKs in docs/sdk-compatibility.md read these bytes and header fields. Do not change them.
func TestCredentials(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		lease, err := yields(t, time.Hour, 27*time.Minute)(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		lease.AccessKeyID = "ASIAEXAMPLE"
		// Neither the time zone nor the fraction may show.
		lease.Expiration = time.Date(2000, 1, 1, 3, 4, 5, 987654321, time.FixedZone("", 7200))
		w := start(t, func(context.Context) (credential.Lease, error) { return lease, nil })
		for _, path := range []string{"/v1/credentials", "/v1/credentials/"} {
			a := w.do(http.MethodGet, path, "Authorization", authorization)
			a.want(t, http.StatusOK, "")
			const want = `{"AccessKeyId":"ASIAEXAMPLE","SecretAccessKey":"secret/key+text=","Token":"session/token+text==",` +
				`"Expiration":"2000-01-01T01:04:05Z","RoleArn":"arn:aws:iam::123456789012:role/team/app","AccountId":"123456789012"}`
			if diff := cmp.Diff(want, a.body); diff != "" {
				t.Errorf("body (-want +got):\n%s", diff)
			}
			if got := a.header.Get("Content-Type"); got != "application/json" {
				t.Errorf("Content-Type = %q", got)
			}
			if got := a.header.Get("Cache-Control"); got != "no-store" {
				t.Errorf("Cache-Control = %q", got)
			}
		}
	})
}

// Some accounts have session tokens that make the response longer than net/http would send in one piece.
func TestLongResponsesHaveALength(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		lease, err := yields(t, time.Hour, 27*time.Minute)(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		lease.SessionToken = credential.NewSecret(strings.Repeat("t", 4000))
		w := start(t, func(context.Context) (credential.Lease, error) { return lease, nil })
		for _, path := range []string{"/v1/credentials", "/v1/credentials/"} {
			a := w.do(http.MethodGet, path, "Authorization", authorization)
			a.want(t, http.StatusOK, "")
			if got, want := a.header.Get("Content-Length"), strconv.Itoa(len(a.body)); got != want || len(a.body) < 4000 {
				t.Errorf("%s: Content-Length = %q, want %s", path, got, want)
			}
		}
	})
}

func TestAuthorization(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := start(t, yields(t, time.Hour, 27*time.Minute))
		for _, value := range []string{
			"", "x", authorization + " ", authorization[1:], authorization + "0",
			"Bearer " + authorization, strings.ToUpper(authorization),
		} {
			header := []string{"Authorization", value}
			if value == "" {
				header = nil
			}
			if strings.TrimSpace(value) == authorization {
				continue // HTTP removes blanks around a value
			}
			w.do(http.MethodGet, contract.CredentialsPath, header...).want(t, http.StatusForbidden, "AUTHORIZATION_INVALID")
		}
		w.credentials().want(t, http.StatusOK, "")
	})
}

// A wrong request gets an error immediately, with or without credentials.
func TestRouting(t *testing.T) {
	tests := []struct {
		method, path string
		status       int
		code         string
	}{
		{http.MethodGet, "/", 404, "NOT_FOUND"},
		{http.MethodGet, "/v1", 404, "NOT_FOUND"},
		{http.MethodGet, "/v1/credentials/x", 404, "NOT_FOUND"},
		{http.MethodGet, "//v1/credentials", 404, "NOT_FOUND"},
		{http.MethodGet, "/v1/../v1/credentials", 404, "NOT_FOUND"},
		{http.MethodGet, "///latest/meta-data/iam/info", 404, "NOT_FOUND"},
		{http.MethodGet, "//latest/user-data", 404, "NOT_FOUND"},
		{http.MethodGet, "//latest/api/token", 405, "METHOD_NOT_ALLOWED"},
		{http.MethodGet, "/latest/meta-data/iam/security-credentials-extended/", 404, "NOT_FOUND"},
		{http.MethodGet, "/latest/meta-data/iam/security-credentials-extended/app", 404, "NOT_FOUND"},
		{http.MethodGet, "/latest/user-data", 404, "NOT_FOUND"},
		{http.MethodPost, "/v1/credentials", 405, "METHOD_NOT_ALLOWED"},
		{http.MethodGet, "/latest/api/token", 405, "METHOD_NOT_ALLOWED"},
		{http.MethodPut, "/latest/meta-data/iam/info", 405, "METHOD_NOT_ALLOWED"},
	}
	allow := map[string]string{"/v1/credentials": "GET", "/latest/api/token": "PUT", "//latest/api/token": "PUT", "/latest/meta-data/iam/info": "GET"}
	for _, source := range []sourceFunc{hangs, yields(t, time.Hour, 27*time.Minute)} {
		synctest.Test(t, func(t *testing.T) {
			w := start(t, source)
			for _, test := range tests {
				a := w.do(test.method, test.path, "Authorization", authorization)
				a.want(t, test.status, test.code)
				if a.took != 0 {
					t.Errorf("%s %s took %v", test.method, test.path, a.took)
				}
				if got := a.header.Get("Allow"); test.status == 405 && got != allow[test.path] {
					t.Errorf("%s %s: Allow = %q, want %q", test.method, test.path, got, allow[test.path])
				}
			}
		})
	}
}

func TestHost(t *testing.T) {
	s, err := sidecar.New(sidecar.Config{Source: sourceFunc(hangs), Authorization: authorization, Metadata: policy.MetadataV2})
	if err != nil {
		t.Fatal(err)
	}
	handler := s.Handler()
	for host, allowed := range map[string]bool{
		"127.0.0.1:9779": true, "127.0.0.1": true, "127.1.2.3:80": true, "localhost:9779": true, "LocalHost": true,
		"[::1]:9779": true, "[::1]": true, "[::ffff:127.0.0.1]:9779": true,
		"": false, "evil.example:9779": false, "evil.example": false, "localhost.evil.example:9779": false,
		"127.0.0.1.evil.example": false, "169.254.169.254": false, "10.0.0.1:9779": false, "0.0.0.0:9779": false,
		"[::]:9779": false, "2130706433": false, "0x7f.1": false, "[::1%25lo]:9779": false, "localhost.": false,
	} {
		// Host is checked even for a path that does not exist.
		request := httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/latest/user-data", http.NoBody)
		request.Host = host
		w := httptest.NewRecorder()
		handler.ServeHTTP(w, request)
		if want := map[bool]int{true: http.StatusNotFound, false: http.StatusForbidden}[allowed]; w.Code != want {
			t.Errorf("Host %q: status %d, want %d", host, w.Code, want)
		}
	}
}

// At most half of the connections wait. More requests that would wait get an error immediately.
func TestWaitingIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := start(t, hangs)
		synctest.Wait()
		var all sync.WaitGroup
		for range sidecar.MaxWaiting {
			all.Go(func() { w.do(http.MethodGet, "/v1/ready") })
		}
		synctest.Wait()
		for _, a := range []result{w.credentials(), w.do(http.MethodGet, "/v1/ready")} {
			if a.want(t, http.StatusServiceUnavailable, "CREDENTIALS_PENDING"); a.took != 0 {
				t.Errorf("one more request took %v, want an immediate error", a.took)
			}
		}
		all.Wait()
		if a := w.credentials(); a.took != 900*time.Millisecond {
			t.Errorf("a request after all others took %v, want 900ms: it found no place to wait", a.took)
		}
	})
}

// A probe that need not wait gets a response, however many requests wait.
func TestReadyWhileManyWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := start(t, hangs, func(c *sidecar.Config) { c.StartTimeout = time.Minute })
		time.Sleep(time.Minute)
		var all sync.WaitGroup
		for range sidecar.MaxWaiting {
			all.Go(func() { w.credentials() })
		}
		synctest.Wait()
		w.credentials().want(t, http.StatusServiceUnavailable, "CREDENTIALS_PENDING")
		if a := w.do(http.MethodGet, "/v1/ready"); a.status != http.StatusNoContent || a.took != 0 {
			t.Errorf("the probe got status %d after %v, want 204 immediately", a.status, a.took)
		}
		all.Wait()
	})
}

// Host is checked before the path, so that the response to a foreign host reveals nothing about paths.
func TestHostIsCheckedFirst(t *testing.T) {
	s, err := sidecar.New(sidecar.Config{Source: sourceFunc(hangs), Authorization: authorization, Metadata: policy.MetadataOff})
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{"/", "/v1/credentials", "/v1/ready", "/latest/api/token", "*"} {
		request := httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/", http.NoBody)
		request.URL.Path, request.Host = path, "evil.example"
		w := httptest.NewRecorder()
		s.Handler().ServeHTTP(w, request)
		if w.Code != http.StatusForbidden {
			t.Errorf("%s: status %d, want 403", path, w.Code)
		}
	}
}

// If there is no session, the response comes before SDKs time out.
func TestLongestWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := start(t, hangs)
		a := w.credentials()
		a.want(t, http.StatusServiceUnavailable, "CREDENTIALS_PENDING")
		if a.took != 900*time.Millisecond {
			t.Errorf("credentials took %v", a.took)
		}
		a = w.do(http.MethodPut, tokenPath, headerTTL, "60")
		a.want(t, http.StatusOK, "")
		token := a.body
		if a.took != 900*time.Millisecond {
			t.Errorf("a token took %v", a.took)
		}
		for agent, want := range map[string]time.Duration{
			"Boto3/1.26.27 Python/3.11.2 Linux/6.1.0 Botocore/1.29.27":                        900 * time.Millisecond,
			"aws-sdk-go-v2/1.47.7 ua/2.1 os/linux lang/go#1.26.8 md/GOARCH#amd64 ft/ec2-imds": 400 * time.Millisecond,
		} {
			for _, path := range []string{rolesPath, rolesPath + "app", regionPath} {
				a = w.do(http.MethodGet, path, headerToken, token, "User-Agent", agent)
				a.want(t, http.StatusServiceUnavailable, "CREDENTIALS_PENDING")
				if a.took != want {
					t.Errorf("%s took %v for %s, want %v", path, a.took, agent, want)
				}
			}
		}
	})
	synctest.Test(t, func(t *testing.T) {
		w := start(t, func(ctx context.Context) (credential.Lease, error) {
			time.Sleep(300 * time.Millisecond)
			return yields(t, time.Hour, 27*time.Minute)(ctx)
		})
		a := w.credentials()
		a.want(t, http.StatusOK, "")
		if a.took != 300*time.Millisecond {
			t.Errorf("the response took %v, want 300ms, as the first session", a.took)
		}
	})
	synctest.Test(t, func(t *testing.T) {
		w := start(t, fails(errUnavailable))
		a := w.credentials()
		a.want(t, http.StatusServiceUnavailable, string(credential.ReasonInternal))
		if a.took != 900*time.Millisecond {
			t.Errorf("the response took %v, want 900ms, as retries may succeed", a.took)
		}
	})
}

// SDKs retry a 503 and give up after other errors. They show the message of both.
func TestRefusals(t *testing.T) {
	tests := map[string]struct {
		err    error
		status int
		code   string
		text   string
	}{
		"denied":          {errDenied, 403, "ROLE_NOT_PERMITTED", "annotate the namespace"},
		"wrapped":         {fmt.Errorf("calling: %w", errDenied), 403, "ROLE_NOT_PERMITTED", "annotate the namespace"},
		"invalid":         {credential.Errorf(credential.ErrInvalid, credential.ReasonRoleInvalid, "bad role"), 400, "ROLE_INVALID", "bad role"},
		"unauthenticated": {credential.Errorf(credential.ErrUnauthenticated, credential.ReasonTokenExpired, "old"), 403, "TOKEN_EXPIRED", "old"},
		"not found":       {credential.Errorf(credential.ErrNotFound, credential.ReasonPodNotFound, "no pod"), 403, "POD_NOT_FOUND", "no pod"},
		"unavailable":     {errUnavailable, 503, "INTERNAL", "the broker is unavailable"},
		"private cause": {&credential.Error{
			Kind: credential.ErrUnavailable, Reason: credential.ReasonInternal, Message: "the sidecar keeps retrying", Cause: fmt.Errorf("dialling 10.1.2.3"),
		}, 503, "INTERNAL", "the sidecar keeps retrying, see its log for the cause"},
		"internal": {fmt.Errorf("some detail"), 503, "INTERNAL", "cannot get credentials now; see the sidecar's log for the cause"},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := start(t, fails(test.err))
				synctest.Wait()
				a := w.credentials()
				a.want(t, test.status, test.code)
				var body struct{ Message string }
				if err := json.Unmarshal([]byte(a.body), &body); err != nil {
					t.Fatal(err)
				}
				if body.Message != test.text {
					t.Errorf("message = %q, want %q", body.Message, test.text)
				}
				if test.status != 503 && a.took != 0 {
					t.Errorf("a refusal took %v", a.took)
				}
				synctest.Wait()
				if log := w.log.String(); !strings.Contains(log, test.err.Error()) || strings.Contains(log, "see its log") {
					t.Errorf("the log does not contain the cause %q, or refers to a log:\n%s", test.err, log)
				}
			})
		})
	}
}

func TestReady(t *testing.T) {
	ready := func(w *world) result { return w.do(http.MethodGet, "/v1/ready") }
	t.Run("session", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			w := start(t, func(ctx context.Context) (credential.Lease, error) {
				time.Sleep(time.Second)
				return yields(t, time.Hour, 27*time.Minute)(ctx)
			})
			a := ready(w)
			a.want(t, http.StatusNoContent, "")
			if a.took != time.Second {
				t.Errorf("took %v, want 1s", a.took)
			}
		})
	})
	t.Run("start timeout", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			began := time.Now()
			w := start(t, fails(errDenied), func(c *sidecar.Config) { c.StartTimeout = 12 * time.Second })
			for ready(w).status != http.StatusNoContent {
			}
			// The timeout starts with the sidecar, not with a request of the probe.
			if took := time.Since(began); took != 12*time.Second {
				t.Errorf("took %v, want 12s", took)
			}
			if a := ready(w); a.status != http.StatusNoContent || a.took != 0 {
				t.Errorf("later: status %d after %v", a.status, a.took)
			}
		})
	})
	t.Run("no timeout", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			w := start(t, fails(errUnavailable), func(c *sidecar.Config) { c.StartTimeout = 0 })
			for range 1000 {
				a := ready(w)
				a.want(t, http.StatusServiceUnavailable, "CREDENTIALS_PENDING")
				if a.took != 5*time.Second {
					t.Fatalf("took %v, want 5s: less is a busy loop of the probe, more exceeds the server's timeouts", a.took)
				}
			}
		})
	})
}

// Connections of clients that send little, slowly or nothing, or do not read, are closed.
func TestSlowClients(t *testing.T) {
	const head = "GET /v1/ready HTTP/1.1\r\nHost: localhost\r\n"
	tests := map[string]struct {
		send   string
		every  time.Duration // interval of further single bytes; 0: none
		unread bool
		open   time.Duration
	}{
		"nothing":              {open: sidecar.ReadTimeout},
		"half a line":          {send: "GET /v1/cred", open: sidecar.ReadTimeout},
		"a byte at a time":     {send: head, every: 100 * time.Millisecond, open: sidecar.ReadTimeout},
		"no body":              {send: head + "Content-Length: 1000\r\n\r\n", open: sidecar.ReadTimeout},
		"a body byte by byte":  {send: head + "Content-Length: 1000\r\n\r\n", every: 100 * time.Millisecond, open: sidecar.ReadTimeout},
		"no chunk":             {send: head + "Transfer-Encoding: chunked\r\n\r\n", open: sidecar.ReadTimeout},
		"no continuation":      {send: head + "Content-Length: 1000\r\nExpect: 100-continue\r\n\r\n", open: sidecar.ReadTimeout},
		"options":              {send: "OPTIONS * HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n", open: sidecar.ReadTimeout},
		"idle after a request": {send: head + "\r\n", open: sidecar.IdleTimeout},
		"unread response":      {send: head + "\r\n", unread: true, open: sidecar.WriteTimeout},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := start(t, yields(t, time.Hour, 27*time.Minute))
				synctest.Wait()
				conn := w.dial()
				defer conn.Close()
				began := time.Now()
				sent := make(chan struct{})
				go func() {
					defer close(sent)
					_, err := io.WriteString(conn, test.send)
					for test.every > 0 && err == nil {
						time.Sleep(test.every)
						_, err = io.WriteString(conn, "x")
					}
				}()
				if test.unread {
					time.Sleep(test.open + time.Millisecond)
				}
				if _, err := io.Copy(io.Discard, conn); err != nil {
					t.Fatal(err)
				}
				if took := time.Since(began).Truncate(time.Second); took != test.open {
					t.Errorf("the connection was open for %v, want %v", took, test.open)
				}
				conn.Close()
				<-sent
			})
		})
	}
}

// Slow clients (slow loris) keep all connections open as long as possible, and reconnect immediately. They delay an SDK no
// longer than one of them may take.
func TestSlowLoris(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := start(t, yields(t, time.Hour, 27*time.Minute))
		synctest.Wait()
		stop := make(chan struct{})
		var attackers sync.WaitGroup
		for range sidecar.MaxConnections {
			attackers.Go(func() {
				conn := w.dial() // one at a time: together as many as are served
				for {
					if _, err := io.WriteString(conn, "GET /v1/credentials HTTP/1.1\r\nHost: localhost\r\nX: "); err == nil {
						_, _ = io.Copy(io.Discard, conn)
					}
					conn.Close()
					select {
					case <-stop:
						return
					case <-time.After(time.Millisecond):
						conn = w.dial()
					}
				}
			})
		}
		synctest.Wait()
		for range 5 {
			a := w.credentials()
			a.want(t, http.StatusOK, "")
			if a.took > sidecar.ReadTimeout {
				t.Errorf("an SDK waited %v, want at most %v", a.took, sidecar.ReadTimeout)
			}
			w.CloseIdleConnections()
		}
		close(stop)
		attackers.Wait()
	})
}

func TestHeaderIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := start(t, yields(t, time.Hour, 27*time.Minute))
		conn := w.dial()
		defer conn.Close()
		go func() {
			_, _ = fmt.Fprintf(conn, "GET /v1/credentials HTTP/1.1\r\nHost: localhost\r\nX-Long: %s\r\n\r\n", strings.Repeat("x", 16<<10))
		}()
		response, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil {
			t.Fatal(err)
		}
		defer response.Body.Close()
		if response.StatusCode != http.StatusRequestHeaderFieldsTooLarge {
			t.Errorf("status = %d, want 431", response.StatusCode)
		}
	})
}

// A header with too many lines is not parsed. Each request has its own count.
func TestLinesAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := start(t, yields(t, time.Hour, 27*time.Minute))
		synctest.Wait()
		conn := w.dial()
		defer conn.Close()
		responses := bufio.NewReader(conn)
		for _, test := range []struct{ lines, status int }{{20, 200}, {sidecar.MaxLines, 200}, {sidecar.MaxLines, 200}, {sidecar.MaxLines + 1, 400}} {
			go func() {
				fields := strings.Repeat("X-Field: value\r\n", test.lines-4)
				_, _ = fmt.Fprintf(conn, "GET /v1/credentials HTTP/1.1\r\nHost: localhost\r\nAuthorization: %s\r\n%s\r\n", authorization, fields)
			}()
			response, err := http.ReadResponse(responses, nil)
			if err != nil {
				t.Fatalf("%d lines: %v", test.lines, err)
			}
			if _, err := io.Copy(io.Discard, response.Body); err != nil {
				t.Errorf("%d lines: %v", test.lines, err)
			}
			response.Body.Close()
			if response.StatusCode != test.status {
				t.Errorf("%d lines: status %d, want %d", test.lines, response.StatusCode, test.status)
			}
		}
	})
}

// Connections over the limit wait until others close. They are not refused.
func TestConnectionsAreLimited(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := start(t, yields(t, time.Hour, 27*time.Minute))
		for range sidecar.MaxConnections {
			defer w.dial().Close()
		}
		synctest.Wait()
		a := w.credentials()
		a.want(t, http.StatusOK, "")
		if a.took != 2*time.Second {
			t.Errorf("one more connection got its response after %v, want 2s, when the silent ones are closed", a.took)
		}
	})
}

// SDKs keep connections open. If there are many, each response closes its connection, so that no client waits for
// another.
func TestKeepAliveLimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := start(t, yields(t, time.Hour, 27*time.Minute))
		synctest.Wait()
		kept := 0
		for i := range 2 * sidecar.MaxConnections {
			conn := w.dial()
			defer conn.Close()
			if _, err := io.WriteString(conn, "GET /v1/ready HTTP/1.1\r\nHost: localhost\r\n\r\n"); err != nil {
				t.Fatalf("connection %d: %v", i, err)
			}
			response, err := http.ReadResponse(bufio.NewReader(conn), nil)
			if err != nil {
				t.Fatalf("connection %d: %v", i, err)
			}
			response.Body.Close()
			if !response.Close {
				kept++
			}
		}
		// Accept may have reserved a place for the next connection already.
		if kept != sidecar.KeepAliveLimit && kept != sidecar.KeepAliveLimit-1 {
			t.Errorf("%d connections stayed open, want %d", kept, sidecar.KeepAliveLimit)
		}
		if a := w.credentials(); a.status != http.StatusOK || a.took != 0 {
			t.Errorf("one more client got status %d after %v, want 200 immediately", a.status, a.took)
		}
	})
}

func TestLimitedListenerCloses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		listener := sidecar.Limit(&pipeListener{conns: make(chan net.Conn, 1), closed: make(chan struct{})}, 0)
		done := make(chan error)
		go func() {
			_, err := listener.Accept()
			done <- err
		}()
		synctest.Wait()
		for range 2 {
			if err := listener.Close(); err != nil {
				t.Error(err)
			}
		}
		if err := <-done; err == nil {
			t.Error("Accept returned a connection over the limit")
		}
	})
}
