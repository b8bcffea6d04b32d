package inject

import (
	"cmp"
	"maps"
	"slices"
	"strconv"

	corev1 "k8s.io/api/core/v1"

	"github.com/credence-iam/credence/broker/policy"
	"github.com/credence-iam/credence/webhook/inject/podview"
)

// plan decides what one pod gets: from the webhook's configuration, the sidecar settings at this moment and the pod's
// annotations. Each pod has its own plan, which does not change: new settings apply to the next pod.
type plan struct {
	cfg       *Config
	requested policy.Settings // of the pod's annotations
	settings  Settings        // of the sidecar, with the pod's overrides of memory, CPU, port and log level
	endpoint  string          // http://127.0.0.1:PORT
	dns       DNS
	dnsName   string // full name of the brokers, with its final dot; empty if it is unknown
}

func (i *Injector) newPlan(requested policy.Settings, spec *podview.Spec) *plan {
	p := &plan{cfg: &i.cfg, requested: requested, settings: *i.settings.Load(), dns: *i.dns.Load()}
	p.dnsName = p.dns.fullName(i.cfg.Broker)
	s, overrides := &p.settings, requested.Sidecar
	s.Memory = cmp.Or(overrides.Memory, s.Memory)
	s.LogLevel = cmp.Or(overrides.LogLevel, s.LogLevel)
	s.CPU = s.CPU.changed(overrides)
	// If the pod already has a sidecar, its containers have that port in their environment.
	s.Port = cmp.Or(presentPort(spec), overrides.Port, s.Port)
	p.endpoint = "http://" + listenAddress(s.Port)
	return p
}

// listenAddress returns the address that the sidecar serves on. It is a literal of 127.0.0.1, the only form of loopback
// that all SDKs accept.
func listenAddress(port int) string { return "127.0.0.1:" + strconv.Itoa(port) }

// changed returns c with a pod's overrides. If a pod sets only its CPU request or limit, changed adjusts the other, so
// that the pair stays valid.
func (c CPU) changed(overrides policy.Sidecar) CPU {
	if overrides.CPURequest != 0 {
		c.Request = overrides.CPURequest
		// In a Guaranteed pod it is also the limit, which has a minimum.
		c.Guaranteed = max(overrides.CPURequest, policy.MinCPULimit)
		if c.Limit != 0 {
			c.Limit = max(c.Limit, c.Request)
		}
	}
	if limit := overrides.CPULimit; limit != nil {
		c.Limit = *limit
		if *limit != 0 {
			c.Guaranteed = *limit
			c.Request = min(c.Request, *limit)
		}
	}
	return c
}

// addPullSecrets appends the secrets that the pod lacks. A pod that lists none already has those of its service account,
// because the API server adds them before it calls webhooks.
func (p *plan) addPullSecrets(ops []Operation, spec *podview.Spec) []Operation {
	var missing []corev1.LocalObjectReference
	for _, name := range p.settings.ImagePullSecrets {
		if reference := (corev1.LocalObjectReference{Name: name}); !slices.Contains(spec.ImagePullSecrets, reference) {
			missing = append(missing, reference)
		}
	}
	return appendAll(ops, "/spec/imagePullSecrets", spec.ImagePullSecrets, missing)
}

// addAnnotations adds the annotations that the pod lacks. It keeps another value, which the user or earlier settings
// chose.
func (p *plan) addAnnotations(ops []Operation, pod *podview.Pod, w *warnings) []Operation {
	for _, key := range slices.Sorted(maps.Keys(p.settings.PodAnnotations)) {
		value := p.settings.PodAnnotations[key]
		if present, ok := pod.Metadata.Annotations[key]; !ok {
			ops = setKey(ops, "/metadata/annotations", pod.Metadata.Annotations, key, value)
		} else if present != value {
			w.addf("annotation %q keeps its value %.45q. The sidecar settings ask for %.45q.", key, present, value)
		}
	}
	return ops
}
