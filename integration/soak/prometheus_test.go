//go:build linux

package soak

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/credence-iam/credence/integration/await"
	"github.com/credence-iam/credence/integration/process"
)

// A prometheus is a running Prometheus, of this machine, with the alerts of docs/metrics.md.
type prometheus struct {
	url     string
	client  *http.Client
	process *process.Process
}

const prometheusConfig = `global: {scrape_interval: 10s, scrape_timeout: 10s, evaluation_interval: 5s}
rule_files: [%q]
scrape_configs:
- job_name: credence
  file_sd_configs: [{files: [%q], refresh_interval: 2s}]
`

// forAnHour is the part of the rules that the page says to adapt to the session duration.
const forAnHour = "credence_broker_stalest_session_seconds < 1200"

// startPrometheus starts a Prometheus without a history in the cluster's network. Nothing of an earlier failure is in it.
func startPrometheus(ctx context.Context) (*prometheus, error) {
	path, err := exec.LookPath("prometheus")
	if err != nil {
		return nil, fmt.Errorf("finding Prometheus, on Debian in the package prometheus: %w", err)
	}
	page, err := os.ReadFile("../../docs/metrics.md")
	if err != nil {
		return nil, err
	}
	_, rules, ok := strings.Cut(string(page), "```yaml\ngroups:")
	rules, _, ok2 := strings.Cut(rules, "```")
	if !ok || !ok2 || !strings.Contains(rules, forAnHour) {
		return nil, errors.New("docs/metrics.md has no rules, or none on the session duration")
	}
	rules = "groups:" + strings.Replace(rules, forAnHour, fmt.Sprintf("credence_broker_stalest_session_seconds < %.0f", part(20*time.Minute).Seconds()), 1)
	folder := filepath.Join(d.Cluster.Run().Dir(), "prometheus")
	rulesFile, configFile, targets := filepath.Join(folder, "rules.yaml"), filepath.Join(folder, "prometheus.yaml"), filepath.Join(folder, "targets.json")
	if err := errors.Join(
		os.RemoveAll(folder), os.MkdirAll(folder, 0o700), os.WriteFile(rulesFile, []byte(rules), 0o600),
		os.WriteFile(configFile, fmt.Appendf(nil, prometheusConfig, rulesFile, targets), 0o600),
	); err != nil {
		return nil, err
	}
	host := d.Cluster.Host()
	address := host.Address() + ":9090" // the network is the cluster's
	started, err := host.Start(process.Command{Name: "prometheus", Path: path, Args: []string{
		"--config.file=" + configFile, "--storage.tsdb.path=" + folder, "--web.listen-address=" + address, "--log.level=warn",
	}})
	if err != nil {
		return nil, err
	}
	go writeTargets(ctx, targets)
	p := &prometheus{url: "http://" + address, client: &http.Client{Transport: &http.Transport{DialContext: host.Dial}}, process: started}
	return p, await.Poll(ctx, func() error {
		ready, err := p.query(ctx, "sum(credence_broker_ready) == 2", time.Now(), time.Now())
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
		addresses := []string{}
		for _, p := range list {
			if p.Status.PodIP != "" {
				addresses = append(addresses, p.Status.PodIP+":8080")
			}
		}
		text, err := json.Marshal([]map[string]any{{"targets": addresses}})
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

// query returns the number of values of each series in the time between, by the name of the alert.
func (p *prometheus) query(ctx context.Context, expression string, from, to time.Time) (map[string]int, error) {
	seconds := func(t time.Time) string { return strconv.FormatInt(t.Unix(), 10) }
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, p.url+"/api/v1/query_range?"+url.Values{
		"query": {expression}, "start": {seconds(from)}, "end": {seconds(to)}, "step": {step.String()},
	}.Encode(), nil)
	if err != nil {
		return nil, err
	}
	response, err := p.client.Do(request)
	if err != nil {
		return nil, err
	}
	defer func() { _ = response.Body.Close() }()
	var body struct {
		Error string
		Data  struct {
			Result []struct {
				Metric map[string]string
				Values [][2]any
			}
		}
	}
	if err := json.NewDecoder(response.Body).Decode(&body); err != nil || body.Error != "" {
		return nil, errors.Join(err, errors.New(body.Error))
	}
	counts := map[string]int{}
	for _, series := range body.Data.Result {
		counts[series.Metric["alertname"]] += len(series.Values)
	}
	return counts, nil
}

// between returns the names of the alerts that were in that state for that time, in the time between.
func (p *prometheus) between(ctx context.Context, state string, least time.Duration, from, to time.Time) (names []string, err error) {
	counts, err := p.query(ctx, `max by (alertname) (ALERTS{alertstate="`+state+`"})`, from, to)
	for name, count := range counts {
		if time.Duration(count)*step >= least {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names, err
}
