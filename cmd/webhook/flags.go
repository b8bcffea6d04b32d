package main

import (
	"errors"
	"flag"
	"fmt"
	"log/slog"

	corev1 "k8s.io/api/core/v1"

	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/policy"
	"github.com/credence-iam/credence/cmd/internal/program"
	"github.com/credence-iam/credence/webhook/inject"
)

// options are the flags, and what is made of them without asking anybody: a value that cannot be
// right is a bad flag.
type options struct {
	listen, tlsCert, tlsKey, kubeconfig string
	adminListen                         string // empty: there are no metrics
	rulesFile                           string // empty: there is none
	level                               slog.Level

	injector *inject.Injector
	rules    *policy.Rules
}

const usage = `credence-webhook answers the API server's admission reviews: pods that are annotated
with a role get a sidecar that brings them AWS credentials, or are refused with the reason.

Usage: credence-webhook --broker=ADDRESS --sidecar-image=IMAGE [flags]`

// flags defines the flags; what it returns parses their values.
func flags(f *flag.FlagSet) func(args []string) (options, error) {
	var (
		o                                     options
		prefix, baseARN, cluster, onShadowed  string
		image, pullPolicy, broker, trust, aud string
		port                                  int
		user                                  int64
	)
	f.StringVar(&o.listen, "listen", ":9443", "`address` to serve HTTPS on: /mutate, /healthz and /readyz")
	f.StringVar(&o.adminListen, "admin-listen", ":8080", "`address` to serve /metrics on, over plain HTTP; empty serves none")
	f.StringVar(&o.tlsCert, "tls-cert", "/etc/credence/tls/tls.crt", "PEM `file` with the serving certificate; replaced files are taken up without a restart")
	f.StringVar(&o.tlsKey, "tls-key", "/etc/credence/tls/tls.key", "PEM `file` with its private key")
	f.StringVar(&o.kubeconfig, "kubeconfig", "", "kubeconfig `file`; empty inside a cluster")
	f.StringVar(&prefix, "annotation-prefix", policy.DefaultPrefix, "`prefix` of every label and annotation key; the broker's must be the same")
	f.StringVar(&baseARN, "base-arn", "", "`ARN` that completes role names, such as arn:aws:iam::123456789012:role/; empty leaves roles that are no full ARNs to the broker")
	f.StringVar(&cluster, "cluster-name", "", "`name` of this cluster in session names; default credence")
	f.StringVar(&o.rulesFile, "rules-file", "", "YAML or JSON `file` with limits to what namespaces permit and pods ask for; the broker's must be the same; a replaced file is taken up without a restart; empty sets no limits")
	f.StringVar(&image, "sidecar-image", "", "`image` of the sidecar (required)")
	f.StringVar(&pullPolicy, "sidecar-image-pull-policy", "", "`policy` Always, IfNotPresent or Never; empty leaves it to Kubernetes")
	f.IntVar(&port, "sidecar-port", inject.DefaultPort, "`port` on 127.0.0.1 where the sidecar listens")
	f.Int64Var(&user, "sidecar-run-as-user", inject.DefaultRunAsUser, "user `id` of the sidecar; -1 leaves it to the platform (OpenShift)")
	f.StringVar(&broker, "broker", "", "address of the brokers, `HOST:PORT`, that sidecars ask, such as credence-broker.credence.svc:9443 (required)")
	f.StringVar(&aud, "audience", inject.DefaultAudience, "`audience` of the sidecars' tokens; the broker's must be the same")
	f.StringVar(&trust, "trust-config-map", inject.DefaultTrustConfigMap, "`name` of the ConfigMap, in each namespace, with the broker's roots as roots.pem")
	f.StringVar(&onShadowed, "on-shadowed", string(inject.RefuseShadowed), "what to do about containers with web identity, which SDKs prefer to the sidecar: refuse, or warn during a migration (`choice`)")
	f.TextVar(&o.level, "log-level", slog.LevelInfo, "least `level` that is logged: debug, info, warn or error")
	return func(args []string) (options, error) {
		err := program.NoArguments(args)
		if err == nil && (broker == "" || image == "") {
			err = errors.New("--broker and --sidecar-image are required")
		}
		if err != nil {
			return options{}, err
		}
		keys, err := policy.NewKeys(prefix)
		if err != nil {
			return options{}, fmt.Errorf("--annotation-prefix: %w", err)
		}
		var base credential.RoleBase
		if baseARN != "" {
			if base, err = credential.ParseRoleBase(baseARN); err != nil {
				return options{}, fmt.Errorf("--base-arn: %w", err)
			}
		}
		if o.rules, err = policy.New(policy.Config{Keys: keys, Base: base, Cluster: cluster}); err != nil {
			return options{}, fmt.Errorf("--cluster-name: %w", err)
		}
		runAs := &user
		if user == -1 {
			runAs = nil
		}
		o.injector, err = inject.New(inject.Config{
			Keys:            keys,
			Image:           image,
			ImagePullPolicy: corev1.PullPolicy(pullPolicy),
			Broker:          broker,
			Audience:        aud,
			TrustConfigMap:  trust,
			Port:            port,
			RunAsUser:       runAs,
			OnShadowed:      inject.OnShadowed(onShadowed),
		})
		return o, err
	}
}
