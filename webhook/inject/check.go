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

// mirrorAnnotation marks the API server's copy of a static pod, which the kubelet runs from a file.
const mirrorAnnotation = corev1.MirrorPodAnnotationKey

// checkSupported refuses pods in which a sidecar could not serve, or would serve other pods too.
func (p *plan) checkSupported(pod *podview.Pod, spec *podview.Spec) error {
	role := p.cfg.Keys.Name(policy.Role)
	switch {
	case spec.HostNetwork:
		return unsupported("the pod has hostNetwork, so every process on its node could get its credentials from the sidecar; remove hostNetwork, or annotation %q", role)
	case spec.Windows():
		return unsupported("the pod is for Windows, and the sidecar runs on Linux only; remove annotation %q", role)
	case pod.Metadata.Annotations[mirrorAnnotation] != "":
		return unsupported("the pod is static: the kubelet runs it from a file, which admission cannot change; remove annotation %q from the file, or make the pod a DaemonSet", role)
	}
	for c := range spec.All() {
		for _, port := range c.Ports {
			if c.Name != contract.ContainerName && int(port.ContainerPort) == p.settings.Port && cmp.Or(port.Protocol, corev1.ProtocolTCP) == corev1.ProtocolTCP {
				return unsupported("container %q has port %d, on which the sidecar listens, and containers of a pod share ports; change the port, or set the sidecar's with annotation %q", c.Name, p.settings.Port, p.cfg.Keys.Name(policy.SidecarPort))
			}
		}
	}
	return nil
}

// checkLists refuses a list of containers with a name that the pod lacks.
func (p *plan) checkLists(spec *podview.Spec, w *warnings) error {
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
		return unsupported("annotation %q names %.100q, and the pod has only %q%s; correct the name",
			p.cfg.Keys.Name(policy.Containers), unknown[:min(len(unknown), shown)], names[:min(len(names), shown)], more)
	}
	// Another webhook may add a skipped container later, so this is no reason to refuse. Nor does any container lose its
	// credentials by it.
	if unknown := missing(p.requested.SkipContainers); len(unknown) > 0 {
		w.addf("annotation %q names container %.63q, which the pod lacks. Check the name, unless another webhook adds the container.", p.cfg.Keys.Name(policy.SkipContainers), unknown[0])
	}
	return nil
}

// warnDuration warns of session durations that are valid, but rarely useful.
func (p *plan) warnDuration(w *warnings) {
	key, duration := p.cfg.Keys.Name(policy.Duration), p.requested.Duration
	if duration < policy.DefaultDuration {
		w.addf("annotation %q: with sessions of %s, SDKs request new credentials on nearly every call. Set 1h or more.", key, duration)
	}
	if duration > policy.DefaultDuration {
		w.addf("annotation %q: AWS refuses sessions of %s if the broker's own credentials are those of a role, as they nearly always are. Set 1h then.", key, duration)
	}
}

// selected reports whether the user wants credentials in the container. It is no security boundary: the containers of a
// pod share the loopback interface on which the sidecar listens.
func selected(name string, requested policy.Settings) bool {
	if len(requested.Containers) > 0 {
		return slices.Contains(requested.Containers, name)
	}
	return !slices.Contains(requested.SkipContainers, name)
}
