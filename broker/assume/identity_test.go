package assume_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/credence-iam/credence/broker/assume"
	"github.com/credence-iam/credence/broker/assume/ststest"
	"github.com/credence-iam/credence/broker/credential"
)

// form is an error response in the form of STS.
func form(code, message string) string {
	return fmt.Sprintf(`<ErrorResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><Error><Type></Type><Code>%s</Code><Message>%s</Message></Error><RequestId>18EC3C10FE2E4612</RequestId></ErrorResponse>`, code, message)
}

// TestIdentityByResponse: the response of STS decides whether the broker's identity is confirmed, and which problem is reported.
func TestIdentityByResponse(t *testing.T) {
	const confirmed, unsupported = "confirmed", "unsupported"
	user := "User: arn:aws:iam::123456789012:user/broker is not authorized to perform: "
	for name, tt := range map[string]struct {
		status int
		body   string
		want   string   // of the two above; "" for neither
		words  []string // of the problem
	}{
		"STS": {200, `<GetCallerIdentityResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><GetCallerIdentityResult>` +
			`<Arn>arn:aws:iam::123456789012:user/broker</Arn><Account>123456789012</Account></GetCallerIdentityResult></GetCallerIdentityResponse>`, confirmed, nil},
		"unknown key":               {403, form("InvalidClientTokenId", "The security token included in the request is invalid."), "", []string{"InvalidClientTokenId", "access key does not exist", "Secret"}},
		"wrong secret":              {403, form("SignatureDoesNotMatch", "The request signature we calculated does not match"), "", []string{"SignatureDoesNotMatch", "secret access key"}},
		"unknown key, MinIO":        {403, form("AccessDenied", "The Access Key Id you provided does not exist in our records."), "", []string{"access key does not exist"}},
		"expired":                   {400, form("ExpiredToken", "The security token included in the request is expired"), "", []string{"have expired", "replace"}},
		"clock":                     {400, form("RequestExpired", "Request has expired"), "", []string{"clock"}},
		"no account":                {403, form("OptInRequired", "The AWS Access Key Id needs a subscription for the service"), "", []string{"subscribed"}},
		"region":                    {403, form("RegionDisabledException", "STS is not activated in this region"), "", []string{"eu-central-1", "--region"}},
		"throttled":                 {400, form("Throttling", "Rate exceeded"), "", []string{"throttles", "keeps trying"}},
		"failing":                   {503, form("ServiceUnavailable", "try later"), "", []string{"ServiceUnavailable", "status 503", "keeps trying"}},
		"a denial without a caller": {403, form("AccessDenied", "Access Denied."), "", []string{"denies the broker", "VPC endpoint"}},
		// An endpoint policy allows only AssumeRole. STS knew the caller.
		"a policy against the action": {403, form("AccessDenied", user+"sts:GetCallerIdentity because no VPC endpoint policy allows the sts:GetCallerIdentity action"), confirmed, nil},
		// A real MinIO responds so, whatever the keys are.
		"MinIO":                      {400, form("InvalidParameterValue", "Unsupported action GetCallerIdentity"), unsupported, []string{"no GetCallerIdentity", "--base-arn"}},
		"unknown action":             {400, form("InvalidAction", "Could not find operation GetCallerIdentity for version 2011-06-15"), unsupported, nil},
		"not implemented":            {501, form("NotImplemented", "A header you provided implies functionality that is not implemented"), unsupported, nil},
		"not allowed, as S3 says it": {405, `<?xml version="1.0" encoding="UTF-8"?><Error><Code>MethodNotAllowed</Code><RequestId>tx1</RequestId></Error>`, unsupported, nil},
		"a web server":               {404, "<html><title>404 Not Found</title></html>", "", []string{"status 404", "--sts-endpoint"}},
		"a proxy":                    {403, "<html><title>Forbidden by your company</title></html>", "", []string{"status 403", "prox"}},
		"a page":                     {200, "<html>Sign in to the guest network</html>", "", []string{"status 200", "prox"}},
	} {
		t.Run(name, func(t *testing.T) {
			isolate(t, "AKIAEXAMPLE", "own-secret", "")
			front := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
				w.WriteHeader(tt.status)
				_, _ = w.Write([]byte(tt.body))
			}))
			defer front.Close()
			s := newSTS(t, assume.Config{Endpoint: front.URL})
			if is := s.Identity(); is != (assume.Identity{}) {
				t.Fatalf("before any call: %+v", is)
			}
			_, _ = s.Base(t.Context())
			is := s.Identity()
			if is.Confirmed != (tt.want == confirmed) || is.Unsupported != (tt.want == unsupported) || (is.Problem == "") != is.Confirmed {
				t.Errorf("%+v, want %q", is, tt.want)
			}
			for _, words := range tt.words {
				if !strings.Contains(is.Problem, words) {
					t.Errorf("the problem lacks %q: %s", words, is.Problem)
				}
			}
			for _, never := range []string{"own-secret", "18EC3C10FE2E4612", "arn:", "<html>"} {
				if strings.Contains(is.Problem, never) {
					t.Errorf("the problem has %q: %s", never, is.Problem)
				}
			}
		})
	}
}

// TestIdentityIsConfirmedByAnyCallAndStays: any response of STS to a caller that it knows confirms the identity. Nothing
// revokes that.
func TestIdentityIsConfirmedByAnyCallAndStays(t *testing.T) {
	server := start(t, ststest.Config{})
	server.SetIdentity(ststest.Behavior{Fault: &ststest.Fault{Code: "InvalidParameterValue", Message: "Unsupported action GetCallerIdentity"}})
	s := newSTS(t, assume.Config{Endpoint: server.URL()})
	_, _ = s.Base(t.Context())
	if is := s.Identity(); is.Confirmed || !is.Unsupported {
		t.Fatalf("without GetCallerIdentity: %+v", is)
	}
	if _, err := s.Credential(t.Context(), grant(t, nil)); err != nil {
		t.Fatal(err)
	}
	for _, outage := range []ststest.Outage{ststest.NoOutage, ststest.Failing, ststest.Refusing} {
		server.SetOutage(outage)
		_, _ = s.Base(t.Context())
		if is := s.Identity(); is != (assume.Identity{Confirmed: true}) {
			t.Errorf("outage %v: %+v", outage, is)
		}
	}

	// A role that does not trust the broker confirms it, too: STS names the caller that it denies.
	server = start(t, ststest.Config{Default: ststest.Behavior{Deny: true}})
	s = newSTS(t, assume.Config{Endpoint: server.URL()})
	if _, err := s.Credential(t.Context(), grant(t, nil)); err == nil || !s.Identity().Confirmed {
		t.Errorf("a role that is refused (%v): %+v", err, s.Identity())
	}
	// Other failures do not.
	server.SetDefault(ststest.Behavior{Fault: ststest.Throttling()})
	s = newSTS(t, assume.Config{Endpoint: server.URL()})
	if _, err := s.Credential(t.Context(), grant(t, nil)); err == nil || s.Identity().Confirmed {
		t.Errorf("a call that is throttled (%v): %+v", err, s.Identity())
	}
}

// TestIdentityWithAssumeRole: with --assume-role, that role must be assumed, too.
func TestIdentityWithAssumeRole(t *testing.T) {
	first, err := credential.ParseRoleARN(firstARN)
	if err != nil {
		t.Fatal(err)
	}
	server := start(t, ststest.Config{})
	for name, tt := range map[string]struct {
		first ststest.Behavior
		words []string
	}{
		"refused":     {ststest.Behavior{Deny: true}, []string{"--assume-role", "trust policy", "sts:AssumeRole"}},
		"throttled":   {ststest.Behavior{Fault: ststest.Throttling()}, []string{"--assume-role", "throttles"}},
		"unreachable": {ststest.Behavior{Fault: ststest.Drop()}, []string{"--assume-role", "cannot reach STS"}},
	} {
		server.SetRole(firstARN, tt.first)
		s := newSTS(t, assume.Config{Endpoint: server.URL(), AssumeRole: first})
		_, _ = s.Base(t.Context())
		is := s.Identity()
		if is.Confirmed || is.Unsupported {
			t.Errorf("%s: %+v", name, is)
		}
		for _, words := range tt.words {
			if !strings.Contains(is.Problem, words) || strings.Contains(is.Problem, "arn:") {
				t.Errorf("%s: the problem lacks %q, or has an ARN: %s", name, words, is.Problem)
			}
		}
	}
	server.SetRole(firstARN, ststest.Behavior{})
	s := newSTS(t, assume.Config{Endpoint: server.URL(), AssumeRole: first})
	if _, err := s.Base(t.Context()); err != nil || !s.Identity().Confirmed {
		t.Errorf("a first role that works: %v, %+v", err, s.Identity())
	}
}

func TestIdentityWithoutCredentials(t *testing.T) {
	server := start(t, ststest.Config{})
	isolate(t, "", "", "")
	s := newSTS(t, assume.Config{Endpoint: server.URL()})
	_, _ = s.Base(t.Context())
	if is := s.Identity(); is.Confirmed || !strings.Contains(is.Problem, "has no AWS credentials") || !strings.Contains(is.Problem, "docs/aws.md") {
		t.Errorf("without credentials: %+v", is)
	}

	webIdentity(t, server, "token")
	server.SetRole(baseARN, ststest.Behavior{WebIdentityToken: "another"})
	s = newSTS(t, assume.Config{Endpoint: server.URL()})
	_, _ = s.Base(t.Context())
	if is := s.Identity(); is.Confirmed || !strings.Contains(is.Problem, "InvalidIdentityToken") || !strings.Contains(is.Problem, "identity provider") {
		t.Errorf("a token that is refused: %+v", is)
	}
	server.SetRole(baseARN, ststest.Behavior{Deny: true})
	s = newSTS(t, assume.Config{Endpoint: server.URL()})
	_, _ = s.Base(t.Context())
	if is := s.Identity(); is.Confirmed || !strings.Contains(is.Problem, "trust policy") {
		t.Errorf("a role that is refused: %+v", is)
	}
	server.SetRole(baseARN, ststest.Behavior{Fault: ststest.Drop()})
	s = newSTS(t, assume.Config{Endpoint: server.URL()})
	_, _ = s.Base(t.Context())
	if is := s.Identity(); is.Confirmed || !strings.Contains(is.Problem, "cannot reach STS") {
		t.Errorf("STS is unavailable: %+v", is)
	}
}

// TestProblemsHaveNoPorts: one mistake has one text, whatever the local port, because each text is an Event.
func TestProblemsHaveNoPorts(t *testing.T) {
	isolate(t, "AKIAEXAMPLE", "own-secret", "")
	port := 40_000
	s := newSTS(t, assume.Config{Dial: func(context.Context, string, string) (net.Conn, error) {
		port++
		resolver, source := net.UDPAddr{IP: net.IPv4(10, 96, 0, 10), Port: 53}, net.UDPAddr{IP: net.IPv4(10, 0, 0, 7), Port: port}
		return nil, &net.OpError{Op: "read", Net: "udp", Source: &source, Addr: &resolver, Err: errors.New("i/o timeout")}
	}})
	problems := map[string]bool{}
	for range 3 {
		_, _ = s.Base(t.Context())
		problems[s.Identity().Problem] = true
	}
	const want = "the broker cannot reach STS; it keeps trying; check egress, DNS, --region and proxies (request send failed, " +
		`Post "https://sts.eu-central-1.amazonaws.com/": read udp 10.96.0.10:53: i/o timeout)`
	if len(problems) != 1 || !problems[want] {
		t.Errorf("the problems are %v, want %s", problems, want)
	}
}

// TestAwaitIdentity: the identity is confirmed within seconds after the end of an outage, however long it was. The broker sends
// no burst of calls.
func TestAwaitIdentity(t *testing.T) {
	for name, outage := range map[string]ststest.Outage{"failing": ststest.Failing, "refusing": ststest.Refusing} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				server, s := inMemory(t, ststest.Config{}, assume.Config{})
				server.SetOutage(outage)
				done := make(chan struct{})
				go func() { defer close(done); s.AwaitIdentity(t.Context(), slog.New(slog.DiscardHandler)) }()
				const unreachable = time.Hour
				time.Sleep(unreachable)
				first := s.Identity()
				if first.Confirmed || first.Problem == "" {
					t.Errorf("during the outage: %+v", first)
				}
				time.Sleep(time.Minute)
				if again := s.Identity(); again != first {
					t.Errorf("the text of the problem changes from %q to %q", first.Problem, again.Problem)
				}
				server.SetOutage(ststest.NoOutage)
				began := time.Now()
				<-done
				if took := time.Since(began); took > 10*time.Second || !s.Identity().Confirmed {
					t.Errorf("%s after the outage: %+v", took, s.Identity())
				}
				if n := server.Count("GetCallerIdentity", ""); outage == ststest.Failing && (n < 300 || n > 800) {
					t.Errorf("%d calls in an hour", n)
				}
			})
		})
	}
	t.Run("unsupported", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			server, s := inMemory(t, ststest.Config{}, assume.Config{})
			server.SetIdentity(ststest.Behavior{Fault: &ststest.Fault{Code: "InvalidAction"}})
			s.AwaitIdentity(t.Context(), slog.New(slog.DiscardHandler)) // returns
			if n := server.Count("GetCallerIdentity", ""); n != 1 || !s.Identity().Unsupported {
				t.Errorf("%d calls of an unsupported action: %+v", n, s.Identity())
			}
			// A base needs a response, so the call is repeated until there is one.
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			if base, err := s.AwaitBase(ctx, slog.New(slog.DiscardHandler)); err == nil || !base.IsZero() || server.Count("GetCallerIdentity", "") < 5 {
				t.Errorf("the base is %s, %v", base, err)
			}
		})
	})
}
