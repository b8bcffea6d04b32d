// Package podview decodes the fields of a pod that injection reads, within limits.
//
// It guarantees:
//   - a pod that an API server could not store is refused before it is decoded, see [Check];
//   - a nil slice or map is a field that is absent or null. A patch must treat it differently from an empty one;
//   - keys match by case, as in the API server and in a JSON patch, and unlike in encoding/json.
//
// It never encodes a pod, so a field that it leaves out is not lost. It does not decide whether a pod can be injected.
package podview

import (
	"cmp"
	stdjson "encoding/json"
	"slices"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/json"

	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/sidecar/contract"
)

// Pod has the fields that show whether a pod is annotated. Make it with [Parse].
type Pod struct {
	Metadata struct {
		Name         string            `json:"name"`
		GenerateName string            `json:"generateName"`
		UID          string            `json:"uid"`
		Labels       map[string]string `json:"labels"`
		Annotations  map[string]string `json:"annotations"`
	} `json:"metadata"`
	// Spec is not decoded: the spec of a pod without annotations is never a reason to refuse the pod.
	Spec stdjson.RawMessage `json:"spec"`
}

// Spec has the fields of a pod's spec that injection reads. Make it with [Pod.ParseSpec].
type Spec struct {
	Containers                    Containers                        `json:"containers"`
	InitContainers                Containers                        `json:"initContainers"`
	Volumes                       List[Volume]                      `json:"volumes"`
	ServiceAccountName            string                            `json:"serviceAccountName"`
	DeprecatedServiceAccount      string                            `json:"serviceAccount"`
	HostNetwork                   bool                              `json:"hostNetwork"`
	OS                            *corev1.PodOS                     `json:"os"`
	NodeSelector                  map[string]string                 `json:"nodeSelector"`
	Affinity                      Affinity                          `json:"affinity"`
	TerminationGracePeriodSeconds *int64                            `json:"terminationGracePeriodSeconds"`
	Resources                     Resources                         `json:"resources"`
	ImagePullSecrets              List[corev1.LocalObjectReference] `json:"imagePullSecrets"`
	SecurityContext               SecurityContext                   `json:"securityContext"`
	DNSPolicy                     corev1.DNSPolicy                  `json:"dnsPolicy"`
	DNSConfig                     struct {
		Nameservers List[string] `json:"nameservers"`
		Searches    List[string] `json:"searches"`
	} `json:"dnsConfig"`
}

// Container is a container or an init container.
type Container struct {
	Name            string                         `json:"name"`
	Image           string                         `json:"image"`
	Command         List[string]                   `json:"command"`
	Args            List[string]                   `json:"args"`
	Env             Environment                    `json:"env"`
	EnvFrom         List[struct{}]                 `json:"envFrom"`
	Ports           List[Port]                     `json:"ports"`
	Resources       Resources                      `json:"resources"`
	VolumeMounts    List[VolumeMount]              `json:"volumeMounts"`
	RestartPolicy   *corev1.ContainerRestartPolicy `json:"restartPolicy"`
	SecurityContext SecurityContext                `json:"securityContext"`
}

// SecurityContext belongs to a pod or to a container.
type SecurityContext struct {
	RunAsUser *int64 `json:"runAsUser"`
}

// Port is a port of a container.
type Port struct {
	ContainerPort int32           `json:"containerPort"`
	Protocol      corev1.Protocol `json:"protocol"`
}

// VolumeMount mounts a volume in a container.
type VolumeMount struct {
	Name        string `json:"name"`
	MountPath   string `json:"mountPath"`
	SubPath     string `json:"subPath"`
	SubPathExpr string `json:"subPathExpr"`
}

// Volume is a volume of a pod.
type Volume struct {
	Name string `json:"name"`
}

// Affinity limits the nodes of a pod.
type Affinity struct {
	NodeAffinity struct {
		Required *struct {
			Terms List[NodeSelectorTerm] `json:"nodeSelectorTerms"`
		} `json:"requiredDuringSchedulingIgnoredDuringExecution"`
	} `json:"nodeAffinity"`
}

// NodeSelectorTerm matches a node that meets all expressions.
type NodeSelectorTerm struct {
	MatchExpressions List[NodeRequirement] `json:"matchExpressions"`
}

// NodeRequirement is a condition on a label of a node.
type NodeRequirement struct {
	Key      string                      `json:"key"`
	Operator corev1.NodeSelectorOperator `json:"operator"`
	Values   List[string]                `json:"values"`
}

// Resources belong to a pod or to a container.
type Resources struct {
	Limits   Amounts `json:"limits"`
	Requests Amounts `json:"requests"`
}

// Amounts has nil for an amount that is not set.
type Amounts struct {
	CPU    *Quantity `json:"cpu"`
	Memory *Quantity `json:"memory"`
}

// DefaultServiceAccount is the service account of a pod that names none.
const DefaultServiceAccount = "default"

// Parse decodes a pod without its spec.
func Parse(raw []byte) (*Pod, error) {
	var p Pod
	if err := json.Unmarshal(raw, &p); err != nil {
		return nil, unsupported("cannot read the pod: %.300v", err)
	}
	return &p, nil
}

// ParseSpec decodes the pod's spec. It refuses a spec without containers, with more than [MaxContainers], or with a name
// that Kubernetes would refuse for its length.
func (p *Pod) ParseSpec() (*Spec, error) {
	if len(p.Spec) == 0 {
		return nil, unsupported("the pod has no spec")
	}
	var spec Spec
	if err := json.Unmarshal(p.Spec, &spec); err != nil {
		return nil, unsupported("cannot read the pod's spec: %.300v", err)
	}
	if len(spec.Containers) == 0 {
		return nil, unsupported("the pod has no containers")
	}
	if n := len(spec.Containers) + len(spec.InitContainers); n > MaxContainers {
		return nil, unsupported("the pod has %v", tooManyContainers(n))
	}
	if name := spec.ServiceAccount(); len(name) > maxName {
		return nil, unsupported("service account %.63q… is longer than %d characters, the maximum of Kubernetes; shorten it", name, maxName)
	}
	for c := range spec.All() {
		switch {
		case c.Name == "":
			return nil, unsupported("the pod has a container without a name")
		case len(c.Name) > maxName:
			return nil, unsupported("container name %.63q… is longer than %d characters, the maximum of Kubernetes; shorten it", c.Name, maxName)
		}
	}
	return &spec, nil
}

// unsupported refuses a pod that is too large or malformed.
func unsupported(format string, args ...any) error {
	return credential.Errorf(credential.ErrInvalid, credential.ReasonPodUnsupported, format, args...)
}

// All yields every container, then every init container.
func (s *Spec) All() func(yield func(Container) bool) {
	return func(yield func(Container) bool) {
		for _, list := range [][]Container{s.Containers, s.InitContainers} {
			for _, c := range list {
				if !yield(c) {
					return
				}
			}
		}
	}
}

// Sidecar returns the init container that has the sidecar's name; nil if there is none.
func (s *Spec) Sidecar() *Container {
	at := slices.IndexFunc(s.InitContainers, func(c Container) bool { return c.Name == contract.ContainerName })
	if at < 0 {
		return nil
	}
	return &s.InitContainers[at]
}

// ServiceAccount returns the name of the pod's service account.
func (s *Spec) ServiceAccount() string {
	// serviceAccount is the older name of the field. The API server copies it to the newer one.
	return cmp.Or(s.ServiceAccountName, s.DeprecatedServiceAccount, DefaultServiceAccount)
}

// Windows reports whether the pod can run on Windows nodes only.
func (s *Spec) Windows() bool {
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
	// A node must meet one of the terms, and all expressions of that term.
	return len(required.Terms) > 0 && !slices.ContainsFunc(required.Terms, func(term NodeSelectorTerm) bool {
		return !slices.ContainsFunc(term.MatchExpressions, onlyWindows)
	})
}

// osLabels are the labels in which kubelets put the operating system of their node.
var osLabels = []string{corev1.LabelOSStable, "beta.kubernetes.io/os"}

func onlyWindows(r NodeRequirement) bool {
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

// Guaranteed reports whether the pod's quality-of-service class is Guaranteed: every container has limits of CPU and
// memory, and its requests are equal or absent. Absent requests default to the limits. A pod with resources of its own
// gets its class from those, so injection cannot change it.
func (s *Spec) Guaranteed() bool {
	for c := range s.All() {
		limits, requests := c.Resources.Limits, c.Resources.Requests
		for _, pair := range []struct{ limit, request *Quantity }{{limits.CPU, requests.CPU}, {limits.Memory, requests.Memory}} {
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

// MaxUser is the maximum user ID in Kubernetes.
const MaxUser = 1<<31 - 1

// CommonUser returns the user ID as which all containers run. It reports false if they declare different users, or if
// the user is root. It also reports false if a container declares no user, because that container runs as the user of
// its image.
//
// The kubelet makes this user the owner of projected tokens, trust bundles and pod certificates, with mode 0600 (KEP-1205,
// FsUserFrom in pkg/volume/util of Kubernetes). A sidecar with another user would end that: root would own a file of mode
// 0400, and everybody could read a file without a mode.
func (s *Spec) CommonUser() (user int64, ok bool) {
	for c := range s.All() {
		own := cmp.Or(c.SecurityContext.RunAsUser, s.SecurityContext.RunAsUser)
		if own == nil || *own <= 0 || *own > MaxUser || user != 0 && *own != user {
			return 0, false
		}
		user = *own
	}
	return user, user != 0
}
