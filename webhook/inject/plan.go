package inject

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"

	"github.com/credence-iam/credence/broker/policy"
)

// plan is what one pod is injected by: what the webhook is configured with, its settings at this moment, and what
// the pod's annotations make of them. It is made anew for each pod and is not changed, so that settings which
// come in meanwhile are for the next one.
type plan struct {
	cfg      *Config
	pod      policy.Settings // what the pod's annotations say
	settings Settings        // but for what pod says otherwise
	endpoint string          // http://127.0.0.1:PORT
	dns      DNS
	dnsName  string // full name of the brokers, with its final dot; empty: it is not known, or there is no other than Config.Broker has
}

func (i *Injector) newPlan(pod policy.Settings, spec *podSpec) *plan {
	by := &plan{cfg: &i.cfg, pod: pod, settings: *i.settings.Load(), dns: *i.dns.Load()}
	by.dnsName = by.dns.fullName(i.cfg.Broker)
	s := &by.settings
	s.Memory = defaultTo(pod.Sidecar.Memory, s.Memory)
	s.LogLevel = defaultTo(pod.Sidecar.LogLevel, s.LogLevel)
	s.CPU = s.CPU.changed(pod.Sidecar)
	switch listens := spec.sidecarPort(); {
	case pod.Sidecar.Port != 0:
		s.Port = pod.Sidecar.Port
	case listens != 0:
		// Called again: the sidecar is there since before the settings were changed, or is of a webhook beside
		// this one that has others. Its containers have that port in their environment.
		s.Port = listens
	}
	by.endpoint = loopback + strconv.Itoa(s.Port)
	return by
}

const loopback = "http://127.0.0.1:"

// sidecarPort returns the port of a sidecar that is there already; 0 if there is none, or it has none that a
// webhook could have given it.
func (s *podSpec) sidecarPort() int {
	c := slices.IndexFunc(s.InitContainers, func(c container) bool { return c.Name == sidecarName })
	if c < 0 {
		return 0
	}
	at := slices.IndexFunc(s.InitContainers[c].Env, func(v corev1.EnvVar) bool { return v.Name == listenEnv })
	if at < 0 {
		return 0
	}
	digits, ok := strings.CutPrefix("http://"+s.InitContainers[c].Env[at].Value, loopback)
	port, err := strconv.Atoi(digits)
	if !ok || err != nil || strconv.Itoa(port) != digits || policy.CheckPort(port) != nil {
		return 0
	}
	return port
}

// changed returns what c is in a pod that says something of it. Of request and limit, what is said moves the
// other, so that neither half of a pair refuses the pod.
func (c CPU) changed(pod policy.Sidecar) CPU {
	if pod.CPURequest != 0 {
		c.Request = pod.CPURequest
		// No less than what a guarantee needs as a limit.
		c.Guaranteed = max(pod.CPURequest, policy.MinCPULimit)
		if c.Limit != 0 {
			c.Limit = max(c.Limit, c.Request)
		}
	}
	if limit := pod.CPULimit; limit != nil {
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
func (by *plan) addPullSecrets(ops []Operation, spec *podSpec) []Operation {
	var missing []corev1.LocalObjectReference
	for _, name := range by.settings.ImagePullSecrets {
		if reference := (corev1.LocalObjectReference{Name: name}); !slices.Contains(spec.ImagePullSecrets, reference) {
			missing = append(missing, reference)
		}
	}
	return appendAll(ops, "/spec/imagePullSecrets", spec.ImagePullSecrets, missing)
}

// addAnnotations adds those that the pod does not have. Another value is somebody's intention, or that of settings
// before, and stays.
func (by *plan) addAnnotations(ops []Operation, p *pod) (_ []Operation, warnings []string) {
	for _, key := range slices.Sorted(maps.Keys(by.settings.PodAnnotations)) {
		value := by.settings.PodAnnotations[key]
		if there, ok := p.Metadata.Annotations[key]; !ok {
			ops = setKey(ops, "/metadata/annotations", p.Metadata.Annotations, key, value)
		} else if there != value {
			warnings = append(warnings, fmt.Sprintf("annotation %q is %.50q and stays so, where the settings of the sidecar have %.50q", key, there, value))
		}
	}
	return ops, warnings
}
