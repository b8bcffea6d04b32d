package inject

import (
	"cmp"
	"fmt"
	"math"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"

	"github.com/credence-iam/credence/broker/policy"
	"github.com/credence-iam/credence/sidecar/contract"
	"github.com/credence-iam/credence/webhook/inject/podview"
)

// The volume of the sidecar.
const (
	volumeName = "credence-identity"
	// mountPath is where the API server would mount an API token into every container that has
	// nothing there. The sidecar needs none, and so gets none.
	mountPath = "/var/run/secrets/kubernetes.io/serviceaccount"
	tokenFile = "token"
	rootsFile = "roots.pem"
)

// Environment variables of the sidecar.
var (
	brokerEnv        = contract.Env(contract.Broker)
	dnsNameEnv       = contract.Env(contract.BrokerDNSName)
	routingKeyEnv    = contract.Env(contract.RoutingKey)
	podUIDEnv        = contract.Env(contract.PodUID)
	listenEnv        = contract.Env(contract.Listen)
	tokenEnv         = contract.Env(contract.TokenFile)
	rootsEnv         = contract.Env(contract.RootsFile)
	authorizationEnv = contract.Env(contract.Authorization)
	startTimeoutEnv  = contract.Env(contract.StartTimeout)
	metadataEnv      = contract.Env(contract.Metadata)
	logLevelEnv      = contract.Env(contract.LogLevel)
	zoneEnv          = contract.Env(contract.Zone)
)

// everyVersion are the variables without which no version of the sidecar serves anybody.
var everyVersion = []string{brokerEnv, listenEnv, tokenEnv, rootsEnv, authorizationEnv}

// zoneFieldPath is the label of a pod that has its node's zone, from Kubernetes 1.35 on (KEP-4742). A pod without
// it finds the variable zone empty.
const zoneFieldPath = "metadata.labels['" + corev1.LabelTopologyZone + "']"

// sidecar returns the container to put first among the init containers: a native sidecar, that is one
// which starts before all others, stays, and is ended after them.
func (p *plan) sidecar(spec *podview.Spec, namespace string) corev1.Container {
	var user *int64
	if p.settings.RunAsUser != PlatformUser {
		user = new(p.settings.RunAsUser)
		if common, ok := spec.CommonUser(); ok {
			user = new(common)
		}
	}
	return corev1.Container{
		Name:            contract.ContainerName,
		Image:           p.cfg.Image,
		ImagePullPolicy: p.settings.ImagePullPolicy,
		Command:         []string{contract.Binary},
		Env:             p.sidecarEnv(p.requested.RoutingKey(namespace, spec.ServiceAccount())),
		Resources:       p.resources(spec),
		VolumeMounts:    []corev1.VolumeMount{{Name: volumeName, MountPath: mountPath, ReadOnly: true}},
		RestartPolicy:   new(corev1.ContainerRestartPolicyAlways),
		StartupProbe:    startupProbe(p.requested.StartTimeout),
		// No readiness probe: it would count for the pod, and take an application that holds valid
		// credentials out of its Services while the broker is away. No liveness probe: a restart
		// loses the credentials, and mends nothing.
		TerminationMessagePolicy: corev1.TerminationMessageFallbackToLogsOnError,
		SecurityContext: &corev1.SecurityContext{
			RunAsNonRoot:             new(true),
			RunAsUser:                user,
			AllowPrivilegeEscalation: new(false),
			ReadOnlyRootFilesystem:   new(true),
			Capabilities:             &corev1.Capabilities{Drop: []corev1.Capability{"ALL"}},
			SeccompProfile:           &corev1.SeccompProfile{Type: corev1.SeccompProfileTypeRuntimeDefault},
		},
	}
}

// sidecarEnv is all of the sidecar's configuration: in variables and not in arguments, because the
// probe, which is a process of its own, inherits them.
func (p *plan) sidecarEnv(key policy.RoutingKey) []corev1.EnvVar {
	vars := []corev1.EnvVar{{Name: brokerEnv, Value: p.cfg.Broker}}
	if p.dnsName != "" {
		vars = append(vars, corev1.EnvVar{Name: dnsNameEnv, Value: p.dnsName})
	}
	vars = append(vars, []corev1.EnvVar{
		{Name: routingKeyEnv, Value: string(key)},
		{Name: listenEnv, Value: strings.TrimPrefix(p.endpoint, "http://")},
		{Name: tokenEnv, Value: mountPath + "/" + tokenFile},
		{Name: rootsEnv, Value: mountPath + "/" + rootsFile},
		fromUID(authorizationEnv),
		{Name: startTimeoutEnv, Value: p.requested.StartTimeout.String()},
		{Name: metadataEnv, Value: string(p.requested.Metadata)},
	}...)
	if p.settings.LogLevel != policy.LogInfo { // its own default, which most pods need not carry
		vars = append(vars, corev1.EnvVar{Name: logLevelEnv, Value: string(p.settings.LogLevel)})
	}
	if p.requested.Metadata != policy.MetadataOff {
		vars = append(vars, fromField(zoneEnv, zoneFieldPath))
	}
	if p.requested.Scope == policy.ScopePod {
		vars = append(vars, fromUID(podUIDEnv)) // which the API server has not chosen yet
	}
	return vars
}

const (
	// probeMargin is how much longer than the start timeout the kubelet lets the probe run. It covers
	// what lies between the two clocks: starting a process under CPU pressure, and the sidecar's own
	// start if the probe comes first.
	probeMargin = 30 * time.Second
	// endlessProbe is how long one probe may run when the start timeout is 0, for ever. The kubelet
	// then ends the probe and starts another; an hour makes that too rare to cost anything.
	endlessProbe = time.Hour
)

// startupProbe holds back all other containers until the sidecar says that they may start. The
// waiting is done inside the call, which succeeds with the first credentials, or when the start
// timeout has passed. It never fails the container: MaxInt32 failures, one per second at most, take
// 68 years, and their product still fits the 32 bits in which tools multiply the two.
// It is an exec because PodSecurity refuses probes that name a host, and only loopback is listened on.
func startupProbe(startTimeout time.Duration) *corev1.Probe {
	timeout := startTimeout + probeMargin
	if startTimeout == 0 {
		timeout = endlessProbe
	}
	return &corev1.Probe{
		ProbeHandler: corev1.ProbeHandler{
			Exec: &corev1.ExecAction{Command: []string{contract.Binary, contract.ProbeArgument}},
		},
		// Policy bounds the start timeout to a day, far from what int32 holds.
		TimeoutSeconds:   int32(math.Ceil(timeout.Seconds())),
		PeriodSeconds:    1, // the least there is: the next call follows at once on one that failed
		FailureThreshold: math.MaxInt32,
	}
}

// resources returns the sidecar's requests and limits. A pod that would be of class Guaranteed
// remains so. Of a resource that the pod as a whole declares, the sidecar declares nothing: it lives
// on that budget, which the API server requires to cover the sum of all containers' requests.
func (p *plan) resources(spec *podview.Spec) corev1.ResourceRequirements {
	memory := *resource.NewQuantity(int64(p.settings.Memory)<<20, resource.BinarySI)
	request, limit := p.settings.CPU.Request, p.settings.CPU.Limit
	if spec.Guaranteed() {
		// Not below the request, which may be there for the minimum of a LimitRange.
		request = max(request, p.settings.CPU.Guaranteed)
		limit = request
	}
	r := corev1.ResourceRequirements{
		// Of memory the request is the limit, so that a full node has no reason to kill the sidecar.
		Requests: corev1.ResourceList{corev1.ResourceCPU: processors(request), corev1.ResourceMemory: memory},
		Limits:   corev1.ResourceList{corev1.ResourceMemory: memory},
	}
	if limit != 0 {
		r.Limits[corev1.ResourceCPU] = processors(limit)
	}
	for _, whole := range []podview.Amounts{spec.Resources.Requests, spec.Resources.Limits} {
		for name, declared := range map[corev1.ResourceName]*podview.Quantity{corev1.ResourceCPU: whole.CPU, corev1.ResourceMemory: whole.Memory} {
			if declared != nil {
				delete(r.Requests, name)
				delete(r.Limits, name)
			}
		}
	}
	return r
}

func processors(c policy.CPU) resource.Quantity {
	return *resource.NewMilliQuantity(int64(c), resource.DecimalSI)
}

// volume returns what the sidecar alone mounts: the token that proves to the broker which pod this
// is, and the roots by which the broker proves itself. The roots are not optional: the kubelet
// retries a ConfigMap that is missing within seconds, and shows a late optional one after a minute.
func (p *plan) volume(spec *podview.Spec) corev1.Volume {
	return corev1.Volume{
		Name: volumeName,
		VolumeSource: corev1.VolumeSource{Projected: &corev1.ProjectedVolumeSource{
			Sources: []corev1.VolumeProjection{
				{ServiceAccountToken: &corev1.ServiceAccountTokenProjection{
					Audience:          p.cfg.Audience,
					ExpirationSeconds: new(tokenSeconds(spec.TerminationGracePeriodSeconds)),
					Path:              tokenFile,
				}},
				{ConfigMap: &corev1.ConfigMapProjection{
					LocalObjectReference: corev1.LocalObjectReference{Name: p.cfg.TrustConfigMap},
					Items:                []corev1.KeyToPath{{Key: rootsFile, Path: rootsFile}},
				}},
			},
		}},
	}
}

const (
	minTokenSeconds     = int64(2 * time.Hour / time.Second)
	maxTokenSeconds     = int64(24 * time.Hour / time.Second)
	servedAheadSeconds  = int64(25 * time.Minute / time.Second)
	defaultGraceSeconds = int64(corev1.DefaultTerminationGracePeriodSeconds)
)

// tokenSeconds returns how long the token is valid for. The kubelet renews a token at 80 % of its life,
// but no longer once the pod is terminating: for the whole grace period, the sidecar then has the
// last fifth of a life to rely on, and after it the credentials it still holds, which are good for at
// least 25 minutes. So a fifth of the life must cover the grace period but for 25 minutes. Less than
// two hours gains nothing; more than a day is more than the kubelet lets a token grow old.
func tokenSeconds(grace *int64) int64 {
	seconds := defaultGraceSeconds
	if grace != nil {
		seconds = *grace
	}
	// Clamped before it is multiplied, too: the field holds any int64.
	seconds = min(max(seconds, 0), maxTokenSeconds)
	return min(max(5*(seconds-servedAheadSeconds), minTokenSeconds), maxTokenSeconds)
}

// checkPresent reports whether the pod has our sidecar and our volume already, as it has when we are
// called again because another webhook changed it. What goes by our names and would not work is
// refused, not replaced: it is the user's until they remove it. It comes from a manifest that was
// copied from a running pod, perhaps of an older version; a forged one would gain nothing, because
// the broker believes tokens and annotations only.
func (p *plan) checkPresent(spec *podview.Spec) (bool, error) {
	const mend = "the webhook adds it to each new pod, so remove it from the manifest, with volume %q and variables %s*"
	for _, c := range spec.Containers {
		if c.Name == contract.ContainerName {
			return false, unsupported("container name %q is taken by the sidecar that the webhook adds: choose another one", contract.ContainerName)
		}
	}
	c := slices.IndexFunc(spec.InitContainers, func(c podview.Container) bool { return c.Name == contract.ContainerName })
	v := slices.IndexFunc(spec.Volumes, func(v podview.Volume) bool { return v.Name == volumeName })
	switch {
	case c < 0 && v < 0:
		return false, nil
	case c < 0:
		return false, unsupported("volume name %q is taken by the volume that the webhook adds: remove it from the manifest, or choose another name", volumeName)
	case v < 0:
		return false, unsupported("init container %q has no volume %q: "+mend, contract.ContainerName, volumeName, volumeName, containerPrefix)
	}
	difference := cmp.Or(
		p.sidecarDifference(spec.InitContainers[c]),
		p.volumeDifference(spec.Volumes[v]),
	)
	if difference != "" {
		return false, unsupported("init container %q is not the one that this version of the webhook adds (%s): "+mend,
			contract.ContainerName, difference, volumeName, containerPrefix)
	}
	return true, nil
}

// sidecarDifference names what keeps c from doing what our sidecar does, or is empty. Other webhooks
// and defaults may add to a container, move its image to a mirror, or change its resources and its
// security context: that is theirs to do. It may be of another version, see anotherVersion, and then have variables that
// this one does not know, or lack some. So may settings, which can have changed since. Webhooks may also change the
// service account or an annotation, and with it the routing key; an old one costs a session that is fetched more often
// than need be, and the pod nothing.
func (p *plan) sidecarDifference(c podview.Container) string {
	there, asked := splitImage(c.Image), splitImage(p.cfg.Image)
	switch {
	case there.name != asked.name:
		return fmt.Sprintf("its image is %.300q, not %q", c.Image, p.cfg.Image)
	case !slices.Equal(c.Command, []string{contract.Binary}) || len(c.Args) > 0:
		return "its command differs"
	case c.RestartPolicy == nil || *c.RestartPolicy != corev1.ContainerRestartPolicyAlways:
		return "its restartPolicy is not Always"
	case c.StartupProbe == nil || c.StartupProbe.Exec == nil || !slices.Equal(c.StartupProbe.Exec.Command, []string{contract.Binary, contract.ProbeArgument}):
		return "its startupProbe differs"
	case !slices.ContainsFunc(c.VolumeMounts, func(m podview.VolumeMount) bool {
		return m.Name == volumeName && m.MountPath == mountPath && m.SubPath == "" && m.SubPathExpr == ""
	}):
		return fmt.Sprintf("it does not mount volume %q at %s", volumeName, mountPath)
	}
	known := p.sidecarEnv("")
	want := slices.Clone(known)
	// Whether the UID is a part of the routing key is compared no more than the key is.
	want = slices.DeleteFunc(want, func(v corev1.EnvVar) bool { return v.Name == podUIDEnv })
	if has(c, podUIDEnv) {
		want = append(want, fromUID(podUIDEnv))
	}
	// A webhook of another version may not have added it, and may have had the same sidecar; nobody misses a zone.
	if !has(c, zoneEnv) {
		want = slices.DeleteFunc(want, func(v corev1.EnvVar) bool { return v.Name == zoneEnv })
	}
	// The cluster's domain may not have been known when it was written, or not be known here.
	want = slices.DeleteFunc(want, func(v corev1.EnvVar) bool { return v.Name == dnsNameEnv })
	if at := slices.IndexFunc(c.Env, func(v corev1.EnvVar) bool { return v.Name == dnsNameEnv }); at >= 0 && p.canBeDNSName(c.Env[at].Value) {
		want = append(want, corev1.EnvVar{Name: dnsNameEnv, Value: c.Env[at].Value})
	}
	another := !there.canBe(asked)
	// The settings, and an annotation, may have had another level when it was written. It changes what is logged, and
	// nothing of what the sidecar does.
	want = slices.DeleteFunc(want, func(v corev1.EnvVar) bool { return v.Name == logLevelEnv })
	if at := slices.IndexFunc(c.Env, func(v corev1.EnvVar) bool { return v.Name == logLevelEnv }); at >= 0 && policy.LogLevel(c.Env[at].Value).Check() == nil {
		want = append(want, corev1.EnvVar{Name: logLevelEnv, Value: c.Env[at].Value})
	}
	for _, v := range c.Env {
		if !strings.HasPrefix(v.Name, contract.EnvPrefix) {
			continue
		}
		at := slices.IndexFunc(want, func(w corev1.EnvVar) bool { return w.Name == v.Name })
		if at < 0 && another && !slices.ContainsFunc(known, func(w corev1.EnvVar) bool { return w.Name == v.Name }) {
			continue // what that version has and this one does not
		}
		if at < 0 || v.Value != want[at].Value && v.Name != routingKeyEnv || fieldPath(v) != fieldPath(want[at]) {
			return fmt.Sprintf("its variable %.100s differs", v.Name)
		}
		// Taken off the list, so that a second one of the same name differs.
		want = slices.Delete(want, at, at+1)
	}
	if another {
		want = slices.DeleteFunc(want, func(v corev1.EnvVar) bool { return !slices.Contains(everyVersion, v.Name) })
	}
	if len(want) > 0 {
		return fmt.Sprintf("it lacks variable %s", want[0].Name)
	}
	return ""
}

// volumeDifference names what keeps v from holding what our volume holds, or is empty. The life of
// the token is not compared: another webhook may have changed the grace period since.
func (p *plan) volumeDifference(v podview.Volume) string {
	if v.Projected == nil || len(v.Projected.Sources) != 2 {
		return fmt.Sprintf("volume %q is not its volume", volumeName)
	}
	token, roots := v.Projected.Sources[0].ServiceAccountToken, v.Projected.Sources[1].ConfigMap
	switch {
	case token == nil || token.Audience != p.cfg.Audience || token.Path != tokenFile:
		return fmt.Sprintf("the token in volume %q differs", volumeName)
	case roots == nil || roots.Name != p.cfg.TrustConfigMap || roots.Optional != nil && *roots.Optional || len(roots.Items) != 1 ||
		roots.Items[0].Key != rootsFile || roots.Items[0].Path != rootsFile:
		return fmt.Sprintf("the roots in volume %q differ", volumeName)
	}
	return ""
}

// anotherVersion returns the image of a sidecar that is there and is of another version than this webhook's; empty for
// none. While webhooks are replaced, two versions of them are called for one pod where another webhook changes it in
// between.
func (p *plan) anotherVersion(spec *podview.Spec) string {
	c := slices.IndexFunc(spec.InitContainers, func(c podview.Container) bool { return c.Name == contract.ContainerName })
	if c < 0 || splitImage(spec.InitContainers[c].Image).canBe(splitImage(p.cfg.Image)) {
		return ""
	}
	return spec.InitContainers[c].Image
}

type image struct{ name, tag, digest string }

// canBe reports whether i can be the image other, after a webhook that moves images to a mirror or pins tags to
// digests: the last component of its name is the same, and so are tag and digest where both have one.
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
