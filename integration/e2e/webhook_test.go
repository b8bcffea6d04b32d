//go:build linux

package e2e

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	discoveryv1 "k8s.io/api/discovery/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/credence-iam/credence/integration/deployment"
	"github.com/credence-iam/credence/integration/kubetest"
	"github.com/credence-iam/credence/integration/stack"
)

// Metrics of the webhook.
const (
	reviewsOf  = "credence_webhook_reviews_total"
	refusalsOf = "credence_webhook_refusals_total"
)

// addCounters adds the webhook's counters in a text of metrics to those in all, by series.
func addCounters(all map[string]int, metrics io.Reader) error {
	lines := bufio.NewScanner(metrics)
	for lines.Scan() {
		series, text, _ := strings.Cut(lines.Text(), " ")
		if !strings.HasPrefix(series, reviewsOf+"{") && !strings.HasPrefix(series, refusalsOf+"{") {
			continue
		}
		value, err := strconv.ParseFloat(text, 64)
		if err != nil {
			return fmt.Errorf("metric %q: %w", lines.Text(), err)
		}
		all[series] += int(value)
	}
	return lines.Err()
}

// counts scrapes the webhooks as Prometheus does with the ServiceMonitor: each endpoint of the Service's port
// http-metrics, at /metrics. It returns the sums of their counters of reviews and refusals.
func counts(t *testing.T) map[string]int {
	t.Helper()
	slices, err := d.Client.DiscoveryV1().EndpointSlices(deployment.Namespace).List(t.Context(), metav1.ListOptions{LabelSelector: discoveryv1.LabelServiceName + "=credence-webhook"})
	if err != nil {
		t.Fatal(err)
	}
	client := &http.Client{Transport: &http.Transport{DialContext: d.Cluster.Host().Dial, DisableKeepAlives: true}}
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
				response, err := client.Do(request)
				if err != nil {
					t.Fatal(err)
				}
				err = addCounters(all, response.Body)
				if err := errors.Join(err, response.Body.Close()); err != nil || response.StatusCode != http.StatusOK {
					t.Fatalf("%s: %s, %v", url, response.Status, err)
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

// counted returns the differences of counts to an earlier result.
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

// TestWebhookCountsItsDecisions shows that each decision on a pod is counted once, by its outcome and reason.
func TestWebhookCountsItsDecisions(t *testing.T) {
	ns := d.Namespace(t, func(_, annotations map[string]string) { annotations[permittedKey] = stack.RoleARN(bucket) })
	try := func(annotations map[string]string) error {
		_, err := kubetest.Dry(t, d.Client, ns, d.App("app", annotations))
		return err
	}
	// All counters exist from the start of the process.
	before := counts(t)
	for _, series := range []string{reviewsOf + `{decision="complete"}`, refusalsOf + `{reason="INTERNAL"}`} {
		if _, ok := before[series]; !ok {
			t.Errorf("there is no %s among %v", series, before)
		}
	}
	for range 3 {
		if err := try(annotated()); err != nil {
			t.Errorf("a pod with a permitted role: %v", err)
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
		t.Errorf("a pod without annotations: %v", err)
	}
	want := map[string]int{
		reviewsOf + `{decision="injected"}`:          3,
		reviewsOf + `{decision="refused"}`:           3,
		refusalsOf + `{reason="ROLE_NOT_PERMITTED"}`: 2,
		refusalsOf + `{reason="ANNOTATION_UNKNOWN"}`: 1,
	}
	if diff := cmp.Diff(want, counted(t, before)); diff != "" {
		t.Errorf("the counters (- want, + got):\n%s", diff)
	}
}

// TestWebhookUnavailable shows how the API server refuses an annotated pod without a webhook. The message leads to
// docs/operations.md, and controllers retry. integration/chart/admission shows that other pods are admitted.
func TestWebhookUnavailable(t *testing.T) {
	ns := d.Namespace(t)
	stop(t, "webhook")
	_, err := kubetest.Dry(t, d.Client, ns, d.App("app", annotated()))
	for _, part := range []string{`failed calling webhook "inject.credence-iam.github.io"`, `no endpoints available for service "credence-webhook"`} {
		if err == nil || !strings.Contains(err.Error(), part) {
			t.Errorf("an annotated pod got %v, want %s in it", err, part)
		}
	}
	if !apierrors.IsInternalError(err) {
		t.Errorf("controllers do not retry after %v", err)
	}
}
