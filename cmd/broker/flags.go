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

// options are the parsed flags.
type options struct {
	listen, adminListen         string
	tlsCert, tlsKey, kubeconfig string
	keys                        policy.Keys
	audience                    string
	issuers                     []string // nil: the API server's own
	tokenReview                 bool     // verify each token by a TokenReview
	maxTokenLife                time.Duration
	base                        credential.RoleBase // zero: the broker's own account
	cluster                     string
	region, stsEndpoint         string
	assumeRole                  credential.RoleARN // zero: none
	stsRate                     float64
	stsConcurrency              int
	maxGrants                   int
	service                     string       // empty: this broker is the only one
	podIPs                      []netip.Addr // set if service is
	settleTime                  time.Duration
	auditRequired               bool
	rulesFile                   string // empty: there is none
	rootsFile                   string // empty: this broker publishes no roots
	rootsRequired               bool   // the flag is set, so the file must exist
	namespace, trustConfigMap   string
	trustOwner                  string // empty: none
	trustPropagation            time.Duration
	level                       slog.Level
	debugListen                 string // empty: no debug pages
	commandAccount              string // empty: commands need no token
	traceEndpoint               string // empty: calls are not traced
	traceRatio                  float64
}

const (
	rootsFileFlag   = "roots-file"
	debugListenFlag = "debug-listen"
)

// minTokenLife is the shortest lifetime of the tokens that the webhook requests (webhook/inject). A lower maximum would refuse
// every pod.
const minTokenLife = 2 * time.Hour

const usage = `credence-broker exchanges the identities of injected pods for AWS credentials.

Usage: credence-broker [flags]`

// flags defines the flags, and returns the function that parses their values.
func flags(f *flag.FlagSet) func(args []string) (options, error) {
	var o options
	var prefix, issuers, base, assumeRole, audit, verification, podIPs string
	f.StringVar(&o.listen, "listen", ":9443", "`address` to serve gRPC on")
	f.StringVar(&o.adminListen, "admin-listen", ":8080", "`address` to serve /healthz, /readyz and /metrics on")
	f.StringVar(&o.debugListen, debugListenFlag, "127.0.0.1:8081", "`address` to serve /debug/grants and /debug/pprof on. Anyone who can connect to it can use them, so keep it on loopback; empty: none")
	f.StringVar(&o.commandAccount, "command-account", "", "`name` of the ServiceAccount, in --namespace, of which commands on --debug-listen need a token, with the audience of --audience and -commands. The right to forward ports is then not enough to renew and drop sessions; empty: commands need no token")
	f.StringVar(&o.traceEndpoint, "trace-endpoint", "", "`URL` of the OpenTelemetry collector that receives traces, http://HOST:PORT (OTLP over gRPC); empty: no traces")
	f.Float64Var(&o.traceRatio, "trace-ratio", 0.01, "`fraction` of the calls that are traced, from 0 to 1")
	f.StringVar(&o.tlsCert, "tls-cert", "/etc/credence/tls/tls.crt", "PEM `file` with the serving certificate; a replaced file takes effect without a restart")
	f.StringVar(&o.tlsKey, "tls-key", "/etc/credence/tls/tls.key", "PEM `file` with the private key of --tls-cert")
	f.StringVar(&o.kubeconfig, "kubeconfig", "", "kubeconfig `file`; empty: the configuration inside a cluster")
	f.StringVar(&prefix, "annotation-prefix", policy.DefaultPrefix, "`prefix` of every label and annotation key")
	f.StringVar(&o.audience, "audience", "credence-broker", "`audience` that pod tokens must have")
	f.StringVar(&issuers, "issuer", "", "comma `list` of accepted token issuers; empty: the API server's own")
	f.StringVar(&verification, "token-verification", "jwks", "`mode` of token verification: jwks uses the API server's published keys, tokenreview sends it each token")
	f.DurationVar(&o.maxTokenLife, "max-token-life", verify.DefaultMaxTokenLife, "maximum `lifetime` of an accepted token. Kubelets request tokens of 24h at most for injected pods; without a maximum, a user who may create tokens could create one that is valid for years")
	f.StringVar(&base, "base-arn", "", "`ARN` that completes role names, such as arn:aws:iam::123456789012:role/; empty: the broker's own account, from STS")
	f.StringVar(&o.cluster, "cluster-name", "", "`name` of this cluster in session names; empty: credence")
	f.StringVar(&o.region, "region", "", "AWS `region` of STS, and of pods that set none; empty: AWS_REGION")
	f.StringVar(&o.stsEndpoint, "sts-endpoint", "", "`URL` of an STS-compatible service instead of AWS's regional endpoint")
	f.StringVar(&assumeRole, "assume-role", "", "`ARN` of a role to assume before any other (role chaining); AWS then limits sessions to one hour, and the broker refuses longer ones")
	f.Float64Var(&o.stsRate, "sts-rate", cache.DefaultRate, "STS `calls` per second of all brokers of --service together; each makes an equal share, and fewer while STS throttles. AWS is reported to allow 600 per account and region, for all its users")
	f.IntVar(&o.stsConcurrency, "sts-concurrency", 64, "maximum `number` of STS calls at the same time")
	f.IntVar(&o.maxGrants, "max-grants-per-namespace", 500, "maximum `number` of distinct sessions of one namespace in this broker; 0: no maximum")
	f.StringVar(&o.service, "service", "", "`name` of the brokers' Service, in --namespace: its endpoints are the brokers that share the sessions; empty: this broker owns all sessions")
	f.StringVar(&podIPs, "pod-ips", "", "comma `list` of this broker's addresses among the endpoints of --service, one of each family; empty: POD_IPS")
	f.DurationVar(&o.settleTime, "settle-time", placement.DefaultSettleTime, "`time` without a change of the endpoints of --service after which this broker fetches the sessions of which it is the second owner. It should exceed a step of a rolling update, so that each is fetched once")
	f.StringVar(&audit, "audit", "best-effort", "`mode` of the audit log: best-effort counts lost lines, required refuses a call whose line would be lost")
	f.StringVar(&o.rulesFile, "rules-file", "", "YAML or JSON `file` with limits on what namespaces permit and pods request; a replaced file takes effect without a restart; empty: no limits")
	f.StringVar(&o.rootsFile, rootsFileFlag, "/etc/credence/tls/ca.crt", "PEM `file` with the root certificates of --tls-cert, which the broker publishes in opted-in namespaces; empty: none")
	f.StringVar(&o.namespace, "namespace", "", "`namespace` of this broker; empty: POD_NAMESPACE, or that of the service account")
	f.StringVar(&o.trustConfigMap, "trust-config-map", "credence-trust", "`name` of the ConfigMaps with the published roots")
	f.StringVar(&o.trustOwner, "trust-owner", "", "`name` of the ClusterRole that owns the ConfigMaps of --trust-config-map, so that they are deleted with it; empty: none")
	f.DurationVar(&o.trustPropagation, "trust-propagation", trust.DefaultPropagation, "minimum `time` between the publication of a root and the first use of a certificate under it: kubelets need it to update ConfigMaps in pods; 0: none")
	f.TextVar(&o.level, "log-level", slog.LevelInfo, "lowest `level` that is logged: debug, info, warn or error")
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
		if assumeRole != "" {
			if o.assumeRole, err = credential.ParseRoleARN(assumeRole); err != nil {
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
			return options{}, fmt.Errorf("--max-token-life=%s: must be at least %s, the shortest lifetime of the tokens of injected pods", o.maxTokenLife, minTokenLife)
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
