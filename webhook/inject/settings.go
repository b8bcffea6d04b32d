package inject

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/validation"

	"github.com/credence-iam/credence/broker/policy"
	"github.com/credence-iam/credence/webhook/inject/podview"
)

// Defaults of [Settings].
const (
	DefaultPort = 9779
	// DefaultRunAsUser is the "nonroot" user of distroless images.
	DefaultRunAsUser int64 = 65532
	// PlatformUser leaves the user to the platform, which chooses one for each namespace (OpenShift).
	PlatformUser int64 = -1
)

// Settings are what whoever runs the platform may choose of the sidecar, and change while the webhook runs:
// see [Injector.Use]. The names of its fields in a file are those behind json. It has no default for a zero
// value: begin with [DefaultSettings].
//
// The sidecar's image is not among them. It goes with the version of the webhook, which writes what that sidecar
// reads; and it is what a sidecar that is there already is known p.
type Settings struct {
	// ImagePullPolicy of the sidecar. Empty leaves Kubernetes to choose by the image's tag.
	ImagePullPolicy corev1.PullPolicy `json:"imagePullPolicy"`
	// ImagePullSecrets are the names of Secrets, in the namespaces of the pods, that injected pods get
	// behind those they have.
	ImagePullSecrets []string `json:"imagePullSecrets"`
	// Memory is the sidecar's request and limit.
	Memory policy.Memory `json:"memory"`
	// CPU is its processor time.
	CPU CPU `json:"cpu"`
	// Port is where it listens on 127.0.0.1.
	Port int `json:"port"`
	// RunAsUser is its user id, never 0, or [PlatformUser].
	RunAsUser int64 `json:"runAsUser"`
	// LogLevel is the least level that it logs.
	LogLevel policy.LogLevel `json:"logLevel"`
	// PodAnnotations are further annotations of injected pods, where they are missing: for what has to be
	// told of the sidecar, such as a service mesh.
	PodAnnotations map[string]string `json:"podAnnotations"`
}

// CPU is the sidecar's processor time.
type CPU struct {
	// Request is what a node reserves.
	Request policy.CPU `json:"request"`
	// Limit is what it may take; 0 is no limit.
	Limit policy.CPU `json:"limit"`
	// Guaranteed is both in a pod of class Guaranteed, which would lose its class were they not equal. Where Request
	// is more, it counts.
	Guaranteed policy.CPU `json:"guaranteed"`
}

// DefaultSettings are those of a webhook that is told none.
func DefaultSettings() Settings {
	return Settings{
		Memory: policy.DefaultMemory,
		CPU: CPU{
			Request: 5,
			// The limit lets a first handshake be done in milliseconds. One of 10m stretches it to 400 ms.
			Limit:      100,
			Guaranteed: 50,
		},
		Port:      DefaultPort,
		RunAsUser: DefaultRunAsUser,
		LogLevel:  policy.LogInfo,
	}
}

// Bounds of lists. Both are on every injected pod, of which etcd keeps each.
const (
	// maxPullSecrets: a kubelet tries one after the other.
	maxPullSecrets = 8
	// maxPodAnnotations and maxAnnotationValue are far above what meshes ask for: a handful of short lists.
	maxPodAnnotations  = 16
	maxAnnotationValue = 1024
)

// FieldError says what is wrong with a field of [Settings].
type FieldError struct {
	Field string // as in a file, such as cpu.request
	Err   error
}

// Error implements error.
func (e *FieldError) Error() string { return e.Field + ": " + e.Err.Error() }

// Unwrap returns what is wrong.
func (e *FieldError) Unwrap() error { return e.Err }

// Check returns the [*FieldError] for which [New] and [Injector.Use] would refuse s with those annotation keys.
func (s Settings) Check(keys policy.Keys) error {
	for _, field := range []struct {
		name  string
		check func() error
	}{
		{"imagePullPolicy", s.checkPullPolicy},
		{"imagePullSecrets", s.checkPullSecrets},
		{"memory", s.Memory.Check},
		{"cpu.request", s.CPU.Request.CheckRequest},
		{"cpu.limit", s.CPU.checkLimit},
		// Request and limit at once, so held to the bounds of a limit; and there must be one.
		{"cpu.guaranteed", s.CPU.checkGuaranteed},
		{"port", func() error { return policy.CheckPort(s.Port) }},
		{"runAsUser", s.checkUser},
		{"logLevel", s.LogLevel.Check},
		{"podAnnotations", func() error { return s.checkAnnotations(keys) }},
	} {
		if err := field.check(); err != nil {
			return &FieldError{Field: field.name, Err: err}
		}
	}
	return nil
}

func (s Settings) checkPullPolicy() error {
	switch s.ImagePullPolicy {
	case "", corev1.PullAlways, corev1.PullIfNotPresent, corev1.PullNever:
		return nil
	}
	return fmt.Errorf("%.100q must be Always, IfNotPresent or Never", s.ImagePullPolicy)
}

func (s Settings) checkPullSecrets() error {
	if n := len(s.ImagePullSecrets); n > maxPullSecrets {
		return fmt.Errorf("has %d names, the limit is %d", n, maxPullSecrets)
	}
	for i, name := range s.ImagePullSecrets {
		if len(validation.IsDNS1123Subdomain(name)) > 0 {
			return fmt.Errorf("%.100q is no name of a Secret", name)
		}
		if slices.Contains(s.ImagePullSecrets[:i], name) {
			return fmt.Errorf("%q stands twice", name)
		}
	}
	return nil
}

func (c CPU) checkLimit() error {
	if err := c.Limit.CheckLimit(); err != nil {
		return err
	}
	if c.Limit != 0 && c.Limit < c.Request {
		return fmt.Errorf("%s is below the request, %s", c.Limit, c.Request)
	}
	return nil
}

func (c CPU) checkGuaranteed() error {
	if c.Guaranteed < policy.MinCPULimit || c.Guaranteed > policy.MaxCPU {
		return fmt.Errorf("%s is out of bounds: from %s to %s", c.Guaranteed, policy.MinCPULimit, policy.MaxCPU)
	}
	return nil
}

func (s Settings) checkUser() error {
	if s.RunAsUser != PlatformUser && (s.RunAsUser <= 0 || s.RunAsUser > podview.MaxUser) {
		return fmt.Errorf("%d is no user id from 1 to %d: the sidecar never runs as root; %d leaves it to the platform", s.RunAsUser, podview.MaxUser, PlatformUser)
	}
	return nil
}

func (s Settings) checkAnnotations(keys policy.Keys) error {
	if n := len(s.PodAnnotations); n > maxPodAnnotations {
		return fmt.Errorf("has %d keys, the limit is %d", n, maxPodAnnotations)
	}
	for _, key := range slices.Sorted(maps.Keys(s.PodAnnotations)) {
		prefix, _, prefixed := strings.Cut(key, "/")
		switch {
		case len(validation.IsQualifiedName(strings.ToLower(key))) > 0:
			return fmt.Errorf("%.100q is no key of an annotation, such as example.com/name", key)
		case prefixed && strings.EqualFold(prefix, keys.Prefix()):
			return fmt.Errorf("%q is under the prefix of the annotations that ask for credentials: those are for whoever writes the pod", key)
		case prefixed && reserved(strings.ToLower(prefix)):
			return fmt.Errorf("%q belongs to Kubernetes, where it may decide on more than the sidecar", key)
		case len(s.PodAnnotations[key]) > maxAnnotationValue:
			return fmt.Errorf("the value of %q has %d bytes, the limit is %d", key, len(s.PodAnnotations[key]), maxAnnotationValue)
		}
	}
	return nil
}

// reserved reports whether keys with that prefix are those of Kubernetes itself.
func reserved(prefix string) bool {
	return slices.ContainsFunc([]string{"kubernetes.io", "k8s.io"}, func(domain string) bool {
		return prefix == domain || strings.HasSuffix(prefix, "."+domain)
	})
}

// clone returns a copy that shares nothing with s.
func (s Settings) clone() Settings {
	s.ImagePullSecrets = slices.Clone(s.ImagePullSecrets)
	s.PodAnnotations = maps.Clone(s.PodAnnotations)
	return s
}

// Use makes s the settings from now on, in place of those before. On an error, a [*FieldError], those before
// stay. It may be called while Inject runs: each pod is injected by one value as a whole.
func (i *Injector) Use(s Settings) error {
	if err := s.Check(i.cfg.Keys); err != nil {
		return err
	}
	i.settings.Store(new(s.clone()))
	return nil
}

// Settings returns those in force.
func (i *Injector) Settings() Settings { return i.settings.Load().clone() }
