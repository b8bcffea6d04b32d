//go:build unix

package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"strconv"
	"time"

	"golang.org/x/time/rate"

	"github.com/credence-iam/credence/broker"
	"github.com/credence-iam/credence/broker/assume"
	"github.com/credence-iam/credence/broker/assume/ststest"
	"github.com/credence-iam/credence/broker/cache"
	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/policy"
	"github.com/credence-iam/credence/integration/bench/report"
)

// fleetMetrics are what the broker makes of many pods at once.
var fleetMetrics = []metric{{
	Metric: report.Metric{
		Name: "broker_cold_5000_roles_per_second", Unit: "roles/s",
		// 64 calls under way that take 100 ms each make 640.
		Goal: &report.Goal{Of: report.Value, Op: ">=", Value: 500},
	},
	about: "Sessions fetched per second when a broker starts among 5,000 pods of as many roles in 20 namespaces, with STS over HTTP\n" +
		"\tthat takes 100 ms, 64 calls at once and no limit of their rate, until all are warm. STS and broker are one process.",
	measure: func(ctx context.Context, b *bench) ([]report.Run, error) {
		return b.coldStarts(ctx, func(f fleet) float64 { return float64(f.warm) / f.took.Seconds() },
			5000, 5000, rate.Inf)
	},
}, {
	Metric: report.Metric{
		Name: "broker_cold_10000_pods_sts_calls", Unit: "calls",
		Goal: &report.Goal{Of: report.Value, Op: "<=", Value: 500},
	},
	about: "Calls of STS when a broker starts among 10,000 pods of 500 roles in 20 namespaces, until all are warm.",
	measure: func(ctx context.Context, b *bench) ([]report.Run, error) {
		return b.coldStarts(ctx, func(f fleet) float64 { return float64(f.calls) }, 10_000, 500, 0)
	},
}, {
	Metric: report.Metric{
		Name: "broker_renewal_5000_min_remaining_seconds", Unit: "s",
		// 0.45 of an hour.
		Goal: &report.Goal{Of: report.Value, Op: ">=", Value: 1620},
	},
	about: "The least that any of 5,000 sessions of an hour has left while they, made within seconds, fall due and are renewed, at\n" +
		"\t400 calls per second at most. In virtual time, by the test TestManyIdleGrantsFallDueTogether of package broker.",
	measure: renewal,
}}

// fleet is what came of one cold start.
type fleet struct {
	warm, calls int
	took        time.Duration
}

// coldStarts starts brokers among pods, one after the other.
func (b *bench) coldStarts(ctx context.Context, figure func(fleet) float64, pods, roles int, limit rate.Limit) ([]report.Run, error) {
	var runs []report.Run
	for range b.runs {
		f, err := coldStart(ctx, pods, roles, limit)
		if err != nil {
			return nil, err
		}
		runs = append(runs, report.Run{Value: figure(f)})
	}
	return runs, nil
}

// namespaces of a fleet.
const namespaces = 20

// patience bounds one start: at 400 calls a second 5,000 take 13 s.
const patience = 2 * time.Minute

func coldStart(ctx context.Context, pods, roles int, limit rate.Limit) (fleet, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	sts, err := ststest.Start(ctx, ststest.Config{Account: account, Default: ststest.Behavior{Latency: 100 * time.Millisecond}})
	if err != nil {
		return fleet{}, err
	}
	defer sts.Close()
	source, err := source(ctx, sts)
	if err != nil {
		return fleet{}, err
	}
	sessions, err := cache.New(cache.Config[policy.Grant]{Source: source, Rate: limit, Logger: discard})
	if err != nil {
		return fleet{}, err
	}
	rules, err := newRules()
	if err != nil {
		return fleet{}, err
	}
	requests := make([]*policy.Request, roles)
	for i := range requests {
		requests[i] = rules.Keys().Request(map[string]string{policy.DefaultPrefix + "/" + string(policy.Role): fmt.Sprintf("bench-%d", i)})
	}
	all := make(map[string]policy.Pod, pods)
	for i := range pods {
		pod := policy.Pod{
			Namespace: fmt.Sprintf("ns-%d", i%namespaces), Name: fmt.Sprintf("pod-%d", i), ServiceAccount: "default",
			Request: requests[i%roles],
		}
		all[pod.Namespace+"/"+pod.Name] = pod
	}
	prefetch, err := broker.NewPrefetch(broker.PrefetchConfig{
		Lookup: func(key string) (policy.Pod, policy.Namespace, bool) {
			pod, ok := all[key]
			return pod, optedIn(pod.Namespace), ok
		},
		Sessions: sessions, Logger: discard,
	})
	if err != nil {
		return fleet{}, err
	}
	for _, run := range []func(context.Context) error{sessions.Run, func(ctx context.Context) error { return prefetch.Run(ctx, rules) }} {
		go func() { _ = run(ctx) }()
	}
	began := time.Now()
	for key := range all {
		prefetch.Changed(key)
	}
	for sessions.Stats().Warm < roles {
		select {
		case <-time.After(5 * time.Millisecond):
		case <-ctx.Done():
			return fleet{}, fmt.Errorf("only %d of %d roles are warm: %w", sessions.Stats().Warm, roles, ctx.Err())
		}
	}
	return fleet{warm: roles, calls: sts.Count("AssumeRole", ""), took: time.Since(began)}, nil
}

// source calls sts as the broker does, with keys that this process is given for the time of New.
func source(ctx context.Context, sts *ststest.Server) (*assume.STS, error) {
	keyID, secret := sts.Keys()
	for name, value := range map[string]string{
		"AWS_ACCESS_KEY_ID": keyID, "AWS_SECRET_ACCESS_KEY": secret.Reveal(), "AWS_SESSION_TOKEN": "",
		"AWS_CONFIG_FILE": os.DevNull, "AWS_SHARED_CREDENTIALS_FILE": os.DevNull,
	} {
		if err := os.Setenv(name, value); err != nil {
			return nil, fmt.Errorf("setting %s: %w", name, err)
		}
	}
	return assume.New(ctx, assume.Config{Region: region, Endpoint: sts.URL()})
}

// newRules completes role names to those of one account.
func newRules() (*policy.Rules, error) {
	keys, err := policy.NewKeys(policy.DefaultPrefix)
	if err != nil {
		return nil, err
	}
	base, err := credential.BaseOf("aws", account)
	if err != nil {
		return nil, err
	}
	return policy.New(policy.Config{Keys: keys, Base: base})
}

// optedIn is a namespace that permits what the benchmark asks for.
func optedIn(name string) policy.Namespace {
	return policy.Namespace{
		Name:        name,
		Labels:      map[string]string{policy.DefaultPrefix + "/" + string(policy.Inject): policy.Enabled},
		Annotations: map[string]string{policy.DefaultPrefix + "/" + string(policy.Permitted): "arn:aws:iam::[0-9]+:role/bench.*"},
	}
}

// renewal runs the test that lets an hour pass in a second.
func renewal(ctx context.Context, b *bench) ([]report.Run, error) {
	var runs []report.Run
	for range b.runs {
		test := exec.CommandContext(ctx, "go", "test", "-count=1", "-v", "-run", "^TestManyIdleGrantsFallDueTogether$", "./broker")
		test.Dir = b.root
		out, err := test.CombinedOutput()
		if err != nil {
			return nil, fmt.Errorf("running the test: %w\n%s", err, out)
		}
		seconds, err := said(out, "least_remaining_seconds")
		if err != nil {
			return nil, err
		}
		runs = append(runs, report.Run{Value: seconds})
	}
	return runs, nil
}

// said reads a figure that a test has written as name=value.
func said(out []byte, name string) (float64, error) {
	found := regexp.MustCompile(`\b` + name + `=([0-9.]+)`).FindSubmatch(out)
	if found == nil {
		return 0, fmt.Errorf("the test does not say %s", name)
	}
	return strconv.ParseFloat(string(found[1]), 64)
}
