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
	// As kubelet does it: the new file takes the old one's place.
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

// webIdentity makes own credentials come from STS, by a token in a file.
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

// A rotated file is taken up: at once when the old keys are refused, and soon while they still work.
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
			credential.ErrUnavailable, credential.ReasonBaseCredential, []string{"operator"}, otherSecret.Reveal())

		// Refused again within the wait: the source is left alone.
		check(t, "refused again", call(t, sts, g, func() int { return server.Count("", "") }), credential.ErrUnavailable, credential.ReasonBaseCredential, nil)
		time.Sleep(2 * time.Second)

		// The call whose old keys are refused takes the new ones.
		write(t, file, keysFile(id, secret.Reveal()))
		if _, err := sts.Credential(t.Context(), g); err != nil {
			t.Errorf("with keys replaced on disk: %v", err)
		}
		if log := server.Calls(); log[len(log)-1].AccessKeyID != id || log[len(log)-2].AccessKeyID != otherID || log[len(log)-2].Code != "InvalidClientTokenId" {
			t.Errorf("the calls are %+v", log)
		}

		// Nothing is refused, and the new keys are used all the same.
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

// Each session of the base is asked for with the token that the file holds by then.
func TestWebIdentityTokenChanges(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		server, sts := inMemory(t, ststest.Config{Roles: map[string]ststest.Behavior{baseARN: {WebIdentityToken: "token-1"}}}, assume.Config{})
		file := webIdentity(t, server, "token-1")
		g := grant(t, nil)
		if _, ok := sts.BaseExpiration(); ok {
			t.Error("own credentials expire before there are any")
		}
		began := time.Now()
		if _, err := sts.Credential(t.Context(), g); err != nil {
			t.Fatal(err)
		}
		if at, ok := sts.BaseExpiration(); !ok || !at.Equal(began.Add(time.Hour)) {
			t.Errorf("own credentials expire at %v, %v, want %v", at, ok, began.Add(time.Hour))
		}

		// Renewed ahead, with the new token and without a call that waits for it.
		server.SetRole(baseARN, ststest.Behavior{WebIdentityToken: "token-2", Latency: 3 * time.Second})
		write(t, file, "token-2")
		time.Sleep(56 * time.Minute)
		at := time.Now()
		if _, err := sts.Credential(t.Context(), g); err != nil || time.Since(at) != 0 {
			t.Errorf("while own credentials are renewed, a call takes %v and gives %v", time.Since(at), err)
		}
		time.Sleep(time.Minute)
		if n := server.Count("AssumeRoleWithWebIdentity", baseARN); n != 2 {
			t.Errorf("own credentials were asked for %d times, want 2", n)
		}
		if end, _ := sts.BaseExpiration(); !end.Equal(at.Add(time.Hour + 3*time.Second)) {
			t.Errorf("the new ones expire at %v, asked for at %v", end, at)
		}

		// A token that is not taken any more is an operator's matter. Until the session ends nobody feels it.
		server.SetRole(baseARN, ststest.Behavior{WebIdentityToken: "token-3"})
		time.Sleep(58 * time.Minute)
		if _, err := sts.Credential(t.Context(), g); err != nil {
			t.Errorf("with two minutes left: %v", err)
		}
		time.Sleep(3 * time.Minute)
		_, err := sts.Credential(t.Context(), g)
		check(t, "expired", err, credential.ErrUnavailable, credential.ReasonBaseCredential, []string{"operator"}, "token-2")
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

// What STS says to the web identity behind own credentials.
func TestWebIdentityErrors(t *testing.T) {
	for _, tt := range []struct {
		fault *ststest.Fault
		asked int // by one call
		words string
	}{
		{&ststest.Fault{Code: "IDPCommunicationError", Status: 400}, 2, "operator must see to it"},
		{&ststest.Fault{Code: "InvalidIdentityToken", Status: 400}, 2, "operator must see to it"},
		{&ststest.Fault{Code: "IDPRejectedClaim", Status: 403}, 2, "operator must see to it"},
		{&ststest.Fault{Code: "ExpiredTokenException", Status: 400}, 2, "operator must see to it"},
		{&ststest.Fault{Code: "AccessDenied", Status: 403}, 1, "operator must see to it"},
		{&ststest.Fault{Code: "ValidationError", Status: 400}, 1, "operator must see to it"},
		{ststest.Throttling(), 1, "cannot be had at the moment"},
		{ststest.Unavailable(), 1, "cannot be had at the moment"},
		{ststest.StatusPage(502), 1, "cannot be had at the moment"},
		{ststest.Drop(), 1, "operator must see to it"},
		{ststest.EmptyBody(), 1, "operator must see to it"},
		{ststest.WithElement("Expiration", "planted-secret"), 1, "cannot be had at the moment"},
	} {
		what := fmt.Sprintf("%+v", *tt.fault)
		synctest.Test(t, func(t *testing.T) {
			server, sts := inMemory(t, ststest.Config{}, assume.Config{})
			webIdentity(t, server, "planted-token")
			server.SetRole(baseARN, ststest.Behavior{Fault: tt.fault})
			_, err := sts.Credential(t.Context(), grant(t, nil))
			check(t, what, err, credential.ErrUnavailable, credential.ReasonBaseCredential, []string{tt.words}, "planted-secret", "planted-token")
			if n := server.Count("AssumeRoleWithWebIdentity", ""); n != tt.asked {
				t.Errorf("%s: STS was asked %d times, want %d", what, n, tt.asked)
			}
			if n := server.Count("AssumeRole", ""); n != 0 {
				t.Errorf("%s: %d calls were made without credentials", what, n)
			}
			// It passes, and a second try of the first call is enough for what passes quickly.
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

// counting is a source of credentials as containers have it, which counts.
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

// However many grants want a session, a source that is away is asked by one of them.
func TestSourceIsAskedByOne(t *testing.T) {
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
					check(t, "failing source", err, credential.ErrUnavailable, credential.ReasonBaseCredential, []string{"operator"})
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
	// One question, and those that came after its end found it on its wait. The race for a question
	// more is one that a machine stopped for a second would make.
	if asked, most := source.asked.Load(), source.most.Load(); asked > 2 || most != 1 {
		t.Errorf("the source was asked %d times by %d calls, by %d at once", asked, callers, most)
	}
	working := func() (int, map[string]string) {
		return 200, map[string]string{"AccessKeyId": id, "SecretAccessKey": secret.Reveal()}
	}
	source.answer.Store(&working)
	for all() > 0 {
		time.Sleep(50 * time.Millisecond) // the source is on its wait
	}
}

// The waits between questions to a source that fails, in virtual time, and who is told of them.
func TestSourceIsLeftAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		server, sts := inMemory(t, ststest.Config{}, assume.Config{Logger: slog.New(slog.NewJSONHandler(&log, nil))})
		webIdentity(t, server, "planted-token")
		server.SetRole(baseARN, ststest.Behavior{Fault: &ststest.Fault{Code: "AccessDenied", Message: "no", Status: 403}})
		g := grant(t, nil)
		began := time.Now()
		var asked []time.Duration
		for range 40 * 60 { // grants want sessions all the time
			_, err := sts.Credential(t.Context(), g)
			e, ok := errors.AsType[*credential.Error](err)
			if !ok || e.Reason != credential.ReasonBaseCredential || e.RetryAfter <= 0 || e.RetryAfter > time.Minute {
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
			t.Errorf("the source was asked at (-want +got):\n%s", diff)
		}
		if n := strings.Count(log.String(), "Obtaining the broker's own AWS credentials failed"); n != len(want) || strings.Contains(log.String(), "planted-token") {
			t.Errorf("%d lines in the log:\n%s", n, &log)
		}
		// A mended source is found within the longest wait, and the count begins anew.
		server.SetRole(baseARN, ststest.Behavior{})
		time.Sleep(time.Minute)
		if _, err := sts.Credential(t.Context(), g); err != nil {
			t.Error(err)
		}
	})
}

// A caller that leaves takes nothing from the others.
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
			check(t, "impatient", err, credential.ErrUnavailable, credential.ReasonBaseCredential, nil)
			if time.Since(began) != time.Second {
				t.Errorf("left after %v", time.Since(began))
			}
		})
		synctest.Wait()
		wg.Go(func() {
			if _, err := sts.Credential(t.Context(), g); err != nil {
				t.Errorf("the patient one: %v", err)
			}
		})
		wg.Wait()
		if n := server.Count("AssumeRoleWithWebIdentity", ""); n != 1 {
			t.Errorf("the source was asked %d times", n)
		}
	})
}

// The first hop is called once per its life, and ahead of its end.
func TestFirstHopIsRenewedAhead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		hop, err := credential.ParseRoleARN(hopARN)
		if err != nil {
			t.Fatal(err)
		}
		var told []assume.Call
		var mu sync.Mutex
		server, sts := inMemory(t, ststest.Config{}, assume.Config{FirstHop: hop, Observe: func(c assume.Call) {
			mu.Lock()
			defer mu.Unlock()
			told = append(told, c)
		}})
		g := grant(t, nil)
		began := time.Now()
		var at []time.Duration
		for range 3 * 60 {
			if _, err := sts.Credential(t.Context(), g); err != nil {
				t.Fatal(err)
			}
			synctest.Wait()
			if n := server.Count("AssumeRole", hopARN); n > len(at) {
				at = append(at, time.Since(began))
			}
			time.Sleep(time.Minute)
		}
		if diff := cmp.Diff([]time.Duration{0, 55 * time.Minute, 110 * time.Minute, 165 * time.Minute}, at); diff != "" {
			t.Errorf("the first hop was assumed at (-want +got):\n%s", diff)
		}
		if end, ok := sts.BaseExpiration(); !ok || !end.Equal(began.Add((165+60)*time.Minute)) {
			t.Errorf("own credentials expire at %v, %v", end, ok)
		}

		// It fails: the old session is used to its end, and then it is the operator's matter.
		server.SetRole(hopARN, ststest.Behavior{Fault: ststest.Unavailable()})
		time.Sleep(40 * time.Minute)
		if _, err := sts.Credential(t.Context(), g); err != nil {
			t.Errorf("with five minutes left: %v", err)
		}
		time.Sleep(6 * time.Minute)
		for _, fault := range []*ststest.Fault{ststest.Unavailable(), ststest.Throttling(), ststest.Drop(), {Code: "AccessDenied", Status: 403}, ststest.EmptyBody(), ststest.HTMLPage()} {
			server.SetRole(hopARN, ststest.Behavior{Fault: fault})
			time.Sleep(2 * time.Minute)
			before := server.Count("AssumeRole", roleARN)
			_, err := sts.Credential(t.Context(), g)
			check(t, fmt.Sprintf("%+v", *fault), err, credential.ErrUnavailable, credential.ReasonBaseCredential, []string{"operator"})
			if server.Count("AssumeRole", roleARN) != before {
				t.Error("a role was assumed without the first hop")
			}
		}
		mu.Lock()
		defer mu.Unlock()
		for _, outcome := range []credential.Reason{"ok", credential.ReasonSTSUnavailable, credential.ReasonSTSThrottled, credential.ReasonSTSDenied} {
			if !slices.ContainsFunc(told, func(c assume.Call) bool { return c.Action == "AssumeRole" && c.Outcome == string(outcome) }) {
				t.Errorf("Observe was not told of %s", outcome)
			}
		}
	})
}

// What STS doubted once is used again while nothing better is to be had.
func TestDoubtedCredentialsAreBetterThanNone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		hop, err := credential.ParseRoleARN(hopARN)
		if err != nil {
			t.Fatal(err)
		}
		server, sts := inMemory(t, ststest.Config{}, assume.Config{FirstHop: hop})
		if _, err := sts.Credential(t.Context(), grant(t, nil)); err != nil {
			t.Fatal(err)
		}
		server.SetRole(hopARN, ststest.Behavior{Fault: ststest.Unavailable()})
		server.SetRole(roleARN, ststest.Behavior{Fault: &ststest.Fault{Code: "ExpiredToken", Status: 403, Times: 1}})
		_, _ = sts.Credential(t.Context(), grant(t, nil)) // finds out that there is nothing else
		if _, err := sts.Credential(t.Context(), grant(t, nil)); err != nil {
			t.Errorf("with credentials that STS takes, and a source that is away: %v", err)
		}
	})
}

// IAM revokes sessions by a policy that denies them everything, in the words in which a role is denied. The broker's
// own is replaced after a while of that; one role that denies does not make it.
func TestRevokedByPolicy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		hop, err := credential.ParseRoleARN(hopARN)
		if err != nil {
			t.Fatal(err)
		}
		server, sts := inMemory(t, ststest.Config{}, assume.Config{FirstHop: hop})
		hops := func() int { return server.Count("AssumeRole", hopARN) }
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
		if n := hops(); n != 1 {
			t.Errorf("the hop was made %d times, though others were let in", n)
		}
		call(21)
		if n := hops(); n != 2 {
			t.Errorf("after nothing but denials the hop was made %d times", n)
		}
	})
}

// A session of the first hop that is revoked is replaced by the call that finds out.
func TestRevokedHop(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		hop, err := credential.ParseRoleARN(hopARN)
		if err != nil {
			t.Fatal(err)
		}
		server, sts := inMemory(t, ststest.Config{}, assume.Config{FirstHop: hop})
		once := &ststest.Fault{Code: "ExpiredToken", Status: 403, Times: 1}
		server.SetRole(roleARN, ststest.Behavior{Fault: once})
		if _, err := sts.Credential(t.Context(), grant(t, nil)); err != nil {
			t.Error(err)
		}
		var roles []string
		for _, c := range server.Calls() {
			roles = append(roles, c.RoleARN)
		}
		if diff := cmp.Diff([]string{hopARN, roleARN, hopARN, roleARN}, roles); diff != "" {
			t.Errorf("the calls (-want +got):\n%s", diff)
		}
		// Behind a role AWS gives one hour.
		_, err = sts.Credential(t.Context(), grant(t, map[policy.Key]string{policy.Duration: "2h"}))
		check(t, "two hours", err, credential.ErrInvalid, credential.ReasonSTSRejected, []string{"because the broker itself is a role", "1h or less"})
	})
}

// An operator corrects the secret of a key that has been refused, and leaves its id.
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
		check(t, "a wrong secret", err, credential.ErrUnavailable, credential.ReasonBaseCredential, []string{"operator"}, "wrong-secret")
		write(t, file, keysFile(id, secret.Reveal()))
		time.Sleep(time.Minute)
		if _, err := sts.Credential(t.Context(), g); err != nil {
			t.Errorf("the right secret a minute later: %v", err)
		}
	})
}
