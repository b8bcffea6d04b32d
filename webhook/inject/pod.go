package inject

import (
	stdjson "encoding/json"
	"fmt"
	"slices"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/json"

	"github.com/credence-iam/credence/broker/policy"
)

// The types of this file are a view of the pod's JSON: the fields that decisions read, and no
// others. They are never encoded, so what they leave out is never lost. A nil slice or map stands for
// one that is absent or null, which the patch has to tell from an empty one.

type pod struct {
	Metadata struct {
		Name         string            `json:"name"`
		GenerateName string            `json:"generateName"`
		UID          string            `json:"uid"`
		Labels       map[string]string `json:"labels"`
		Annotations  map[string]string `json:"annotations"`
	} `json:"metadata"`
	// Spec is decoded for annotated pods only: nothing in the spec of another pod is a reason to
	// refuse it.
	Spec stdjson.RawMessage `json:"spec"`
}

type podSpec struct {
	Containers                    []container                   `json:"containers"`
	InitContainers                []container                   `json:"initContainers"`
	Volumes                       []volume                      `json:"volumes"`
	ServiceAccountName            string                        `json:"serviceAccountName"`
	DeprecatedServiceAccount      string                        `json:"serviceAccount"`
	HostNetwork                   bool                          `json:"hostNetwork"`
	OS                            *corev1.PodOS                 `json:"os"`
	NodeSelector                  map[string]string             `json:"nodeSelector"`
	Affinity                      *corev1.Affinity              `json:"affinity"`
	TerminationGracePeriodSeconds *int64                        `json:"terminationGracePeriodSeconds"`
	Resources                     *corev1.ResourceRequirements  `json:"resources"`
	ImagePullSecrets              []corev1.LocalObjectReference `json:"imagePullSecrets"`
	SecurityContext               securityContext               `json:"securityContext"`
	DNSPolicy                     corev1.DNSPolicy              `json:"dnsPolicy"`
	DNSConfig                     struct {
		Nameservers []string `json:"nameservers"`
		Searches    []string `json:"searches"`
	} `json:"dnsConfig"`
}

type container struct {
	Name          string                         `json:"name"`
	Image         string                         `json:"image"`
	Command       []string                       `json:"command"`
	Args          []string                       `json:"args"`
	Env           []corev1.EnvVar                `json:"env"`
	EnvFrom       []corev1.EnvFromSource         `json:"envFrom"`
	Ports         []corev1.ContainerPort         `json:"ports"`
	Resources     corev1.ResourceRequirements    `json:"resources"`
	VolumeMounts  []corev1.VolumeMount           `json:"volumeMounts"`
	RestartPolicy *corev1.ContainerRestartPolicy `json:"restartPolicy"`
	StartupProbe  *corev1.Probe                  `json:"startupProbe"`

	SecurityContext securityContext `json:"securityContext"`
}

// securityContext is that of a pod or of a container.
type securityContext struct {
	RunAsUser *int64 `json:"runAsUser"`
}

type volume struct {
	Name      string                        `json:"name"`
	Projected *corev1.ProjectedVolumeSource `json:"projected"`
}

// defaultServiceAccount is whom a pod runs as that names nobody.
const defaultServiceAccount = "default"

// parsePod decodes the part of a pod that tells whether it concerns us. Keys are matched by case,
// unlike those of encoding/json, because a patch addresses them by case.
func parsePod(raw []byte) (*pod, error) {
	var p pod
	if err := json.Unmarshal(raw, &p); err != nil {
		return nil, unsupported("the pod cannot be read: %v", err)
	}
	return &p, nil
}

func (p *pod) parseSpec() (*podSpec, error) {
	if len(p.Spec) == 0 {
		return nil, unsupported("the pod has no spec")
	}
	var spec podSpec
	if err := json.Unmarshal(p.Spec, &spec); err != nil {
		return nil, unsupported("the pod's spec cannot be read: %v", err)
	}
	if len(spec.Containers) == 0 {
		return nil, unsupported("the pod has no containers")
	}
	for c := range spec.all() {
		if c.Name == "" {
			return nil, unsupported("the pod has a container without a name")
		}
	}
	return &spec, nil
}

// all yields every container and init container.
func (s *podSpec) all() func(yield func(container) bool) {
	return func(yield func(container) bool) {
		for _, list := range [][]container{s.Containers, s.InitContainers} {
			for _, c := range list {
				if !yield(c) {
					return
				}
			}
		}
	}
}

func (s *podSpec) serviceAccount() string {
	// serviceAccount is the older name of the field, which the API server copies to the newer one.
	return defaultTo(defaultTo(s.ServiceAccountName, s.DeprecatedServiceAccount), defaultServiceAccount)
}

// windows reports whether the pod says that it is for Windows nodes only.
func (s *podSpec) windows() bool {
	if s.OS != nil && s.OS.Name == corev1.Windows {
		return true
	}
	for _, label := range osLabels {
		if s.NodeSelector[label] == string(corev1.Windows) {
			return true
		}
	}
	if s.Affinity == nil || s.Affinity.NodeAffinity == nil || s.Affinity.NodeAffinity.RequiredDuringSchedulingIgnoredDuringExecution == nil {
		return false
	}
	// A node has to meet one of the terms, and of that term all expressions.
	terms := s.Affinity.NodeAffinity.RequiredDuringSchedulingIgnoredDuringExecution.NodeSelectorTerms
	return len(terms) > 0 && !slices.ContainsFunc(terms, func(term corev1.NodeSelectorTerm) bool {
		return !slices.ContainsFunc(term.MatchExpressions, onlyWindows)
	})
}

// osLabels are those that kubelets give their nodes with the name of the operating system.
var osLabels = []string{corev1.LabelOSStable, "beta.kubernetes.io/os"}

func onlyWindows(r corev1.NodeSelectorRequirement) bool {
	if !slices.Contains(osLabels, r.Key) {
		return false
	}
	switch r.Operator {
	case corev1.NodeSelectorOpIn:
		return len(r.Values) == 1 && r.Values[0] == string(corev1.Windows)
	case corev1.NodeSelectorOpNotIn:
		return slices.Contains(r.Values, string(corev1.Linux))
	default:
		return false
	}
}

// guaranteed reports whether the quality-of-service class of the pod as it came is Guaranteed: every
// container has limits of CPU and memory, and requests of the same size or none, which then default
// to the limits. Pods with resources of their own get their class from those, whatever we add.
func (s *podSpec) guaranteed() bool {
	for c := range s.all() {
		for _, name := range []corev1.ResourceName{corev1.ResourceCPU, corev1.ResourceMemory} {
			limit, ok := c.Resources.Limits[name]
			if !ok || limit.IsZero() {
				return false
			}
			if request, ok := c.Resources.Requests[name]; ok && !request.Equal(limit) {
				return false
			}
		}
	}
	return true
}

// commonUser returns the user as which all containers of the pod run. It reports false if they declare different
// users, if one declares none and so runs as its image's, and for root.
//
// A kubelet makes this user the owner of projected tokens, trust bundles and pod certificates, with mode 0600 (KEP-1205,
// FsUserFrom in pkg/volume/util of Kubernetes). A sidecar with another user would take that away: a file of mode 0400
// would be root's, and one without a mode readable by all.
func (s *podSpec) commonUser() (user int64, ok bool) {
	for c := range s.all() {
		if c.Name == sidecarName {
			continue
		}
		own := c.SecurityContext.RunAsUser
		if own == nil {
			own = s.SecurityContext.RunAsUser
		}
		if own == nil || *own <= 0 || *own > maxUser || user != 0 && *own != user {
			return 0, false
		}
		user = *own
	}
	return user, user != 0
}

// mirrorAnnotation marks the API server's image of a static pod, which a kubelet runs from a file.
const mirrorAnnotation = corev1.MirrorPodAnnotationKey

// checkSupported refuses pods in which a sidecar could not do its work, or would do it for others.
func (by *plan) checkSupported(p *pod, spec *podSpec) error {
	role := by.cfg.Keys.Name(policy.Role)
	switch {
	case spec.HostNetwork:
		return unsupported("the pod has hostNetwork: every process on its node could ask the sidecar for its credentials; remove hostNetwork, or annotation %q", role)
	case spec.windows():
		return unsupported("the pod is for Windows, and the sidecar runs on Linux only: remove annotation %q", role)
	case p.Metadata.Annotations[mirrorAnnotation] != "":
		return unsupported("the pod is static: its kubelet runs it from a file, which admission cannot change; remove annotation %q there, or make it a DaemonSet", role)
	}
	for c := range spec.all() {
		for _, port := range c.Ports {
			if c.Name != sidecarName && int(port.ContainerPort) == by.settings.Port && defaultTo(port.Protocol, corev1.ProtocolTCP) == corev1.ProtocolTCP {
				return unsupported("container %q has port %d, where the sidecar listens (containers of a pod share its ports): choose another one, or give the sidecar one with annotation %q", c.Name, by.settings.Port, by.cfg.Keys.Name(policy.SidecarPort))
			}
		}
	}
	return nil
}

// checkSettings refuses lists of containers that name some which are not there, and warns of
// settings that are legal and unwise.
func (by *plan) checkSettings(spec *podSpec) (warnings []string, err error) {
	var names []string
	for c := range spec.all() {
		if c.Name != sidecarName {
			names = append(names, c.Name)
		}
	}
	missing := func(list []string) []string {
		return slices.DeleteFunc(slices.Clone(list), func(name string) bool { return slices.Contains(names, name) })
	}
	if unknown := missing(by.pod.Containers); len(unknown) > 0 {
		return nil, unsupported("annotation %q names %q, and the pod has only %q",
			by.cfg.Keys.Name(policy.Containers), unknown, names)
	}
	// A container to skip may come from a webhook that is called after this one, so that refusing
	// would be wrong; and missing one makes no container go without.
	if unknown := missing(by.pod.SkipContainers); len(unknown) > 0 {
		warnings = append(warnings, fmt.Sprintf("annotation %q names %q, which the pod does not have so far", by.cfg.Keys.Name(policy.SkipContainers), unknown))
	}
	if by.pod.Duration < policy.DefaultDuration {
		warnings = append(warnings, fmt.Sprintf("annotation %q: SDKs ask for new credentials on nearly every call when sessions are as short as %s; 1h or more is better", by.cfg.Keys.Name(policy.Duration), by.pod.Duration))
	}
	if by.pod.Duration > policy.DefaultDuration {
		warnings = append(warnings, fmt.Sprintf("annotation %q: AWS refuses sessions of %s if the broker's own credentials are those of a role, as they nearly always are; 1h is the most then", by.cfg.Keys.Name(policy.Duration), by.pod.Duration))
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
