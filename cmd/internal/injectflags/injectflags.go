// Package injectflags is the one definition of the flags that say what is injected into pods and which
// roles are permitted: those of the webhook, and of "credence inject", which must come to the same result.
// It parses values and opens nothing; the flags of one program alone are that program's.
package injectflags

import (
	"errors"
	"flag"
	"fmt"
	"strings"

	corev1 "k8s.io/api/core/v1"

	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/policy"
	"github.com/credence-iam/credence/webhook/inject"
)

// Options are what the flags mean.
type Options struct {
	// Injector injects.
	Injector *inject.Injector
	// Rules judge, with the keys of Injector. They have not seen RulesFile.
	Rules *policy.Rules
	// RulesFile is the path of the rules file. Empty: there is none.
	RulesFile string
	// ClusterDomain is the cluster's domain, which Injector has seen. Empty: it was not given.
	ClusterDomain string
	// SettingsFile is the path of the file with settings of the sidecar, which Injector has not seen. Empty: there is none.
	SettingsFile string
}

// Define defines the flags. What it returns is called when they are parsed, and returns what they mean or
// why they cannot be right.
func Define(f *flag.FlagSet) func() (Options, error) {
	var (
		o                                     Options
		prefix, baseARN, cluster, onShadowed  string
		image, pullPolicy, broker, trust, aud string
		chained                               bool
		sidecar                               = inject.DefaultSettings()
	)
	f.StringVar(&prefix, "annotation-prefix", policy.DefaultPrefix, "`prefix` of every label and annotation key; the broker's must be the same")
	f.StringVar(&baseARN, "base-arn", "", "`ARN` that completes role names, such as arn:aws:iam::123456789012:role/; empty leaves roles that are no full ARNs to the broker")
	f.BoolVar(&chained, "role-chaining", false, "refuse sessions of more than one hour, as a broker with --assume-role does and AWS wherever the broker's own credentials are those of a role")
	f.StringVar(&cluster, "cluster-name", "", "`name` of this cluster in session names; default credence")
	f.StringVar(&o.RulesFile, "rules-file", "", "YAML or JSON `file` with limits to what namespaces permit and pods ask for; the broker's must be the same; a server takes up a replaced file without a restart; empty sets no limits")
	f.StringVar(&image, "sidecar-image", "", "`image` of the sidecar (required)")
	f.StringVar(&pullPolicy, "sidecar-image-pull-policy", "", "`policy` Always, IfNotPresent or Never; empty leaves it to Kubernetes")
	f.TextVar(&sidecar.Memory, "sidecar-memory", sidecar.Memory, "`memory` of the sidecar, request and limit, from 12Mi to 256Mi")
	f.TextVar(&sidecar.CPU.Request, "sidecar-cpu-request", sidecar.CPU.Request, "`CPU` request of the sidecar, from 1m to 1")
	f.TextVar(&sidecar.CPU.Limit, "sidecar-cpu-limit", sidecar.CPU.Limit, "`CPU` limit of the sidecar, from 10m to 1; 0 sets none")
	f.TextVar(&sidecar.CPU.Guaranteed, "sidecar-cpu-guaranteed", sidecar.CPU.Guaranteed, "`CPU` request and limit of the sidecar in pods of class Guaranteed, from 10m to 1")
	f.IntVar(&sidecar.Port, "sidecar-port", sidecar.Port, "`port` on 127.0.0.1 where the sidecar listens")
	f.Int64Var(&sidecar.RunAsUser, "sidecar-run-as-user", sidecar.RunAsUser, "user `id` of the sidecar; -1 leaves it to the platform (OpenShift)")
	f.TextVar(&sidecar.LogLevel, "sidecar-log-level", sidecar.LogLevel, "least `level` that the sidecar logs: debug, info, warn or error")
	f.StringVar(&o.SettingsFile, "sidecar-settings-file", "", "YAML or JSON `file` with settings of the sidecar, which count more than the flags; a server takes up a replaced file without a restart")
	f.StringVar(&broker, "broker", "", "address of the brokers, `HOST:PORT`, that sidecars ask, such as credence-broker.credence.svc:9443 (required)")
	f.StringVar(&o.ClusterDomain, "cluster-domain", "", "`domain` of the cluster's Services, such as cluster.local, with which sidecars look the brokers up by their full name; empty: the webhook reads it from its own resolv.conf, and without one the pods' search domains complete the name")
	f.StringVar(&aud, "audience", inject.DefaultAudience, "`audience` of the sidecars' tokens; the broker's must be the same")
	f.StringVar(&trust, "trust-config-map", inject.DefaultTrustConfigMap, "`name` of the ConfigMap, in each namespace, with the broker's roots as roots.pem")
	f.StringVar(&onShadowed, "on-shadowed", string(inject.RefuseShadowed), "what to do about containers with web identity, which SDKs prefer to the sidecar: refuse, or warn during a migration (`choice`)")
	return func() (Options, error) {
		if broker == "" || image == "" {
			return Options{}, errors.New("--broker and --sidecar-image are required")
		}
		keys, err := policy.NewKeys(prefix)
		if err != nil {
			return Options{}, fmt.Errorf("--annotation-prefix: %w", err)
		}
		var base credential.RoleBase
		if baseARN != "" {
			if base, err = credential.ParseRoleBase(baseARN); err != nil {
				return Options{}, fmt.Errorf("--base-arn: %w", err)
			}
		}
		if o.Rules, err = policy.New(policy.Config{Keys: keys, Base: base, Cluster: cluster, Chained: chained}); err != nil {
			return Options{}, fmt.Errorf("--cluster-name: %w", err)
		}
		sidecar.ImagePullPolicy = corev1.PullPolicy(pullPolicy)
		if wrong, ok := errors.AsType[*inject.FieldError](sidecar.Check(keys)); ok {
			return Options{}, fmt.Errorf("--sidecar-%s: %w", flagged(wrong.Field), wrong.Err)
		}
		o.Injector, err = inject.New(inject.Config{
			Keys:           keys,
			Image:          image,
			Broker:         broker,
			Audience:       aud,
			TrustConfigMap: trust,
			Settings:       sidecar,
			OnShadowed:     inject.OnShadowed(onShadowed),
		})
		if err != nil {
			return o, err
		}
		o.ClusterDomain = strings.TrimSuffix(o.ClusterDomain, ".")
		if err := o.Injector.UseDNS(inject.DNS{Domain: o.ClusterDomain}); err != nil {
			return Options{}, fmt.Errorf("--cluster-domain: %w", err)
		}
		return o, nil
	}
}

// flagged writes the name of a setting as flags are written: cpu.request as cpu-request, runAsUser as run-as-user.
func flagged(field string) string {
	var name strings.Builder
	for _, r := range field {
		switch {
		case r == '.':
			r = '-'
		case 'A' <= r && r <= 'Z':
			name.WriteByte('-')
			r += 'a' - 'A'
		}
		name.WriteRune(r)
	}
	return name.String()
}
