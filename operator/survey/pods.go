package survey

import (
	"context"
	"fmt"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/credence-iam/credence/broker/policy"
	"github.com/credence-iam/credence/operator/installation"
	"github.com/credence-iam/credence/sidecar/contract"
	"github.com/credence-iam/credence/webhook/inject"
)

// Pods is what is known of all pods that have not ended.
type Pods struct {
	Total, Annotated, Injected int
	Without                    Tally          // annotated, in an opted-in namespace, without a sidecar
	NotOptedIn                 Tally          // annotated, in another namespace
	Versions                   map[string]int // of sidecars
	Apart                      Tally          // sidecars of a version that is too far from the webhook's
	Outdated                   Tally          // sidecars with names that are no longer in use
	Waiting, Restarting        Tally
}

// Bounds of what is ordinary.
const (
	// Patience is how long a sidecar may wait for its first credentials.
	Patience = 2 * time.Minute
	// MaxRestarts is how often a sidecar may have restarted.
	MaxRestarts = 3
	// maxVersions bounds the versions that are counted: an image is the choice of a user.
	maxVersions = 20
)

// Add looks at one pod.
func (p *Pods) Add(s *Snapshot, pod *corev1.Pod) {
	if pod.Status.Phase == corev1.PodSucceeded || pod.Status.Phase == corev1.PodFailed || pod.DeletionTimestamp != nil {
		return
	}
	p.Total++
	name, sidecar := pod.Namespace+"/"+pod.Name, sidecarOf(&pod.Spec)
	if s.Keys.Annotated(pod.Annotations) {
		p.Annotated++
		switch {
		case !s.Namespaces.Value.OptedIn[pod.Namespace]:
			if sidecar == nil {
				p.NotOptedIn.Add(name, s.Target.Command("kubectl label namespace %s %s=%s", pod.Namespace, s.Keys.Name(policy.Inject), policy.Enabled))
			}
		case sidecar == nil || pod.Labels[s.Keys.Name(policy.Injected)] != "true":
			p.Without.Add(name, s.restart(pod))
		}
	}
	if sidecar == nil {
		return
	}
	p.Injected++
	version := installation.Image(sidecar.Image).Label()
	if _, known := p.Versions[version]; known || len(p.Versions) < maxVersions {
		p.Versions[version]++
	}
	if installation.Apart(version, s.WebhookVersion()) > installation.MaxApart {
		p.Apart.Add(name+" ("+version+")", s.restart(pod))
	}
	if why := s.outdated(pod, sidecar); why != "" {
		p.Outdated.Add(name+" ("+why+")", s.restart(pod))
	}
	for _, c := range pod.Status.InitContainerStatuses {
		if c.Name != contract.ContainerName {
			continue
		}
		if c.RestartCount > MaxRestarts {
			p.Restarting.Add(fmt.Sprintf("%s (%d times)", name, c.RestartCount), s.Target.Command("kubectl -n %s logs %s -c %s --previous", pod.Namespace, pod.Name, c.Name))
		} else if c.State.Running != nil && (c.Started == nil || !*c.Started) && s.Now.Sub(c.State.Running.StartedAt.Time) > Patience {
			p.Waiting.Add(name, s.Target.Command("kubectl -n %s logs %s -c %s", pod.Namespace, pod.Name, c.Name))
		}
	}
}

// outdated returns which name in the pod is not the one in use; empty if all are.
func (s *Snapshot) outdated(pod *corev1.Pod, sidecar *corev1.Container) string {
	args := s.Found.WebhookArgs()
	if args == nil {
		return ""
	}
	if want := installation.Arg(args, "broker"); want != "" {
		for _, v := range sidecar.Env {
			if v.Name == contract.Env(contract.Broker) && v.Value != want {
				return "broker " + v.Value
			}
		}
	}
	audience := installation.Arg(args, "audience")
	if audience == "" {
		audience = inject.DefaultAudience
	}
	for _, m := range sidecar.VolumeMounts {
		for _, v := range pod.Spec.Volumes {
			if v.Name != m.Name || v.Projected == nil {
				continue
			}
			for _, source := range v.Projected.Sources {
				if t := source.ServiceAccountToken; t != nil && t.Audience != audience {
					return "audience " + t.Audience
				}
				if source.ConfigMap != nil && source.ConfigMap.Name != s.TrustName() {
					return "ConfigMap " + source.ConfigMap.Name
				}
			}
		}
	}
	return ""
}

// restart returns the command that replaces the pod by a new one.
func (s *Snapshot) restart(pod *corev1.Pod) string {
	for _, o := range pod.OwnerReferences {
		name := o.Name
		switch o.Kind {
		case "ReplicaSet":
			short, ok := strings.CutSuffix(name, "-"+pod.Labels["pod-template-hash"])
			if !ok || pod.Labels["pod-template-hash"] == "" {
				continue
			}
			return s.Target.Command("kubectl -n %s rollout restart deployment/%s", pod.Namespace, short)
		case "StatefulSet", "DaemonSet":
			return s.Target.Command("kubectl -n %s rollout restart %s/%s", pod.Namespace, strings.ToLower(o.Kind), name)
		}
	}
	return s.Target.Command("kubectl -n %s delete pod %s", pod.Namespace, pod.Name)
}

func sidecarOf(spec *corev1.PodSpec) *corev1.Container {
	for i := range spec.InitContainers {
		if spec.InitContainers[i].Name == contract.ContainerName {
			return &spec.InitContainers[i]
		}
	}
	return nil
}

func (g *gatherer) pods(ctx context.Context) (Pods, error) {
	p := Pods{Versions: make(map[string]int)}
	err := pages(metav1.ListOptions{}, func(o metav1.ListOptions) (*corev1.PodList, error) {
		return g.kube.CoreV1().Pods(g.s.Scope).List(ctx, o)
	}, func(list *corev1.PodList) {
		for i := range list.Items {
			p.Add(g.s, &list.Items[i])
		}
	})
	return p, err
}

// Nodes is what is known of all nodes.
type Nodes struct {
	Total, EC2 int
	Old        Tally // kubelets without native sidecars
}

// MinKubelet is the minor version of the oldest kubelet with native sidecars.
const MinKubelet = 29

// Add looks at one node.
func (n *Nodes) Add(s *Snapshot, node *corev1.Node) {
	n.Total++
	if strings.HasPrefix(node.Spec.ProviderID, "aws://") {
		n.EC2++
	}
	if installation.OlderKubernetes(node.Status.NodeInfo.KubeletVersion, MinKubelet) {
		n.Old.Add(node.Name+" ("+node.Status.NodeInfo.KubeletVersion+")", s.Target.Command("kubectl drain %s --ignore-daemonsets", node.Name))
	}
}
