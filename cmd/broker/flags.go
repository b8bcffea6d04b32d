package main

import (
	"flag"
	"fmt"
	"log/slog"
	"strings"

	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/policy"
	"github.com/credence-iam/credence/cmd/internal/program"
)

// options are the flags, parsed.
type options struct {
	listen, adminListen         string
	tlsCert, tlsKey, kubeconfig string
	keys                        policy.Keys
	audience                    string
	issuers                     []string            // nil: the API server's own
	base                        credential.RoleBase // zero: the broker's own account
	cluster                     string
	region, stsEndpoint         string
	firstHop                    credential.RoleARN // zero: none
	auditRequired               bool
	level                       slog.Level
}

const usage = `credence-broker exchanges the identities of injected pods for AWS credentials.

Usage: credence-broker [flags]`

// flags defines the flags; what it returns parses their values.
func flags(f *flag.FlagSet) func(args []string) (options, error) {
	var o options
	var prefix, issuers, base, firstHop, audit string
	f.StringVar(&o.listen, "listen", ":9443", "`address` to serve gRPC on")
	f.StringVar(&o.adminListen, "admin-listen", ":8080", "`address` to serve /healthz and /readyz on")
	f.StringVar(&o.tlsCert, "tls-cert", "/etc/credence/tls/tls.crt", "PEM `file` with the serving certificate; replaced files are taken up without a restart")
	f.StringVar(&o.tlsKey, "tls-key", "/etc/credence/tls/tls.key", "PEM `file` with its private key")
	f.StringVar(&o.kubeconfig, "kubeconfig", "", "kubeconfig `file`; empty inside a cluster")
	f.StringVar(&prefix, "annotation-prefix", policy.DefaultPrefix, "`prefix` of every label and annotation key")
	f.StringVar(&o.audience, "audience", "credence-broker", "`audience` that pod tokens must be made for")
	f.StringVar(&issuers, "issuer", "", "comma `list` of accepted token issuers; empty asks the API server for its own")
	f.StringVar(&base, "base-arn", "", "`ARN` that completes role names, such as arn:aws:iam::123456789012:role/; empty asks STS for the broker's own account")
	f.StringVar(&o.cluster, "cluster-name", "", "`name` of this cluster in session names; default credence")
	f.StringVar(&o.region, "region", "", "AWS `region` whose STS is used, and which pods are told; empty takes AWS_REGION")
	f.StringVar(&o.stsEndpoint, "sts-endpoint", "", "`URL` of an STS-compatible service instead of AWS's regional endpoint")
	f.StringVar(&firstHop, "assume-role", "", "`ARN` of a role to assume before any other; sessions behind it last one hour at most")
	f.StringVar(&audit, "audit", "best-effort", "best-effort counts audit lines that are lost; required refuses instead (`mode`)")
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
		o.auditRequired = audit == "required"
		o.issuers = strings.FieldsFunc(issuers, func(r rune) bool { return r == ',' || r == ' ' })
		return o, nil
	}
}
