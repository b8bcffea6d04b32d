package inject

import (
	"cmp"
	"fmt"
	"slices"

	corev1 "k8s.io/api/core/v1"

	"github.com/credence-iam/credence/broker/policy"
	"github.com/credence-iam/credence/sidecar/contract"
	"github.com/credence-iam/credence/webhook/inject/podview"
)

// mirrorAnnotation marks the API server's image of a static pod, which a kubelet runs from a file.
const mirrorAnnotation = corev1.MirrorPodAnnotationKey

// checkSupported refuses pods in which a sidecar could not do its work, or would do it for others.
func (p *plan) checkSupported(pod *podview.Pod, spec *podview.Spec) error {
	role := p.cfg.Keys.Name(policy.Role)
	switch {
	case spec.HostNetwork:
		return unsupported("the pod has hostNetwork: every process on its node could ask the sidecar for its credentials; remove hostNetwork, or annotation %q", role)
	case spec.Windows():
		return unsupported("the pod is for Windows, and the sidecar runs on Linux only: remove annotation %q", role)
	case pod.Metadata.Annotations[mirrorAnnotation] != "":
		return unsupported("the pod is static: its kubelet runs it from a file, which admission cannot change; remove annotation %q there, or make it a DaemonSet", role)
	}
	for c := range spec.All() {
		for _, port := range c.Ports {
			if c.Name != contract.ContainerName && int(port.ContainerPort) == p.settings.Port && cmp.Or(port.Protocol, corev1.ProtocolTCP) == corev1.ProtocolTCP {
				return unsupported("container %q has port %d, where the sidecar listens (containers of a pod share its ports): choose another one, or give the sidecar one with annotation %q", c.Name, p.settings.Port, p.cfg.Keys.Name(policy.SidecarPort))
			}
		}
	}
	return nil
}

// checkSettings refuses lists of containers that name some which are not there, and warns of
// settings that are legal and unwise.
func (p *plan) checkSettings(spec *podview.Spec) (warnings []string, err error) {
	var names []string
	for c := range spec.All() {
		if c.Name != contract.ContainerName {
			names = append(names, c.Name)
		}
	}
	const shown = 20
	missing := func(list []string) []string {
		return slices.DeleteFunc(slices.Clone(list), func(name string) bool { return slices.Contains(names, name) })
	}
	if unknown := missing(p.requested.Containers); len(unknown) > 0 {
		more := ""
		if len(names) > shown {
			more = fmt.Sprintf(" and %d more", len(names)-shown)
		}
		return nil, unsupported("annotation %q names %.100q, and the pod has only %q%s",
			p.cfg.Keys.Name(policy.Containers), unknown[:min(len(unknown), shown)], names[:min(len(names), shown)], more)
	}
	// A container to skip may come from a webhook that is called after this one, so that refusing
	// would be wrong; and missing one makes no container go without.
	if unknown := missing(p.requested.SkipContainers); len(unknown) > 0 {
		warnings = append(warnings, fmt.Sprintf("annotation %q names %.100q, which the pod does not have so far", p.cfg.Keys.Name(policy.SkipContainers), unknown[:min(len(unknown), shown)]))
	}
	if p.requested.Duration < policy.DefaultDuration {
		warnings = append(warnings, fmt.Sprintf("annotation %q: SDKs ask for new credentials on nearly every call when sessions are as short as %s; 1h or more is better", p.cfg.Keys.Name(policy.Duration), p.requested.Duration))
	}
	if p.requested.Duration > policy.DefaultDuration {
		warnings = append(warnings, fmt.Sprintf("annotation %q: AWS refuses sessions of %s if the broker's own credentials are those of a role, as they nearly always are; 1h is the most then", p.cfg.Keys.Name(policy.Duration), p.requested.Duration))
	}
	return warnings, nil
}

// selected reports whether the user wants the container to have credentials. That is no boundary:
// the containers of a pod share the loopback interface that the sidecar listens on.
func selected(name string, settings policy.Settings) bool {
	if len(settings.Containers) > 0 {
		return slices.Contains(settings.Containers, name)
	}
	return !slices.Contains(settings.SkipContainers, name)
}
