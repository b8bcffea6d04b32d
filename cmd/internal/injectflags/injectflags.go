// Package injectflags defines the flags that the webhook and "credence inject" share, because both must have the same
// result. The flags configure injection and the check of roles. It parses values and opens no files. Each program
// defines its other flags itself.
package injectflags

import (
	"errors"
	"flag"
	"fmt"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"

	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/policy"
	"github.com/credence-iam/credence/webhook/inject"
)

// WebhookOnly are the other flags of the webhook. They do not change what it injects.
var WebhookOnly = []string{"admin-listen", "kubeconfig", "listen", "log-level", "tls-cert", "tls-key"}

// OfWebhook returns the values of the flags of f in the arguments of a webhook, by name, and the arguments that are neither
// of f nor [WebhookOnly]: the webhook may be of a newer version.
func OfWebhook(f *flag.FlagSet, args []string) (values map[string]string, unknown []string) {
	values = map[string]string{}
	for at := 0; at < len(args); at++ {
		arg := args[at]
		name, value, inline := strings.Cut(strings.TrimPrefix(strings.TrimPrefix(arg, "-"), "-"), "=")
		known := f.Lookup(name)
		boolean := false
		if known != nil {
			b, ok := known.Value.(interface{ IsBoolFlag() bool })
			boolean = ok && b.IsBoolFlag()
		}
		switch {
		case !strings.HasPrefix(arg, "-"), known == nil && !slices.Contains(WebhookOnly, name), !inline && !boolean && at+1 == len(args):
			unknown = append(unknown, arg)
			continue
		case inline:
		case boolean:
			value = "true"
		default:
			at++
			value = args[at]
		}
		if known != nil {
			values[name] = value
		}
	}
	return values, unknown
}

// Options are the values of the flags.
type Options struct {
	// Injector injects pods.
	Injector *inject.Injector
	// Rules decide on roles, with the keys of Injector. They do not include RulesFile.
	Rules *policy.Rules
	// RulesFile is the path of the rules file; empty without one.
	RulesFile string
	// ClusterDomain is the cluster's domain, which Injector uses; empty if it is not set.
	ClusterDomain string
	// SettingsFile is the path of the file with sidecar settings, which Injector does not use yet; empty without one.
	SettingsFile string
}

// Define defines the flags. Call the returned function after parsing: it validates the values and returns them.
func Define(f *flag.FlagSet) func() (Options, error) {
	var (
		o                                     Options
		prefix, baseARN, cluster, onShadowed  string
		image, pullPolicy, broker, trust, aud string
		chained                               bool
		sidecar                               = inject.DefaultSettings()
	)
	f.StringVar(&prefix, "annotation-prefix", policy.DefaultPrefix, "`prefix` of all label and annotation keys; must be the broker's")
	f.StringVar(&baseARN, "base-arn", "", "`ARN` that completes role names, such as arn:aws:iam::123456789012:role/; if empty, only the broker decides on roles without a full ARN")
	f.BoolVar(&chained, "role-chaining", false, "refuse sessions of more than one hour, as AWS does if the broker's own credentials are those of a role, for example with --assume-role")
	f.StringVar(&cluster, "cluster-name", "", "`name` of this cluster in session names; default credence")
	f.StringVar(&o.RulesFile, "rules-file", "", "YAML or JSON `file` with cluster-wide limits for namespaces and pods; must be the broker's; a replaced file takes effect without a restart of the server; if empty, there are no limits")
	f.StringVar(&image, "sidecar-image", "", "`image` of the sidecar (required)")
	f.StringVar(&pullPolicy, "sidecar-image-pull-policy", "", "`policy` Always, IfNotPresent or Never; if empty, Kubernetes chooses")
	f.TextVar(&sidecar.Memory, "sidecar-memory", sidecar.Memory, "`memory` of the sidecar, request and limit, from 12Mi to 256Mi")
	f.TextVar(&sidecar.CPU.Request, "sidecar-cpu-request", sidecar.CPU.Request, "`CPU` request of the sidecar, from 1m to 1")
	f.TextVar(&sidecar.CPU.Limit, "sidecar-cpu-limit", sidecar.CPU.Limit, "`CPU` limit of the sidecar, from 10m to 1; 0 for no limit")
	f.TextVar(&sidecar.CPU.Guaranteed, "sidecar-cpu-guaranteed", sidecar.CPU.Guaranteed, "`CPU` request and limit of the sidecar in Guaranteed pods, from 10m to 1")
	f.IntVar(&sidecar.Port, "sidecar-port", sidecar.Port, "`port` of the sidecar on 127.0.0.1")
	f.Int64Var(&sidecar.RunAsUser, "sidecar-run-as-user", sidecar.RunAsUser, "user `ID` of the sidecar; with -1 the platform chooses (OpenShift)")
	f.TextVar(&sidecar.LogLevel, "sidecar-log-level", sidecar.LogLevel, "lowest `level` that the sidecar logs: debug, info, warn or error")
	f.StringVar(&o.SettingsFile, "sidecar-settings-file", "", "YAML or JSON `file` with sidecar settings, which take precedence over the flags; a replaced file takes effect without a restart of the server")
	f.StringVar(&broker, "broker", "", "`HOST:PORT` at which sidecars call the brokers, such as credence-broker.credence.svc:9443 (required)")
	f.StringVar(&o.ClusterDomain, "cluster-domain", "", "`domain` of the cluster's Services, such as cluster.local, for the brokers' full DNS name; if empty, the webhook reads it from its own resolv.conf; if that has none, sidecars use search domains")
	f.StringVar(&aud, "audience", inject.DefaultAudience, "`audience` of the sidecars' tokens; must be the broker's")
	f.StringVar(&trust, "trust-config-map", inject.DefaultTrustConfigMap, "`name` of the ConfigMap in each namespace that has the brokers' root certificates under key roots.pem")
	f.StringVar(&onShadowed, "on-shadowed", string(inject.RefuseShadowed), "`action` for pods with web identity or EKS Pod Identity, which SDKs prefer to the sidecar: refuse, or warn during a migration")
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
		if o.Rules, err = policy.New(policy.Config{Keys: keys, Base: base, Cluster: cluster, RoleChaining: chained}); err != nil {
			return Options{}, fmt.Errorf("--cluster-name: %w", err)
		}
		sidecar.ImagePullPolicy = corev1.PullPolicy(pullPolicy)
		if wrong, ok := errors.AsType[*inject.FieldError](sidecar.Check(keys)); ok {
			return Options{}, fmt.Errorf("--%s: %w", ForSetting(wrong.Field), wrong.Err)
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

// ForSetting returns the name of the flag for a field of a file with sidecar settings: sidecar-cpu-request for cpu.request,
// sidecar-run-as-user for runAsUser. Not all fields have a flag.
func ForSetting(field string) string {
	name := new(strings.Builder)
	name.WriteString("sidecar-")
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
