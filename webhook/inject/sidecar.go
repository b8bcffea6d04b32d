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
		{Name: listenEnv, Value: listenAddress(p.settings.Port)},
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
