//go:build unix

package integration

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/credence-iam/credence/broker/assume/ststest"
	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/kube"
	"github.com/credence-iam/credence/broker/placement"
	"github.com/credence-iam/credence/broker/policy"
	"github.com/credence-iam/credence/integration/process"
	"github.com/credence-iam/credence/integration/stack"
)

// The tests of this file run the broker with other flags, so they do not run in parallel.

// withFlags restarts the broker with more flags until the test ends.
func withFlags(t *testing.T, flags ...string) {
	t.Helper()
	credence.StopBroker()
	t.Cleanup(func() {
		credence.StopBroker()
		if err := credence.StartBroker(context.WithoutCancel(t.Context())); err != nil {
			t.Fatal(err)
		}
	})
	if err := credence.StartBroker(t.Context(), flags...); err != nil {
		t.Fatal(err)
	}
}

// soon waits until check is content, or fails with what it said last.
func soon(t *testing.T, what string, check func() error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	for {
		err := check()
		if err == nil {
			return
		}
		select {
		case <-ctx.Done():
			t.Fatalf("still not so: %s: %v", what, err)
		case <-time.After(100 * time.Millisecond):
		}
	}
}

func TestBrokerHasTokensReviewed(t *testing.T) {
	withFlags(t, "--token-verification=tokenreview")
	ns := namespace(t, ".*")
	pod := create(t, ns, "app", map[string]string{roleKey: "cart"})
	got, err := command(t, app(t, run(t, pod)), "", awsclient, "whoami")
	if err != nil || got != assumed("cart") {
		t.Errorf("an SDK saw %q, %v", got, err)
	}
	other, err := credence.Token(t.Context(), pod, "another-audience", 3600)
	if err != nil {
		t.Fatal(err)
	}
	lease, err := ask(t, other)
	refused(t, lease, err, credential.ReasonTokenAudience)
}

// A broker that starts while STS is down is not ready, and becomes so by itself.
func TestBrokerWaitsForSTS(t *testing.T) {
	credence.StopBroker()
	t.Cleanup(func() {
		credence.STS.SetOutage(ststest.NoOutage)
		credence.StopBroker()
		if err := credence.StartBroker(context.WithoutCancel(t.Context())); err != nil {
			t.Fatal(err)
		}
	})
	credence.STS.SetOutage(ststest.Failing)
	started := make(chan error, 1)
	go func() {
		started <- credence.StartBroker(t.Context(), "--base-arn=arn:aws:iam::"+stack.Account+":role/")
	}()
	soon(t, "the broker waits for STS, and for nothing else", func() error {
		text, err := credence.Readiness(t.Context())
		if err == nil && text != "AWS identity: STS fails (ServiceUnavailable, status 503); the broker keeps trying" {
			err = fmt.Errorf("it answers %q", text)
		}
		return err
	})
	select {
	case err := <-started:
		t.Fatalf("it is ready: %v", err)
	default:
	}
	credence.STS.SetOutage(ststest.NoOutage)
	if err := <-started; err != nil {
		t.Errorf("when STS is back: %v", err)
	}
}

func TestRulesFileIsFollowed(t *testing.T) {
	file := filepath.Join(t.TempDir(), "rules.yaml")
	write := func(role string) {
		t.Helper()
		text := fmt.Sprintf("namespaces:\n- match: ['*']\n  accounts: ['*']\n  roles: [%s]\n", role)
		// Replaced by a rename, so that no half of it is read.
		if err := errors.Join(os.WriteFile(file+".new", []byte(text), 0o600), os.Rename(file+".new", file)); err != nil {
			t.Fatal(err)
		}
	}
	write("/cart")
	withFlags(t, "--rules-file="+file)
	ns := namespace(t, ".*")
	text := token(t, create(t, ns, "app", map[string]string{roleKey: "cart"}))
	if _, err := ask(t, text); err != nil {
		t.Fatal(err)
	}
	write("/other")
	soon(t, "the pod is refused under the new rules", func() error {
		lease, err := ask(t, text)
		if credential.ReasonOf(err) != credential.ReasonRulesRole {
			return fmt.Errorf("it has %s, %w", lease.AccessKeyID, err)
		}
		return nil
	})
}

func TestOperatorDropsSessionsOfARole(t *testing.T) {
	port, err := process.FreePort(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	debug := net.JoinHostPort("127.0.0.1", strconv.Itoa(port))
	withFlags(t, "--debug-listen="+debug)
	ns := namespace(t, ".*")
	texts := map[string]string{} // :: role → token
	before := map[string]string{}
	for _, role := range []string{"dropped", "left"} {
		texts[role] = token(t, create(t, ns, role, map[string]string{roleKey: role}))
		lease, err := ask(t, texts[role])
		if err != nil {
			t.Fatal(err)
		}
		before[role] = lease.AccessKeyID
	}
	request, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "http://"+debug+"/debug/grants/drop?role="+url.QueryEscape(arn("dropped")), nil)
	if err != nil {
		t.Fatal(err)
	}
	answer, err := http.DefaultClient.Do(request)
	if err != nil {
		t.Fatal(err)
	}
	body, err := io.ReadAll(answer.Body)
	if closeErr := answer.Body.Close(); err != nil || closeErr != nil || answer.StatusCode != http.StatusOK {
		t.Fatalf("dropping was answered %s: %s", answer.Status, body)
	}
	for role, text := range texts {
		lease, err := ask(t, text)
		if err != nil {
			t.Fatal(err)
		}
		if changed := lease.AccessKeyID != before[role]; changed != (role == "dropped") {
			t.Errorf("role %s: session %s before, %s after", role, before[role], lease.AccessKeyID)
		}
	}
}

// One of several brokers keeps what it owns and takes its part of the rate, and answers all pods all the same.
func TestBrokerAmongOthers(t *testing.T) {
	const self, pods = "10.0.0.1", 30
	endpoints := credence.Client.DiscoveryV1().EndpointSlices(stack.SystemNamespace)
	// A real API server takes no loopback addresses, so the broker is told that it has another one.
	tell := func(ready ...string) {
		t.Helper()
		s := &discoveryv1.EndpointSlice{
			ObjectMeta:  metav1.ObjectMeta{Name: "brokers", Labels: map[string]string{discoveryv1.LabelServiceName: "brokers"}},
			AddressType: discoveryv1.AddressTypeIPv4, Endpoints: []discoveryv1.Endpoint{},
		}
		for _, address := range ready {
			s.Endpoints = append(s.Endpoints, discoveryv1.Endpoint{Addresses: []string{address}})
		}
		_, err := endpoints.Update(t.Context(), s, metav1.UpdateOptions{})
		if apierrors.IsNotFound(err) {
			_, err = endpoints.Create(t.Context(), s, metav1.CreateOptions{})
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() {
		// t.Context has ended here.
		if err := endpoints.Delete(context.Background(), "brokers", metav1.DeleteOptions{}); err != nil {
			t.Error(err)
		}
	})
	tell(self, "10.0.0.2", "10.0.0.3", "10.0.0.4")
	port, err := process.FreePort(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	debug := net.JoinHostPort("127.0.0.1", strconv.Itoa(port))
	withFlags(t, "--service=brokers", "--pod-ips="+self, "--settle-time=1s", "--debug-listen="+debug)
	ns := namespace(t, ".*")
	keys, err := policy.NewKeys(policy.DefaultPrefix)
	if err != nil {
		t.Fatal(err)
	}
	var all []*corev1.Pod
	owned := func(brokers ...string) (n int) {
		var addresses []netip.Addr
		for _, b := range brokers {
			addresses = append(addresses, netip.MustParseAddr(b))
		}
		for _, pod := range all {
			key, err := policy.Pod{Namespace: ns, ServiceAccount: "default", Request: keys.Request(pod.Annotations)}.RoutingKey()
			if err != nil {
				t.Fatal(err)
			}
			owners := placement.Rank(string(key), addresses)[:min(placement.Owners, len(addresses))]
			if slices.Contains(owners, netip.MustParseAddr(self)) {
				n++
			}
		}
		return n
	}
	kept := func() (n int, err error) {
		request, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+debug+"/debug/grants?limit=1000", nil)
		if err != nil {
			return 0, err
		}
		answer, err := http.DefaultClient.Do(request)
		if err != nil {
			return 0, err
		}
		defer answer.Body.Close()
		var page struct {
			Grants []struct {
				Role string `json:"role"`
				Pods int    `json:"pods"`
			} `json:"grants"`
		}
		if err := json.NewDecoder(answer.Body).Decode(&page); err != nil {
			return 0, err
		}
		for _, grant := range page.Grants { // there are those of other tests, too
			if strings.Contains(grant.Role, "/among-") && grant.Pods > 0 {
				n++
			}
		}
		return n, nil
	}
	for i := range pods {
		all = append(all, create(t, ns, fmt.Sprint("app-", i), map[string]string{roleKey: fmt.Sprint("among-", i)}))
	}
	wants := func(share int, brokers ...string) {
		t.Helper()
		want := owned(brokers...)
		if want == 0 || len(brokers) > 2 && want == pods {
			t.Fatalf("of %d pods the broker owns %d, which shows nothing", pods, want)
		}
		soon(t, fmt.Sprintf("it keeps %d sessions as one of %d", want, len(brokers)), func() error {
			text, err := credence.Metrics(t.Context())
			if err != nil {
				return err
			}
			if got := number(t, text, "credence_broker_fetch_rate_share"); got != share {
				return fmt.Errorf("its part of the rate is %d, want %d", got, share)
			}
			got, err := kept()
			if err == nil && got != want {
				err = fmt.Errorf("it keeps %d", got)
			}
			return err
		})
	}
	wants(100, self, "10.0.0.2", "10.0.0.3", "10.0.0.4")
	for _, pod := range all { // whoever owns it
		if _, err := ask(t, token(t, pod)); err != nil {
			t.Error(err)
		}
	}
	tell(self, "10.0.0.2")
	wants(200, self, "10.0.0.2")
}

// number is the value of a metric without labels.
func number(t *testing.T, metrics, name string) int {
	t.Helper()
	for line := range strings.Lines(metrics) {
		if text, ok := strings.CutPrefix(line, name+" "); ok {
			value, err := strconv.ParseFloat(strings.TrimSpace(text), 64)
			if err != nil {
				t.Fatal(err)
			}
			return int(value)
		}
	}
	t.Fatalf("there is no metric %s", name)
	return 0
}

// Whoever describes a pod sees why it is refused.
func TestRefusalIsAnEventOnThePod(t *testing.T) {
	t.Parallel()
	ns := namespace(t, ".*")
	credence.STS.SetRole(arn("eventful"), ststest.Behavior{Deny: true})
	pod := create(t, ns, "app", map[string]string{roleKey: "eventful"})
	lease, err := ask(t, token(t, pod))
	refused(t, lease, err, credential.ReasonSTSDenied)
	soon(t, "there is an Event", func() error {
		events, err := credence.Client.EventsV1().Events(ns).List(t.Context(), metav1.ListOptions{})
		if err != nil {
			return err
		}
		for _, e := range events.Items {
			if e.Reason == kube.EventReason && e.Regarding.UID == pod.UID && strings.Contains(e.Note, string(credential.ReasonSTSDenied)) {
				return nil
			}
		}
		text, _ := json.Marshal(events.Items)
		return fmt.Errorf("the Events are %s", text)
	})
}

// The metrics that alerts are made of are there, and nobody has a role or a namespace in a label.
func TestMetricsOfARunningBroker(t *testing.T) {
	t.Parallel()
	ns := namespace(t, ".*")
	if _, err := ask(t, token(t, create(t, ns, "app", map[string]string{roleKey: "metered"}))); err != nil {
		t.Fatal(err)
	}
	text, err := credence.Metrics(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{
		"answers_total", "sts_calls_total", "sessions_warm", "stalest_session_seconds", "certificate_expiry_timestamp_seconds",
		"informer_age_seconds", "token_verification_age_seconds", "clock_skew_seconds", "events_total", "pods_queued", "audit_lines_lost_total",
	} {
		if !strings.Contains(text, "\ncredence_broker_"+name) {
			t.Errorf("there is no metric %s", name)
		}
	}
	webhooks, err := credence.WebhookMetrics(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if regexp.MustCompile(`(?m)^credence_webhook_reviews_total\{decision="injected"\} 0$`).MatchString(webhooks) ||
		!strings.Contains(webhooks, "\ncredence_webhook_informer_age_seconds 0\n") {
		t.Errorf("the webhook that has injected a pod tells:\n%s", webhooks)
	}
	for _, secret := range []string{"metered", ns} {
		if strings.Contains(text+webhooks, secret) {
			t.Errorf("the metrics name %s", secret)
		}
	}
}
