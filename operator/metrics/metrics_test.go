package metrics_test

import (
	"fmt"
	"math"
	"strings"
	"testing"

	"github.com/credence-iam/credence/operator/metrics"
)

func TestMetrics(t *testing.T) {
	m := metrics.Parse([]byte(`# TYPE credence_broker_ready gauge
credence_broker_ready 1
# TYPE credence_broker_sts_calls_total counter
credence_broker_sts_calls_total{outcome="ok",action="AssumeRole"} 7
credence_broker_sts_calls_total{outcome="STS_UNAVAILABLE",action="AssumeRole"} 2
# TYPE credence_broker_sts_call_duration_seconds histogram
credence_broker_sts_call_duration_seconds_bucket{action="AssumeRole",le="0.5"} 90
credence_broker_sts_call_duration_seconds_bucket{action="AssumeRole",le="5"} 99
credence_broker_sts_call_duration_seconds_bucket{action="AssumeRole",le="+Inf"} 100
credence_broker_sts_call_duration_seconds_sum{action="AssumeRole"} 3
credence_broker_sts_call_duration_seconds_count{action="AssumeRole"} 100
# TYPE go_goroutines gauge
go_goroutines 12
`))
	if v, ok := m.Broker("ready"); !ok || v != 1 {
		t.Errorf("ready: %v, %v", v, ok)
	}
	if _, ok := m.Broker("rules_file_ok"); ok {
		t.Error("a metric that is absent is known")
	}
	if all, bad := m.Of("credence_broker_sts_calls_total"), m.Of("credence_broker_sts_calls_total", `outcome="STS_UNAVAILABLE"`); all != 9 || bad != 2 {
		t.Errorf("calls: %v, %v", all, bad)
	}
	for share, want := range map[float64]float64{0.5: 0.5, 0.99: 5, 0.999: math.Inf(1)} {
		if bound, count := metrics.Sum([]metrics.Values{m, m}).Within(share, "credence_broker_sts_call_duration_seconds", `action="AssumeRole"`); bound != want || count != 200 {
			t.Errorf("%v of the calls within %v of %v, want %v", share, bound, count, want)
		}
	}
	if got := m.By("credence_broker_sts_calls_total", "outcome", `action="AssumeRole"`); len(got) != 2 || got["ok"] != 7 {
		t.Errorf("calls by outcome: %v", got)
	}
	if median, ok := m.Quantile(0.45, "credence_broker_sts_call_duration_seconds", `action="AssumeRole"`); !ok || median != 0.25 {
		t.Errorf("the quantile is %v, %v", median, ok)
	}
	if _, ok := m["go_goroutines"]; ok || len(m) != 8 {
		t.Errorf("series are %v", m)
	}
	endless := new(strings.Builder)
	for n := range 10 * 2000 {
		_, _ = fmt.Fprintf(endless, "credence_x%d 1\n", n)
	}
	if got := len(metrics.Parse([]byte(endless.String()))); got != 2000 {
		t.Errorf("a page of 20,000 series has %d", got)
	}
	for _, text := range []string{"<html>", "", "credence_x", "credence_x y", " ", "credence_x 1 2 3 z"} {
		if got := metrics.Parse([]byte(text)); len(got) > 0 {
			t.Errorf("%q has the series %v", text, got)
		}
	}
}
