//go:build unix

// Package prometheus runs the Prometheus of this machine for tests, because only PromQL shows whether an alert fires and
// whether a dashboard has data. Each server starts without a history. On Debian, the package prometheus has the programs.
package prometheus

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"sigs.k8s.io/yaml"

	"github.com/credence-iam/credence/integration/process"
)

// Program returns the path of a program of Prometheus. Without it, the test fails in CI, and is skipped elsewhere.
func Program(t testing.TB, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil && os.Getenv("CI") == "true" {
		t.Fatalf("%v; on Debian, run apt-get install prometheus", err)
	} else if err != nil {
		t.Skipf("%v; on Debian, run apt-get install prometheus", err)
	}
	return path
}

// Config configures [Start]. All fields are required.
type Config struct {
	// Path is the path of the program.
	Path string
	// Host is where it runs. Its address there is free for the server's port.
	Host process.Host
	// Folder has its files. Start removes what is there.
	Folder string
	// Interval is the time between two scrapes, and Evaluation that between two evaluations of the rules.
	Interval, Evaluation time.Duration
	// Rules is a file of rules, as a value that YAML can encode.
	Rules any
	// Scrape has the scrape configurations, in YAML.
	Scrape string
}

// Server is a running Prometheus.
type Server struct {
	*process.Process

	url    string
	client *http.Client
}

const config = `global: {scrape_interval: %[1]s, scrape_timeout: %[1]s, evaluation_interval: %[2]s}
rule_files: [%[3]q]
scrape_configs:
%[4]s`

// Start starts a Prometheus. It may not serve yet when Start returns. It ends with the run of the host.
func Start(ctx context.Context, cfg Config) (*Server, error) {
	rules, err := yaml.Marshal(cfg.Rules)
	if err != nil {
		return nil, fmt.Errorf("encoding rules: %w", err)
	}
	rulesFile, configFile := filepath.Join(cfg.Folder, "rules.yaml"), filepath.Join(cfg.Folder, "prometheus.yaml")
	if err := errors.Join(
		os.RemoveAll(cfg.Folder), os.MkdirAll(cfg.Folder, 0o700), os.WriteFile(rulesFile, rules, 0o600),
		os.WriteFile(configFile, fmt.Appendf(nil, config, cfg.Interval, cfg.Evaluation, rulesFile, cfg.Scrape), 0o600),
	); err != nil {
		return nil, fmt.Errorf("writing the files of Prometheus: %w", err)
	}
	port, err := process.FreePortOf(ctx, cfg.Host)
	if err != nil {
		return nil, err
	}
	address := net.JoinHostPort(cfg.Host.Address(), strconv.Itoa(port))
	started, err := cfg.Host.Start(process.Command{Name: "prometheus", Path: cfg.Path, Args: []string{
		"--config.file=" + configFile, "--storage.tsdb.path=" + filepath.Join(cfg.Folder, "data"), "--web.listen-address=" + address, "--log.level=warn",
	}})
	if err != nil {
		return nil, err
	}
	return &Server{Process: started, url: "http://" + address, client: &http.Client{Transport: &http.Transport{DialContext: cfg.Host.Dial}}}, nil
}

// Series is one series of a query.
type Series struct {
	Metric map[string]string
	Values [][2]any // of a query with a range: seconds since 1970, and the value as a text
}

// Query returns the series that an expression has now.
func (s *Server) Query(ctx context.Context, expression string) (all []Series, err error) {
	err = s.get(ctx, "query", url.Values{"query": {expression}}, &struct{ Result *[]Series }{&all})
	return all, err
}

// Range returns the series that an expression has between two times.
func (s *Server) Range(ctx context.Context, expression string, from, to time.Time, step time.Duration) (all []Series, err error) {
	seconds := func(t time.Time) string { return strconv.FormatInt(t.Unix(), 10) }
	err = s.get(ctx, "query_range", url.Values{
		"query": {expression}, "start": {seconds(from)}, "end": {seconds(to)}, "step": {step.String()},
	}, &struct{ Result *[]Series }{&all})
	return all, err
}

// Alert is an alert that is pending or fires.
type Alert struct {
	State               string
	Labels, Annotations map[string]string
}

// Alerts returns the alerts that are pending or fire now.
func (s *Server) Alerts(ctx context.Context) (all []Alert, err error) {
	err = s.get(ctx, "alerts", nil, &struct{ Alerts *[]Alert }{&all})
	return all, err
}

// get calls Prometheus' API, and decodes its data into a value.
func (s *Server) get(ctx context.Context, call string, values url.Values, into any) error {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, s.url+"/api/v1/"+call+"?"+values.Encode(), nil)
	if err != nil {
		return fmt.Errorf("asking Prometheus: %w", err)
	}
	response, err := s.client.Do(request)
	if err != nil {
		return fmt.Errorf("asking Prometheus: %w", err)
	}
	defer func() { _ = response.Body.Close() }()
	body := struct {
		Error string
		Data  any
	}{Data: into}
	if err := json.NewDecoder(response.Body).Decode(&body); err != nil {
		return fmt.Errorf("reading the response of Prometheus: %w", err)
	}
	if body.Error != "" {
		return fmt.Errorf("prometheus: %s: %s", values.Get("query"), body.Error)
	}
	return nil
}
