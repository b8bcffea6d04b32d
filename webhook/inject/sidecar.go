package inject

import (
	"math"
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
	// mountPath is the path at which the API server mounts an API token, unless the container has a volume there. The
	// sidecar needs no API token, so it takes the path.
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

// zoneFieldPath is the label of a pod that has its node's zone, from Kubernetes 1.35 (KEP-4742). Without the label, the
// variable is empty.
const zoneFieldPath = "metadata.labels['" + corev1.LabelTopologyZone + "']"

// sidecar returns the sidecar, which must be the first init container. It is a native sidecar: it starts before all other
// containers, keeps running, and stops after them.
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
		// No readiness probe: it would count for the pod. If the broker is unavailable, an application with valid
		// credentials would leave its Services. No liveness probe: a restart loses the credentials and fixes nothing.
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

// sidecarEnv returns all of the sidecar's configuration. It uses variables, not arguments, because the probe is a process
// of its own and inherits variables.
func (p *plan) sidecarEnv(key policy.RoutingKey) []corev1.EnvVar {
	vars := []corev1.EnvVar{{Name: brokerEnv, Value: p.cfg.Broker}}
	if p.dnsName != "" {
		vars = append(vars, corev1.EnvVar{Name: dnsNameEnv, Value: p.dnsName})
	}
	vars = append(vars, []corev1.EnvVar{
		{Name: routingKeyEnv, Value: string(key)},
		{Name: listenEnv, Value: listenAddress(p.settings.Port)},
		{Name: tokenEnv, Value: mountPath + "/" + tokenFile},
		{Name: rootsEnv, Value: mountPath + "/" + rootsFile},
		fromUID(authorizationEnv),
		{Name: startTimeoutEnv, Value: p.requested.StartTimeout.String()},
		{Name: metadataEnv, Value: string(p.requested.Metadata)},
	}...)
	if p.settings.LogLevel != policy.LogInfo { // the sidecar's default, which most pods need not repeat
		vars = append(vars, corev1.EnvVar{Name: logLevelEnv, Value: string(p.settings.LogLevel)})
	}
	if p.requested.Metadata != policy.MetadataOff {
		vars = append(vars, fromField(zoneEnv, zoneFieldPath))
	}
	if p.requested.Scope == policy.ScopePod {
		vars = append(vars, fromUID(podUIDEnv)) // The API server has not chosen it yet.
	}
	return vars
}

const (
	// probeMargin is how much longer than the start timeout the kubelet lets the probe run. It covers the difference
	// between the two clocks: starting a process under CPU pressure, and the start of the sidecar if the probe is first.
	probeMargin = 30 * time.Second
	// endlessProbe is how long one probe may run if the start timeout is 0, which means no limit. The kubelet then stops
	// the probe and starts another; at one an hour, that costs nothing.
	endlessProbe = time.Hour
)

// startupProbe delays all other containers. One call of the probe waits until the first credentials arrive or the start
// timeout passes, and then succeeds. Meanwhile the sidecar makes some calls fail, so that the kubelet reports why there are
// no credentials; sidecars of older versions do not. The probe never fails the container: MaxInt32 failures, at most one a second, take 68
// years. The product of period and failures still fits the 32 bits in which tools multiply them.
// It is an exec probe, because the sidecar listens on loopback only, and PodSecurity refuses probes that name a host.
func startupProbe(startTimeout time.Duration) *corev1.Probe {
	timeout := startTimeout + probeMargin
	if startTimeout == 0 {
		timeout = endlessProbe
	}
	return &corev1.Probe{
		ProbeHandler: corev1.ProbeHandler{
			Exec: &corev1.ExecAction{Command: []string{contract.Binary, contract.ProbeArgument}},
		},
		// Policy limits the start timeout to a day, which fits an int32.
		TimeoutSeconds:   int32(math.Ceil(timeout.Seconds())),
		PeriodSeconds:    1, // the minimum: after a failure, the next call follows immediately
		FailureThreshold: math.MaxInt32,
	}
}

// resources returns the sidecar's requests and limits. A Guaranteed pod keeps its class. The sidecar declares no
// resource that the pod declares as a whole, but uses the pod's budget. If the requests of all containers exceed that
// budget, the API server refuses the pod.
func (p *plan) resources(spec *podview.Spec) corev1.ResourceRequirements {
	memory := *resource.NewQuantity(int64(p.settings.Memory)<<20, resource.BinarySI)
	request, limit := p.settings.CPU.Request, p.settings.CPU.Limit
	if spec.Guaranteed() {
		// A LimitRange may require the request as a minimum.
		request = max(request, p.settings.CPU.Guaranteed)
		limit = request
	}
	r := corev1.ResourceRequirements{
		// The memory request equals the limit, so a full node has no reason to kill the sidecar.
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

// volume returns the volume that only the sidecar mounts. Its token authenticates the pod to the broker, and its root
// certificates authenticate the broker. The roots are not optional: the kubelet retries a missing ConfigMap within seconds,
// but projects a late optional one after a minute.
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

// tokenSeconds returns the lifetime of the token. The kubelet renews a token at 80% of its lifetime, but not in a
// terminating pod. So at the start of the grace period, the token is valid for at least a fifth of its lifetime. After
// that, the sidecar has credentials for at least another 25 minutes. So a fifth of the lifetime must cover the grace
// period minus 25 minutes. A shorter lifetime than two hours has no benefit, and the kubelet renews each token after a
// day.
func tokenSeconds(grace *int64) int64 {
	seconds := defaultGraceSeconds
	if grace != nil {
		seconds = *grace
	}
	// The field can have any int64, so it is limited before the multiplication, too.
	seconds = min(max(seconds, 0), maxTokenSeconds)
	return min(max(5*(seconds-servedAheadSeconds), minTokenSeconds), maxTokenSeconds)
}
