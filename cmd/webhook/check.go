package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	corev1client "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/rest"

	"github.com/credence-iam/credence/broker/policy"
	"github.com/credence-iam/credence/cmd/internal/program"
	"github.com/credence-iam/credence/sidecar/contract"
)

const checkUsage = `credence-webhook check waits until the API server calls the webhook and the webhook injects. It creates a
PodTemplate in a dry run, which stores nothing and runs nothing. It needs the right to create PodTemplates.

Usage: credence-webhook check --namespace=NAMESPACE [flags]`

const (
	// checkPause is the time between two attempts.
	checkPause = 2 * time.Second
	// checkRequest limits one attempt. The API server waits at most 30 s for a webhook.
	checkRequest = 35 * time.Second
)

// checkOptions has the values of the flags of check.
type checkOptions struct {
	keys                  policy.Keys
	namespace, kubeconfig string
	timeout               time.Duration
	out                   io.Writer // constant except in tests
}

func checkFlags(f *flag.FlagSet) func(args []string) (checkOptions, error) {
	o := checkOptions{out: os.Stdout}
	f.StringVar(&o.namespace, "namespace", "", "`namespace` of the webhook, where the chart registers the webhook for this check")
	f.StringVar(&o.kubeconfig, "kubeconfig", "", "kubeconfig `file`; leave empty inside a cluster")
	f.DurationVar(&o.timeout, "timeout", 3*time.Minute, "maximum `time` to wait")
	prefix := f.String("annotation-prefix", policy.DefaultPrefix, "`prefix` of the webhook's annotations")
	return func(args []string) (checkOptions, error) {
		err := program.NoArguments(args)
		switch {
		case err != nil:
		case o.namespace == "":
			err = errors.New("--namespace is required")
		case o.timeout <= 0:
			err = fmt.Errorf("--timeout: %s is not positive", o.timeout)
		default:
			if o.keys, err = policy.NewKeys(*prefix); err != nil {
				err = fmt.Errorf("--annotation-prefix: %w", err)
			}
		}
		return o, err
	}
}

// check tries until the webhook injects, and prints each new cause of a failure. Its error has the last one.
func check(ctx context.Context, o checkOptions) error {
	config, err := apiServer(o.kubeconfig)
	if err != nil {
		return err
	}
	config.Timeout, config.WarningHandler, config.ContentType = checkRequest, rest.NoWarnings{}, "application/json"
	client, err := corev1client.NewForConfig(config)
	if err != nil {
		return fmt.Errorf("configuring the API server: %w", err)
	}
	end, stop := context.WithTimeout(ctx, o.timeout)
	defer stop()
	pause := time.NewTicker(checkPause)
	defer pause.Stop()
	last := errors.New("no response of the API server")
	for {
		err := attempt(end, client.PodTemplates(o.namespace), o.keys)
		switch {
		case err == nil:
			_, _ = fmt.Fprintln(o.out, "The API server calls the webhook, and the webhook injects pods.")
			return nil
		case end.Err() != nil: // The error of an interrupted attempt has no cause.
		case err.Error() != last.Error():
			_, _ = fmt.Fprintln(o.out, "Pods cannot be injected yet:", err)
			last = err
		}
		select {
		case <-pause.C:
		case <-end.Done():
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			return fmt.Errorf("pods cannot be injected after %s: %w", o.timeout, last)
		}
	}
}

// attempt creates a PodTemplate in a dry run. It returns nil if the webhook has injected the template.
func attempt(ctx context.Context, templates corev1client.PodTemplateInterface, keys policy.Keys) error {
	created, err := templates.Create(ctx, &corev1.PodTemplate{
		// The chart registers the webhook for PodTemplates with these labels.
		ObjectMeta: metav1.ObjectMeta{Name: "credence-check", Labels: map[string]string{
			"app.kubernetes.io/name": "credence", "app.kubernetes.io/component": "check",
		}},
		Template: corev1.PodTemplateSpec{
			ObjectMeta: metav1.ObjectMeta{Annotations: map[string]string{keys.Name(policy.Role): "check"}},
			Spec:       corev1.PodSpec{Containers: []corev1.Container{{Name: "app", Image: "app:1"}}},
		},
	}, metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}})
	if err != nil {
		return explain(err)
	}
	for _, c := range created.Template.Spec.InitContainers {
		if c.Name != contract.ContainerName {
			continue
		}
		if c.RestartPolicy == nil || *c.RestartPolicy != corev1.ContainerRestartPolicyAlways {
			return errors.New("the API server dropped the sidecar's restartPolicy, so it does not support native sidecars; use Kubernetes 1.30 or newer")
		}
		return nil
	}
	return errors.New("the API server does not call the webhook, or a webhook of an older version responded; " +
		"check that MutatingWebhookConfiguration credence-check exists")
}

// fixes has the fix for each failure of the API server to call the webhook, by a part of its message.
var fixes = []struct{ part, fix string }{
	{"unknown authority", "the API server lacks the webhook's current root: check that cert-manager's cainjector runs and has set caBundle of " +
		"MutatingWebhookConfiguration credence-check, or check the value certificates.roots"},
	{"x509:", "check the webhook's certificate, and the clocks of control plane and nodes"},
	{"connection refused", "no webhook serves yet: check the pods of Deployment credence-webhook"},
	{"no endpoints available", "no webhook is ready yet: check the pods of Deployment credence-webhook"},
	{"service \"credence-webhook\" not found", "create Service credence-webhook"},
	// Not "timeout" alone, which is in the URL of each message.
	{"deadline exceeded", unreachable}, {" timeout", unreachable}, {"Timeout exceeded", unreachable}, {"no route to host", unreachable},
	{"is forbidden", "grant the ServiceAccount of this check the right to create PodTemplates in the namespace"},
}

const unreachable = "the control plane cannot reach the webhook's pods: allow its connections to the webhook's port (9443 by default) in firewalls and NetworkPolicies, " +
	"or set webhook.hostNetwork of the chart if it has no route to pods"

// explain adds the fix to an error of the API server.
func explain(err error) error {
	text := err.Error()
	if !strings.Contains(text, "failed calling webhook") && !strings.Contains(text, "is forbidden") {
		return err
	}
	for _, f := range fixes {
		if strings.Contains(text, f.part) {
			return fmt.Errorf("%w; %s", err, f.fix)
		}
	}
	return err
}

// isCheck reports whether the first argument is the command check.
func isCheck(args []string) bool { return len(args) > 1 && args[1] == "check" }
