// Package installation finds Credence in a cluster and reads what the credence command needs: the Deployments of webhook
// and brokers, the settings that they use, and the brokers' pages, by port-forward. It uses only the rights of its user.
// An error says which right is missing.
//
// It guarantees: it changes nothing, except by [Broker.Post]; it opens no port on this machine; it reads no Secret.
package installation

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"github.com/credence-iam/credence/broker/clip"
)

// Names that the chart gives to its objects.
const (
	BrokerName            = "credence-broker"
	WebhookName           = "credence-webhook"
	SettingsConfigMap     = "credence-sidecar-settings"
	RulesConfigMap        = "credence-rules"
	TrustConfigMap        = "credence-trust"
	Configuration         = "credence" // of the webhook in the API server
	DefaultNamespace      = "credence"
	componentLabel        = "app.kubernetes.io/component"
	selector              = "app.kubernetes.io/name=credence," + componentLabel + "="
	brokerComponent       = "broker"
	webhookComponent      = "webhook"
	settingsKey, rulesKey = "settings.yaml", "rules.yaml"
)

// Client is access to a cluster with the rights of the command's user.
type Client struct {
	// Kube is the API server.
	Kube kubernetes.Interface
	// Config is what Kube was made from.
	Config *rest.Config
}

// NewClient returns a client. It sends no request yet.
func NewClient(config *rest.Config) (*Client, error) {
	kube, err := kubernetes.NewForConfig(config)
	if err != nil {
		return nil, fmt.Errorf("making a client of the cluster: %w", err)
	}
	return &Client{Kube: kube, Config: config}, nil
}

// Installation is what a cluster has of Credence. A field that its user may not read is nil, and Problems says why.
type Installation struct {
	// Namespace is the namespace of webhook and brokers.
	Namespace string
	// Webhook and Broker are the Deployments.
	Webhook, Broker *appsv1.Deployment
	// Settings and Rules are the files that the webhook reads, as text; empty without one.
	Settings, Rules string
	// Problems are why parts could not be read.
	Problems []error
}

// ErrNone means that the cluster has no Credence, as far as the user may see.
var ErrNone = errors.New("found no Credence in this cluster; install it (docs/install.md), or name its namespace with --credence-namespace")

// Find finds the installation. Without a namespace, it looks for the webhook's Deployment in all namespaces, or in
// [DefaultNamespace] if the user may not list all. Of several, it takes the one that the API server calls. It returns
// [ErrNone] if there is none.
func (c *Client) Find(ctx context.Context, namespace string) (*Installation, error) {
	if namespace == "" {
		found, err := c.namespaceOf(ctx)
		if err != nil {
			return nil, err
		}
		namespace = found
	}
	i := &Installation{Namespace: namespace}
	i.Webhook = read(i, "deployment", WebhookName, func() (*appsv1.Deployment, error) {
		return c.Kube.AppsV1().Deployments(namespace).Get(ctx, WebhookName, metav1.GetOptions{})
	})
	i.Broker = read(i, "deployment", BrokerName, func() (*appsv1.Deployment, error) {
		return c.Kube.AppsV1().Deployments(namespace).Get(ctx, BrokerName, metav1.GetOptions{})
	})
	if i.Webhook == nil && i.Broker == nil && !slices.ContainsFunc(i.Problems, func(err error) bool { return !apierrors.IsNotFound(err) }) {
		return nil, ErrNone
	}
	i.Settings = c.text(ctx, i, SettingsConfigMap, settingsKey)
	if slices.ContainsFunc(i.WebhookArgs(), func(arg string) bool { return strings.HasPrefix(arg, "--rules-file=") }) {
		i.Rules = c.text(ctx, i, RulesConfigMap, rulesKey)
	}
	return i, nil
}

// namespaceOf returns the namespace of the webhook.
func (c *Client) namespaceOf(ctx context.Context) (string, error) {
	list, err := c.Kube.AppsV1().Deployments(metav1.NamespaceAll).List(ctx, metav1.ListOptions{LabelSelector: selector + webhookComponent})
	switch {
	case apierrors.IsForbidden(err):
		return DefaultNamespace, nil
	case err != nil:
		return "", fmt.Errorf("looking for the webhook: %w", err)
	case len(list.Items) == 0:
		return "", ErrNone
	}
	namespaces := make([]string, 0, len(list.Items))
	for _, item := range list.Items {
		namespaces = append(namespaces, item.Namespace)
	}
	if slices.Sort(namespaces); len(namespaces) == 1 {
		return namespaces[0], nil
	}
	// The owner of a namespace can make a Deployment with these labels, but only a cluster admin a configuration.
	configuration, err := c.Kube.AdmissionregistrationV1().MutatingWebhookConfigurations().Get(ctx, Configuration, metav1.GetOptions{})
	if err == nil && len(configuration.Webhooks) > 0 {
		if service := configuration.Webhooks[0].ClientConfig.Service; service != nil && slices.Contains(namespaces, service.Namespace) {
			return service.Namespace, nil
		}
	}
	return "", fmt.Errorf("namespaces %s have a webhook of Credence; choose one with --credence-namespace", clip.Bytes(strings.Join(namespaces, ", "), maxFailure))
}

// read returns an object, or nil with a problem.
func read[T any](i *Installation, kind, name string, get func() (*T, error)) *T {
	object, err := get()
	if err != nil {
		i.Problems = append(i.Problems, fmt.Errorf("reading %s %s/%s: %w", kind, i.Namespace, name, err))
		return nil
	}
	return object
}

// text returns one key of a ConfigMap.
func (c *Client) text(ctx context.Context, i *Installation, name, key string) string {
	object := read(i, "configmap", name, func() (*corev1.ConfigMap, error) {
		return c.Kube.CoreV1().ConfigMaps(i.Namespace).Get(ctx, name, metav1.GetOptions{})
	})
	if object == nil {
		return ""
	}
	return object.Data[key]
}

// WebhookArgs returns the arguments of the webhook, nil if its Deployment is not known.
func (i *Installation) WebhookArgs() []string { return argsOf(i.Webhook, webhookComponent) }

// BrokerArgs returns the arguments of the brokers, nil if their Deployment is not known. Those with $(VARIABLE) are as
// the Deployment has them.
func (i *Installation) BrokerArgs() []string { return argsOf(i.Broker, brokerComponent) }

func argsOf(d *appsv1.Deployment, container string) []string {
	if d == nil {
		return nil
	}
	return arguments(d.Spec.Template.Spec.Containers, container)
}

func arguments(containers []corev1.Container, container string) []string {
	for _, c := range containers {
		if c.Name == container {
			return c.Args
		}
	}
	return nil
}

// Arg returns the value of --name=value in args, "" if there is none. The last one has precedence, as for package flag.
func Arg(args []string, name string) string {
	for _, arg := range slices.Backward(args) {
		if value, ok := strings.CutPrefix(arg, "--"+name+"="); ok {
			return value
		}
	}
	return ""
}
