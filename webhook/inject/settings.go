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
	defaultPort = 9779
	// defaultRunAsUser is the "nonroot" user of distroless images.
	defaultRunAsUser int64 = 65532
	// PlatformUser means that the platform chooses a user for each namespace (OpenShift).
	PlatformUser int64 = -1
)

// Settings are the sidecar settings that a cluster admin can choose, and change while the webhook runs, see [Injector.Use].
// The json tags name the fields in a file. A zero value is not a default: start from [DefaultSettings].
//
// The sidecar's image is not a setting. The webhook writes the variables that a sidecar of its own version reads, and
// recognizes a present sidecar by the image.
type Settings struct {
	// ImagePullPolicy is the sidecar's. If it is empty, Kubernetes chooses by the image's tag.
	ImagePullPolicy corev1.PullPolicy `json:"imagePullPolicy"`
	// ImagePullSecrets names Secrets in the pods' namespaces. Injected pods get them in addition to their own.
	ImagePullSecrets []string `json:"imagePullSecrets"`
	// Memory is the sidecar's request and limit.
	Memory policy.Memory `json:"memory"`
	// CPU is the sidecar's processor time.
	CPU CPU `json:"cpu"`
	// Port is the port on 127.0.0.1 that the sidecar serves on.
	Port int `json:"port"`
	// RunAsUser is the sidecar's user ID, never 0, or [PlatformUser].
	RunAsUser int64 `json:"runAsUser"`
	// LogLevel is the lowest level that the sidecar logs.
	LogLevel policy.LogLevel `json:"logLevel"`
	// PodAnnotations are annotations that injected pods get if they lack them. They configure other software for the
	// sidecar, such as a service mesh.
	PodAnnotations map[string]string `json:"podAnnotations"`
}

// CPU is the sidecar's processor time.
type CPU struct {
	// Request is the amount that a node reserves.
	Request policy.CPU `json:"request"`
	// Limit is the maximum; 0 is no limit.
	Limit policy.CPU `json:"limit"`
	// Guaranteed is request and limit in a Guaranteed pod, which would lose its class if they differed. If Request is
	// larger, Request is both.
	Guaranteed policy.CPU `json:"guaranteed"`
}

// DefaultSettings returns the settings of a webhook without sidecar flags or file.
func DefaultSettings() Settings {
	return Settings{
		Memory: policy.DefaultMemory,
		CPU: CPU{
			Request: 5,
			// With this limit, the first handshake takes milliseconds. With 10m, it takes 400 ms.
			Limit:      100,
			Guaranteed: 50,
		},
		Port:      defaultPort,
		RunAsUser: defaultRunAsUser,
		LogLevel:  policy.LogInfo,
	}
}

// Limits of lists. Every injected pod has both, and etcd stores each pod.
const (
	// maxPullSecrets is low, because the kubelet tries the secrets one by one.
	maxPullSecrets = 8
	// maxPodAnnotations and maxAnnotationValue are far above the needs of meshes: a handful of short lists.
	maxPodAnnotations  = 16
	maxAnnotationValue = 1024
)

// FieldError is the error of a field of [Settings].
type FieldError struct {
	Field string // its name in a file, such as cpu.request
	Err   error
}

// Error implements error.
func (e *FieldError) Error() string { return e.Field + ": " + e.Err.Error() }

// Unwrap returns the error without the field.
func (e *FieldError) Unwrap() error { return e.Err }

// Check returns the [*FieldError] that [New] and [Injector.Use] return for s with these annotation keys.
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
		// It is request and limit at once, so the bounds of a limit apply, and 0 is not allowed.
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
	return fmt.Errorf("%.100q is not Always, IfNotPresent or Never", s.ImagePullPolicy)
}

func (s Settings) checkPullSecrets() error {
	if n := len(s.ImagePullSecrets); n > maxPullSecrets {
		return fmt.Errorf("has %d names, the limit is %d", n, maxPullSecrets)
	}
	for i, name := range s.ImagePullSecrets {
		if len(validation.IsDNS1123Subdomain(name)) > 0 {
			return fmt.Errorf("%.100q is not a name of a Secret", name)
		}
		if slices.Contains(s.ImagePullSecrets[:i], name) {
			return fmt.Errorf("%q is listed twice", name)
		}
	}
	return nil
}

func (c CPU) checkLimit() error {
	if err := c.Limit.CheckLimit(); err != nil {
		return err
	}
	if c.Limit != 0 && c.Limit < c.Request {
		return fmt.Errorf("%s is less than the request, %s; raise the limit, or lower the request", c.Limit, c.Request)
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
		return fmt.Errorf("%d is not a user ID from 1 to %d, and the sidecar never runs as root; with %d the platform chooses", s.RunAsUser, podview.MaxUser, PlatformUser)
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
			return fmt.Errorf("%.100q is not an annotation key such as example.com/name", key)
		case prefixed && strings.EqualFold(prefix, keys.Prefix()):
			return fmt.Errorf("%q has the prefix of Credence's annotations, which only the author of a pod sets; use another key", key)
		case prefixed && reserved(strings.ToLower(prefix)):
			return fmt.Errorf("%q belongs to Kubernetes and may affect more than the sidecar; use another key", key)
		case len(s.PodAnnotations[key]) > maxAnnotationValue:
			return fmt.Errorf("the value of %q has %d bytes, the limit is %d", key, len(s.PodAnnotations[key]), maxAnnotationValue)
		}
	}
	return nil
}

// reserved reports whether Kubernetes itself owns the prefix.
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

// Use replaces the sidecar settings with s. If it returns an error, a [*FieldError], the settings do not change. It may be
// called while Inject runs: each pod gets one set of settings, never a mixture.
func (i *Injector) Use(s Settings) error {
	if err := s.Check(i.cfg.Keys); err != nil {
		return err
	}
	i.settings.Store(new(s.clone()))
	return nil
}

// Settings returns the settings in force.
func (i *Injector) Settings() Settings { return i.settings.Load().clone() }
