package main

import (
	"flag"
	"fmt"
	"log/slog"
	"math"
	"net/netip"
	"os"
	"strings"
	"time"

	"github.com/credence-iam/credence/broker/cache"
	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/kube/verify"
	"github.com/credence-iam/credence/broker/placement"
	"github.com/credence-iam/credence/broker/policy"
	"github.com/credence-iam/credence/broker/tracing"
	"github.com/credence-iam/credence/certs/trust"
	"github.com/credence-iam/credence/cmd/internal/program"
)

// options are the flags, parsed.
type options struct {
	listen, adminListen         string
	tlsCert, tlsKey, kubeconfig string
	keys                        policy.Keys
	audience                    string
	issuers                     []string // nil: the API server's own
	tokenReview                 bool     // ask the API server about each token
	maxTokenLife                time.Duration
	base                        credential.RoleBase // zero: the broker's own account
	cluster                     string
	region, stsEndpoint         string
	firstHop                    credential.RoleARN // zero: none
	stsRate                     float64
	stsConcurrency              int
	maxGrants                   int
	service                     string       // empty: this broker is the only one
	podIPs                      []netip.Addr // set where service is
	settleTime                  time.Duration
	auditRequired               bool
	rulesFile                   string // empty: there is none
	rootsFile                   string // empty: nothing is published
	rootsRequired               bool   // the flag was given, so the file must be there
	namespace, trustConfigMap   string
	trustOwner                  string // empty: none
	trustPropagation            time.Duration
	level                       slog.Level
	debugListen                 string // empty: no debug pages
	traceEndpoint               string // empty: nothing is traced
	traceRatio                  float64
}

const (
	rootsFileFlag   = "roots-file"
	debugListenFlag = "debug-listen"
)

// minTokenLife is the shortest life that the webhook gives to tokens (webhook/inject): with less, no pod would be served.
const minTokenLife = 2 * time.Hour

const usage = `credence-broker exchanges the identities of injected pods for AWS credentials.

Usage: credence-broker [flags]`

// flags defines the flags; what it returns parses their values.
func flags(f *flag.FlagSet) func(args []string) (options, error) {
	var o options
	var prefix, issuers, base, firstHop, audit, verification, podIPs string
	f.StringVar(&o.listen, "listen", ":9443", "`address` to serve gRPC on")
	f.StringVar(&o.adminListen, "admin-listen", ":8080", "`address` to serve /healthz, /readyz and /metrics on")
	f.StringVar(&o.debugListen, debugListenFlag, "127.0.0.1:8081", "`address` to serve /debug/grants and /debug/pprof on, to whoever reaches it: keep it on loopback; empty serves them nowhere")
	f.StringVar(&o.traceEndpoint, "trace-endpoint", "", "`URL` of an OpenTelemetry collector, http://HOST:PORT (OTLP over gRPC), that is sent traces; empty traces nothing")
	f.Float64Var(&o.traceRatio, "trace-ratio", 0.01, "`part` of the traces that is recorded, from 0 to 1")
	f.StringVar(&o.tlsCert, "tls-cert", "/etc/credence/tls/tls.crt", "PEM `file` with the serving certificate; replaced files are taken up without a restart")
	f.StringVar(&o.tlsKey, "tls-key", "/etc/credence/tls/tls.key", "PEM `file` with its private key")
	f.StringVar(&o.kubeconfig, "kubeconfig", "", "kubeconfig `file`; empty inside a cluster")
	f.StringVar(&prefix, "annotation-prefix", policy.DefaultPrefix, "`prefix` of every label and annotation key")
	f.StringVar(&o.audience, "audience", "credence-broker", "`audience` that pod tokens must be made for")
	f.StringVar(&issuers, "issuer", "", "comma `list` of accepted token issuers; empty asks the API server for its own")
	f.StringVar(&verification, "token-verification", "jwks", "`mode` of verifying tokens: jwks by the API server's published keys, tokenreview by asking it about each")
	f.DurationVar(&o.maxTokenLife, "max-token-life", verify.DefaultMaxTokenLife, "longest `life` of a token that is accepted: the webhook has kubelets request tokens of 24h at most, and a user who may create tokens could otherwise create one that is valid for years")
	f.StringVar(&base, "base-arn", "", "`ARN` that completes role names, such as arn:aws:iam::123456789012:role/; empty asks STS for the broker's own account")
	f.StringVar(&o.cluster, "cluster-name", "", "`name` of this cluster in session names; default credence")
	f.StringVar(&o.region, "region", "", "AWS `region` whose STS is used, and which pods are told; empty takes AWS_REGION")
	f.StringVar(&o.stsEndpoint, "sts-endpoint", "", "`URL` of an STS-compatible service instead of AWS's regional endpoint")
	f.StringVar(&firstHop, "assume-role", "", "`ARN` of a role to assume before any other; sessions behind it last one hour at most, and longer ones are refused")
	f.Float64Var(&o.stsRate, "sts-rate", cache.DefaultRate, "`calls` of STS that all brokers of --service together begin per second, of which each takes an equal part: AWS is reported to take 600 of an account in a region, and is used by others too. Fewer while STS throttles")
	f.IntVar(&o.stsConcurrency, "sts-concurrency", 64, "`number` of calls of STS under way at once")
	f.IntVar(&o.maxGrants, "max-grants-per-namespace", 500, "`number` of distinct sessions that the pods of one namespace may have at a time, of those that this broker has; 0 sets no bound")
	f.StringVar(&o.service, "service", "", "`name` of the Service that brings sidecars to the brokers, in --namespace: its endpoints are the brokers that share the work; empty makes this one keep every session by itself")
	f.StringVar(&podIPs, "pod-ips", "", "comma `list` of this broker's addresses among those endpoints, one of each family; empty takes POD_IPS")
	f.DurationVar(&o.settleTime, "settle-time", placement.DefaultSettleTime, "`time` without a change of those endpoints after which this broker takes up the sessions that it is to have for the loss of another one; more than a step of a rolling update takes, so that they are fetched once")
	f.StringVar(&audit, "audit", "best-effort", "best-effort counts audit lines that are lost; required refuses instead (`mode`)")
	f.StringVar(&o.rulesFile, "rules-file", "", "YAML or JSON `file` with limits to what namespaces permit and pods ask for; a replaced file is taken up without a restart; empty sets no limits")
	f.StringVar(&o.rootsFile, rootsFileFlag, "/etc/credence/tls/ca.crt", "PEM `file` with the roots that verify --tls-cert, which are published to opted-in namespaces; empty publishes nothing")
	f.StringVar(&o.namespace, "namespace", "", "`namespace` that this broker runs in; empty takes POD_NAMESPACE, or that of the service account")
	f.StringVar(&o.trustConfigMap, "trust-config-map", "credence-trust", "`name` of the ConfigMaps that hold the published roots")
	f.StringVar(&o.trustOwner, "trust-owner", "", "`name` of the ClusterRole that owns those ConfigMaps, so that they go when it goes; empty leaves them")
	f.DurationVar(&o.trustPropagation, "trust-propagation", trust.DefaultPropagation, "`time` that a root is published before a certificate under it is served: what kubelets need to bring a changed ConfigMap into pods; 0 serves at once")
	f.TextVar(&o.level, "log-level", slog.LevelInfo, "least `level` that is logged: debug, info, warn or error")
	return func(args []string) (options, error) {
		err := program.NoArguments(args)
		if err != nil {
			return options{}, err
		}
		if o.keys, err = policy.NewKeys(prefix); err != nil {
			return options{}, fmt.Errorf("--annotation-prefix: %w", err)
		}
		if base != "" {
			if o.base, err = credential.ParseRoleBase(base); err != nil {
				return options{}, fmt.Errorf("--base-arn: %w", err)
			}
		}
		if firstHop != "" {
			if o.firstHop, err = credential.ParseRoleARN(firstHop); err != nil {
				return options{}, fmt.Errorf("--assume-role: %w", err)
			}
		}
		if audit != "best-effort" && audit != "required" {
			return options{}, fmt.Errorf("--audit=%s: must be best-effort or required", audit)
		}
		if !(o.stsRate > 0) || math.IsInf(o.stsRate, 0) || o.stsConcurrency <= 0 {
			return options{}, fmt.Errorf("--sts-rate=%v, --sts-concurrency=%d: must be positive", o.stsRate, o.stsConcurrency)
		}
		if o.service != "" {
			if podIPs == "" {
				podIPs = os.Getenv("POD_IPS")
			}
			if o.podIPs, err = addresses(podIPs); err != nil {
				return options{}, fmt.Errorf("--service needs --pod-ips or POD_IPS: %w", err)
			}
		}
		if o.settleTime < 0 {
			return options{}, fmt.Errorf("--settle-time=%s: must not be negative", o.settleTime)
		}
		if o.maxGrants < 0 {
			return options{}, fmt.Errorf("--max-grants-per-namespace=%d: must not be negative", o.maxGrants)
		}
		if verification != "jwks" && verification != "tokenreview" {
			return options{}, fmt.Errorf("--token-verification=%s: must be jwks or tokenreview", verification)
		}
		o.tokenReview = verification == "tokenreview"
		if o.maxTokenLife < minTokenLife {
			return options{}, fmt.Errorf("--max-token-life=%s: must be at least %s, the shortest life of the tokens that the webhook has kubelets request", o.maxTokenLife, minTokenLife)
		}
		if o.trustPropagation < 0 {
			return options{}, fmt.Errorf("--trust-propagation=%s: must not be negative", o.trustPropagation)
		}
		if o.traceEndpoint != "" {
			if err := (tracing.Config{Endpoint: o.traceEndpoint, Ratio: o.traceRatio}).Check(); err != nil {
				return options{}, fmt.Errorf("--trace-endpoint, --trace-ratio: %w", err)
			}
		}
		f.Visit(func(given *flag.Flag) { o.rootsRequired = o.rootsRequired || given.Name == rootsFileFlag })
		o.auditRequired = audit == "required"
		o.issuers = strings.FieldsFunc(issuers, func(r rune) bool { return r == ',' || r == ' ' })
		return o, nil
	}
}

// addresses parses a comma list of one address or more.
func addresses(list string) (all []netip.Addr, err error) {
	for text := range strings.SplitSeq(list, ",") {
		a, err := netip.ParseAddr(strings.TrimSpace(text))
		if err != nil {
			return nil, fmt.Errorf("%q must be a comma list of IP addresses: %w", list, err)
		}
		all = append(all, a.Unmap())
	}
	return all, nil
}
