// Package inject decides what a pod needs to get its own AWS credentials: one sidecar, one volume,
// and the environment that points AWS SDKs at the sidecar.
//
// It is a pure function of a pod's JSON and a configuration: no clock, no randomness, no network.
// It promises that
//   - a pod without annotations of ours is left alone, and one with any of them is either injected
//     or refused with a sentence that says what to change: nothing in between;
//   - the patch consists of RFC 6902 "add" operations made by hand against the JSON as it came.
//     Nothing of the user's is removed, changed or reordered, fields newer than this program's
//     Kubernetes API included: a patch made by comparing typed pods would drop those;
//   - injecting twice is injecting once, and a container that another webhook added in between gets
//     its environment from the second time.
//
// It does not decide which role a pod may have: see package policy. It does not touch ephemeral
// containers, which cannot be part of a new pod.
package inject

import (
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
)

// Defaults of [Config].
const (
	DefaultAudience       = "credence-broker"
	DefaultTrustConfigMap = "credence-trust"
)

// OnShadowed says what becomes of a container whose own environment would outrank the sidecar in
// SDKs without any fall-through.
type OnShadowed string

// The choices of [OnShadowed].
const (
	// RefuseShadowed refuses the pod. The default.
	RefuseShadowed OnShadowed = "refuse"
	// WarnShadowed injects it and warns: for the time of a migration, when the pod still runs on its
	// old credentials.
	WarnShadowed OnShadowed = "warn"
)

// Config configures [New].
type Config struct {
	// Keys are the annotation keys in use. Required.
	Keys policy.Keys
	// Image is the sidecar's image. Required.
	Image string
	// Broker is HOST:PORT, such as credence-broker.credence.svc:9443. The addresses of HOST are those of the
	// brokers. Required.
	Broker string
	// Audience of the token that the sidecar shows the broker. Default [DefaultAudience].
	Audience string
	// TrustConfigMap is the ConfigMap, in the pod's namespace, whose key roots.pem holds the
	// broker's roots. Default [DefaultTrustConfigMap].
	TrustConfigMap string
	// Settings of the sidecar, until [Injector.Use] changes them. Required; begin with [DefaultSettings].
	Settings Settings
	// OnShadowed is what to do about web identity, or EKS Pod Identity, in a container. Default [RefuseShadowed].
	OnShadowed OnShadowed
}

// Injector injects pods. Make it with [New]; the zero value must not be used. It may be used
// concurrently.
type Injector struct {
	cfg      Config // but for its Settings
	settings atomic.Pointer[Settings]
	dns      atomic.Pointer[DNS]
}

// New checks cfg and fills in its defaults.
func New(cfg Config) (*Injector, error) {
	cfg.Audience = defaultTo(cfg.Audience, DefaultAudience)
	cfg.TrustConfigMap = defaultTo(cfg.TrustConfigMap, DefaultTrustConfigMap)
	cfg.OnShadowed = defaultTo(cfg.OnShadowed, RefuseShadowed)
	switch {
	case cfg.Keys.Prefix() == "":
		return nil, errors.New("injecting without annotation keys would inject nothing")
	case cfg.Image == "" || strings.ContainsAny(cfg.Image, " \t\n"):
		return nil, fmt.Errorf("sidecar image %q: set --sidecar-image to one such as registry.example/credence-sidecar:v1", cfg.Image)
	case !hostPort(cfg.Broker):
		return nil, fmt.Errorf("broker address %q: set --broker to HOST:PORT such as credence-broker.credence.svc:9443", cfg.Broker)
	case len(validation.IsDNS1123Subdomain(cfg.TrustConfigMap)) > 0:
		return nil, fmt.Errorf("trust ConfigMap %q: --trust-config-map must be a name that Kubernetes takes", cfg.TrustConfigMap)
	}
	switch cfg.OnShadowed {
	case RefuseShadowed, WarnShadowed:
	default:
		return nil, fmt.Errorf("on shadowed credentials %q: --on-shadowed must be %s or %s", cfg.OnShadowed, RefuseShadowed, WarnShadowed)
	}
	i := &Injector{cfg: cfg}
	i.dns.Store(new(DNS))
	if err := i.Use(cfg.Settings); err != nil {
		return nil, fmt.Errorf("sidecar settings: %w", err)
	}
	return i, nil
}

// hostPort reports whether sidecars can take s as the brokers' address. A target of gRPC with a scheme has slashes.
func hostPort(s string) bool {
	host, port, err := net.SplitHostPort(s)
	number, malformed := strconv.ParseUint(port, 10, 16)
	return err == nil && malformed == nil && number > 0 && host != "" && !strings.ContainsAny(host, "/% \t\n")
}

// Keys returns the annotation keys in use.
func (i *Injector) Keys() policy.Keys { return i.cfg.Keys }

// Image is the sidecar's image.
func (i *Injector) Image() string { return i.cfg.Image }

func defaultTo[T comparable](value, fallback T) T {
	var zero T
	if value == zero {
		return fallback
	}
	return value
}

// Result is what [Injector.Inject] made of a pod.
type Result struct {
	// Patch injects the pod. Nil: there is nothing to add. Always nil beside an error.
	Patch []Operation
	// Warnings are sentences for the user who creates the pod, at most 64. They quote no values of its environment.
	Warnings []string
	// MoreWarnings is how many there are beside them.
	MoreWarnings int
	// Annotated reports whether the pod asks for anything of ours; if not, it is to be let through.
	Annotated bool
	// Pod is what package policy decides by. Set for annotated pods, beside an error too.
	Pod policy.Pod
	// Name is the pod's name or, where the API server makes one, what it is made of; for logs. Set
	// beside an error too.
	Name string
}

// Inject returns the patch that injects the pod, given as JSON, into a namespace. namespace is the
// admission request's, which a pod's own metadata need not repeat. The caller bounds the length of
// raw.
//
// A refusal is an [*credential.Error] of kind credential.ErrInvalid whose message says what to
// change; its reason is one of those that package policy gives for annotations,
// credential.ReasonPodUnsupported or credential.ReasonShadowed.
func (i *Injector) Inject(raw []byte, namespace string) (Result, error) {
	return i.inject(func() error { return nil }, raw, namespace, func(int) error { return nil })
}

// InjectWithin is Inject within the time of ctx and the memory that the caller has. It refuses a pod that exceeds
// [MaxObject], [MaxValues] or [MaxDepth] before decoding it. Before it makes the patch, it calls room with the number of
// containers. Its error is also that of ctx, or of room.
func (i *Injector) InjectWithin(ctx context.Context, raw []byte, namespace string, room func(containers int) error) (Result, error) {
	if err := check(raw); err != nil {
		return Result{}, err
	}
	return i.inject(ctx.Err, raw, namespace, room)
}

// inject stops with the error of ended as soon as there is one.
func (i *Injector) inject(ended func() error, raw []byte, namespace string, room func(containers int) error) (Result, error) {
	p, err := parsePod(raw)
	if err != nil {
		return Result{}, err
	}
	result := Result{Name: defaultTo(p.Metadata.Name, p.Metadata.GenerateName)}
	if !i.cfg.Keys.Annotated(p.Metadata.Annotations) {
		return result, nil
	}
	result.Annotated = true
	result.Pod = policy.Pod{
		Namespace:      namespace,
		Name:           p.Metadata.Name,
		UID:            p.Metadata.UID,
		ServiceAccount: defaultServiceAccount,
		Request:        i.cfg.Keys.Request(p.Metadata.Annotations),
	}
	if n := length(p.Metadata.Annotations); n > maxAnnotations {
		return result, unsupported("the pod's annotations have %d bytes together, and Kubernetes takes %d: make them shorter", n, maxAnnotations)
	}
	settings, err := result.Pod.Request.Settings()
	if err != nil {
		return result, err
	}
	spec, err := p.parseSpec()
	if err != nil {
		return result, err
	}
	result.Pod.ServiceAccount = spec.serviceAccount()
	if err := errors.Join(ended(), room(len(spec.Containers)+len(spec.InitContainers))); err != nil {
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

// length returns the length of annotations as Kubernetes counts it.
func length(annotations map[string]string) (n int) {
	for key, value := range annotations {
		n += len(key) + len(value)
	}
	return n
}

// patch makes the operations in an order in which the indices of the pod as it came stay right: what
// edits existing containers first, and the container that shifts all others last.
func (by *plan) patch(ended func() error, p *pod, spec *podSpec, namespace string, w *warnings) (ops []Operation, err error) {
	if err := by.checkSupported(p, spec); err != nil {
		return nil, err
	}
	present, err := by.checkPresent(spec)
	if err != nil {
		return nil, err
	}
	unwise, err := by.checkSettings(spec)
	if err != nil {
		return nil, err
	}
	for _, warning := range unwise {
		w.addf("%s", warning)
	}
	unresolved, err := by.checkDNS(spec)
	if err != nil {
		return nil, err
	}
	for _, warning := range unresolved {
		w.addf("%s", warning)
	}
	if image := by.anotherVersion(spec); present && image != "" {
		w.addf("init container %q is of another version than the webhook's, %.200q, and stays so: that is so for moments during an upgrade, and else comes of a manifest that was injected or copied before one", sidecarName, image)
	}
	if present && spec.InitContainers[0].Name != sidecarName {
		// Patches of "add" cannot reorder, and the order is the other webhook's to choose.
		w.addf("init container %q stands before the sidecar: it has no credentials while it runs", spec.InitContainers[0].Name)
	}
	for _, list := range []struct {
		path       string
		containers []container
	}{{"/spec/containers", spec.Containers}, {"/spec/initContainers", spec.InitContainers}} {
		for at, c := range list.containers {
			if err := ended(); err != nil {
				return nil, err
			}
			if c.Name == sidecarName || !selected(c.Name, by.pod) {
				continue
			}
			if err := by.shadowed(c, w); err != nil {
				return nil, err
			}
			path := fmt.Sprintf("%s/%d/env", list.path, at)
			ops = appendAll(ops, path, c.Env, by.env(c))
		}
	}
	ops = by.mark(ops, p, spec, w.kept())
	ops, differing := by.addAnnotations(ops, p)
	for _, warning := range differing {
		w.addf("%s", warning)
	}
	ops = by.addPullSecrets(ops, spec)
	if !present {
		ops = appendAll(ops, "/spec/volumes", spec.Volumes, []corev1.Volume{by.volume(spec)})
		ops = prepend(ops, "/spec/initContainers", spec.InitContainers, by.sidecar(spec, namespace))
	}
	return ops, nil
}

// mark adds the label and the annotation by which the broker finds the pod, and the annotation with warnings. The keys
// are the webhook's own: mark overwrites another value, which can come from a copied manifest, and an annotation with
// warnings that no longer apply becomes empty, because "add" cannot remove it.
func (by *plan) mark(ops []Operation, p *pod, spec *podSpec, kept string) []Operation {
	key := by.cfg.Keys.Name(policy.Warnings)
	ops = setKey(ops, "/metadata/labels", p.Metadata.Labels, by.cfg.Keys.Name(policy.Injected), "true")
	ops = setKey(ops, "/metadata/annotations", p.Metadata.Annotations, by.cfg.Keys.Name(policy.ServiceAccount), spec.serviceAccount())
	if _, there := p.Metadata.Annotations[key]; there || kept != "" {
		ops = setKey(ops, "/metadata/annotations", p.Metadata.Annotations, key, kept)
	}
	return ops
}

// unsupported refuses a pod for its shape.
func unsupported(format string, args ...any) error {
	return credential.Errorf(credential.ErrInvalid, credential.ReasonPodUnsupported, format, args...)
}
