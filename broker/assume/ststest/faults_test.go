package ststest_test

import (
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/sts"
	"github.com/aws/aws-sdk-go-v2/service/sts/types"
	"github.com/aws/smithy-go"
	"github.com/google/go-cmp/cmp"

	"github.com/credence-iam/credence/broker/assume/ststest"
)

func inMemory(t *testing.T, cfg ststest.Config) *ststest.Server {
	t.Helper()
	s, err := ststest.StartInMemory(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestLatencies(t *testing.T) {
	const n = 20_000
	sample := func(next func() time.Duration) []time.Duration {
		all := make([]time.Duration, n)
		for i := range all {
			all[i] = next()
		}
		return all
	}
	uniform := sample(ststest.Uniform(100*time.Millisecond, 300*time.Millisecond, 1))
	again := sample(ststest.Uniform(100*time.Millisecond, 300*time.Millisecond, 1))
	if !slices.Equal(uniform, again) {
		t.Error("the same seed gives other latencies")
	}
	slices.Sort(uniform)
	if uniform[0] < 100*time.Millisecond || uniform[n-1] > 300*time.Millisecond {
		t.Errorf("uniform latencies go from %v to %v", uniform[0], uniform[n-1])
	}
	if m := uniform[n/2]; m < 195*time.Millisecond || m > 205*time.Millisecond {
		t.Errorf("the middle of uniform latencies is %v", m)
	}
	tail := sample(ststest.Percentiles(80*time.Millisecond, 900*time.Millisecond, 1))
	slices.Sort(tail)
	if tail[0] <= 0 {
		t.Errorf("the least latency is %v", tail[0])
	}
	if p50 := tail[n/2]; p50 < 76*time.Millisecond || p50 > 84*time.Millisecond {
		t.Errorf("the 50th percentile is %v, want about 80ms", p50)
	}
	if p99 := tail[n*99/100]; p99 < 800*time.Millisecond || p99 > 1000*time.Millisecond {
		t.Errorf("the 99th percentile is %v, want about 900ms", p99)
	}

	synctest.Test(t, func(t *testing.T) {
		s := inMemory(t, ststest.Config{Default: ststest.Behavior{Latency: time.Second, Latencies: ststest.Uniform(time.Minute, 2*time.Minute, 7)}})
		first := ststest.Uniform(time.Minute, 2*time.Minute, 7)()
		began := time.Now()
		assume(t, s, input(roleARN))
		if d := time.Since(began); d != time.Second+first {
			t.Errorf("the answer took %v, want %v", d, time.Second+first)
		}
	})
}

func TestThrottle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := inMemory(t, ststest.Config{Throttle: &ststest.Throttle{Rate: 10, Burst: 5}})
		wave := func(n int) (throttled int) {
			var mu sync.Mutex
			var wg sync.WaitGroup
			for i := range n {
				wg.Go(func() {
					_, err := baseClient(s).AssumeRole(t.Context(), input(roleARN+fmt.Sprint(i)))
					if err != nil {
						wantError(t, err, 400, "Throttling", "Rate exceeded")
						mu.Lock()
						throttled++
						mu.Unlock()
					}
				})
			}
			wg.Wait()
			return throttled
		}
		for _, step := range []struct {
			wait      time.Duration
			n, wanted int
		}{
			{0, 20, 15},                    // the bucket is full at the start
			{100 * time.Millisecond, 3, 2}, // one call was added
			{time.Minute, 20, 15},          // up to its size
		} {
			time.Sleep(step.wait)
			if got := wave(step.n); got != step.wanted {
				t.Errorf("of %d calls after %v, %d were throttled, want %d", step.n, step.wait, got, step.wanted)
			}
		}
		if a, ok := s.Answered("Throttling"), s.Answered(""); a != 32 || ok != 11 {
			t.Errorf("%d answers were of throttling and %d of success, want 32 and 11", a, ok)
		}
		if _, err := baseClient(s).GetCallerIdentity(t.Context(), nil); err == nil {
			t.Error("GetCallerIdentity has a bucket of its own")
		}
		s.SetThrottle(nil)
		if got := wave(50); got != 0 {
			t.Errorf("without a limit, %d calls were throttled", got)
		}
	})
}

func TestOutage(t *testing.T) {
	both := func(t *testing.T, s *ststest.Server, c *sts.Client, refused error) {
		t.Helper()
		identity(t, c)
		s.SetOutage(ststest.Failing)
		_, err := c.GetCallerIdentity(t.Context(), nil)
		wantError(t, err, 503, "ServiceUnavailable", "temporary")
		_, err = c.AssumeRole(t.Context(), input(roleARN))
		wantError(t, err, 503, "ServiceUnavailable", "temporary")

		s.SetOutage(ststest.Refusing)
		for range 3 { // on the open connection, then on new ones
			_, err = c.GetCallerIdentity(t.Context(), nil)
			if _, ok := errors.AsType[smithy.APIError](err); ok || err == nil {
				t.Errorf("while connections are refused, the answer is %v", err)
			}
		}
		if refused != nil && !errors.Is(err, refused) {
			t.Errorf("a new connection gives %v, want %v", err, refused)
		}
		s.SetOutage(ststest.NoOutage)
		identity(t, c)
	}
	t.Run("TCP", func(t *testing.T) {
		s := start(t, ststest.Config{})
		both(t, s, baseClient(s), nil)
	})
	t.Run("memory", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			s := inMemory(t, ststest.Config{})
			both(t, s, baseClient(s), syscall.ECONNREFUSED)

			// Calls in progress end, too.
			s.SetRole(roleARN, ststest.Behavior{Latency: time.Hour})
			failed := make(chan error, 1)
			began := time.Now()
			go func() {
				_, err := baseClient(s).AssumeRole(t.Context(), input(roleARN))
				failed <- err
			}()
			time.Sleep(time.Minute)
			s.SetOutage(ststest.Refusing)
			if err := <-failed; err == nil || time.Since(began) != time.Minute {
				t.Errorf("a call in progress ended after %v with %v", time.Since(began), err)
			}
		})
	})
}

func TestClock(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := inMemory(t, ststest.Config{})
		for _, tt := range []struct {
			ahead time.Duration
			code  string
		}{{0, ""}, {4 * time.Minute, ""}, {-4 * time.Minute, ""}, {6 * time.Minute, "Signature expired"}, {-6 * time.Minute, "Signature not yet current"}} {
			s.SetClock(tt.ahead)
			resp, err := s.Client().Get(s.URL()) //nolint:noctx // The GET is refused at once.
			if err != nil {
				t.Fatal(err)
			}
			_ = resp.Body.Close()
			date, err := http.ParseTime(resp.Header.Get("Date"))
			if want := time.Now().Add(tt.ahead).Truncate(time.Second); err != nil || !date.Equal(want) {
				t.Errorf("with a clock %v ahead, Date is %v (%v), want %v", tt.ahead, date, err, want)
			}
			out, err := baseClient(s).AssumeRole(t.Context(), input(roleARN))
			if tt.code != "" {
				wantError(t, err, 403, "SignatureDoesNotMatch", tt.code)
				continue
			}
			if err != nil {
				t.Fatal(err)
			}
			if want := time.Now().Add(tt.ahead + time.Hour); !out.Credentials.Expiration.Equal(want) {
				t.Errorf("with a clock %v ahead, a session ends %v, want %v", tt.ahead, out.Credentials.Expiration, want)
			}
		}
	})
}

// TestInheritance: role chaining passes on tags and identities, and trust policies may refuse them.
func TestInheritance(t *testing.T) {
	const hop = "arn:aws:iam::123456789012:role/hop"
	s := start(t, ststest.Config{})
	tag := func(key string) []types.Tag { return []types.Tag{{Key: &key, Value: aws.String("v")}} }
	first := input(hop)
	first.Tags = append(tag("Team"), tag("Cost")...)
	first.TransitiveTagKeys = []string{"Team"}
	first.SourceIdentity = aws.String("alice")
	session := sessionClient(s, assume(t, s, first).Credentials)

	for name, tt := range map[string]struct {
		change  func(*sts.AssumeRoleInput)
		b       ststest.Behavior
		status  int // 0: allowed
		code    string
		message string
	}{
		"nothing":                   {change: func(*sts.AssumeRoleInput) {}},
		"another tag":               {change: func(i *sts.AssumeRoleInput) { i.Tags = tag("Other") }},
		"a tag that did not go on":  {change: func(i *sts.AssumeRoleInput) { i.Tags = tag("Cost") }},
		"an inherited tag":          {func(i *sts.AssumeRoleInput) { i.Tags = tag("team") }, ststest.Behavior{}, 400, "InvalidParameterValue", "conflicts with a transitive tag key"},
		"the same identity":         {change: func(i *sts.AssumeRoleInput) { i.SourceIdentity = aws.String("alice") }},
		"another identity":          {func(i *sts.AssumeRoleInput) { i.SourceIdentity = aws.String("bob") }, ststest.Behavior{}, 403, "AccessDenied", "sts:SetSourceIdentity"},
		"no sts:TagSession":         {func(*sts.AssumeRoleInput) {}, ststest.Behavior{NoTagSession: true}, 403, "AccessDenied", "is not authorized to perform: sts:TagSession on resource: " + roleARN},
		"no sts:SetSourceIdentity":  {func(*sts.AssumeRoleInput) {}, ststest.Behavior{NoSourceIdentity: true}, 403, "AccessDenied", "perform: sts:SetSourceIdentity"},
		"no transitive key is long": {change: func(i *sts.AssumeRoleInput) { i.TransitiveTagKeys = []string{strings.Repeat("k", 128)} }},
		"one is":                    {func(i *sts.AssumeRoleInput) { i.TransitiveTagKeys = []string{strings.Repeat("k", 129)} }, ststest.Behavior{}, 400, "ValidationError", "'transitiveTagKeys.1.member'"},
	} {
		t.Run(name, func(t *testing.T) {
			s.SetRole(roleARN, tt.b)
			in := input(roleARN)
			tt.change(in)
			out, err := session.AssumeRole(t.Context(), in)
			if tt.status != 0 {
				wantError(t, err, tt.status, tt.code, tt.message)
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if got := aws.ToString(out.SourceIdentity); got != "alice" {
				t.Errorf("the source identity is %q", got)
			}
			// It is passed on repeatedly.
			again := input("arn:aws:iam::123456789012:role/third")
			again.Tags = tag("TEAM")
			_, err = sessionClient(s, out.Credentials).AssumeRole(t.Context(), again)
			wantError(t, err, 400, "InvalidParameterValue", "transitive")
		})
	}
	// Without role chaining, the trust policy applies to the tags of the call.
	s.SetRole(roleARN, ststest.Behavior{NoTagSession: true, NoSourceIdentity: true})
	assume(t, s, input(roleARN))
	in := input(roleARN)
	in.Tags = tag("Other")
	_, err := baseClient(s).AssumeRole(t.Context(), in)
	wantError(t, err, 403, "AccessDenied", "sts:TagSession")
}

func TestWebIdentity(t *testing.T) {
	s := start(t, ststest.Config{Roles: map[string]ststest.Behavior{roleARN: {WebIdentityToken: "right-token"}}})
	unsigned := sts.New(sts.Options{Region: "eu-west-1", BaseEndpoint: aws.String(s.URL()), HTTPClient: s.Client(), Retryer: aws.NopRetryer{}})
	in := func(token string, seconds int32) *sts.AssumeRoleWithWebIdentityInput {
		return &sts.AssumeRoleWithWebIdentityInput{RoleArn: aws.String(roleARN), RoleSessionName: aws.String("broker"), WebIdentityToken: &token, DurationSeconds: &seconds}
	}
	out, err := unsigned.AssumeRoleWithWebIdentity(t.Context(), in("right-token", 12*3600))
	if err != nil {
		t.Fatal(err)
	}
	if *out.Provider == "" || *out.Audience == "" || *out.SubjectFromWebIdentityToken == "" {
		t.Errorf("got %+v", out)
	}
	session := sessionClient(s, out.Credentials)
	if got := identity(t, session)["Arn"]; got != "arn:aws:sts::210987654321:assumed-role/reader/broker" {
		t.Errorf("the session is %s", got)
	}
	// It is a role, so its own calls are role chaining.
	longer := input("arn:aws:iam::123456789012:role/r")
	longer.DurationSeconds = aws.Int32(3601)
	_, err = session.AssumeRole(t.Context(), longer)
	wantError(t, err, 400, "ValidationError", "role chaining")

	_, err = unsigned.AssumeRoleWithWebIdentity(t.Context(), in("wrong-token", 3600))
	wantError(t, err, 400, "InvalidIdentityToken", "")
	_, err = unsigned.AssumeRoleWithWebIdentity(t.Context(), in("abc", 3600))
	wantError(t, err, 400, "ValidationError", "webIdentityToken")
	s.SetRole(roleARN, ststest.Behavior{Deny: true})
	_, err = unsigned.AssumeRoleWithWebIdentity(t.Context(), in("right-token", 3600))
	wantError(t, err, 403, "AccessDenied", "sts:AssumeRoleWithWebIdentity")
	for _, c := range s.Calls() {
		if strings.Contains(fmt.Sprintf("%+v", c), "right-token") {
			t.Error("the call log has a token")
		}
	}
}

// TestGarbage: each kind of garbage matches its name, and no client accepts it as a session.
func TestGarbage(t *testing.T) {
	for name, tt := range map[string]struct {
		fault  *ststest.Fault
		status int
		check  func(header http.Header, body string) bool
	}{
		"HTMLPage": {ststest.HTMLPage(), 200, func(h http.Header, b string) bool {
			return strings.HasPrefix(h.Get("Content-Type"), "text/html") && strings.HasPrefix(b, "<!DOCTYPE html>")
		}},
		"TruncatedXML":     {ststest.TruncatedXML(), 200, func(_ http.Header, b string) bool { return strings.HasPrefix(b, "<AssumeRoleResponse") && !parses(b) }},
		"ShortBody":        {ststest.ShortBody(), 200, func(h http.Header, b string) bool { return h.Get("Content-Length") == "1000000" && len(b) < 2000 }},
		"EmptyBody":        {ststest.EmptyBody(), 200, func(_ http.Header, b string) bool { return b == "" }},
		"WrongContentType": {ststest.WrongContentType(), 200, func(h http.Header, b string) bool { return h.Get("Content-Type") == "application/json" && b[0] == '{' }},
		"HugeBody":         {ststest.HugeBody(), 200, func(_ http.Header, b string) bool { return len(b) > 8<<20 && parses(b) }},
		"WithoutElement": {ststest.WithoutElement("SessionToken"), 200, func(_ http.Header, b string) bool {
			return parses(b) && !strings.Contains(b, "SessionToken") && strings.Contains(b, "SecretAccessKey")
		}},
		"WithElement": {ststest.WithElement("Expiration", "tomorrow"), 200, func(_ http.Header, b string) bool {
			return parses(b) && strings.Contains(b, "<Expiration>tomorrow</Expiration>")
		}},
		"StatusPage": {ststest.StatusPage(502), 502, func(h http.Header, b string) bool {
			return h.Get("Content-Type") == "text/html" && strings.HasPrefix(b, "<html>")
		}},
	} {
		t.Run(name, func(t *testing.T) {
			s := start(t, ststest.Config{Default: ststest.Behavior{Fault: tt.fault}})
			id, secret := s.Keys()
			var header http.Header
			var body string
			var status int
			c := client(s, id, secret.Reveal(), "")
			out, err := c.AssumeRole(t.Context(), input(roleARN), func(o *sts.Options) {
				o.HTTPClient = &http.Client{Transport: watch{s.Client().Transport, func(resp *http.Response) {
					b, _ := io.ReadAll(resp.Body) // Short bodies end with an error.
					header, body, status = resp.Header, string(b), resp.StatusCode
					resp.Body = io.NopCloser(strings.NewReader(body))
				}}}
			})
			if status != tt.status || !tt.check(header, body) {
				t.Errorf("got %d, %v, %d bytes: %.300s", status, header, len(body), body)
			}
			if whole := err == nil && out.Credentials != nil && out.Credentials.SessionToken != nil && out.Credentials.Expiration != nil; whole != (name == "HugeBody") {
				t.Errorf("the SDK read %v", err)
			}
			if n := s.Answered("Garbled"); n != 1 {
				t.Errorf("%d responses count as garbled", n)
			}
			if calls := s.Calls(); calls[0].Code != "Garbled" || calls[0].Status != tt.status {
				t.Errorf("recorded %+v", calls[0])
			}
			if diff := cmp.Diff(1, s.Count("AssumeRole", "")); diff != "" {
				t.Error(diff)
			}
		})
	}
}

type watch struct {
	next http.RoundTripper
	see  func(*http.Response)
}

func (w watch) RoundTrip(r *http.Request) (*http.Response, error) {
	resp, err := w.next.RoundTrip(r)
	if err == nil {
		w.see(resp)
	}
	return resp, err
}

func parses(doc string) bool { return xml.Unmarshal([]byte(doc), new(struct{})) == nil }
