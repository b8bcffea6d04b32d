package webhook_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	admissionv1 "k8s.io/api/admission/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/credence-iam/credence/broker/connlimit"
	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/policy"
	"github.com/credence-iam/credence/certs"
	"github.com/credence-iam/credence/certs/certstest"
	"github.com/credence-iam/credence/webhook"
	"github.com/credence-iam/credence/webhook/inject"
)

// namespaces is a function that implements webhook.Namespaces.
type namespaces func(ctx context.Context, name string) (policy.Namespace, error)

func (f namespaces) Namespace(ctx context.Context, name string) (policy.Namespace, error) {
	return f(ctx, name)
}

func (f namespaces) Latest(ctx context.Context, name string) (policy.Namespace, error) {
	return f(ctx, name)
}

// teamA returns an opted-in namespace that permits the roles under /team-a/ of one account.
func teamA(_ context.Context, name string) (policy.Namespace, error) {
	return policy.Namespace{
		Name:        name,
		Labels:      map[string]string{"iam.amazonaws.com/inject": "enabled"},
		Annotations: map[string]string{"iam.amazonaws.com/permitted": "arn:aws:iam::123456789012:role/team-a/.*"},
	}, nil
}

const image = "registry.example/credence-sidecar:v1"

func config(t testing.TB) webhook.Config {
	t.Helper()
	keys, err := policy.NewKeys(policy.DefaultPrefix)
	if err != nil {
		t.Fatal(err)
	}
	rules, err := policy.New(policy.Config{Keys: keys})
	if err != nil {
		t.Fatal(err)
	}
	injector, err := inject.New(inject.Config{Keys: keys, Image: image, Broker: "broker:9443", Settings: inject.DefaultSettings()})
	if err != nil {
		t.Fatal(err)
	}
	certFile, keyFile := certstest.NewCA(t).Leaf("webhook.example").WriteTo(t.TempDir())
	pair, err := certs.NewKeyPair(certFile, keyFile, nil)
	if err != nil {
		t.Fatal(err)
	}
	return webhook.Config{Injector: injector, Rules: rules, Namespaces: namespaces(teamA), KeyPair: pair}
}

func newServer(t testing.TB, change ...func(*webhook.Config)) *webhook.Server {
	t.Helper()
	cfg := config(t)
	for _, f := range change {
		f(&cfg)
	}
	s, err := webhook.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// start runs s on listener. It returns a client that connects with dial, and a function that shuts s down and returns the
// error of Run.
func start(t testing.TB, s *webhook.Server, pair *certs.KeyPair, listener net.Listener, dial func(ctx context.Context, network, address string) (net.Conn, error)) (client *http.Client, stop func() error) {
	t.Helper()
	cert, err := pair.GetCertificate(nil)
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(cert.Leaf) // A leaf can be a root; the CA does not matter here.
	transport := &http.Transport{
		DialContext:       dial,
		TLSClientConfig:   &tls.Config{RootCAs: roots, ServerName: "webhook.example", MinVersion: tls.VersionTLS13},
		ForceAttemptHTTP2: true,
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx, listener) }()
	return &http.Client{Transport: transport}, sync.OnceValue(func() error {
		cancel()
		defer transport.CloseIdleConnections()
		return <-done
	})
}

// startTCP runs a server on a loopback port until the test ends.
func startTCP(t testing.TB, change ...func(*webhook.Config)) (client *http.Client, url string) {
	t.Helper()
	cfg := config(t)
	cfg.DrainDelay = time.Nanosecond
	for _, f := range change {
		f(&cfg)
	}
	s, err := webhook.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	listener, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	client, stop := start(t, s, cfg.KeyPair, listener, nil)
	t.Cleanup(func() {
		client.CloseIdleConnections() // Otherwise the shutdown takes a second, for HTTP/2's GOAWAY.
		if err := stop(); err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	return client, "https://" + listener.Addr().String()
}

func post(t testing.TB, client *http.Client, url, contentType, body string) (code int, text string) {
	t.Helper()
	request, err := http.NewRequestWithContext(t.Context(), http.MethodPost, url, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	request.Header.Set("Content-Type", contentType)
	return do(t, client, request)
}

func get(t testing.TB, client *http.Client, url string) (code int, text string) {
	t.Helper()
	request, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	return do(t, client, request)
}

func do(t testing.TB, client *http.Client, request *http.Request) (code int, text string) {
	t.Helper()
	response, err := client.Do(request)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err != nil {
		t.Fatal(err)
	}
	return response.StatusCode, string(body)
}

// pod returns a pod with a role annotation, and with fields in its spec.
func pod(role, spec string) string {
	return `{"metadata":{"generateName":"app-","annotations":{"iam.amazonaws.com/role":"` + role + `"}},"spec":{` + spec + `"containers":[{"name":"app","env":[{"name":"PASSWORD","value":"hunter2"}]}]}}`
}

const permitted = "arn:aws:iam::123456789012:role/team-a/reader"

// review returns a review of the creation of object. edit has pairs of old and new text.
func review(object string, edit ...string) string {
	return strings.NewReplacer(edit...).Replace(`{"apiVersion":"admission.k8s.io/v1","kind":"AdmissionReview","request":{"uid":"0b2e5d3c",` +
		`"kind":{"group":"","version":"v1","kind":"Pod"},"resource":{"group":"","version":"v1","resource":"pods"},` +
		`"namespace":"team-a","operation":"CREATE","object":` + object + `,"oldObject":null,"dryRun":true,"options":{"kind":"CreateOptions"}}}`)
}

// decodeReview returns the response in text, which must have the given uid.
func decodeReview(t testing.TB, text, uid string) *admissionv1.AdmissionResponse {
	t.Helper()
	var got admissionv1.AdmissionReview
	d := json.NewDecoder(strings.NewReader(text))
	d.DisallowUnknownFields()
	if err := d.Decode(&got); err != nil {
		t.Fatalf("%v in %s", err, text)
	}
	if got.APIVersion != "admission.k8s.io/v1" || got.Kind != "AdmissionReview" || got.Request != nil || got.Response == nil {
		t.Fatalf("not a review with a response: %s", text)
	}
	if string(got.Response.UID) != uid {
		t.Fatalf("uid is %q, want %q", got.Response.UID, uid)
	}
	if (got.Response.Patch == nil) != (got.Response.PatchType == nil) || !got.Response.Allowed && got.Response.Patch != nil {
		t.Fatalf("patch or its type does not match the decision: %s", text)
	}
	return got.Response
}

func TestDecisions(t *testing.T) {
	refusal := func(code int32, reason metav1.StatusReason, cause credential.Reason, retry int32, message string) *metav1.Status {
		return &metav1.Status{Status: "Failure", Code: code, Reason: reason, Message: "credence: " + message,
			Details: &metav1.StatusDetails{RetryAfterSeconds: retry, Causes: []metav1.StatusCause{{Type: metav1.CauseType(cause), Message: message}}}}
	}
	unavailable := namespaces(func(context.Context, string) (policy.Namespace, error) {
		return policy.Namespace{}, errors.New("dial tcp 192.0.2.1:443: connection refused")
	})
	gone := namespaces(func(context.Context, string) (policy.Namespace, error) {
		return policy.Namespace{}, fmt.Errorf("reading: %w", credential.ErrNotFound)
	})
	panicking := namespaces(func(context.Context, string) (policy.Namespace, error) { panic("hunter2") })
	closed := namespaces(func(_ context.Context, name string) (policy.Namespace, error) {
		return policy.Namespace{Name: name, Labels: map[string]string{"iam.amazonaws.com/inject": "enabled"}}, nil
	})
	for _, tc := range []struct {
		name       string
		review     string
		namespaces namespaces // teamA if nil
		patched    bool
		want       *admissionv1.AdmissionResponse
		log        string
	}{
		{
			name: "injected", review: review(pod(permitted, "")), patched: true,
			want: &admissionv1.AdmissionResponse{Allowed: true, AuditAnnotations: map[string]string{"decision": "injected", "role": permitted, "sidecar": image}},
			log:  `level=INFO msg="Decided on an admission" uid=0b2e5d3c namespace=team-a pod=app- decision=injected reason="" role=` + permitted + ` dry_run=true`,
		},
		{
			name: "warned", review: review(pod(permitted, ""), "PASSWORD", "AWS_ACCESS_KEY_ID"), patched: true,
			want: &admissionv1.AdmissionResponse{Allowed: true, AuditAnnotations: map[string]string{"decision": "injected", "role": permitted, "sidecar": image},
				Warnings: []string{`credence: container "app" sets AWS_ACCESS_KEY_ID: SDKs use these keys, not the annotated role. Remove it, unless it is for something else.`}},
			log: `level=INFO msg="Decided on an admission" uid=0b2e5d3c namespace=team-a pod=app- decision=injected reason="" role=` + permitted + ` dry_run=true`,
		},
		{
			name: "no base ARN, so the broker decides", review: review(pod("reader", "")), patched: true,
			want: &admissionv1.AdmissionResponse{Allowed: true, AuditAnnotations: map[string]string{"decision": "injected", "sidecar": image}},
			log:  `level=INFO msg="Decided on an admission" uid=0b2e5d3c namespace=team-a pod=app- decision=injected reason="" role="" dry_run=true`,
		},
		{
			name: "not annotated", review: review(`{"metadata":{"name":"app","annotations":{"a":"b"}},"spec":{"hostNetwork":true}}`), namespaces: unavailable,
			want: &admissionv1.AdmissionResponse{Allowed: true, AuditAnnotations: map[string]string{"decision": "untouched"}},
			log:  `level=INFO msg="Decided on an admission" uid=0b2e5d3c namespace=team-a pod=app decision=untouched reason="" role="" dry_run=true`,
		},
		{
			name: "update", review: review(pod("x y z", ""), "CREATE", "UPDATE"), namespaces: unavailable,
			want: &admissionv1.AdmissionResponse{Allowed: true, AuditAnnotations: map[string]string{"decision": "untouched"}},
			log:  `level=INFO msg="Decided on an admission" uid=0b2e5d3c namespace=team-a pod="" decision=untouched reason="" role="" dry_run=true`,
		},
		{
			name: "subresource", review: review(pod("x y z", ""), `"operation"`, `"subResource":"ephemeralcontainers","operation"`), namespaces: unavailable,
			want: &admissionv1.AdmissionResponse{Allowed: true, AuditAnnotations: map[string]string{"decision": "untouched"}},
			log:  `level=INFO msg="Decided on an admission" uid=0b2e5d3c namespace=team-a pod="" decision=untouched reason="" role="" dry_run=true`,
		},
		{
			name: "another resource", review: review(pod("x y z", ""), `"resource":"pods"`, `"resource":"jobs"`), namespaces: unavailable,
			want: &admissionv1.AdmissionResponse{Allowed: true, AuditAnnotations: map[string]string{"decision": "untouched"}},
			log:  `level=INFO msg="Decided on an admission" uid=0b2e5d3c namespace=team-a pod="" decision=untouched reason="" role="" dry_run=true`,
		},
		{
			name: "unsupported pod", review: review(pod(permitted, `"hostNetwork":true,`)),
			want: &admissionv1.AdmissionResponse{
				Result: refusal(400, "BadRequest", "POD_UNSUPPORTED", 0,
					`the pod has hostNetwork, so every process on its node could get its credentials from the sidecar; remove hostNetwork, or annotation "iam.amazonaws.com/role"`),
				AuditAnnotations: map[string]string{"decision": "refused", "reason": "POD_UNSUPPORTED"}},
			log: `level=INFO msg="Decided on an admission" uid=0b2e5d3c namespace=team-a pod=app- decision=refused reason=POD_UNSUPPORTED role="" dry_run=true`,
		},
		{
			name: "role not permitted", review: review(pod("arn:aws:iam::123456789012:role/admin", "")),
			want: &admissionv1.AdmissionResponse{
				Result: refusal(403, "Forbidden", "ROLE_NOT_PERMITTED", 0,
					"namespace \"team-a\" does not permit role arn:aws:iam::123456789012:role/admin: its annotation \"iam.amazonaws.com/permitted\" is "+
						"`arn:aws:iam::123456789012:role/team-a/.*` and must match the whole ARN; change the namespace's annotation, or the pod's \"iam.amazonaws.com/role\""),
				AuditAnnotations: map[string]string{"decision": "refused", "reason": "ROLE_NOT_PERMITTED"}},
			log: `level=INFO msg="Decided on an admission" uid=0b2e5d3c namespace=team-a pod=app- decision=refused reason=ROLE_NOT_PERMITTED role="" dry_run=true`,
		},
		{
			name: "nothing permitted", review: review(pod(permitted, "")), namespaces: closed,
			want: &admissionv1.AdmissionResponse{
				Result: refusal(403, "Forbidden", "NOTHING_PERMITTED", 0,
					`namespace "team-a" permits no roles; annotate it with "iam.amazonaws.com/permitted", a regular expression that matches `+permitted),
				AuditAnnotations: map[string]string{"decision": "refused", "reason": "NOTHING_PERMITTED"}},
			log: `level=INFO msg="Decided on an admission" uid=0b2e5d3c namespace=team-a pod=app- decision=refused reason=NOTHING_PERMITTED role="" dry_run=true`,
		},
		{
			name: "no such namespace", review: review(pod(permitted, "")), namespaces: gone,
			want: &admissionv1.AdmissionResponse{
				Result:           refusal(403, "Forbidden", "NAMESPACE_NOT_FOUND", 0, `namespace "team-a" does not exist`),
				AuditAnnotations: map[string]string{"decision": "refused", "reason": "NAMESPACE_NOT_FOUND"}},
			log: `level=INFO msg="Decided on an admission" uid=0b2e5d3c namespace=team-a pod=app- decision=refused reason=NAMESPACE_NOT_FOUND role="" dry_run=true`,
		},
		{
			name: "API server unavailable", review: review(pod(permitted, "")), namespaces: unavailable,
			want: &admissionv1.AdmissionResponse{
				Result: refusal(503, "ServiceUnavailable", "API_SERVER_UNAVAILABLE", 1,
					`cannot check whether namespace "team-a" permits the role: the API server does not respond; try again`),
				AuditAnnotations: map[string]string{"decision": "refused", "reason": "API_SERVER_UNAVAILABLE"}},
			log: `level=INFO msg="Decided on an admission" uid=0b2e5d3c namespace=team-a pod=app- decision=refused reason=API_SERVER_UNAVAILABLE role="" dry_run=true
level=ERROR msg="Refused an admission because of a fault" uid=0b2e5d3c error="dial tcp 192.0.2.1:443: connection refused"`,
		},
		{
			name: "panic", review: review(pod(permitted, "")), namespaces: panicking,
			want: &admissionv1.AdmissionResponse{
				Result:           refusal(500, "InternalError", "INTERNAL", 0, `internal error; see the webhook's log for uid 0b2e5d3c`),
				AuditAnnotations: map[string]string{"decision": "refused", "reason": "INTERNAL"}},
			log: `level=ERROR msg="Recovered from a panic in an admission" uid=0b2e5d3c panic=string
level=INFO msg="Decided on an admission" uid=0b2e5d3c namespace=team-a pod="" decision=refused reason=INTERNAL role="" dry_run=true
level=ERROR msg="Refused an admission because of a fault" uid=0b2e5d3c error="panic: string"`,
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var log bytes.Buffer
			client, url := startTCP(t, func(c *webhook.Config) {
				c.Logger = slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
					if a.Key == slog.TimeKey || a.Key == "stack" {
						return slog.Attr{}
					}
					return a
				}}))
				if tc.namespaces != nil {
					c.Namespaces = tc.namespaces
				}
			})
			code, text := post(t, client, url+"/mutate", "application/json; charset=utf-8", tc.review)
			if code != http.StatusOK {
				t.Fatalf("status %d: %s", code, text)
			}
			got := decodeReview(t, text, "0b2e5d3c")
			if (got.Patch != nil) != tc.patched {
				t.Errorf("patch is %s, want one: %v", got.Patch, tc.patched)
			}
			got.UID, got.Patch, got.PatchType = "", nil, nil
			if diff := cmp.Diff(tc.want, got); diff != "" {
				t.Errorf("response (-want +got):\n%s", diff)
			}
			if diff := cmp.Diff(tc.log+"\n", log.String()); diff != "" {
				t.Errorf("log (-want +got):\n%s", diff)
			}
			if strings.Contains(log.String(), "hunter2") {
				t.Error("log has the pod's environment")
			}
		})
	}
}

// TestRulesFile: the webhook decides by the rules file in force, as the broker does.
func TestRulesFile(t *testing.T) {
	cfg := config(t)
	client, url := startTCP(t, func(c *webhook.Config) { c.Rules = cfg.Rules })
	mutate := func() *admissionv1.AdmissionResponse {
		t.Helper()
		code, text := post(t, client, url+"/mutate", "application/json", review(pod(permitted, "")))
		if code != http.StatusOK {
			t.Fatalf("%d: %s", code, text)
		}
		return decodeReview(t, text, "0b2e5d3c")
	}
	if r := mutate(); !r.Allowed {
		t.Errorf("without a rules file, response is %+v, want allowed", r.Result)
	}
	for account, allowed := range map[string]bool{"123456789012": true, "210987654321": false} {
		if err := cfg.Rules.Use(policy.File{Namespaces: []policy.NamespaceRules{{Match: []string{"team-*"}, Accounts: []string{account}, Roles: []string{"*"}}}}); err != nil {
			t.Fatal(err)
		}
		r := mutate()
		if r.Allowed != allowed || !allowed && (r.Result.Code != http.StatusForbidden || r.AuditAnnotations["reason"] != "RULES_ACCOUNT" ||
			!strings.Contains(r.Result.Message, `the rules file (namespaces[0], "team-*") does not allow namespace "team-a" to have a role of account 123456789012`)) {
			t.Errorf("with account %s in the file, response is %+v, want allowed: %v", account, r, allowed)
		}
	}
}

// TestPatchedTwice: the response for an injected pod has no patch, and decision "complete".
func TestPatchedTwice(t *testing.T) {
	cfg := config(t)
	result, err := cfg.Injector.Inject([]byte(pod(permitted, "")), "team-a")
	if err != nil {
		t.Fatal(err)
	}
	patched := applied(t, pod(permitted, ""), result.Patch)
	client, url := startTCP(t)
	_, text := post(t, client, url+"/mutate", "application/json", review(patched))
	got := decodeReview(t, text, "0b2e5d3c")
	if !got.Allowed || got.Patch != nil || got.AuditAnnotations["decision"] != "complete" {
		t.Errorf("response is %s", text)
	}
}

func TestUnreadableReviews(t *testing.T) {
	client, url := startTCP(t)
	for _, tc := range []struct {
		name, path, contentType, body string
		code                          int
		want                          string
	}{
		{"content type", "/mutate", "text/yaml", review("{}"), 415, `content type "text/yaml" is not application/json`},
		{"empty", "/mutate", "application/json", "", 400, "decoding the review: unexpected end of JSON input"},
		{"two reviews", "/mutate", "application/json", review("{}") + review("{}"), 400, "decoding the review: invalid character '{' after top-level value"},
		{"v1beta1", "/mutate", "application/json", review("{}", "admission.k8s.io/v1", "admission.k8s.io/v1beta1"), 400,
			`the body is "AdmissionReview" of "admission.k8s.io/v1beta1", and the webhook supports only AdmissionReview of admission.k8s.io/v1; list only v1 in its admissionReviewVersions`},
		{"kind", "/mutate", "application/json", review("{}", "AdmissionReview", "Pod"), 400,
			`the body is "Pod" of "admission.k8s.io/v1", and the webhook supports only AdmissionReview of admission.k8s.io/v1; list only v1 in its admissionReviewVersions`},
		{"no request", "/mutate", "application/json", `{"apiVersion":"admission.k8s.io/v1","kind":"AdmissionReview"}`, 400, "the review has no request"},
		{"no uid", "/mutate", "application/json", review("{}", "0b2e5d3c", ""), 400, "the review's request has no uid"},
		{"too long", "/mutate", "application/json", strings.Repeat(" ", 4<<20) + review("{}"), 413, "the review is longer than 4194304 bytes, and an API server accepts pods of at most 3145728; make the pod smaller"},
		{"not UTF-8", "/mutate", "application/json", review(`{"metadata":{"name":"` + "\xff" + `"}}`), 400, "decoding the review: it is not UTF-8"},
		{"path", "/validate", "application/json", review("{}"), 404, "404 page not found"},
		{"unclean path", "//mutate", "application/json", review("{}"), 404, "404 page not found"},
		{"method", "/readyz", "application/json", review("{}"), 405, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			code, text := post(t, client, url+tc.path, tc.contentType, tc.body)
			if code != tc.code || strings.TrimSpace(text) != tc.want {
				t.Errorf("response is %d %q, want %d %q", code, text, tc.code, tc.want)
			}
		})
	}
	// The longest accepted body.
	body := review("{}")
	code, text := post(t, client, url+"/mutate", "application/json", strings.Repeat(" ", 4<<20-len(body))+body)
	if code != http.StatusOK {
		t.Errorf("response to a body of 4 MiB is %d %s", code, text)
	}
}

// TestTooLarge: the webhook refuses each pod that an API server could not store, with the reason.
func TestTooLarge(t *testing.T) {
	containers := func(n int) string {
		return `"initContainers":[` + strings.Repeat(`{"name":"i"},`, n-2) + `{"name":"i"}],` // and the pod's own container
	}
	client, url := startTCP(t)
	for name, tt := range map[string]struct {
		review string
		want   string // "" if it is injected
	}{
		"maximum of containers": {review(pod(permitted, containers(1000))), ""},
		"one more container":    {review(pod(permitted, containers(1001))), "the pod has 1001 containers, and the maximum is 1000; split the pod"},
		"60,000 containers in one list": {review(pod(permitted, strings.ReplaceAll(containers(60_002), `"i"}`, `"i","env":[{"name":"AWS_PROFILE","value":"x"},{"name":"AWS_ACCESS_KEY_ID","value":"x"}]}`))),
			"the review is longer than 4194304 bytes, and an API server accepts pods of at most 3145728; make the pod smaller"},
		"20,000 containers": {review(pod(permitted, containers(20_000))), "cannot read the pod's spec: 19999 containers, and the maximum is 1000; split the pod"},
		"elements":          {review(pod(permitted, `"x":[0`+strings.Repeat(`,0`, 200_000)+`],`)), "the pod has 200033 fields and list elements, and the maximum is 200000; make it smaller, or remove its annotations of Credence"},
		"levels":            {review(pod(permitted, `"x":`+strings.Repeat(`[`, 97)+strings.Repeat(`]`, 97)+`,`)), "the pod is nested 101 levels deep, and the maximum is 100; make it simpler, or remove its annotations of Credence"},
		"bytes":             {review(pod(permitted, `"x":"`+strings.Repeat(`x`, 3<<20)+`",`)), "the pod has 3145944 bytes of JSON, and an API server accepts at most 3145728; make it smaller"},
		"annotations":       {review(pod(permitted+`","x":"`+strings.Repeat(`x`, 256<<10), "")), "the pod's annotations have 262211 bytes, and Kubernetes accepts 262144; shorten them"},
	} {
		t.Run(name, func(t *testing.T) {
			code, text := post(t, client, url+"/mutate", "application/json", tt.review)
			if code != http.StatusOK {
				t.Fatalf("response is %d %s", code, text)
			}
			got := decodeReview(t, text, "0b2e5d3c")
			if got.Allowed != (tt.want == "") {
				t.Fatalf("response is %s", text)
			}
			if tt.want == "" {
				return
			}
			if got.Result.Code != http.StatusBadRequest || got.Result.Message != "credence: "+tt.want || got.AuditAnnotations["reason"] != "POD_UNSUPPORTED" {
				t.Errorf("response is %+v, %v, want %s", got.Result, got.AuditAnnotations, tt.want)
			}
		})
	}
}

func TestWarningsAreBounded(t *testing.T) {
	containers := `"initContainers":[{"name":"x0","envFrom":[{}]}`
	for n := range 40 {
		containers += fmt.Sprintf(`,{"name":"%0253d","envFrom":[{}]}`, n)
	}
	client, url := startTCP(t)
	_, text := post(t, client, url+"/mutate", "application/json", review(pod(permitted, containers+"],")))
	got := decodeReview(t, text, "0b2e5d3c").Warnings
	if len(got) != 16 || got[15] != "credence: and 26 more warnings" {
		t.Errorf("%d warnings, the last one %q, want 16 with a count", len(got), got[len(got)-1])
	}
	for _, warning := range got {
		if n := len([]rune(warning)); n > 256 {
			t.Errorf("warning has %d characters, want at most 256: %s", n, warning)
		}
	}
	if !strings.HasSuffix(got[1], "…") {
		t.Errorf("cut warning does not end with …: %s", got[1])
	}
}

func TestReadiness(t *testing.T) {
	var mu sync.Mutex
	missing := errors.New("not all are listed yet")
	client, url := startTCP(t, func(c *webhook.Config) {
		c.Ready = map[string]func() error{
			"namespaces": func() error { mu.Lock(); defer mu.Unlock(); return missing },
			"always":     func() error { return nil },
		}
	})
	if code, text := get(t, client, url+"/readyz"); code != 503 || strings.TrimSpace(text) != "namespaces: not all are listed yet" {
		t.Errorf("before the list: %d %q", code, text)
	}
	if code, text := get(t, client, url+"/healthz"); code != 200 {
		t.Errorf("health: %d %q", code, text)
	}
	mu.Lock()
	missing = nil
	mu.Unlock()
	if code, text := get(t, client, url+"/readyz"); code != 200 {
		t.Errorf("after the list: %d %q", code, text)
	}
}

func TestExpiredCertificateIsNotReady(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newServer(t)
		time.Sleep(25 * time.Hour) // Leaves of certstest are valid for a day.
		w := recorded(t, s, http.MethodGet, "/readyz", "")
		if w.Code != 503 || !strings.HasPrefix(w.Body.String(), "certificate: expired at 2000-01-02T00:00:00Z") {
			t.Errorf("response is %d %q", w.Code, w.Body)
		}
	})
}

func TestFutureCertificateIsNotReady(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		from := time.Now().Add(time.Hour)
		s := newServer(t, func(c *webhook.Config) {
			leaf := certstest.NewCA(t).LeafWith(func(l *x509.Certificate) { l.NotBefore = from }, "webhook.example")
			certFile, keyFile := leaf.WriteTo(t.TempDir())
			var err error
			if c.KeyPair, err = certs.NewKeyPair(certFile, keyFile, nil); err != nil {
				t.Fatal(err)
			}
		})
		time.Sleep(time.Hour - time.Second)
		w := recorded(t, s, http.MethodGet, "/readyz", "")
		if w.Code != 503 || !strings.HasPrefix(w.Body.String(), "certificate: not valid before 2000-01-01T01:00:00Z") {
			t.Errorf("one second before the start of validity, response is %d %q", w.Code, w.Body)
		}
		time.Sleep(time.Second)
		if w := recorded(t, s, http.MethodGet, "/readyz", ""); w.Code != 200 {
			t.Errorf("at the start of validity, response is %d %q", w.Code, w.Body)
		}
	})
}

// TestShutdown: a server that shuts down reports not ready, accepts connections for the drain delay, and returns after the
// reviews in flight.
func TestShutdown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cfg := config(t)
		slow := 11 * time.Second // and 5 s in which both ends close TLS over unbuffered pipes
		cfg.Namespaces = namespaces(func(ctx context.Context, name string) (policy.Namespace, error) {
			time.Sleep(slow) // ignores ctx
			return teamA(ctx, name)
		})
		s, err := webhook.New(cfg)
		if err != nil {
			t.Fatal(err)
		}
		pipes := newPipes()
		client, stop := start(t, s, cfg.KeyPair, pipes, pipes.dial)

		responses := make(chan string, 2)
		mutate := func(client *http.Client) {
			request, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "https://webhook.example/mutate", strings.NewReader(review(pod(permitted, ""))))
			if err != nil {
				responses <- err.Error()
				return
			}
			request.Header.Set("Content-Type", "application/json")
			response, err := client.Do(request)
			if err != nil {
				responses <- err.Error()
				return
			}
			defer response.Body.Close()
			text, _ := io.ReadAll(response.Body)
			responses <- string(text)
		}
		go mutate(client)
		time.Sleep(time.Second)
		stopped := make(chan error, 1)
		begun := time.Now()
		go func() { stopped <- stop() }()
		time.Sleep(4 * time.Second) // of 5
		if code, text := get(t, client, "https://webhook.example/readyz"); code != 503 || !strings.HasPrefix(text, "server: shutting down") {
			t.Errorf("during the shutdown, readiness is %d %q", code, text)
		}
		other := client.Transport.(*http.Transport).Clone()
		defer other.CloseIdleConnections()
		go mutate(&http.Client{Transport: other}) // on a new connection
		if err := <-stopped; err != nil {
			t.Errorf("Run: %v", err)
		}
		if took := time.Since(begun); took < 15*time.Second {
			t.Errorf("shut down after %s, before the review in flight ended", took)
		}
		for range 2 {
			if got := decodeReview(t, <-responses, "0b2e5d3c"); !got.Allowed {
				t.Errorf("review in flight was refused: %v", got.Result)
			}
		}
	})
}

func TestConnectionBound(t *testing.T) {
	if got := connlimit.MaxOpen(webhook.MaxConnections) * webhook.HeldPerConnection; got != webhook.MaxHeldUnauthenticated {
		t.Errorf("product of the limits is %d, but MaxHeldUnauthenticated is %d", got, webhook.MaxHeldUnauthenticated)
	}
}

// TestShutdownClosesConnections: during a shutdown, each response requests that the client close its connection. So the
// server closes no connection while a review arrives.
func TestShutdownClosesConnections(t *testing.T) {
	for _, tc := range []struct {
		name, protocol string
		http2          bool
	}{
		{"API server", "HTTP/1.1", false},
		{"API server on the same host, which offers HTTP/2", "HTTP/1.1", true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				cfg := config(t)
				s, err := webhook.New(cfg)
				if err != nil {
					t.Fatal(err)
				}
				pipes := newPipes()
				dialled := 0
				client, stop := start(t, s, cfg.KeyPair, pipes, func(ctx context.Context, network, address string) (net.Conn, error) {
					dialled++
					return pipes.dial(ctx, network, address)
				})
				client.Transport.(*http.Transport).ForceAttemptHTTP2 = tc.http2
				mutate := func() {
					t.Helper()
					request, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "https://webhook.example/mutate", strings.NewReader(review(pod(permitted, ""))))
					if err != nil {
						t.Fatal(err)
					}
					request.Header.Set("Content-Type", "application/json")
					response, err := client.Do(request)
					if err != nil {
						t.Fatal(err)
					}
					defer response.Body.Close()
					if text, err := io.ReadAll(response.Body); err != nil || !decodeReview(t, string(text), "0b2e5d3c").Allowed || response.Proto != tc.protocol {
						t.Errorf("response is %s %s: %s (%v)", response.Proto, response.Status, text, err)
					}
					synctest.Wait() // until both ends have kept or closed the connection
				}
				for range 3 {
					mutate()
				}
				if dialled != 1 {
					t.Fatalf("before the shutdown, 3 reviews used %d connections, want 1", dialled)
				}
				stopped := make(chan error, 1)
				begun := time.Now()
				go func() { stopped <- stop() }()
				synctest.Wait()
				for range 3 { // The first review uses the open connection.
					mutate()
				}
				if dialled != 3 {
					t.Errorf("in all, reviews used %d connections, want 3", dialled)
				}
				if err := <-stopped; err != nil {
					t.Errorf("Run: %v", err)
				}
				if took := time.Since(begun); took.Truncate(time.Second) != 5*time.Second { // Shutdown polls every few milliseconds.
					t.Errorf("shut down after %s, want 5s: it waited for connections", took)
				}
			})
		})
	}
}

// TestSlowNamespaces: the webhook waits at most 4 seconds for a namespace, because the API server would stop waiting.
func TestSlowNamespaces(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newServer(t, func(c *webhook.Config) {
			c.Namespaces = namespaces(func(ctx context.Context, _ string) (policy.Namespace, error) {
				<-ctx.Done()
				return policy.Namespace{}, ctx.Err()
			})
		})
		begun := time.Now()
		w := recorded(t, s, http.MethodPost, "/mutate", review(pod(permitted, "")))
		if took := time.Since(begun); took != 4*time.Second {
			t.Errorf("response after %s, want 4s", took)
		}
		if got := decodeReview(t, w.Body.String(), "0b2e5d3c"); got.Allowed || got.Result.Code != 503 {
			t.Errorf("response is %s", w.Body)
		}
	})
}

// TestConnectionsAreBounded tests each limit of a connection separately.
func TestConnectionsAreBounded(t *testing.T) {
	ended := func(t *testing.T, sent string, after time.Duration) {
		t.Helper()
		connection, began := connect(t), time.Now()
		if _, err := io.WriteString(connection, sent); err != nil {
			t.Fatal(err)
		}
		_, _ = io.Copy(io.Discard, connection)
		if took := time.Since(began); took != after {
			t.Errorf("connection ended after %s, want %s", took, after)
		}
	}
	for name, test := range map[string]func(t *testing.T){
		"endless headers": func(t *testing.T) { ended(t, "GET /healthz HTTP/1.1\r\nHost:", 5*time.Second) },
		"unexpected body": func(t *testing.T) {
			ended(t, "GET /healthz HTTP/1.1\r\nHost: webhook\r\nContent-Length: 9\r\n\r\n", 10*time.Second)
		},
		"client that does not read": func(t *testing.T) {
			connection := connect(t)
			if _, err := io.WriteString(connection, "GET /healthz HTTP/1.1\r\nHost: webhook\r\n\r\n"); err != nil {
				t.Fatal(err)
			}
			time.Sleep(30 * time.Second)
			if n, err := connection.Read(make([]byte, 1)); err == nil {
				t.Errorf("after 30 seconds, %d bytes arrived, want a closed connection", n)
			}
		},
		"long headers": func(t *testing.T) {
			connection := connect(t)
			go func() {
				_, _ = io.WriteString(connection, "GET /healthz HTTP/1.1\r\nHost: webhook\r\nX: "+strings.Repeat("x", 40<<10)+"\r\n\r\n")
			}()
			if code, text := readResponse(t, connection); code != http.StatusRequestHeaderFieldsTooLarge {
				t.Errorf("response is %d %s", code, text)
			}
		},
	} {
		t.Run(name, func(t *testing.T) { synctest.Test(t, test) })
	}
}

// TestRefusalsAreBounded: a message has at most maxMessage characters, and clients wait at most a minute before they
// retry.
func TestRefusalsAreBounded(t *testing.T) {
	got := webhook.Refusal(&admissionv1.AdmissionRequest{UID: "1"}, &credential.Error{
		Kind: credential.ErrUnavailable, Reason: credential.ReasonAPIServerUnavailable, Message: strings.Repeat("é", 2049), RetryAfter: time.Hour,
	}).Result
	want := strings.Repeat("é", 2047) + "…"
	if got.Message != "credence: "+want || got.Details.Causes[0].Message != want {
		t.Errorf("message has %d characters and its cause %d, want 2048", len([]rune(got.Message)), len([]rune(got.Details.Causes[0].Message)))
	}
	if got.Details.RetryAfterSeconds != 60 {
		t.Errorf("clients wait for %d s, want 60", got.Details.RetryAfterSeconds)
	}
}

// panics is a body whose Read panics.
type panics struct{}

func (panics) Read([]byte) (int, error) { panic("hunter2") }

// TestPanics: a panic outside the decision leads to a refusal, too.
func TestPanics(t *testing.T) {
	s := newServer(t, func(c *webhook.Config) { c.Observe = func(webhook.Observation) { panic("hunter2") } })
	w := recorded(t, s, http.MethodPost, "/mutate", review(pod(permitted, "")))
	if got := decodeReview(t, w.Body.String(), "0b2e5d3c"); got.Allowed || got.Result.Code != 500 {
		t.Errorf("response is %s", w.Body)
	}
	request := httptest.NewRequestWithContext(t.Context(), http.MethodPost, "/mutate", panics{})
	request.Header.Set("Content-Type", "application/json")
	w = httptest.NewRecorder()
	s.ServeHTTP(w, request)
	if w.Code != 500 || !strings.HasPrefix(w.Body.String(), "internal error") {
		t.Errorf("response is %d %s", w.Code, w.Body)
	}
}

func TestRunReturnsItsFailure(t *testing.T) {
	listener, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	listener.Close()
	if err := newServer(t).Run(t.Context(), listener); err == nil || !strings.HasPrefix(err.Error(), "serving admission reviews: ") {
		t.Errorf("error is %v", err)
	}
}

func TestNew(t *testing.T) {
	other, err := policy.NewKeys("other.example")
	if err != nil {
		t.Fatal(err)
	}
	rules, err := policy.New(policy.Config{Keys: other})
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		change func(*webhook.Config)
		want   string
	}{
		{func(c *webhook.Config) { c.Injector = nil }, "making a webhook: an injector is required"},
		{func(c *webhook.Config) { c.Rules = nil }, "making a webhook: rules are required"},
		{func(c *webhook.Config) { c.Rules = rules }, `making a webhook: injector and rules have different annotation prefixes, "iam.amazonaws.com" and "other.example"`},
		{func(c *webhook.Config) { c.Namespaces = nil }, "making a webhook: a source of namespaces is required"},
		{func(c *webhook.Config) { c.KeyPair = nil }, "making a webhook: a serving certificate is required"},
		{func(c *webhook.Config) { c.DrainDelay = -1 }, "making a webhook: drain delay -1ns is negative"},
	} {
		cfg := config(t)
		tc.change(&cfg)
		if s, err := webhook.New(cfg); s != nil || err == nil || err.Error() != tc.want {
			t.Errorf("error is %v, want %s", err, tc.want)
		}
	}
}
