// Package netpolicy finds the NetworkPolicies that keep one pod from connecting to another. It evaluates the API of
// Kubernetes (networking.k8s.io/v1) as its documentation says, and nothing of network plugins. What it cannot know, it does
// not count as blocking.
package netpolicy

import (
	"net"
	"slices"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// End is one end of a connection. Namespace has the labels of the pod's namespace; nil: they are not known.
type End struct {
	Pod       *corev1.Pod
	Namespace *corev1.Namespace
}

// Egress returns the names of the policies that keep from from connecting to the port of to, as NAMESPACE/NAME. With a zero
// to, it considers ports only, for a peer that is not known, such as a DNS server. It returns nil if nothing blocks.
func Egress(policies []networkingv1.NetworkPolicy, from, to End, port int32, protocol corev1.Protocol) []string {
	return blocking(policies, from.Pod, networkingv1.PolicyTypeEgress, func(p *networkingv1.NetworkPolicy) bool {
		return slices.ContainsFunc(p.Spec.Egress, func(r networkingv1.NetworkPolicyEgressRule) bool {
			return onPort(r.Ports, port, protocol, to.Pod) && (to.Pod == nil || isPeer(r.To, p.Namespace, to))
		})
	})
}

// Ingress returns the names of the policies that keep from from connecting to the port of to, as [Egress] does.
func Ingress(policies []networkingv1.NetworkPolicy, from, to End, port int32, protocol corev1.Protocol) []string {
	return blocking(policies, to.Pod, networkingv1.PolicyTypeIngress, func(p *networkingv1.NetworkPolicy) bool {
		return slices.ContainsFunc(p.Spec.Ingress, func(r networkingv1.NetworkPolicyIngressRule) bool {
			return onPort(r.Ports, port, protocol, to.Pod) && isPeer(r.From, p.Namespace, from)
		})
	})
}

// blocking returns the policies of the pod, if none of them allows the connection: policies add up.
func blocking(policies []networkingv1.NetworkPolicy, pod *corev1.Pod, direction networkingv1.PolicyType, allows func(*networkingv1.NetworkPolicy) bool) (names []string) {
	for i := range policies {
		p := &policies[i]
		if p.Namespace != pod.Namespace || !Selects(&p.Spec.PodSelector, pod.Labels) || !slices.Contains(p.Spec.PolicyTypes, direction) {
			continue
		}
		if allows(p) {
			return nil
		}
		names = append(names, p.Namespace+"/"+p.Name)
	}
	return names
}

// Selects reports whether a selector selects these labels. A nil selector selects all.
func Selects(selector *metav1.LabelSelector, of map[string]string) bool {
	parsed, err := metav1.LabelSelectorAsSelector(selector)
	return err == nil && (selector == nil || parsed.Matches(labels.Set(of)))
}

// onPort reports whether ports have one. pod resolves names of ports.
func onPort(ports []networkingv1.NetworkPolicyPort, port int32, protocol corev1.Protocol, pod *corev1.Pod) bool {
	return len(ports) == 0 || slices.ContainsFunc(ports, func(p networkingv1.NetworkPolicyPort) bool {
		if p.Protocol != nil && *p.Protocol != protocol || p.Protocol == nil && protocol != corev1.ProtocolTCP {
			return false
		}
		switch {
		case p.Port == nil:
			return true
		case p.Port.Type == intstr.Int:
			return p.Port.IntVal == port || p.EndPort != nil && p.Port.IntVal <= port && port <= *p.EndPort
		case pod == nil:
			return true
		}
		return slices.ContainsFunc(pod.Spec.Containers, func(c corev1.Container) bool {
			return slices.ContainsFunc(c.Ports, func(named corev1.ContainerPort) bool {
				return named.Name == p.Port.StrVal && named.ContainerPort == port
			})
		})
	})
}

// isPeer reports whether peers, in a policy of a namespace, have the end.
func isPeer(peers []networkingv1.NetworkPolicyPeer, namespace string, end End) bool {
	return len(peers) == 0 || slices.ContainsFunc(peers, func(p networkingv1.NetworkPolicyPeer) bool {
		switch {
		case p.IPBlock != nil:
			return inBlock(p.IPBlock, end.Pod.Status.PodIP)
		case p.NamespaceSelector == nil && end.Pod.Namespace != namespace:
			return false
		case p.NamespaceSelector != nil && end.Namespace == nil:
			return true
		case p.NamespaceSelector != nil && !Selects(p.NamespaceSelector, end.Namespace.Labels):
			return false
		}
		return p.PodSelector == nil || Selects(p.PodSelector, end.Pod.Labels)
	})
}

func inBlock(block *networkingv1.IPBlock, ip string) bool {
	address := net.ParseIP(ip)
	contains := func(cidr string) bool {
		_, network, err := net.ParseCIDR(cidr)
		return err == nil && network.Contains(address)
	}
	return contains(block.CIDR) && !slices.ContainsFunc(block.Except, contains)
}
