//go:build linux

package soak

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"time"

	"github.com/credence-iam/credence/integration/await"
	"github.com/credence-iam/credence/integration/chart"
	"github.com/credence-iam/credence/integration/prometheus"
)

// startPrometheus starts a Prometheus in the cluster's network, with the alerts of the chart.
func startPrometheus(ctx context.Context) (*prometheus.Server, error) {
	path, err := exec.LookPath("prometheus")
	if err != nil {
		return nil, fmt.Errorf("finding Prometheus, on Debian in the package prometheus: %w", err)
	}
	rules, err := chart.Alerts(ctx, chart.Config{})
	if err != nil {
		return nil, err
	}
	targets := filepath.Join(d.Cluster.Run().Dir(), "targets.json")
	server, err := prometheus.Start(ctx, prometheus.Config{
		Path: path, Host: d.Cluster.Host(), Folder: filepath.Join(d.Cluster.Run().Dir(), "prometheus"),
		Interval: 10 * time.Second, Evaluation: 5 * time.Second, Rules: rules,
		Scrape: fmt.Sprintf("- job_name: credence\n  file_sd_configs: [{files: [%q], refresh_interval: 2s}]\n", targets),
	})
	if err != nil {
		return nil, err
	}
	go writeTargets(ctx, targets)
	return server, await.Poll(ctx, func() error {
		ready, err := server.Query(ctx, "sum(credence_broker_ready) == 2")
		if err == nil && len(ready) == 0 {
			err = errors.New("it has not seen two brokers that are ready")
		}
		return err
	})
}

// writeTargets writes the addresses of our pods to a file until ctx ends, because Debian's Prometheus does not know
// Kubernetes. While the API server is unavailable, the last ones stay.
func writeTargets(ctx context.Context, file string) {
	for ; ctx.Err() == nil; pause(ctx, 2*time.Second) {
		list, err := pods(ctx, "credence", "")
		if err != nil {
			continue
		}
		type target struct {
			Targets []string          `json:"targets"`
			Labels  map[string]string `json:"labels"`
		}
		targets := []target{}
		for _, p := range list {
			if p.Status.PodIP != "" {
				targets = append(targets, target{[]string{p.Status.PodIP + ":8080"}, map[string]string{"namespace": p.Namespace, "pod": p.Name}})
			}
		}
		text, err := json.Marshal(targets)
		if err == nil {
			err = errors.Join(os.WriteFile(file+".new", text, 0o600), os.Rename(file+".new", file))
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, "writing the targets of Prometheus:", err)
		}
	}
}

// step is the time between two values of a query.
const step = 5 * time.Second

// alertsIn returns the names of the alerts that were in that state for that time, in the time between.
func alertsIn(ctx context.Context, server *prometheus.Server, state string, least time.Duration, from, to time.Time) (names []string, err error) {
	all, err := server.Range(ctx, `max by (alertname) (ALERTS{alertstate="`+state+`"})`, from, to, step)
	for _, series := range all {
		if time.Duration(len(series.Values))*step >= least {
			names = append(names, series.Metric["alertname"])
		}
	}
	slices.Sort(names)
	return names, err
}
