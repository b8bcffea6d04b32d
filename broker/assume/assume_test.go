package assume_test

import (
	"bytes"
	"context"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"

	"github.com/credence-iam/credence/broker/assume"
	"github.com/credence-iam/credence/broker/assume/ststest"
	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/policy"
)

const (
	roleARN  = "arn:aws:iam::210987654321:role/apps/reader"
	firstARN = "arn:aws:iam::123456789012:role/first"
)

// isolate hides the AWS configuration of the user who runs the tests, and gives the SDK these keys. An empty key is not set.
func isolate(t *testing.T, id, secret, token string) {
	t.Helper()
	for _, variable := range os.Environ() {
		if name, _, _ := strings.Cut(variable, "="); strings.HasPrefix(name, "AWS_") {
			t.Setenv(name, "")
		}
	}
	for name, value := range map[string]string{
		"AWS_ACCESS_KEY_ID":           id,
		"AWS_SECRET_ACCESS_KEY":       secret,
		"AWS_SESSION_TOKEN":           token,
		"AWS_EC2_METADATA_DISABLED":   "true",
		"AWS_CONFIG_FILE":             os.DevNull,
		"AWS_SHARED_CREDENTIALS_FILE": os.DevNull,
	} {
		t.Setenv(name, value)
	}
}

// start serves an STS, with the broker's own credentials in the environment.
func start(t *testing.T, cfg ststest.Config) *ststest.Server {
	t.Helper()
	s, err := ststest.Start(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	id, secret := s.Keys()
	isolate(t, id, secret.Reveal(), "")
	return s
}

func newSTS(t *testing.T, cfg assume.Config) *assume.STS {
	t.Helper()
	if cfg.Region == "" {
		cfg.Region = "eu-central-1"
	}
	sts, err := assume.New(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	return sts
}

// grant returns the grant of a pod with these annotations.
func grant(t *testing.T, pairs map[policy.Key]string) policy.Grant {
	t.Helper()
	return grantBy(t, nil, pairs)
}

// grantBy is grant with a rules file.
func grantBy(t *testing.T, file *policy.File, pairs map[policy.Key]string) policy.Grant {
	t.Helper()
	keys, err := policy.NewKeys(policy.DefaultPrefix)
	if err != nil {
		t.Fatal(err)
	}
	rules, err := policy.New(policy.Config{Keys: keys})
	if err != nil {
		t.Fatal(err)
	}
	if file != nil {
		if err := rules.Use(*file); err != nil {
			t.Fatal(err)
		}
	}
	annotations := map[string]string{keys.Name(policy.Role): roleARN}
	for key, value := range pairs {
		annotations[keys.Name(key)] = value
	}
	g, err := rules.Grant(
		policy.Pod{Namespace: "shop", Name: "cart-1", UID: "u-1", ServiceAccount: "cart", Request: keys.Request(annotations)},
		policy.Namespace{
			Name:        "shop",
			Labels:      map[string]string{keys.Name(policy.Inject): policy.Enabled},
			Annotations: map[string]string{keys.Name(policy.Permitted): ".*", keys.Name(policy.PermittedTags): "team,cost centre"},
		})
	if err != nil {
		t.Fatal(err)
	}
	return g
}

// recorder stores the forms of the requests that pass through it.
type recorder struct {
	http.Handler
	mu    sync.Mutex
	forms []url.Values
}

func (r *recorder) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	body, err := io.ReadAll(req.Body)
	if err != nil {
		http.Error(w, "reading failed", http.StatusBadRequest)
		return
	}
	form, err := url.ParseQuery(string(body))
	if err != nil {
		http.Error(w, "parsing failed", http.StatusBadRequest)
		return
	}
	r.mu.Lock()
	r.forms = append(r.forms, form)
	r.mu.Unlock()
	req.Body = io.NopCloser(bytes.NewReader(body))
	r.Handler.ServeHTTP(w, req)
}

// TestSendsTheGrant: the request has exactly the inputs of the grant.
func TestSendsTheGrant(t *testing.T) {
	server, err := ststest.New(ststest.Config{})
	if err != nil {
		t.Fatal(err)
	}
	id, secret := server.Keys()
	isolate(t, id, secret.Reveal(), "")
	recorder := &recorder{Handler: server}
	front := httptest.NewServer(recorder)
	defer front.Close()
	sts := newSTS(t, assume.Config{Endpoint: front.URL})

	common := url.Values{"Action": {"AssumeRole"}, "Version": {"2011-06-15"}, "RoleArn": {roleARN}}
	file := &policy.File{
		KubernetesTags: true, TransitiveTags: []string{"team", "kubernetes-namespace"}, SourceIdentity: policy.SourceServiceAccount,
		Namespaces: []policy.NamespaceRules{{Match: []string{"*"}, Accounts: []string{"*"}, Roles: []string{"*"}, ForcedTags: map[string]string{"team": "{namespace}"}}},
	}
	for name, tt := range map[string]struct {
		file  *policy.File
		pairs map[policy.Key]string
		want  url.Values
	}{
		"role alone": {nil, nil, url.Values{"RoleSessionName": {"credence"}, "DurationSeconds": {"3600"}}},
		"everything": {
			nil,
			map[policy.Key]string{
				policy.SessionName:   "my-session",
				policy.ExternalID:    "ext/1:2",
				policy.SessionTags:   "team=shop, cost centre=north + south",
				policy.SessionPolicy: `{ "Statement": [] }`,
				policy.PolicyARNs:    "arn:aws:iam::aws:policy/B, arn:aws:iam::aws:policy/A",
				policy.Duration:      "12h",
				policy.SessionScope:  "pod",
			},
			url.Values{
				"RoleSessionName":         {"my-session"},
				"DurationSeconds":         {"43200"},
				"ExternalId":              {"ext/1:2"},
				"Policy":                  {`{"Statement":[]}`},
				"PolicyArns.member.1.arn": {"arn:aws:iam::aws:policy/A"},
				"PolicyArns.member.2.arn": {"arn:aws:iam::aws:policy/B"},
				"Tags.member.1.Key":       {"cost centre"},
				"Tags.member.1.Value":     {"north + south"},
				"Tags.member.2.Key":       {"team"},
				"Tags.member.2.Value":     {"shop"},
			},
		},
		"scope": {
			nil,
			map[policy.Key]string{policy.SessionScope: "service-account", policy.Duration: "15m"},
			url.Values{"RoleSessionName": {"credence.shop.cart"}, "DurationSeconds": {"900"}},
		},
		"rules file": {
			file,
			map[policy.Key]string{policy.SessionScope: "service-account", policy.SessionTags: "cost centre=7"},
			url.Values{
				"RoleSessionName":            {"credence.shop.cart"},
				"DurationSeconds":            {"3600"},
				"SourceIdentity":             {"shop.cart"},
				"Tags.member.1.Key":          {"cost centre"},
				"Tags.member.1.Value":        {"7"},
				"Tags.member.2.Key":          {"kubernetes-namespace"},
				"Tags.member.2.Value":        {"shop"},
				"Tags.member.3.Key":          {"kubernetes-service-account"},
				"Tags.member.3.Value":        {"cart"},
				"Tags.member.4.Key":          {"team"},
				"Tags.member.4.Value":        {"shop"},
				"TransitiveTagKeys.member.1": {"kubernetes-namespace"},
				"TransitiveTagKeys.member.2": {"team"},
			},
		},
	} {
		maps.Copy(tt.want, common)
		recorder.forms = nil
		g := grantBy(t, tt.file, tt.pairs)
		began := time.Now()
		cred, err := sts.Credential(t.Context(), g)
		ended := time.Now()
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if diff := cmp.Diff([]url.Values{tt.want}, recorder.forms); diff != "" {
			t.Errorf("%s: the requests (-want +got):\n%s", name, diff)
		}
		calls := server.Calls()
		if last := calls[len(calls)-1]; cred.AccessKeyID != last.IssuedAccessKeyID || cred.AccessKeyID == "" {
			t.Errorf("%s: got key %s, issued was %s", name, cred.AccessKeyID, last.IssuedAccessKeyID)
		}
		if !cred.Valid(time.Now()) || cred.SecretAccessKey.Equal(cred.SessionToken) {
			t.Errorf("%s: %s is not complete", name, cred)
		}
		// Issued is not later than the call, so that the age is never underestimated.
		if cred.Issued.Before(began) || cred.Issued.After(ended) {
			t.Errorf("%s: issued %s, called from %s to %s", name, cred.Issued, began, ended)
		}
		// STS states whole seconds.
		if d := cred.Expiration.Sub(cred.Issued.Add(g.Duration())); d < -time.Second || d > ended.Sub(began) {
			t.Errorf("%s: a session of %s lasts until %s, issued %s", name, g.Duration(), cred.Expiration, cred.Issued)
		}
	}
}

func TestZeroGrant(t *testing.T) {
	server := start(t, ststest.Config{})
	sts := newSTS(t, assume.Config{Endpoint: server.URL()})
	cred, err := sts.Credential(t.Context(), policy.Grant{})
	if !errors.Is(err, credential.ErrDenied) || cred != (credential.Credential{}) || server.Count("", "") != 0 {
		t.Errorf("the zero Grant gives %s, %v, after %d calls", cred, err, server.Count("", ""))
	}
}

// check tests the kind and reason of err, that it has all of these texts, and that it has none of the secrets.
func check(t *testing.T, what string, err error, kind error, reason credential.Reason, fragments []string, secrets ...string) {
	t.Helper()
	e, ok := errors.AsType[*credential.Error](err)
	if !ok {
		t.Errorf("%s: the error is %v, not a *credential.Error", what, err)
		return
	}
	if !errors.Is(err, kind) || e.Reason != reason {
		t.Errorf("%s: %v is %v, %s, want %v, %s", what, err, e.Kind, e.Reason, kind, reason)
	}
	for _, fragment := range fragments {
		if !strings.Contains(e.Message, fragment) {
			t.Errorf("%s: the message %q lacks %q", what, e.Message, fragment)
		}
	}
	for _, secret := range secrets {
		if secret == "" {
			t.Fatalf("%s: there is no secret to search for", what)
		}
		for _, form := range []string{"%v", "%+v", "%#v", "%q"} {
			if text := fmt.Sprintf(form, err); strings.Contains(text, secret) || strings.Contains(text, url.QueryEscape(secret)) {
				t.Errorf("%s: the error has a secret", what)
			}
		}
	}
}

// call makes one call that must fail without a retry.
func call(t *testing.T, sts *assume.STS, g policy.Grant, count func() int) error {
	t.Helper()
	return calls(t, 1, sts, g, count)
}

// calls is call with another number of attempts.
func calls(t *testing.T, want int, sts *assume.STS, g policy.Grant, count func() int) error {
	t.Helper()
	before := count()
	cred, err := sts.Credential(t.Context(), g)
	if err == nil || cred != (credential.Credential{}) {
		t.Errorf("got %s with error %v", cred, err)
	}
	if n := count() - before; n != want {
		t.Errorf("%d calls were made, not %d, for %v", n, want, err)
	}
	return err
}

// inMemory is start and newSTS for a testing/synctest bubble.
func inMemory(t *testing.T, served ststest.Config, cfg assume.Config) (*ststest.Server, *assume.STS) {
	t.Helper()
	server, err := ststest.StartInMemory(t.Context(), served)
	if err != nil {
		t.Fatal(err)
	}
	id, secret := server.Keys()
	isolate(t, id, secret.Reveal(), "")
	return server, dialed(t, server, cfg)
}

// dialed returns an STS that reaches server, with the SDK's own type of client.
func dialed(t *testing.T, server *ststest.Server, cfg assume.Config) *assume.STS {
	t.Helper()
	cfg.Endpoint, cfg.Dial = server.URL(), server.Dial
	return newSTS(t, cfg)
}

// TestClassification has each error code with a consequence of its own, as the service returns it.
func TestClassification(t *testing.T) {
	unavailable, denied, invalid := credential.ErrUnavailable, credential.ErrDenied, credential.ErrInvalid
	throttled, own, unreachable := credential.ReasonSTSThrottled, credential.ReasonBrokerCredentials, credential.ReasonSTSUnavailable
	const once, twice = 1, 2
	for _, tt := range []struct {
		status        int
		code, message string
		calls         int
		kind          error
		reason        credential.Reason
		fragments     []string
	}{
		{400, "Throttling", "Rate exceeded", once, unavailable, throttled, []string{"throttles"}},
		{400, "ThrottlingException", "", once, unavailable, throttled, nil},
		{400, "RequestThrottled", "", once, unavailable, throttled, nil},
		{503, "RequestLimitExceeded", "", once, unavailable, throttled, nil},
		{503, "SlowDown", "", once, unavailable, throttled, nil},
		{429, "TooManyRequestsException", "", once, unavailable, throttled, nil},
		{429, "Unheard", "", once, unavailable, throttled, nil},

		{403, "AccessDenied", "m", once, denied, credential.ReasonSTSDenied, []string{roleARN, "trust policy", "exists"}},
		{400, "AccessDeniedException", "m", once, denied, credential.ReasonSTSDenied, nil},
		{403, "AccessDenied", "is not authorized to perform: sts:TagSession on resource: r", once, denied, credential.ReasonSTSDenied, []string{"sts:TagSession", "EKS Pod Identity"}},
		{403, "AccessDenied", "is not authorized to perform: sts:SetSourceIdentity on resource: r", once, denied, credential.ReasonSTSDenied, []string{"sts:SetSourceIdentity"}},
		// MinIO's messages for unknown keys and for a wrong secret.
		{403, "AccessDenied", "The Access Key Id you provided does not exist in our records.", twice, unavailable, own, nil},
		{403, "AccessDenied", "The request signature we calculated does not match the signature you provided.", twice, unavailable, own, nil},

		{400, "ValidationError", "too long by far", once, invalid, credential.ReasonSTSRejected, []string{roleARN, "ValidationError", "too long by far"}},
		{400, "ValidationError", "The requested DurationSeconds exceeds the MaxSessionDuration set for this role.", once, invalid, credential.ReasonSTSRejected, []string{"maximum session duration"}},
		{400, "ValidationError", "The requested DurationSeconds exceeds the 1 hour session limit for roles assumed by role chaining", once, invalid, credential.ReasonSTSRejected,
			[]string{"because the broker itself is a role", "duration to 1h or less"}},
		{400, "MalformedPolicyDocument", "m", once, invalid, credential.ReasonSTSRejected, []string{"MalformedPolicyDocument"}},
		{400, "MalformedPolicyDocumentException", "m", once, invalid, credential.ReasonSTSRejected, nil},
		{400, "PackedPolicyTooLarge", "Packed policy consumes 110% of allotted space", once, invalid, credential.ReasonSTSRejected, []string{"110%", "fewer policy ARNs or session tags"}},
		{400, "PackedPolicyTooLargeException", "m", once, invalid, credential.ReasonSTSRejected, []string{"fewer policy ARNs or session tags"}},
		{400, "InvalidParameterValue", "m", once, invalid, credential.ReasonSTSRejected, nil},

		{403, "RegionDisabledException", "m", once, unavailable, own, []string{"eu-central-1", "--region", "another"}},

		{403, "ExpiredToken", "", twice, unavailable, own, []string{"broker's own AWS credentials", "cluster admin"}},
		{400, "ExpiredTokenException", "", twice, unavailable, own, nil},
		{403, "InvalidClientTokenId", "", twice, unavailable, own, nil},
		{403, "UnrecognizedClientException", "", twice, unavailable, own, nil},
		{403, "SignatureDoesNotMatch", "", twice, unavailable, own, nil},
		{400, "RequestExpired", "", twice, unavailable, own, nil},
		{403, "MissingAuthenticationToken", "", once, unavailable, own, nil},
		{400, "IncompleteSignature", "", once, unavailable, own, nil},
		{400, "InvalidIdentityToken", "", once, unavailable, own, nil},
		{403, "IDPRejectedClaim", "", once, unavailable, own, nil},
		{400, "IDPCommunicationError", "", once, unavailable, own, nil},

		{503, "ServiceUnavailable", "", once, unavailable, unreachable, []string{"STS is unavailable"}},
		{500, "InternalFailure", "", once, unavailable, unreachable, nil},
		{500, "InternalError", "", once, unavailable, unreachable, nil},
		{502, "Bad", "", once, unavailable, unreachable, nil},
		{504, "Bad", "", once, unavailable, unreachable, nil},
		{509, "Bad", "", once, unavailable, unreachable, nil},
		{400, "RequestTimeout", "", once, unavailable, unreachable, nil},
		{400, "RequestTimeoutException", "", once, unavailable, unreachable, nil},
		{400, "Unheard", "", once, unavailable, unreachable, nil},
		{404, "InvalidAction", "", once, unavailable, unreachable, nil},
	} {
		what := fmt.Sprintf("%s with status %d, %q", tt.code, tt.status, tt.message)
		synctest.Test(t, func(t *testing.T) {
			var observed []assume.Call
			server, sts := inMemory(t, ststest.Config{}, assume.Config{Observe: func(c assume.Call) { observed = append(observed, c) }})
			_, secret := server.Keys()
			g := grant(t, nil)
			server.SetRole(roleARN, ststest.Behavior{Latency: 2 * time.Second, Fault: &ststest.Fault{Code: tt.code, Message: tt.message, Status: tt.status}})
			err := calls(t, tt.calls, sts, g, func() int { return server.Count("AssumeRole", roleARN) })
			check(t, what, err, tt.kind, tt.reason, tt.fragments, secret.Reveal())
			e, _ := errors.AsType[*credential.Error](err)
			if is := tt.reason == throttled; e != nil && (e.RetryAfter >= time.Second) != is {
				t.Errorf("%s: RetryAfter is %s", what, e.RetryAfter)
			}
			// The cause is for the broker's own log.
			if e != nil && (e.Cause == nil || !strings.Contains(e.Cause.Error(), tt.code)) {
				t.Errorf("%s: the cause is %v", what, e.Cause)
			}
			want := []assume.Call{{Action: "OwnCredentials", Outcome: "ok"}, {Action: "AssumeRole", Outcome: string(tt.reason), Took: 2 * time.Second}}
			if tt.calls == twice {
				want = append(want, want...)
			}
			if diff := cmp.Diff(want, observed); diff != "" {
				t.Errorf("%s: Observe got (-want +got):\n%s", what, diff)
			}

			// After the fault, calls succeed again.
			server.SetRole(roleARN, ststest.Behavior{})
			if _, err := sts.Credential(t.Context(), g); err != nil {
				t.Errorf("%s: afterwards: %v", what, err)
			}
		})
	}
}

// TestRejectionIsBounded: the part of STS's message that is passed on is bounded, in whole characters.
func TestRejectionIsBounded(t *testing.T) {
	server := start(t, ststest.Config{})
	sts := newSTS(t, assume.Config{Endpoint: server.URL()})
	server.SetRole(roleARN, ststest.Behavior{Fault: &ststest.Fault{Code: "ValidationError", Message: "x" + strings.Repeat("ü", 5000)}})
	err := call(t, sts, grant(t, nil), func() int { return server.Count("", "") })
	check(t, "a long message", err, credential.ErrInvalid, credential.ReasonSTSRejected, []string{"xü"})
	if e, ok := errors.AsType[*credential.Error](err); !ok || len(e.Message) > 700 || !utf8.ValidString(e.Message) {
		t.Errorf("the message has %d bytes, and is valid: %v", len(e.Message), utf8.ValidString(e.Message))
	}
}

// TestDeniedSaysWhatTheTrustPolicyNeeds: the message names the conditions of a trust policy that this grant needs.
func TestDeniedSaysWhatTheTrustPolicyNeeds(t *testing.T) {
	server := start(t, ststest.Config{Roles: map[string]ststest.Behavior{roleARN: {ExternalID: "right"}}})
	sts := newSTS(t, assume.Config{Endpoint: server.URL()})
	count := func() int { return server.Count("", "") }
	identified := &policy.File{SourceIdentity: policy.SourceServiceAccount, Namespaces: []policy.NamespaceRules{{
		Match: []string{"*"}, Accounts: []string{"*"}, Roles: []string{"*"}, ExternalIDs: []string{"*"},
	}}}
	for _, tt := range []struct {
		file  *policy.File
		pairs map[policy.Key]string
		want  string
	}{
		{nil, nil, "names the broker's role, and"},
		{nil, map[policy.Key]string{policy.ExternalID: "wrong"}, "names the broker's role with this external id, and"},
		{nil, map[policy.Key]string{policy.ExternalID: "wrong", policy.SessionTags: "team=shop"}, "with this external id and sts:TagSession, and"},
		{nil, map[policy.Key]string{policy.SessionTags: "team=shop"}, "with sts:TagSession, and"},
		{identified, map[policy.Key]string{policy.ExternalID: "wrong", policy.SessionTags: "team=shop"}, "with this external id, sts:TagSession and sts:SetSourceIdentity, and"},
	} {
		err := call(t, sts, grantBy(t, tt.file, tt.pairs), count)
		check(t, tt.want, err, credential.ErrDenied, credential.ReasonSTSDenied, []string{tt.want})
		e, ok := errors.AsType[*credential.Error](err)
		if ok && strings.Contains(e.Message, "wrong") {
			t.Errorf("the message has the external ID: %s", e.Message)
		}
		// The message mentions external IDs to a pod without one. To a pod with one, it says that it may be wrong.
		const hint = "; if its trust policy requires an external id (sts:ExternalId), set the annotation external-id"
		if _, has := tt.pairs[policy.ExternalID]; ok && has == strings.Contains(e.Message, hint) {
			t.Errorf("with an external id: %v, the message is: %s", has, e.Message)
		}
	}
	if _, err := sts.Credential(t.Context(), grant(t, map[policy.Key]string{policy.ExternalID: "right"})); err != nil {
		t.Error(err)
	}
}

func TestConnectionFaults(t *testing.T) {
	server := start(t, ststest.Config{})
	sts := newSTS(t, assume.Config{Endpoint: server.URL()})
	_, secret := server.Keys()
	g := grant(t, nil)
	unreachable := []string{"STS is unavailable"}

	server.SetRole(roleARN, ststest.Behavior{Fault: ststest.Drop()})
	_, err := sts.Credential(t.Context(), g)
	check(t, "drop", err, credential.ErrUnavailable, credential.ReasonSTSUnavailable, unreachable, secret.Reveal())

	server.SetRole(roleARN, ststest.Behavior{Fault: ststest.Hang()})
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	go func() {
		if err := server.AwaitCount(t.Context(), "AssumeRole", roleARN, 2); err != nil {
			t.Error(err)
		}
		cancel()
	}()
	_, err = sts.Credential(ctx, g)
	check(t, "hang", err, credential.ErrUnavailable, credential.ReasonSTSUnavailable, unreachable, secret.Reveal())
	if !errors.Is(err, context.Canceled) {
		t.Errorf("a canceled call gives %v", err)
	}

	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	closed := listener.Addr().String()
	listener.Close()
	_, err = newSTS(t, assume.Config{Endpoint: "http://" + closed}).Credential(t.Context(), g)
	check(t, "refused connection", err, credential.ErrUnavailable, credential.ReasonSTSUnavailable, unreachable, secret.Reveal())
}

const goodResponse = `<AssumeRoleResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><AssumeRoleResult><Credentials>` +
	`<AccessKeyId>ASIAEXAMPLE</AccessKeyId><SecretAccessKey>planted-secret</SecretAccessKey><SessionToken>planted-token</SessionToken>` +
	`<Expiration>2099-01-01T00:00:00Z</Expiration></Credentials></AssumeRoleResult></AssumeRoleResponse>`

// TestNonsense: a response that is not from STS gives no session, and its content is not passed on.
func TestNonsense(t *testing.T) {
	var answer atomic.Pointer[func(w http.ResponseWriter)]
	var calls atomic.Int64
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		calls.Add(1)
		(*answer.Load())(w)
	}))
	defer server.Close()
	isolate(t, "AKIAEXAMPLE", "own-secret", "")
	sts := newSTS(t, assume.Config{Endpoint: server.URL})
	g := grant(t, nil)

	good := func(w http.ResponseWriter) { _, _ = io.WriteString(w, goodResponse) }
	answer.Store(&good)
	if cred, err := sts.Credential(t.Context(), g); err != nil || cred.SecretAccessKey.Reveal() != "planted-secret" || cred.SessionToken.Reveal() != "planted-token" {
		t.Fatalf("the response that the others are made from gives %s, %v", cred, err)
	}
	without := func(element string) string {
		before, rest, ok := strings.Cut(goodResponse, "<"+element+">")
		_, after, ok2 := strings.Cut(rest, "</"+element+">")
		if !ok || !ok2 {
			t.Fatalf("there is no %s", element)
		}
		return before + after
	}
	for name, tt := range map[string]struct {
		status int
		body   string
	}{
		"empty":                 {200, ""},
		"garbage":               {200, "\x00\x01 planted-secret"},
		"HTML":                  {200, "<html><body>planted-secret"},
		"JSON":                  {200, `{"Credentials":{"SecretAccessKey":"planted-secret"}}`},
		"cut":                   {200, goodResponse[:len(goodResponse)/2]},
		"no credentials":        {200, without("Credentials")},
		"no key id":             {200, without("AccessKeyId")},
		"no secret":             {200, without("SecretAccessKey")},
		"no token":              {200, without("SessionToken")},
		"no expiration":         {200, without("Expiration")},
		"wrong expiration":      {200, strings.Replace(goodResponse, "2099-01-01T00:00:00Z", "tomorrow", 1)},
		"empty secret":          {200, strings.Replace(goodResponse, "planted-secret", "", 1)},
		"error without a code":  {400, "planted-secret"},
		"error as HTML":         {403, "<html>planted-secret</html>"},
		"empty error":           {500, ""},
		"gateway":               {502, "bad gateway planted-secret"},
		"redirect to elsewhere": {302, "planted-secret"},
	} {
		write := func(w http.ResponseWriter) {
			w.WriteHeader(tt.status)
			_, _ = io.WriteString(w, tt.body)
		}
		answer.Store(&write)
		err := call(t, sts, g, func() int { return int(calls.Load()) })
		check(t, name, err, credential.ErrUnavailable, credential.ReasonSTSUnavailable, nil, "own-secret")
		if e, ok := errors.AsType[*credential.Error](err); ok && strings.Contains(e.Message, "planted") {
			t.Errorf("%s: the message passes on the response: %s", name, e.Message)
		}
	}
	// The secrets of a response never reach the log.
	for _, element := range []string{"AccessKeyId", "SessionToken", "Expiration"} {
		write := func(w http.ResponseWriter) { _, _ = io.WriteString(w, without(element)) }
		answer.Store(&write)
		check(t, "without "+element, call(t, sts, g, func() int { return int(calls.Load()) }),
			credential.ErrUnavailable, credential.ReasonSTSUnavailable, []string{"incomplete credentials", roleARN}, "planted-secret", "own-secret")
	}
}

func TestOwnCredentials(t *testing.T) {
	server := start(t, ststest.Config{})
	id, secret := server.Keys()
	g := grant(t, nil)
	admin := []string{"the broker's own AWS credentials", "cluster admin"}

	isolate(t, "", "", "")
	_, err := newSTS(t, assume.Config{Endpoint: server.URL()}).Credential(t.Context(), g)
	check(t, "none", err, credential.ErrUnavailable, credential.ReasonBrokerCredentials, admin)
	if n := server.Count("", ""); n != 0 {
		t.Errorf("%d calls were made without credentials", n)
	}

	for name, own := range map[string][3]string{
		"unknown key":  {"AKIAUNKNOWNUNKNOWN", secret.Reveal(), ""},
		"wrong secret": {id, secret.Reveal() + "x", ""},
		"wrong token":  {id, secret.Reveal(), "planted-token"},
	} {
		isolate(t, own[0], own[1], own[2])
		err := calls(t, 2, newSTS(t, assume.Config{Endpoint: server.URL()}), g, func() int { return server.Count("", "") })
		secrets := []string{own[1]}
		if own[2] != "" {
			secrets = append(secrets, own[2])
		}
		check(t, name, err, credential.ErrUnavailable, credential.ReasonBrokerCredentials, admin, secrets...)
	}

	// They may come from a file, such as a mounted Secret.
	isolate(t, "", "", "")
	file := filepath.Join(t.TempDir(), "credentials")
	content := fmt.Sprintf("[default]\naws_access_key_id = %s\naws_secret_access_key = %s\n", id, secret.Reveal())
	if err := os.WriteFile(file, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("AWS_SHARED_CREDENTIALS_FILE", file)
	if _, err := newSTS(t, assume.Config{Endpoint: server.URL()}).Credential(t.Context(), g); err != nil {
		t.Errorf("with a credentials file: %v", err)
	}
}

func TestAssumeRoleFirst(t *testing.T) {
	server := start(t, ststest.Config{})
	id, secret := server.Keys()
	first, err := credential.ParseRoleARN(firstARN)
	if err != nil {
		t.Fatal(err)
	}
	sts := newSTS(t, assume.Config{Endpoint: server.URL(), AssumeRole: first})
	if n := server.Count("", ""); n != 0 {
		t.Errorf("New made %d calls", n)
	}
	for range 3 {
		if _, err := sts.Credential(t.Context(), grant(t, nil)); err != nil {
			t.Fatal(err)
		}
	}
	calls := server.Calls()
	if len(calls) != 4 || calls[0].RoleARN != firstARN || calls[0].SessionName != "credence-broker" || calls[0].AccessKeyID != id {
		t.Fatalf("the calls are %+v", calls)
	}
	for _, call := range calls[1:] {
		if call.RoleARN != roleARN || call.AccessKeyID != calls[0].IssuedAccessKeyID {
			t.Errorf("after the first role, %s is assumed by %s, not by %s", call.RoleARN, call.AccessKeyID, calls[0].IssuedAccessKeyID)
		}
	}

	// AWS limits role chaining to one hour, and its message says so.
	_, err = sts.Credential(t.Context(), grant(t, map[policy.Key]string{policy.Duration: "2h"}))
	check(t, "two hours", err, credential.ErrInvalid, credential.ReasonSTSRejected, []string{"1 hour", "role chaining"}, secret.Reveal())

	// A cluster admin must fix a refusal of the role of --assume-role, not the pod's user.
	server.SetRole(firstARN, ststest.Behavior{Deny: true})
	_, err = newSTS(t, assume.Config{Endpoint: server.URL(), AssumeRole: first}).Credential(t.Context(), grant(t, nil))
	check(t, "a refused first role", err, credential.ErrUnavailable, credential.ReasonBrokerCredentials, []string{"cluster admin"}, secret.Reveal())
	if !strings.Contains(err.Error(), firstARN) {
		t.Errorf("the cause does not name the first role: %v", err)
	}
}

func TestBase(t *testing.T) {
	server := start(t, ststest.Config{Account: "999988887777"})
	_, secret := server.Keys()
	sts := newSTS(t, assume.Config{Endpoint: server.URL()})
	base, err := sts.Base(t.Context())
	if err != nil || base.String() != "arn:aws:iam::999988887777:role/" {
		t.Errorf("Base = %s, %v", base, err)
	}
	server.SetIdentity(ststest.Behavior{Fault: ststest.Unavailable()})
	base, err = sts.Base(t.Context())
	if err == nil || !base.IsZero() || !strings.Contains(err.Error(), "calling STS for the broker's own account") || strings.Contains(err.Error(), secret.Reveal()) {
		t.Errorf("Base = %s, %v", base, err)
	}

	// Partition and account come from the response.
	for arn, want := range map[string]string{
		"arn:aws-cn:sts::123456789012:assumed-role/x/y":    "arn:aws-cn:iam::123456789012:role/",
		"arn:aws-us-gov:iam::123456789012:user/x":          "arn:aws-us-gov:iam::123456789012:role/",
		"arn:aws:iam::123456789012:root":                   "arn:aws:iam::123456789012:role/",
		"arn:aws:sts::123456789012:federated-user/bob":     "arn:aws:iam::123456789012:role/",
		"arn:aws:iam::123456789012:user/a/path/bob":        "arn:aws:iam::123456789012:role/",
		"arn:aws-iso:sts::123456789012:assumed-role/x/y":   "arn:aws-iso:iam::123456789012:role/",
		"arn:aws-iso-b:sts::123456789012:assumed-role/x/y": "arn:aws-iso-b:iam::123456789012:role/",
		"arn:aws-iso-e:iam::123456789012:root":             "arn:aws-iso-e:iam::123456789012:role/",
		"arn:aws-iso-f:iam::123456789012:user/x":           "arn:aws-iso-f:iam::123456789012:role/",
		"arn:aws-eusc:sts::123456789012:assumed-role/x/y":  "arn:aws-eusc:iam::123456789012:role/",
		"no ARN":                                "",
		"":                                      "",
		"arn:minio:iam::123456789012:user/root": "",
	} {
		front := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			_, _ = fmt.Fprintf(w, `<GetCallerIdentityResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><GetCallerIdentityResult>`+
				`<Arn>%s</Arn><Account>123456789012</Account></GetCallerIdentityResult></GetCallerIdentityResponse>`, arn)
		}))
		base, err := newSTS(t, assume.Config{Endpoint: front.URL}).Base(t.Context())
		if base.String() != want || (err == nil) != (want != "") {
			t.Errorf("for %q, Base = %s, %v", arn, base, err)
		}
		front.Close()
	}
}

func TestRegion(t *testing.T) {
	isolate(t, "AKIAEXAMPLE", "own-secret", "")
	if sts, err := assume.New(t.Context(), assume.Config{}); err == nil || sts != nil || !strings.Contains(err.Error(), "--region") || !strings.Contains(err.Error(), "AWS_REGION") {
		t.Errorf("without a region, New gives %v", err)
	}
	t.Setenv("AWS_REGION", "ap-south-1")
	for configured, want := range map[string]string{"": "ap-south-1", "eu-west-1": "eu-west-1"} {
		sts, err := assume.New(t.Context(), assume.Config{Region: configured})
		if err != nil || sts.Region() != want {
			t.Errorf("with --region %q, the region is %s, %v", configured, sts.Region(), err)
		}
	}
	t.Setenv("AWS_PROFILE", "no-such-profile")
	if _, err := assume.New(t.Context(), assume.Config{}); err == nil || !strings.Contains(err.Error(), "loading the AWS configuration") {
		t.Errorf("with a profile that does not exist, New gives %v", err)
	}
}

// TestOneAttempt: the environment sets more attempts, but each call has one, because the cache schedules retries.
func TestOneAttempt(t *testing.T) {
	server := start(t, ststest.Config{Default: ststest.Behavior{Fault: ststest.Throttling()}})
	t.Setenv("AWS_MAX_ATTEMPTS", "5")
	t.Setenv("AWS_RETRY_MODE", "adaptive")
	sts := newSTS(t, assume.Config{Endpoint: server.URL()})
	err := call(t, sts, grant(t, nil), func() int { return server.Count("", "") })
	check(t, "throttled", err, credential.ErrUnavailable, credential.ReasonSTSThrottled, nil)
}

// TestPrivateAuthority: an STS-compatible service may have a certificate of a private CA, which the SDK reads from
// AWS_CA_BUNDLE.
func TestPrivateAuthority(t *testing.T) {
	server, err := ststest.New(ststest.Config{})
	if err != nil {
		t.Fatal(err)
	}
	id, secret := server.Keys()
	isolate(t, id, secret.Reveal(), "")
	front := httptest.NewTLSServer(server)
	defer front.Close()

	_, err = newSTS(t, assume.Config{Endpoint: front.URL}).Credential(t.Context(), grant(t, nil))
	check(t, "an unknown authority", err, credential.ErrUnavailable, credential.ReasonSTSUnavailable, nil, secret.Reveal())

	bundle := filepath.Join(t.TempDir(), "ca.pem")
	content := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: front.Certificate().Raw})
	if err := os.WriteFile(bundle, content, 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("AWS_CA_BUNDLE", bundle)
	if _, err := newSTS(t, assume.Config{Endpoint: front.URL}).Credential(t.Context(), grant(t, nil)); err != nil {
		t.Errorf("with AWS_CA_BUNDLE: %v", err)
	}
}

// TestConnectionsAreReused: bursts of calls share connections.
func TestConnectionsAreReused(t *testing.T) {
	const wave = 32
	server, err := ststest.New(ststest.Config{})
	if err != nil {
		t.Fatal(err)
	}
	id, secret := server.Keys()
	isolate(t, id, secret.Reveal(), "")
	// The server responds after all requests of a burst have arrived, so each request needs a connection.
	var mu sync.Mutex
	var waiting []chan struct{}
	front := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		arrived := make(chan struct{})
		mu.Lock()
		waiting = append(waiting, arrived)
		if len(waiting) == wave {
			for _, c := range waiting {
				close(c)
			}
			waiting = nil
		}
		mu.Unlock()
		<-arrived
		server.ServeHTTP(w, r)
	}))
	var connections atomic.Int64
	front.Config.ConnState = func(_ net.Conn, state http.ConnState) {
		if state == http.StateNew {
			connections.Add(1)
		}
	}
	front.Start()
	defer front.Close()
	sts := newSTS(t, assume.Config{Endpoint: front.URL})
	g := grant(t, nil)
	const waves = 5
	for range waves {
		var wg sync.WaitGroup
		for range wave {
			wg.Go(func() {
				if _, err := sts.Credential(t.Context(), g); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
	}
	// A few more are allowed, because a connection becomes idle a moment after the read of its response.
	if n := connections.Load(); n < wave || n > 2*wave {
		t.Errorf("%d bursts of %d calls made %d connections", waves, wave, n)
	}
}

func TestIsolation(t *testing.T) {
	t.Setenv("AWS_SOMETHING_OF_THE_MACHINE", "x")
	isolate(t, "", "", "")
	set := slices.DeleteFunc(os.Environ(), func(v string) bool { return !strings.HasPrefix(v, "AWS_") || strings.HasSuffix(v, "=") })
	slices.Sort(set)
	want := []string{"AWS_CONFIG_FILE=" + os.DevNull, "AWS_EC2_METADATA_DISABLED=true", "AWS_SHARED_CREDENTIALS_FILE=" + os.DevNull}
	if diff := cmp.Diff(want, set); diff != "" {
		t.Errorf("the environment of the tests (-want +got):\n%s", diff)
	}
}
