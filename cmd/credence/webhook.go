package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"

	"github.com/credence-iam/credence/broker/policy"
	"github.com/credence-iam/credence/broker/rulesfile"
	"github.com/credence-iam/credence/cmd/internal/injectflags"
	"github.com/credence-iam/credence/cmd/internal/program"
	"github.com/credence-iam/credence/operator/installation"
	"github.com/credence-iam/credence/operator/manifests"
	"github.com/credence-iam/credence/webhook/inject"
	"github.com/credence-iam/credence/webhook/settingsfile"
)

// withoutCluster ends an error after which flags alone can help.
const withoutCluster = "set --broker and --sidecar-image to inject without a cluster"

// fromCluster adds to cfg what the webhook in the cluster uses, except for flags that the command line has.
func (in *injection) fromCluster(ctx context.Context, cfg manifests.Config) (manifests.Config, error) {
	asking, stop := context.WithTimeoutCause(ctx, clusterTimeout, fmt.Errorf("no response within %s", clusterTimeout))
	defer stop()
	client, found, err := in.cluster.find(asking)
	if client == nil {
		return cfg, fmt.Errorf("reading the webhook's settings: %w; or %s", err, withoutCluster)
	}
	name := in.cluster.name(client)
	say := func(format string, args ...any) {
		_, _ = fmt.Fprintf(in.command.ErrOrStderr(), "%s: %s\n", in.command.CommandPath(), readable(fmt.Errorf(format, args...)))
	}
	if err == nil && found.Webhook == nil {
		err = errors.Join(found.Problems...)
	}
	if err != nil {
		return cfg, fmt.Errorf("reading the webhook's settings from %s: %w; %s", name, ended(asking, err), withoutCluster)
	}
	args := found.WebhookArgs()
	if args == nil {
		return cfg, fmt.Errorf("reading the webhook's settings from %s: Deployment %s/%s has no arguments in a container named webhook; %s",
			name, found.Namespace, installation.WebhookName, withoutCluster)
	}
	image := installation.ImageOf(found.Webhook, "webhook")
	if err := in.useArgs(args); err != nil {
		return cfg, fmt.Errorf("the webhook of %s, image %s: %w", name, image, err)
	}
	o, err := in.finish()
	if err != nil {
		return cfg, wrongFlags(fmt.Errorf("%w (with the arguments of the webhook of %s)", err, name))
	}
	cfg.Injector, cfg.Rules = o.Injector, o.Rules
	if cfg.SettingsFile, err = in.useFile("sidecar-settings-file", o.SettingsFile, found.Settings, found.Problems, func(text string) error {
		return in.useSettings(text, o.Injector)
	}); err != nil {
		return cfg, fmt.Errorf("the webhook of %s: %w", name, err)
	}
	if cfg.RulesFile, err = in.useFile("rules-file", o.RulesFile, found.Rules, found.Problems, func(text string) error {
		rules, err := rulesfile.Parse([]byte(text))
		if err != nil {
			return err
		}
		return o.Rules.Use(rules)
	}); err != nil {
		return cfg, fmt.Errorf("the webhook of %s: %w", name, err)
	}
	say("using the settings of webhook %s/%s of %s", found.Namespace, installation.WebhookName, name)
	if warning := differ(program.Version(), image.Version()); warning != "" {
		say("warning: %s", warning)
	}
	if err := in.useDNS(asking, client, found, o, say); err != nil {
		return cfg, err
	}
	if cfg.Namespace, err = in.cluster.namespaceOrDefault(); err != nil {
		return cfg, err
	}
	cfg.LookUp = lookUp(client, name)
	return cfg, nil
}

// differ returns a warning if the versions of this command and of the webhook are of different minor versions, else "".
func differ(own, webhook string) string {
	if installation.Apart(own, webhook) == 0 {
		return ""
	}
	return fmt.Sprintf("the webhook has version %s, this command %s, so results can differ; use credence %[1]s", webhook, own)
}

// ended returns the cause of an error after the end of ctx, which says more than the error.
func ended(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return cmp.Or(context.Cause(ctx), err)
	}
	return err
}

// useArgs sets the flags that the command line lacks to the values in the webhook's arguments.
func (in *injection) useArgs(args []string) error {
	values, unknown := injectflags.OfWebhook(in.shared, args)
	if len(unknown) > 0 {
		// An unknown argument may change what the webhook injects.
		return fmt.Errorf("this command does not understand its argument %.200q; use the credence command of the webhook's version, or %s", unknown[0], withoutCluster)
	}
	for _, name := range slices.Sorted(maps.Keys(values)) {
		value := values[name]
		switch {
		case in.set(name):
		case strings.Contains(value, "$("):
			return fmt.Errorf("its argument --%s=%s has a variable, which only Kubernetes can replace; set --%s", name, value, name)
		default:
			if err := in.shared.Set(name, value); err != nil {
				return fmt.Errorf("its argument --%s=%s is not valid: %w; set --%s", name, value, err, name)
			}
		}
	}
	return nil
}

// useFile applies the text that the cluster has of a file of the webhook. If the command line names a file, useFile returns
// its path instead.
func (in *injection) useFile(name, path, text string, problems []error, use func(text string) error) (string, error) {
	switch {
	case in.set(name) || path == "":
		return path, nil
	case text == "":
		return "", fmt.Errorf("cannot read its file %s: %w; set --%s", path, cmp.Or(errors.Join(problems...), errors.New("its ConfigMap has no such key")), name)
	}
	if err := use(text); err != nil {
		return "", fmt.Errorf("its file %s is not valid: %w; set --%s", path, err, name)
	}
	return "", nil
}

// useSettings applies sidecar settings, except those for which the command line has a flag.
func (in *injection) useSettings(text string, injector *inject.Injector) error {
	var fields map[string]any
	if err := yaml.Unmarshal([]byte(text), &fields); err != nil {
		return err
	}
	dropped := false
	var drop func(path string, fields map[string]any)
	drop = func(path string, fields map[string]any) {
		for name, value := range fields {
			if in.set(injectflags.ForSetting(path + name)) {
				delete(fields, name)
				dropped = true
			} else if inner, ok := value.(map[string]any); ok {
				drop(path+name+".", inner)
			}
		}
	}
	if drop("", fields); dropped {
		rest, err := yaml.Marshal(fields)
		if err != nil {
			return err
		}
		text = string(rest)
	}
	settings, err := settingsfile.Parse([]byte(text), injector.Settings(), injector.Keys())
	if err != nil {
		return err
	}
	return injector.Use(settings)
}

// useDNS applies the cluster's DNS as the webhook knows it. A sidecar works without it.
func (in *injection) useDNS(ctx context.Context, client *installation.Client, found *installation.Installation, o injectflags.Options, say func(string, ...any)) error {
	dns, err := client.ClusterDNS(ctx, found, o.Injector.Keys(), in.shared.Lookup("broker").Value.String())
	if err != nil && dns.Domain == "" && o.ClusterDomain == "" {
		say("note: the webhook's cluster domain is not known, so sidecars find the brokers by their pod's search domains; "+
			"set --cluster-domain, such as cluster.local: %v", strings.ReplaceAll(err.Error(), "\n", "; "))
	}
	return o.Injector.UseDNS(inject.DNS{Domain: cmp.Or(o.ClusterDomain, dns.Domain), Servers: dns.Servers})
}

// lookUp returns a function that reads a namespace from the cluster.
func lookUp(client *installation.Client, cluster string) func(context.Context, string) (policy.Namespace, string, error) {
	return func(ctx context.Context, name string) (policy.Namespace, string, error) {
		asking, stop := context.WithTimeoutCause(ctx, clusterTimeout, fmt.Errorf("no response within %s", clusterTimeout))
		defer stop()
		ns, err := client.Kube.CoreV1().Namespaces().Get(asking, name, metav1.GetOptions{})
		switch {
		case apierrors.IsNotFound(err):
			return policy.Namespace{}, fmt.Sprintf("%s has no namespace %q; add it to the input, or set --namespaces", cluster, name), nil
		case apierrors.IsForbidden(err):
			return policy.Namespace{}, fmt.Sprintf("you may not read namespace %q; it needs the right to get namespaces, or --namespaces", name), nil
		case err != nil:
			return policy.Namespace{}, "", ended(asking, err)
		}
		return policy.Namespace{Name: ns.Name, Labels: ns.Labels, Annotations: ns.Annotations}, "", nil
	}
}
