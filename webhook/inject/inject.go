// Package inject adds to a pod all that it needs for its own AWS credentials: one sidecar, one volume, and environment
// variables that send AWS SDKs to the sidecar. It is a pure function of a pod's JSON and a configuration: no clock, no
// randomness, no network.
//
// It guarantees:
//   - a pod without Credence's annotations does not change. An annotated pod is injected, or refused with a message that
//     names the fix;
//   - the patch has RFC 6902 "add" operations only, made from the received JSON. It removes, changes and reorders nothing
//     of the user's, not even fields that this program's Kubernetes API lacks. Comparing typed pods would drop those;
//   - a second injection adds nothing, except variables in containers that another webhook added in between.
//
// It does not decide which role a pod may use: package policy does. It does not change ephemeral containers, because a new
// pod cannot have any.
package inject

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"strconv"
	"strings"
	"sync/atomic"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/validation"

	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/policy"
	"github.com/credence-iam/credence/sidecar/contract"
	"github.com/credence-iam/credence/webhook/inject/podview"
)

// Defaults of [Config].
const (
	DefaultAudience       = "credence-broker"
	DefaultTrustConfigMap = "credence-trust"
)

// OnShadowed selects what happens to a container with an identity of its own, such as web identity. SDKs prefer that
// identity to the sidecar, and do not fall back to the sidecar if it fails.
type OnShadowed string

// The choices of [OnShadowed].
const (
	// RefuseShadowed refuses the pod. It is the default.
	RefuseShadowed OnShadowed = "refuse"
	// WarnShadowed injects the pod and warns. It is for migrations, during which the pod still uses its old credentials.
	WarnShadowed OnShadowed = "warn"
)

// Config configures [New].
type Config struct {
	// Keys are the annotation keys in use. Required.
	Keys policy.Keys
	// Image is the sidecar's image. Required.
	Image string
	// Broker is HOST:PORT, such as credence-broker.credence.svc:9443. HOST resolves to the addresses of all brokers.
	// Required.
	Broker string
	// Audience is the audience of the sidecar's token for the broker. Default [DefaultAudience].
	Audience string
	// TrustConfigMap names the ConfigMap in the pod's namespace that has the brokers' root certificates under key
	// roots.pem. Default [DefaultTrustConfigMap].
	TrustConfigMap string
	// Settings are the sidecar settings until [Injector.Use] replaces them. Required; start from [DefaultSettings].
	Settings Settings
	// OnShadowed applies to web identity and EKS Pod Identity in a container. Default [RefuseShadowed].
	OnShadowed OnShadowed
}

// Injector injects pods. Make it with [New]; the zero value is unusable. Its methods may be called concurrently.
type Injector struct {
	cfg      Config // its Settings are unused
	settings atomic.Pointer[Settings]
	dns      atomic.Pointer[DNS]
}

// New validates cfg and sets its defaults.
func New(cfg Config) (*Injector, error) {
	cfg.Audience = cmp.Or(cfg.Audience, DefaultAudience)
	cfg.TrustConfigMap = cmp.Or(cfg.TrustConfigMap, DefaultTrustConfigMap)
	cfg.OnShadowed = cmp.Or(cfg.OnShadowed, RefuseShadowed)
	switch {
	case cfg.Keys.Prefix() == "":
		return nil, errors.New("configuring injection: annotation keys are required")
	case cfg.Image == "" || strings.ContainsAny(cfg.Image, " \t\n"):
		return nil, fmt.Errorf("sidecar image %q is invalid; set --sidecar-image to an image such as registry.example/credence-sidecar:v1", cfg.Image)
	case !hostPort(cfg.Broker):
		return nil, fmt.Errorf("broker address %q is invalid; set --broker to HOST:PORT such as credence-broker.credence.svc:9443", cfg.Broker)
	case len(validation.IsDNS1123Subdomain(cfg.TrustConfigMap)) > 0:
		return nil, fmt.Errorf("trust ConfigMap %q is not a name that Kubernetes accepts; change --trust-config-map", cfg.TrustConfigMap)
	}
	switch cfg.OnShadowed {
	case RefuseShadowed, WarnShadowed:
	default:
		return nil, fmt.Errorf("action %q for shadowed credentials is unknown; set --on-shadowed to %s or %s", cfg.OnShadowed, RefuseShadowed, WarnShadowed)
	}
	i := &Injector{cfg: cfg}
	i.dns.Store(new(DNS))
	if err := i.Use(cfg.Settings); err != nil {
		return nil, fmt.Errorf("sidecar settings: %w", err)
	}
	return i, nil
}

// hostPort reports whether s is an address that sidecars accept. A gRPC target with a scheme has slashes and is not.
func hostPort(s string) bool {
	host, port, err := net.SplitHostPort(s)
	number, malformed := strconv.ParseUint(port, 10, 16)
	return err == nil && malformed == nil && number > 0 && host != "" && !strings.ContainsAny(host, "/% \t\n")
}

// Keys returns the annotation keys in use.
func (i *Injector) Keys() policy.Keys { return i.cfg.Keys }

// Image returns the sidecar's image.
func (i *Injector) Image() string { return i.cfg.Image }

// Result is the outcome of [Injector.Inject].
type Result struct {
	// Patch injects the pod. It is nil if there is nothing to add, and with an error.
	Patch []Operation
	// Warnings are for the user who creates the pod, at most 64. They quote no values of its environment.
	Warnings []string
	// MoreWarnings is the number of warnings that are not in Warnings.
	MoreWarnings int
	// Annotated reports whether the pod has Credence's annotations. Other pods are admitted unchanged.
	Annotated bool
	// Pod is the input of package policy. It is set for annotated pods, even with an error.
	Pod policy.Pod
	// Name is the pod's name, or the prefix from which the API server generates one; for logs. It is set even with an
	// error.
	Name string
}

// Inject returns the patch that injects a pod, given as JSON. namespace is that of the admission request, because the
// pod's own metadata may lack it. The caller limits the length of raw.
//
// A refusal is an [*credential.Error] of kind credential.ErrInvalid whose message names the fix. Its reason is one of
// package policy's reasons for annotations, credential.ReasonPodUnsupported or credential.ReasonShadowed.
func (i *Injector) Inject(raw []byte, namespace string) (Result, error) {
	return i.inject(func() error { return nil }, raw, namespace, func(int) error { return nil })
}

// InjectWithin is like Inject, within limits of time and memory. It refuses a pod that exceeds [podview.MaxObject],
// [podview.MaxValues] or [podview.MaxDepth] before it decodes the pod. It calls reserve with the number of containers
// before it makes the patch. It also returns errors of ctx and of reserve.
func (i *Injector) InjectWithin(ctx context.Context, raw []byte, namespace string, reserve func(containers int) error) (Result, error) {
	if err := podview.Check(raw); err != nil {
		return Result{}, err
	}
	return i.inject(ctx.Err, raw, namespace, reserve)
}

// inject calls ended regularly, and returns its error.
func (i *Injector) inject(ended func() error, raw []byte, namespace string, reserve func(containers int) error) (Result, error) {
	p, err := podview.Parse(raw)
	if err != nil {
		return Result{}, err
	}
	result := Result{Name: cmp.Or(p.Metadata.Name, p.Metadata.GenerateName)}
	if !i.cfg.Keys.Annotated(p.Metadata.Annotations) {
		return result, nil
	}
	result.Annotated = true
	result.Pod = policy.Pod{
		Namespace:      namespace,
		Name:           p.Metadata.Name,
		UID:            p.Metadata.UID,
		ServiceAccount: podview.DefaultServiceAccount,
	}
	if n := length(p.Metadata.Annotations); n > maxAnnotations {
		return result, unsupported("the pod's annotations have %d bytes, and Kubernetes accepts %d; shorten them", n, maxAnnotations)
	}
	result.Pod.Request = i.cfg.Keys.Request(p.Metadata.Annotations)
	settings, err := result.Pod.Request.Settings()
	if err != nil {
		return result, err
	}
	spec, err := p.ParseSpec()
	if err != nil {
		return result, err
	}
	result.Pod.ServiceAccount = spec.ServiceAccount()
	if err := errors.Join(ended(), reserve(len(spec.Containers)+len(spec.InitContainers))); err != nil {
		return result, err
	}
	var w warnings
	patch, err := i.newPlan(settings, spec).patch(ended, p, spec, namespace, &w)
	if err != nil {
		return result, err
	}
	result.Patch, result.Warnings, result.MoreWarnings = patch, w.all, w.more
	return result, nil
}

// length returns the total length of annotations as Kubernetes counts it.
func length(annotations map[string]string) (n int) {
	for key, value := range annotations {
		n += len(key) + len(value)
	}
	return n
}

// patch returns the operations in an order in which the indices of the received pod stay valid. Changes of existing
// containers come first. The sidecar comes last, because it shifts all other init containers.
func (p *plan) patch(ended func() error, pod *podview.Pod, spec *podview.Spec, namespace string, w *warnings) (ops []Operation, err error) {
	if err := p.checkSupported(pod, spec); err != nil {
		return nil, err
	}
	present, err := p.checkPresent(spec)
	if err != nil {
		return nil, err
	}
	if err := p.checkLists(spec, w); err != nil {
		return nil, err
	}
	p.warnDuration(w)
	if err := p.checkDNS(spec, w); err != nil {
		return nil, err
	}
	if present {
		p.warnPresent(spec.Sidecar(), w)
	}
	if present && spec.InitContainers[0].Name != contract.ContainerName {
		// "add" operations cannot reorder, and the other webhook may choose the order.
		w.addf("init container %q runs before the sidecar starts, so it gets no credentials. If it needs them, move it after the sidecar.", spec.InitContainers[0].Name)
	}
	for _, list := range []struct {
		path       string
		containers []podview.Container
	}{{"/spec/containers", spec.Containers}, {"/spec/initContainers", spec.InitContainers}} {
		for at, c := range list.containers {
			if err := ended(); err != nil {
				return nil, err
			}
			if c.Name == contract.ContainerName || !selected(c.Name, p.requested) {
				continue
			}
			if err := p.shadowed(c, w); err != nil {
				return nil, err
			}
			path := fmt.Sprintf("%s/%d/env", list.path, at)
			ops = appendAll(ops, path, c.Env, p.env(c))
		}
	}
	ops = p.mark(ops, pod, spec, w.kept())
	ops = p.addAnnotations(ops, pod, w)
	ops = p.addPullSecrets(ops, spec)
	if !present {
		ops = appendAll(ops, "/spec/volumes", spec.Volumes, []corev1.Volume{p.volume(spec)})
		ops = prepend(ops, "/spec/initContainers", spec.InitContainers, p.sidecar(spec, namespace))
	}
	return ops, nil
}

// mark adds the label and the annotation by which the broker finds the pod, and the annotation with warnings. These keys
// belong to the webhook, so mark overwrites other values, for example from a copied manifest. It empties an annotation
// with warnings that no longer apply, because "add" cannot remove it.
func (p *plan) mark(ops []Operation, pod *podview.Pod, spec *podview.Spec, kept string) []Operation {
	key := p.cfg.Keys.Name(policy.Warnings)
	ops = setKey(ops, "/metadata/labels", pod.Metadata.Labels, p.cfg.Keys.Name(policy.Injected), "true")
	ops = setKey(ops, "/metadata/annotations", pod.Metadata.Annotations, p.cfg.Keys.Name(policy.ServiceAccount), spec.ServiceAccount())
	if _, there := pod.Metadata.Annotations[key]; there || kept != "" {
		ops = setKey(ops, "/metadata/annotations", pod.Metadata.Annotations, key, kept)
	}
	return ops
}

// unsupported refuses a pod that the sidecar cannot serve.
func unsupported(format string, args ...any) error {
	return credential.Errorf(credential.ErrInvalid, credential.ReasonPodUnsupported, format, args...)
}
