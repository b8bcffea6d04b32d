package assume_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/credence-iam/credence/broker/assume"
	"github.com/credence-iam/credence/broker/assume/ststest"
	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/policy"
)

const baseARN = "arn:aws:iam::123456789012:role/credence-broker"

func write(t *testing.T, file, content string) {
	t.Helper()
	// The kubelet replaces the file, too.
	if err := os.WriteFile(file+".new", []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(file+".new", file); err != nil {
		t.Fatal(err)
	}
}

func keysFile(id, secret string) string {
	return fmt.Sprintf("[default]\naws_access_key_id = %s\naws_secret_access_key = %s\n", id, secret)
}

// webIdentity makes the broker's own credentials come from STS, with a token in a file.
func webIdentity(t *testing.T, server *ststest.Server, token string) (file string) {
	t.Helper()
	isolate(t, "", "", "")
	file = filepath.Join(t.TempDir(), "token")
	write(t, file, token)
	t.Setenv("AWS_WEB_IDENTITY_TOKEN_FILE", file)
	t.Setenv("AWS_ROLE_ARN", baseARN)
	t.Setenv("AWS_ROLE_SESSION_NAME", "broker")
	t.Setenv("AWS_ENDPOINT_URL_STS", server.URL())
	return file
}

// TestCredentialsFileChanges: a rotated file is used at once if the old keys are refused, and soon if they still work.
func TestCredentialsFileChanges(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		server, sts := inMemory(t, ststest.Config{}, assume.Config{})
		id, secret := server.Keys()
		other, err := ststest.StartInMemory(t.Context(), ststest.Config{})
		if err != nil {
			t.Fatal(err)
		}
		otherID, otherSecret := other.Keys()
		g := grant(t, nil)

		isolate(t, "", "", "")
		file := filepath.Join(t.TempDir(), "credentials")
		t.Setenv("AWS_SHARED_CREDENTIALS_FILE", file)
		write(t, file, keysFile(otherID, otherSecret.Reveal())) // which server does not know
		check(t, "wrong keys", calls(t, 2, sts, g, func() int { return server.Count("", "") }),
			credential.ErrUnavailable, credential.ReasonBrokerCredentials, []string{"cluster admin"}, otherSecret.Reveal())

		// Refused again within the wait: the source is not called.
		check(t, "refused again", call(t, sts, g, func() int { return server.Count("", "") }), credential.ErrUnavailable, credential.ReasonBrokerCredentials, nil)
		time.Sleep(2 * time.Second)

		// The call with the refused old keys uses the new ones.
		write(t, file, keysFile(id, secret.Reveal()))
		if _, err := sts.Credential(t.Context(), g); err != nil {
			t.Errorf("with keys replaced on disk: %v", err)
		}
		if log := server.Calls(); log[len(log)-1].AccessKeyID != id || log[len(log)-2].AccessKeyID != otherID || log[len(log)-2].Code != "InvalidClientTokenId" {
			t.Errorf("the calls are %+v", log)
		}

		// STS refuses nothing, and the new keys are used nevertheless.
		write(t, file, keysFile(otherID, otherSecret.Reveal()))
		time.Sleep(6 * time.Minute)
		for range 2 { // the first starts reading, and does not wait for it
			_, _ = sts.Credential(t.Context(), g)
			synctest.Wait()
		}
		log := server.Calls()
		if !slices.ContainsFunc(log[len(log)-2:], func(c ststest.Call) bool { return c.AccessKeyID == otherID }) {
			t.Errorf("six minutes after the file changed, the calls are %+v", log[len(log)-2:])
		}
	})
}

// TestWebIdentityTokenChanges: each load reads the token that the file has at that time.
func TestWebIdentityTokenChanges(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		server, sts := inMemory(t, ststest.Config{Roles: map[string]ststest.Behavior{baseARN: {WebIdentityToken: "token-1"}}}, assume.Config{})
		file := webIdentity(t, server, "token-1")
		g := grant(t, nil)
		if _, ok := sts.OwnExpiration(); ok {
			t.Error("own credentials expire before there are any")
		}
		began := time.Now()
		if _, err := sts.Credential(t.Context(), g); err != nil {
			t.Fatal(err)
		}
		if at, ok := sts.OwnExpiration(); !ok || !at.Equal(began.Add(time.Hour)) {
			t.Errorf("own credentials expire at %v, %v, want %v", at, ok, began.Add(time.Hour))
		}

		// Renewed before expiration, with the new token. No call waits.
		server.SetRole(baseARN, ststest.Behavior{WebIdentityToken: "token-2", Latency: 3 * time.Second})
		write(t, file, "token-2")
		time.Sleep(56 * time.Minute)
		at := time.Now()
		if _, err := sts.Credential(t.Context(), g); err != nil || time.Since(at) != 0 {
			t.Errorf("while own credentials are renewed, a call takes %v and gives %v", time.Since(at), err)
		}
		time.Sleep(time.Minute)
		if n := server.Count("AssumeRoleWithWebIdentity", baseARN); n != 2 {
			t.Errorf("own credentials were loaded %d times, want 2", n)
		}
		if end, _ := sts.OwnExpiration(); !end.Equal(at.Add(time.Hour + 3*time.Second)) {
			t.Errorf("the new ones expire at %v, asked for at %v", end, at)
		}

		// A cluster admin must fix a refused token. Until the session expires, it has no effect.
		server.SetRole(baseARN, ststest.Behavior{WebIdentityToken: "token-3"})
		time.Sleep(58 * time.Minute)
		if _, err := sts.Credential(t.Context(), g); err != nil {
			t.Errorf("with two minutes left: %v", err)
		}
		time.Sleep(3 * time.Minute)
		_, err := sts.Credential(t.Context(), g)
		check(t, "expired", err, credential.ErrUnavailable, credential.ReasonBrokerCredentials, []string{"cluster admin"}, "token-2")
		if !strings.Contains(err.Error(), "InvalidIdentityToken") {
			t.Errorf("the cause does not say why: %v", err)
		}
		write(t, file, "token-3")
		time.Sleep(time.Minute)
		if _, err := sts.Credential(t.Context(), g); err != nil {
			t.Errorf("with the right token: %v", err)
		}
	})
}

// TestWebIdentityErrors has STS's errors for the web identity of the broker's own credentials.
func TestWebIdentityErrors(t *testing.T) {
	for _, tt := range []struct {
		fault *ststest.Fault
		asked int // by one call
		words string
	}{
		{&ststest.Fault{Code: "IDPCommunicationError", Status: 400}, 2, "a cluster admin must check them"},
		{&ststest.Fault{Code: "InvalidIdentityToken", Status: 400}, 2, "a cluster admin must check them"},
		{&ststest.Fault{Code: "IDPRejectedClaim", Status: 403}, 2, "a cluster admin must check them"},
		{&ststest.Fault{Code: "ExpiredTokenException", Status: 400}, 2, "a cluster admin must check them"},
		{&ststest.Fault{Code: "AccessDenied", Status: 403}, 1, "a cluster admin must check them"},
		{&ststest.Fault{Code: "ValidationError", Status: 400}, 1, "a cluster admin must check them"},
		{ststest.Throttling(), 1, "cannot load its own AWS credentials now"},
		{ststest.Unavailable(), 1, "cannot load its own AWS credentials now"},
		{ststest.StatusPage(502), 1, "cannot load its own AWS credentials now"},
		{ststest.Drop(), 1, "a cluster admin must check them"},
		{ststest.EmptyBody(), 1, "a cluster admin must check them"},
		{ststest.WithElement("Expiration", "planted-secret"), 1, "cannot load its own AWS credentials now"},
	} {
		what := fmt.Sprintf("%+v", *tt.fault)
		synctest.Test(t, func(t *testing.T) {
			server, sts := inMemory(t, ststest.Config{}, assume.Config{})
			webIdentity(t, server, "planted-token")
			server.SetRole(baseARN, ststest.Behavior{Fault: tt.fault})
			_, err := sts.Credential(t.Context(), grant(t, nil))
			check(t, what, err, credential.ErrUnavailable, credential.ReasonBrokerCredentials, []string{tt.words}, "planted-secret", "planted-token")
			if n := server.Count("AssumeRoleWithWebIdentity", ""); n != tt.asked {
				t.Errorf("%s: STS was called %d times, want %d", what, n, tt.asked)
			}
			if n := server.Count("AssumeRole", ""); n != 0 {
				t.Errorf("%s: %d calls were made without credentials", what, n)
			}
			// The fault ends. A second attempt of the first call is enough for a short fault.
			once := *tt.fault
			once.Times = 1
			server.SetRole(baseARN, ststest.Behavior{Fault: &once})
			time.Sleep(2 * time.Second)
			_, err = sts.Credential(t.Context(), grant(t, nil))
			if (err == nil) != (tt.asked == 2) {
				t.Errorf("%s, once: %v", what, err)
			}
		})
	}
}

// counting is a source of container credentials that counts its requests.
type counting struct {
	asked, at, most atomic.Int64 // at: answering now
	answer          atomic.Pointer[func() (int, map[string]string)]
	wait            chan struct{}
}

func (c *counting) ServeHTTP(w http.ResponseWriter, _ *http.Request) {
	c.asked.Add(1)
	if n := c.at.Add(1); n > c.most.Load() {
		c.most.Store(n)
	}
	defer c.at.Add(-1)
	if c.wait != nil {
		<-c.wait
	}
	status, body := (*c.answer.Load())()
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(body)
}

// TestSourceIsCalledByOne: one caller at a time calls an unavailable source, however many grants need a session.
func TestSourceIsCalledByOne(t *testing.T) {
	server := start(t, ststest.Config{})
	id, secret := server.Keys()
	source := &counting{wait: make(chan struct{})}
	failing := func() (int, map[string]string) { return 500, map[string]string{"code": "Broken", "message": "m"} }
	source.answer.Store(&failing)
	front := httptest.NewServer(source)
	defer front.Close()
	isolate(t, "", "", "")
	t.Setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", front.URL)
	sts := newSTS(t, assume.Config{Endpoint: server.URL()})
	g := grant(t, nil)
	const callers = 40
	all := func() (failed int64) {
		var n atomic.Int64
		var wg sync.WaitGroup
		for range callers {
			wg.Go(func() {
				if _, err := sts.Credential(t.Context(), g); err != nil {
					n.Add(1)
					check(t, "failing source", err, credential.ErrUnavailable, credential.ReasonBrokerCredentials, []string{"cluster admin"})
				}
			})
		}
		wg.Wait()
		return n.Load()
	}
	close(source.wait)
	if n := all(); n != callers {
		t.Errorf("%d of %d calls failed", n, callers)
	}
	// There is one load, and later callers find the wait. Only a machine that stops for a second could cause another load.
	if asked, most := source.asked.Load(), source.most.Load(); asked > 2 || most != 1 {
		t.Errorf("the source was called %d times by %d calls, by %d at once", asked, callers, most)
	}
	working := func() (int, map[string]string) {
		return 200, map[string]string{"AccessKeyId": id, "SecretAccessKey": secret.Reveal()}
	}
	source.answer.Store(&working)
	for all() > 0 {
		time.Sleep(50 * time.Millisecond) // the source is on its wait
	}
}

// TestWaitsBetweenLoads: the waits between loads from a failing source, in virtual time, and their log lines.
func TestWaitsBetweenLoads(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		server, sts := inMemory(t, ststest.Config{}, assume.Config{Logger: slog.New(slog.NewJSONHandler(&log, nil))})
		webIdentity(t, server, "planted-token")
		server.SetRole(baseARN, ststest.Behavior{Fault: &ststest.Fault{Code: "AccessDenied", Message: "no", Status: 403}})
		g := grant(t, nil)
		began := time.Now()
		var asked []time.Duration
		for range 40 * 60 { // grants need sessions all the time
			_, err := sts.Credential(t.Context(), g)
			e, ok := errors.AsType[*credential.Error](err)
			if !ok || e.Reason != credential.ReasonBrokerCredentials || e.RetryAfter <= 0 || e.RetryAfter > time.Minute {
				t.Fatalf("got %v", err)
			}
			if n := server.Count("", ""); n > len(asked) {
				asked = append(asked, time.Since(began))
			}
			time.Sleep(100 * time.Millisecond)
		}
		want := []time.Duration{0, 1, 3, 7, 15, 31, 63, 123, 183}
		for i := range want {
			want[i] *= time.Second
		}
		if diff := cmp.Diff(want, asked); diff != "" {
			t.Errorf("the source was called at (-want +got):\n%s", diff)
		}
		if n := strings.Count(log.String(), "Could not load the broker's own AWS credentials"); n != len(want) || strings.Contains(log.String(), "planted-token") {
			t.Errorf("%d lines in the log:\n%s", n, &log)
		}
		// A repaired source is found within the maximum wait, and the count restarts.
		server.SetRole(baseARN, ststest.Behavior{})
		time.Sleep(time.Minute)
		if _, err := sts.Credential(t.Context(), g); err != nil {
			t.Error(err)
		}
	})
}

// TestSourceIsNotTheCallers: a caller that gives up does not affect other callers.
func TestSourceIsNotTheCallers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		server, sts := inMemory(t, ststest.Config{Roles: map[string]ststest.Behavior{baseARN: {Latency: 5 * time.Second}}}, assume.Config{})
		webIdentity(t, server, "planted-token")
		g := grant(t, nil)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		var wg sync.WaitGroup
		wg.Go(func() {
			began := time.Now()
			_, err := sts.Credential(ctx, g)
			check(t, "impatient", err, credential.ErrUnavailable, credential.ReasonBrokerCredentials, nil)
			if time.Since(began) != time.Second {
				t.Errorf("left after %v", time.Since(began))
			}
		})
		synctest.Wait()
		wg.Go(func() {
			if _, err := sts.Credential(t.Context(), g); err != nil {
				t.Errorf("the caller that waits: %v", err)
			}
		})
		wg.Wait()
		if n := server.Count("AssumeRoleWithWebIdentity", ""); n != 1 {
			t.Errorf("the source was called %d times", n)
		}
	})
}

// TestAssumedRoleIsRenewedAhead: the role of --assume-role is assumed once per session, before the session expires.
func TestAssumedRoleIsRenewedAhead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		first, err := credential.ParseRoleARN(firstARN)
		if err != nil {
			t.Fatal(err)
		}
		var observed []assume.Call
		var mu sync.Mutex
		server, sts := inMemory(t, ststest.Config{}, assume.Config{AssumeRole: first, Observe: func(c assume.Call) {
			mu.Lock()
			defer mu.Unlock()
			observed = append(observed, c)
		}})
		g := grant(t, nil)
		began := time.Now()
		var at []time.Duration
		for range 3 * 60 {
			if _, err := sts.Credential(t.Context(), g); err != nil {
				t.Fatal(err)
			}
			synctest.Wait()
			if n := server.Count("AssumeRole", firstARN); n > len(at) {
				at = append(at, time.Since(began))
			}
			time.Sleep(time.Minute)
		}
		if diff := cmp.Diff([]time.Duration{0, 55 * time.Minute, 110 * time.Minute, 165 * time.Minute}, at); diff != "" {
			t.Errorf("the first role was assumed at (-want +got):\n%s", diff)
		}
		if end, ok := sts.OwnExpiration(); !ok || !end.Equal(began.Add((165+60)*time.Minute)) {
			t.Errorf("own credentials expire at %v, %v", end, ok)
		}

		// It fails: the old session is used until it expires. Then a cluster admin must act.
		server.SetRole(firstARN, ststest.Behavior{Fault: ststest.Unavailable()})
		time.Sleep(40 * time.Minute)
		if _, err := sts.Credential(t.Context(), g); err != nil {
			t.Errorf("with five minutes left: %v", err)
		}
		time.Sleep(6 * time.Minute)
		for _, fault := range []*ststest.Fault{ststest.Unavailable(), ststest.Throttling(), ststest.Drop(), {Code: "AccessDenied", Status: 403}, ststest.EmptyBody(), ststest.HTMLPage()} {
			server.SetRole(firstARN, ststest.Behavior{Fault: fault})
			time.Sleep(2 * time.Minute)
			before := server.Count("AssumeRole", roleARN)
			_, err := sts.Credential(t.Context(), g)
			check(t, fmt.Sprintf("%+v", *fault), err, credential.ErrUnavailable, credential.ReasonBrokerCredentials, []string{"cluster admin"})
			if server.Count("AssumeRole", roleARN) != before {
				t.Error("a role was assumed without the first role")
			}
		}
		mu.Lock()
		defer mu.Unlock()
		for _, outcome := range []credential.Reason{"ok", credential.ReasonSTSUnavailable, credential.ReasonSTSThrottled, credential.ReasonSTSDenied} {
			if !slices.ContainsFunc(observed, func(c assume.Call) bool { return c.Action == "AssumeRole" && c.Outcome == string(outcome) }) {
				t.Errorf("Observe did not get %s", outcome)
			}
		}
	})
}

// TestRefusedCredentialsAreBetterThanNone: credentials that STS refused once are used again if no others are available.
func TestRefusedCredentialsAreBetterThanNone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		first, err := credential.ParseRoleARN(firstARN)
		if err != nil {
			t.Fatal(err)
		}
		server, sts := inMemory(t, ststest.Config{}, assume.Config{AssumeRole: first})
		if _, err := sts.Credential(t.Context(), grant(t, nil)); err != nil {
			t.Fatal(err)
		}
		server.SetRole(firstARN, ststest.Behavior{Fault: ststest.Unavailable()})
		server.SetRole(roleARN, ststest.Behavior{Fault: &ststest.Fault{Code: "ExpiredToken", Status: 403, Times: 1}})
		_, _ = sts.Credential(t.Context(), grant(t, nil)) // finds out that there is nothing else
		if _, err := sts.Credential(t.Context(), grant(t, nil)); err != nil {
			t.Errorf("with credentials that STS accepts, and an unavailable source: %v", err)
		}
	})
}

// TestRevokedByPolicy: IAM revokes sessions by a policy that denies everything, with the message of a role that denies. After many
// denials, the broker loads its own credentials again. One role that denies does not cause that.
func TestRevokedByPolicy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		first, err := credential.ParseRoleARN(firstARN)
		if err != nil {
			t.Fatal(err)
		}
		server, sts := inMemory(t, ststest.Config{}, assume.Config{AssumeRole: first})
		firstCalls := func() int { return server.Count("AssumeRole", firstARN) }
		call := func(times int) {
			for range times {
				_, _ = sts.Credential(t.Context(), grant(t, nil))
			}
		}
		call(1)
		server.SetRole(roleARN, ststest.Behavior{Deny: true})
		for range 10 { // denials with successes between them
			call(10)
			server.SetRole(roleARN, ststest.Behavior{})
			call(1)
			server.SetRole(roleARN, ststest.Behavior{Deny: true})
		}
		if n := firstCalls(); n != 1 {
			t.Errorf("%d calls for the first role, though STS accepted other calls", n)
		}
		call(21)
		if n := firstCalls(); n != 2 {
			t.Errorf("after denials only: %d calls for the first role", n)
		}
	})
}

// TestRevokedSessionOfAssumedRole: the call that detects a revoked session of the role of --assume-role replaces it.
func TestRevokedSessionOfAssumedRole(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		first, err := credential.ParseRoleARN(firstARN)
		if err != nil {
			t.Fatal(err)
		}
		server, sts := inMemory(t, ststest.Config{}, assume.Config{AssumeRole: first})
		once := &ststest.Fault{Code: "ExpiredToken", Status: 403, Times: 1}
		server.SetRole(roleARN, ststest.Behavior{Fault: once})
		if _, err := sts.Credential(t.Context(), grant(t, nil)); err != nil {
			t.Error(err)
		}
		var roles []string
		for _, c := range server.Calls() {
			roles = append(roles, c.RoleARN)
		}
		if diff := cmp.Diff([]string{firstARN, roleARN, firstARN, roleARN}, roles); diff != "" {
			t.Errorf("the calls (-want +got):\n%s", diff)
		}
		// AWS limits role chaining to one hour.
		_, err = sts.Credential(t.Context(), grant(t, map[policy.Key]string{policy.Duration: "2h"}))
		check(t, "two hours", err, credential.ErrInvalid, credential.ReasonSTSRejected, []string{"because the broker itself is a role", "1h or less"})
	})
}

// TestCorrectedSecretOfTheSameKey: a cluster admin corrects the secret of a refused key and keeps its ID.
func TestCorrectedSecretOfTheSameKey(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		server, sts := inMemory(t, ststest.Config{}, assume.Config{})
		id, secret := server.Keys()
		isolate(t, "", "", "")
		file := filepath.Join(t.TempDir(), "credentials")
		t.Setenv("AWS_SHARED_CREDENTIALS_FILE", file)
		write(t, file, keysFile(id, "wrong-secret"))
		g := grant(t, nil)
		_, err := sts.Credential(t.Context(), g)
		check(t, "a wrong secret", err, credential.ErrUnavailable, credential.ReasonBrokerCredentials, []string{"cluster admin"}, "wrong-secret")
		write(t, file, keysFile(id, secret.Reveal()))
		time.Sleep(time.Minute)
		if _, err := sts.Credential(t.Context(), g); err != nil {
			t.Errorf("the right secret a minute later: %v", err)
		}
	})
}
