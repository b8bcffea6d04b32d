package inject

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"

	"github.com/credence-iam/credence/broker/policy"
	"github.com/credence-iam/credence/sidecar/contract"
	"github.com/credence-iam/credence/webhook/inject/podview"
)

// checkPresent reports whether the pod already has the sidecar. It has one if another webhook changed the pod and the API
// server calls this webhook again, or if the manifest was injected or copied before.
//
// A forged sidecar gains nothing. Its author also chooses all other containers, and can give any of them the pod's token.
// The broker trusts that token and the annotations only, so each container of the pod can get the pod's own role, but no
// other. Nor does a broken sidecar help: the variables that injection adds send SDKs to loopback, never to the node's role.
// So checkPresent looks for mistakes: it refuses what the admission policy credence-injected would refuse, but with the fix.
// It also requires the mount, for the token, and the pod's UID as authorization: an attacker who makes an application send
// requests (SSRF) would know a constant. A manifest that was copied from another cluster must not send the pod's token to
// the broker of that cluster, and the webhook can only point containers to a sidecar on loopback. Another token or other
// roots need no check here: the broker refuses the token with an Event, and the kubelet reports a missing ConfigMap.
func (p *plan) checkPresent(spec *podview.Spec) (bool, error) {
	const fix = "remove it from the manifest, with volume %q and variables %s*; the webhook adds it to each new pod"
	if slices.ContainsFunc(spec.Containers, func(c podview.Container) bool { return c.Name == contract.ContainerName }) {
		return false, unsupported("container name %q is reserved for the sidecar that the webhook adds; choose another name", contract.ContainerName)
	}
	sidecar := spec.Sidecar()
	hasVolume := slices.ContainsFunc(spec.Volumes, func(v podview.Volume) bool { return v.Name == volumeName })
	switch {
	case sidecar == nil && !hasVolume:
		return false, nil
	case sidecar == nil:
		return false, unsupported("volume name %q is reserved for the volume that the webhook adds; remove the volume, or choose another name", volumeName)
	case !hasVolume:
		return false, unsupported("init container %q has no volume %q; "+fix, contract.ContainerName, volumeName, volumeName, containerPrefix)
	}
	if fault := p.sidecarFault(sidecar); fault != "" {
		return false, unsupported("init container %q is not the sidecar that the webhook adds: %s; "+fix, contract.ContainerName, fault, volumeName, containerPrefix)
	}
	return true, nil
}

// sidecarFault returns why c cannot be the sidecar; empty if it can. Other webhooks may add to a container, move its image
// to a mirror, or change its resources and security context.
func (p *plan) sidecarFault(c *podview.Container) string {
	authorization, broker := last(c.Env, authorizationEnv), last(c.Env, brokerEnv)
	switch {
	case splitImage(c.Image).name != splitImage(p.cfg.Image).name:
		return fmt.Sprintf("its image is %.300q, not %q", c.Image, p.cfg.Image)
	case !slices.Equal(c.Command, []string{contract.Binary}) || len(c.Args) > 0:
		return "its command differs"
	case c.RestartPolicy == nil || *c.RestartPolicy != corev1.ContainerRestartPolicyAlways:
		return "its restartPolicy is not Always"
	case !slices.ContainsFunc(c.VolumeMounts, func(m podview.VolumeMount) bool {
		return m.Name == volumeName && m.MountPath == mountPath && m.SubPath == "" && m.SubPathExpr == ""
	}):
		return fmt.Sprintf("it does not mount volume %q at %s", volumeName, mountPath)
	case authorization < 0 || !isFromUID(c.Env[authorization]):
		return fmt.Sprintf("its variable %s is not the pod's UID", authorizationEnv)
	case broker < 0 || c.Env[broker].Value != p.cfg.Broker:
		return fmt.Sprintf("its variable %s is not %q", brokerEnv, p.cfg.Broker)
	case portOf(c) == 0:
		return fmt.Sprintf("its variable %s is not 127.0.0.1:PORT", listenEnv)
	}
	return ""
}

// warnPresent warns if the sidecar has another version, or does not follow the annotations. Both can be legitimate: during
// an upgrade, webhooks of two versions may change one pod, and another webhook may change annotations in between.
func (p *plan) warnPresent(c *podview.Container, w *warnings) {
	if !splitImage(c.Image).canBe(splitImage(p.cfg.Image)) {
		w.addf("the sidecar keeps its image %.100q, not the webhook's version. Unless an upgrade is in progress, regenerate the manifest without it.", c.Image)
	}
	annotated := []corev1.EnvVar{{Name: metadataEnv, Value: string(p.requested.Metadata)}, {Name: startTimeoutEnv, Value: p.requested.StartTimeout.String()}}
	if port := p.requested.Sidecar.Port; port != 0 {
		annotated = append(annotated, corev1.EnvVar{Name: listenEnv, Value: listenAddress(port)})
	}
	for _, v := range annotated {
		if at := last(c.Env, v.Name); at >= 0 && c.Env[at].Value != v.Value {
			w.addf("the sidecar keeps %s=%.30q, but the annotations ask for %.30q. Regenerate the manifest without it.", v.Name, c.Env[at].Value, v.Value)
		}
	}
}

// presentPort returns the port of the sidecar that the pod already has; 0 if there is none.
func presentPort(spec *podview.Spec) int {
	if c := spec.Sidecar(); c != nil {
		return portOf(c)
	}
	return 0
}

// portOf returns the port of a sidecar; 0 if it does not listen on loopback, or if no webhook could have chosen its port.
func portOf(c *podview.Container) int {
	at := last(c.Env, listenEnv)
	if at < 0 {
		return 0
	}
	_, digits, _ := strings.Cut(c.Env[at].Value, ":")
	port, err := strconv.Atoi(digits)
	if err != nil || listenAddress(port) != c.Env[at].Value || policy.CheckPort(port) != nil {
		return 0
	}
	return port
}

type image struct{ name, tag, digest string }

// canBe reports whether i can be the image other after another webhook moved it to a mirror or pinned its tag to a
// digest. Then the last component of the name is the same. Tag and digest are the same, too, if both images have them.
func (i image) canBe(other image) bool {
	same := func(x, y string) bool { return x == y || x == "" || y == "" }
	untagged := func(x image) bool { return x.tag == "" && x.digest == "" }
	return i.name == other.name && untagged(i) == untagged(other) && same(i.tag, other.tag) && same(i.digest, other.digest)
}

func splitImage(s string) (i image) {
	s, i.digest, _ = strings.Cut(s, "@")
	s = s[strings.LastIndexByte(s, '/')+1:]
	i.name, i.tag, _ = strings.Cut(s, ":")
	return i
}
