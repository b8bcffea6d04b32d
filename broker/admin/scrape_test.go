package admin_test

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/credence-iam/credence/broker/admin"
)

// collector is a collector of one metric.
type collector func() prometheus.Metric

func (c collector) Describe(chan<- *prometheus.Desc)     {}
func (c collector) Collect(all chan<- prometheus.Metric) { all <- c() }

// A client that hangs up during a scrape is no reason for a warning. A metric that cannot be collected is one.
func TestLogOfScrapes(t *testing.T) {
	desc := prometheus.NewDesc("metric", "Help.", nil, nil)
	for name, tc := range map[string]struct {
		hangUp bool
		metric prometheus.Metric
		want   string
	}{
		"the client hangs up": {hangUp: true, metric: prometheus.MustNewConstMetric(desc, prometheus.GaugeValue, 1)},
		"a metric is broken":  {metric: prometheus.NewInvalidMetric(desc, errors.New("broken")), want: `level=WARN msg="Could not serve all metrics" error="error gathering metrics: `},
	} {
		t.Run(name, func(t *testing.T) {
			registry, log := prometheus.NewRegistry(), new(bytes.Buffer)
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			served := make(chan struct{})
			registry.MustRegister(collector(func() prometheus.Metric {
				if tc.hangUp {
					cancel()
					<-served // then the response cannot be written
				}
				return tc.metric
			}))
			handler := admin.MetricsHandler(registry, slog.New(slog.NewTextHandler(log, nil)))
			request := func(ctx context.Context) {
				handler.ServeHTTP(httptest.NewRecorder(), httptest.NewRequestWithContext(ctx, http.MethodGet, "/metrics", nil))
			}
			request(ctx)
			close(served)
			request(t.Context()) // it waits until the first one has ended
			got := log.String()
			if tc.want == "" && got != "" || !strings.Contains(got, tc.want) {
				t.Errorf("logged %q, want %q", got, tc.want)
			}
		})
	}
}
