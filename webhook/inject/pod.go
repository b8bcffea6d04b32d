package inject

import (
	"bytes"
	stdjson "encoding/json"
	"fmt"
	"regexp"
	"slices"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
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
	Containers                    containers                        `json:"containers"`
	InitContainers                containers                        `json:"initContainers"`
	Volumes                       list[volume]                      `json:"volumes"`
	ServiceAccountName            string                            `json:"serviceAccountName"`
	DeprecatedServiceAccount      string                            `json:"serviceAccount"`
	HostNetwork                   bool                              `json:"hostNetwork"`
	OS                            *corev1.PodOS                     `json:"os"`
	NodeSelector                  map[string]string                 `json:"nodeSelector"`
	Affinity                      affinity                          `json:"affinity"`
	TerminationGracePeriodSeconds *int64                            `json:"terminationGracePeriodSeconds"`
	Resources                     resources                         `json:"resources"`
	ImagePullSecrets              list[corev1.LocalObjectReference] `json:"imagePullSecrets"`
	SecurityContext               securityContext                   `json:"securityContext"`
	DNSPolicy                     corev1.DNSPolicy                  `json:"dnsPolicy"`
	DNSConfig                     struct {
		Nameservers list[string] `json:"nameservers"`
		Searches    list[string] `json:"searches"`
	} `json:"dnsConfig"`
}

type container struct {
	Name          string                         `json:"name"`
	Image         string                         `json:"image"`
	Command       list[string]                   `json:"command"`
	Args          list[string]                   `json:"args"`
	Env           environment                    `json:"env"`
	EnvFrom       list[struct{}]                 `json:"envFrom"`
	Ports         list[port]                     `json:"ports"`
	Resources     resources                      `json:"resources"`
	VolumeMounts  list[volumeMount]              `json:"volumeMounts"`
	RestartPolicy *corev1.ContainerRestartPolicy `json:"restartPolicy"`
	StartupProbe  *struct {
		Exec *struct {
			Command list[string] `json:"command"`
		} `json:"exec"`
	} `json:"startupProbe"`

	SecurityContext securityContext `json:"securityContext"`
}

// environment has those fields of variables that decisions read: names, values, and the field of the pod that a value
// comes from. A variable that takes its value from elsewhere has a ValueFrom without a FieldRef. The rest is not decoded,
// because reading a [resource.Quantity], such as the divisor of a resourceFieldRef, can take minutes.
type environment []corev1.EnvVar

// UnmarshalJSON implements the interface of encoding/json.
func (e *environment) UnmarshalJSON(raw []byte) error {
	var view list[struct {
		Name      string `json:"name"`
		Value     string `json:"value"`
		ValueFrom *struct {
			FieldRef *struct {
				FieldPath string `json:"fieldPath"`
			} `json:"fieldRef"`
		} `json:"valueFrom"`
	}]
	if err := view.UnmarshalJSON(raw); err != nil {
		return err
	}
	*e = nil
	if view == nil {
		return nil
	}
	*e = make(environment, len(view))
	for at, v := range view {
		(*e)[at] = corev1.EnvVar{Name: v.Name, Value: v.Value}
		if v.ValueFrom != nil {
			(*e)[at].ValueFrom = &corev1.EnvVarSource{}
			if ref := v.ValueFrom.FieldRef; ref != nil {
				(*e)[at].ValueFrom.FieldRef = &corev1.ObjectFieldSelector{FieldPath: ref.FieldPath}
			}
		}
	}
	return nil
}

// securityContext is that of a pod or of a container.
type securityContext struct {
	RunAsUser *int64 `json:"runAsUser"`
}

type port struct {
	ContainerPort int32           `json:"containerPort"`
	Protocol      corev1.Protocol `json:"protocol"`
}

type volumeMount struct {
	Name        string `json:"name"`
	MountPath   string `json:"mountPath"`
	SubPath     string `json:"subPath"`
	SubPathExpr string `json:"subPathExpr"`
}

type affinity struct {
	NodeAffinity struct {
		Required *struct {
			Terms list[nodeSelectorTerm] `json:"nodeSelectorTerms"`
		} `json:"requiredDuringSchedulingIgnoredDuringExecution"`
	} `json:"nodeAffinity"`
}

type nodeSelectorTerm struct {
	MatchExpressions list[nodeRequirement] `json:"matchExpressions"`
}

type nodeRequirement struct {
	Key      string                      `json:"key"`
	Operator corev1.NodeSelectorOperator `json:"operator"`
	Values   list[string]                `json:"values"`
}

type resources struct {
	Limits   amounts `json:"limits"`
	Requests amounts `json:"requests"`
}

type amounts struct {
	CPU    *quantity `json:"cpu"`
	Memory *quantity `json:"memory"`
}

// quantity is an amount that is cheap to compare: of 1e99999999 and 1, [resource.Quantity] alone takes a minute.
type quantity struct{ resource.Quantity }

// Bounds of quantities. Kubernetes' own are 2^63-1 and nine decimal places.
const (
	maxQuantity       = 64 // characters
	maxExponentDigits = 2
)

var exponentForm = regexp.MustCompile(`^[-+]?[0-9.]+[eE][-+]?([0-9]+)$`)

// UnmarshalJSON implements the interface of encoding/json.
func (q *quantity) UnmarshalJSON(raw []byte) error {
	// Quantity ignores blanks around the number.
	exponent := exponentForm.FindSubmatch(bytes.TrimSpace(bytes.Trim(raw[:min(len(raw), maxQuantity)], `"`)))
	if len(raw) > maxQuantity || exponent != nil && len(exponent[1]) > maxExponentDigits {
		return fmt.Errorf("quantity %.30s: write it with at most %d characters, and an exponent of at most %d digits", raw, maxQuantity, maxExponentDigits)
	}
	return q.Quantity.UnmarshalJSON(raw)
}

type volume struct {
	Name      string `json:"name"`
	Projected *struct {
		Sources list[projection] `json:"sources"`
	} `json:"projected"`
}

type projection struct {
	ServiceAccountToken *struct {
		Audience string `json:"audience"`
		Path     string `json:"path"`
	} `json:"serviceAccountToken"`
	ConfigMap *struct {
		Name     string                 `json:"name"`
		Items    list[corev1.KeyToPath] `json:"items"`
		Optional *bool                  `json:"optional"`
	} `json:"configMap"`
}

// defaultServiceAccount is whom a pod runs as that names nobody.
const defaultServiceAccount = "default"

// parsePod decodes the part of a pod that tells whether it concerns us. Keys are matched by case,
// unlike those of encoding/json, because a patch addresses them by case.
func parsePod(raw []byte) (*pod, error) {
	var p pod
	if err := json.Unmarshal(raw, &p); err != nil {
		return nil, unsupported("the pod cannot be read: %.300v", err)
	}
	return &p, nil
}

func (p *pod) parseSpec() (*podSpec, error) {
	if len(p.Spec) == 0 {
		return nil, unsupported("the pod has no spec")
	}
	var spec podSpec
	if err := json.Unmarshal(p.Spec, &spec); err != nil {
		return nil, unsupported("the pod's spec cannot be read: %.300v", err)
	}
	if len(spec.Containers) == 0 {
		return nil, unsupported("the pod has no containers")
	}
	if n := len(spec.Containers) + len(spec.InitContainers); n > MaxContainers {
		return nil, unsupported("the pod has %v", tooManyContainers(n))
	}
	if name := spec.serviceAccount(); len(name) > maxName {
		return nil, unsupported("service account %.63q… is longer than %d characters, which Kubernetes takes for no name", name, maxName)
	}
	for c := range spec.all() {
		switch {
		case c.Name == "":
			return nil, unsupported("the pod has a container without a name")
		case len(c.Name) > maxName:
			return nil, unsupported("container name %.63q… is longer than %d characters, which Kubernetes takes for no name", c.Name, maxName)
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
	required := s.Affinity.NodeAffinity.Required
	if required == nil {
		return false
	}
	// A node has to meet one of the terms, and of that term all expressions.
	return len(required.Terms) > 0 && !slices.ContainsFunc(required.Terms, func(term nodeSelectorTerm) bool {
		return !slices.ContainsFunc(term.MatchExpressions, onlyWindows)
	})
}

// osLabels are those that kubelets give their nodes with the name of the operating system.
var osLabels = []string{corev1.LabelOSStable, "beta.kubernetes.io/os"}

func onlyWindows(r nodeRequirement) bool {
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
		of := c.Resources
		for _, pair := range []struct{ limit, request *quantity }{{of.Limits.CPU, of.Requests.CPU}, {of.Limits.Memory, of.Requests.Memory}} {
			if pair.limit == nil || pair.limit.IsZero() {
				return false
			}
			if pair.request != nil && !pair.request.Equal(pair.limit.Quantity) {
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
	const shown = 20
	missing := func(list []string) []string {
		return slices.DeleteFunc(slices.Clone(list), func(name string) bool { return slices.Contains(names, name) })
	}
	if unknown := missing(by.pod.Containers); len(unknown) > 0 {
		more := ""
		if len(names) > shown {
			more = fmt.Sprintf(" and %d more", len(names)-shown)
		}
		return nil, unsupported("annotation %q names %.100q, and the pod has only %q%s",
			by.cfg.Keys.Name(policy.Containers), unknown[:min(len(unknown), shown)], names[:min(len(names), shown)], more)
	}
	// A container to skip may come from a webhook that is called after this one, so that refusing
	// would be wrong; and missing one makes no container go without.
	if unknown := missing(by.pod.SkipContainers); len(unknown) > 0 {
		warnings = append(warnings, fmt.Sprintf("annotation %q names %.100q, which the pod does not have so far", by.cfg.Keys.Name(policy.SkipContainers), unknown[:min(len(unknown), shown)]))
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
