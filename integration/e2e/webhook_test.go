//go:build linux

package e2e

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/credence-iam/credence/integration/deployment"
)

// Series of the webhook's metrics.
const (
	reviewsOf  = "credence_webhook_reviews_total"
	refusalsOf = "credence_webhook_refusals_total"
)

// sum adds up the values of a text of metrics by series, of the series that keep says.
func sum(into map[string]int, metrics io.Reader, keep func(series string) bool) error {
	lines := bufio.NewScanner(metrics)
	for lines.Scan() {
		at := strings.LastIndexByte(lines.Text(), ' ')
		if at < 0 || !keep(lines.Text()[:at]) {
			continue
		}
		value, err := strconv.ParseFloat(lines.Text()[at+1:], 64)
		if err != nil {
			return fmt.Errorf("metric %q: %w", lines.Text(), err)
		}
		into[lines.Text()[:at]] += int(value)
	}
	return lines.Err()
}

// tried is how many admission reviews the API server has sent to our webhook, or tried to.
func tried(t *testing.T) int {
	t.Helper()
	text, err := d.Client.Discovery().RESTClient().Get().AbsPath("/metrics").DoRaw(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	all := make(map[string]int)
	if err := sum(all, strings.NewReader(string(text)), func(series string) bool {
		return strings.HasPrefix(series, "apiserver_admission_webhook_admission_duration_seconds_count{") && strings.Contains(series, `name="inject.credence-iam.github.io"`)
	}); err != nil {
		t.Fatal(err)
	}
	n := 0
	for value := range maps.Values(all) {
		n += value
	}
	return n
}

// counts scrapes the webhooks as Prometheus does that goes by the ServiceMonitor: each endpoint of the Service's
// port http-metrics, at /metrics. It returns their counters of reviews and refusals, all webhooks together.
func counts(t *testing.T) map[string]int {
	t.Helper()
	slices, err := d.Client.DiscoveryV1().EndpointSlices(deployment.Namespace).List(t.Context(), metav1.ListOptions{LabelSelector: discoveryv1.LabelServiceName + "=credence-webhook"})
	if err != nil {
		t.Fatal(err)
	}
	client := &http.Client{Transport: &http.Transport{DialContext: world.Host().Dial, DisableKeepAlives: true}}
	all, scraped := make(map[string]int), 0
	for _, slice := range slices.Items {
		for _, port := range slice.Ports {
			if *port.Name != "http-metrics" {
				continue
			}
			for _, endpoint := range slice.Endpoints {
				url := "http://" + net.JoinHostPort(endpoint.Addresses[0], strconv.Itoa(int(*port.Port))) + "/metrics"
				request, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, http.NoBody)
				if err != nil {
					t.Fatal(err)
				}
				answer, err := client.Do(request)
				if err != nil {
					t.Fatal(err)
				}
				err = sum(all, answer.Body, func(series string) bool {
					return strings.HasPrefix(series, reviewsOf+"{") || strings.HasPrefix(series, refusalsOf+"{")
				})
				if err := errors.Join(err, answer.Body.Close()); err != nil || answer.StatusCode != http.StatusOK {
					t.Fatalf("%s: %s, %v", url, answer.Status, err)
				}
				scraped++
			}
		}
	}
	if scraped != 2 {
		t.Fatalf("%d webhooks were scraped, want 2", scraped)
	}
	return all
}

// counted is what counts has now and had less of before.
func counted(t *testing.T, before map[string]int) map[string]int {
	t.Helper()
	more := make(map[string]int)
	for series, value := range counts(t) {
		if value != before[series] {
			more[series] = value - before[series]
		}
	}
	return more
}

// Each decision on a pod is counted, once, by what became of the pod and why.
func TestWebhookCountsItsDecisions(t *testing.T) {
	ns := namespace(t, func(ns *corev1.Namespace) { ns.Annotations[permittedKey] = deployment.RoleARN(bucket) })
	try := func(annotations map[string]string) error {
		_, err := d.Client.CoreV1().Pods(ns).Create(t.Context(), app("app", annotations), metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}})
		return err
	}
	// The counters of a process start at 0, and all are there from its start.
	before := counts(t)
	for _, series := range []string{reviewsOf + `{decision="complete"}`, refusalsOf + `{reason="INTERNAL"}`} {
		if _, ok := before[series]; !ok {
			t.Errorf("there is no %s among %v", series, before)
		}
	}
	for range 3 {
		if err := try(annotated()); err != nil {
			t.Errorf("a pod with a role that is permitted: %v", err)
		}
	}
	for range 2 {
		if err := try(map[string]string{roleKey: "admin"}); err == nil {
			t.Error("a pod with a role that is not permitted was admitted")
		}
	}
	if err := try(map[string]string{"iam.amazonaws.com/roel": bucket}); err == nil {
		t.Error("a pod with a misspelt key was admitted")
	}
	if err := try(nil); err != nil {
		t.Errorf("a pod that is none of its business: %v", err)
	}
	want := map[string]int{
		reviewsOf + `{decision="injected"}`:          3,
		reviewsOf + `{decision="refused"}`:           3,
		refusalsOf + `{reason="ROLE_NOT_PERMITTED"}`: 2,
		refusalsOf + `{reason="ANNOTATION_UNKNOWN"}`: 1,
	}
	if diff := cmp.Diff(want, counted(t, before)); diff != "" {
		t.Errorf("counted otherwise (- want, + got):\n%s", diff)
	}
}

// Without a webhook, what it would have had to inject is refused, and all else starts: it is not even asked.
func TestWebhookAway(t *testing.T) {
	optedIn := namespace(t)
	plain := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: optedIn + "-plain"}}
	if _, err := d.Client.CoreV1().Namespaces().Create(t.Context(), plain, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		// t.Context has ended here.
		if err := d.Client.CoreV1().Namespaces().Delete(context.Background(), plain.Name, metav1.DeleteOptions{}); err != nil {
			t.Error(err)
		}
	})
	awaitServiceAccount(t, plain.Name)
	awaitServiceAccount(t, metav1.NamespaceSystem)
	// Pods that are none of its business.
	others := func(suffix string) {
		t.Helper()
		for namespace, annotations := range map[string]map[string]string{optedIn: nil, plain.Name: annotated(), metav1.NamespaceSystem: annotated()} {
			pod := app("other-"+suffix, annotations)
			pod.Spec.Containers[0].Image = pauseImage
			create(t, namespace, pod)
			t.Cleanup(func() {
				// t.Context has ended here, and Kubernetes' own namespace stays.
				if err := d.Client.CoreV1().Pods(namespace).Delete(context.Background(), pod.Name, metav1.DeleteOptions{}); err != nil {
					t.Error(err)
				}
			})
			if stored := awaitReady(t, namespace, pod.Name); len(stored.Spec.InitContainers) != 0 {
				t.Errorf("pod %s/%s has init containers %v", namespace, pod.Name, stored.Spec.InitContainers)
			}
		}
	}
	// While it is there, it is asked about the annotated pod of the opted-in namespace, and no other. Both counts are of
	// everybody's pods, and nobody else makes any meanwhile.
	before, triedBefore := counts(t), tried(t)
	others("before")
	if more := counted(t, before); len(more) != 0 {
		t.Errorf("the webhook was asked about pods that are none of its business: %v", more)
	}
	if n := tried(t); n != triedBefore {
		t.Errorf("the API server counts %d calls of the webhook about pods that are none of its business", n-triedBefore)
	}
	create(t, optedIn, once(app("asked", annotated(), "whoami")))
	if diff := cmp.Diff(map[string]int{reviewsOf + `{decision="injected"}`: 1}, counted(t, before)); diff != "" {
		t.Errorf("of an annotated pod the webhook counts otherwise (- want, + got):\n%s", diff)
	}
	if n := tried(t); n != triedBefore+1 {
		t.Errorf("the API server counts %d calls of the webhook about one annotated pod", n-triedBefore)
	}

	away(t, "webhook")
	triedBefore = tried(t)
	others("away")
	if n := tried(t); n != triedBefore {
		t.Errorf("the API server has tried %d times to ask about pods that are none of the webhook's business", n-triedBefore)
	}
	_, err := d.Client.CoreV1().Pods(optedIn).Create(t.Context(), app("refused", annotated()), metav1.CreateOptions{})
	// The words are the API server's. The names in them are ours, and docs/operations.md has what to do.
	for _, said := range []string{`failed calling webhook "inject.credence-iam.github.io"`, `no endpoints available for service "credence-webhook"`} {
		if err == nil || !strings.Contains(err.Error(), said) {
			t.Errorf("an annotated pod: answered %v, which does not say %s", err, said)
		}
	}
	if !apierrors.IsInternalError(err) {
		t.Errorf("it is no error that controllers try again after: %v", err)
	}
	if n := tried(t); n != triedBefore+1 {
		t.Errorf("the API server counts %d calls of the webhook about one annotated pod", n-triedBefore)
	}
}
