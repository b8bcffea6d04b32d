package inject

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strconv"

	corev1 "k8s.io/api/core/v1"

	"github.com/credence-iam/credence/broker/policy"
	"github.com/credence-iam/credence/webhook/inject/podview"
)

// plan is what one pod is injected by: what the webhook is configured with, its settings at this moment, and what
// the pod's annotations make of them. It is made anew for each pod and is not changed, so that settings which
// come in meanwhile are for the next one.
type plan struct {
	cfg       *Config
	requested policy.Settings // what the pod's annotations say
	settings  Settings        // but for what pod says otherwise
	endpoint  string          // http://127.0.0.1:PORT
	dns       DNS
	dnsName   string // full name of the brokers, with its final dot; empty: it is not known, or there is no other than Config.Broker has
}

func (i *Injector) newPlan(requested policy.Settings, spec *podview.Spec) *plan {
	p := &plan{cfg: &i.cfg, requested: requested, settings: *i.settings.Load(), dns: *i.dns.Load()}
	p.dnsName = p.dns.fullName(i.cfg.Broker)
	s := &p.settings
	s.Memory = cmp.Or(requested.Sidecar.Memory, s.Memory)
	s.LogLevel = cmp.Or(requested.Sidecar.LogLevel, s.LogLevel)
	s.CPU = s.CPU.changed(requested.Sidecar)
	// If the pod already has a sidecar, its containers have its port in their environment.
	s.Port = cmp.Or(presentPort(spec), requested.Sidecar.Port, s.Port)
	p.endpoint = "http://" + listenAddress(s.Port)
	return p
}

// listenAddress returns the address that the sidecar serves on. It is a literal of 127.0.0.1, the only form of loopback
// that all SDKs accept.
func listenAddress(port int) string { return "127.0.0.1:" + strconv.Itoa(port) }

// changed returns what c is in a pod that says something of it. Of request and limit, what is said moves the
// other, so that neither half of a pair refuses the pod.
func (c CPU) changed(overrides policy.Sidecar) CPU {
	if overrides.CPURequest != 0 {
		c.Request = overrides.CPURequest
		// No less than what a guarantee needs as a limit.
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

// addPullSecrets adds those that the pod does not have behind those it has: what is in a pod that names none
// comes from its service account, and from the API server before it calls webhooks.
func (p *plan) addPullSecrets(ops []Operation, spec *podview.Spec) []Operation {
	var missing []corev1.LocalObjectReference
	for _, name := range p.settings.ImagePullSecrets {
		if reference := (corev1.LocalObjectReference{Name: name}); !slices.Contains(spec.ImagePullSecrets, reference) {
			missing = append(missing, reference)
		}
	}
	return appendAll(ops, "/spec/imagePullSecrets", spec.ImagePullSecrets, missing)
}

// addAnnotations adds those that the pod does not have. Another value is somebody's intention, or that of settings
// before, and stays.
func (p *plan) addAnnotations(ops []Operation, pod *podview.Pod) (_ []Operation, warnings []string) {
	for _, key := range slices.Sorted(maps.Keys(p.settings.PodAnnotations)) {
		value := p.settings.PodAnnotations[key]
		if there, ok := pod.Metadata.Annotations[key]; !ok {
			ops = setKey(ops, "/metadata/annotations", pod.Metadata.Annotations, key, value)
		} else if there != value {
			warnings = append(warnings, fmt.Sprintf("annotation %q is %.50q and stays so, where the settings of the sidecar have %.50q", key, there, value))
		}
	}
	return ops, warnings
}
