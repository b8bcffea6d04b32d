package netpolicy_test

import (
	"slices"
	"testing"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"

	"github.com/credence-iam/credence/operator/netpolicy"
)

func end(name, namespace, ip string, labels map[string]string) netpolicy.End {
	return netpolicy.End{
		Pod: &corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: namespace, Labels: labels}, Status: corev1.PodStatus{PodIP: ip},
			Spec: corev1.PodSpec{Containers: []corev1.Container{{Ports: []corev1.ContainerPort{{Name: "grpc", ContainerPort: 9443}, {Name: "admin", ContainerPort: 8080}}}}},
		},
		Namespace: &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: namespace, Labels: map[string]string{"kubernetes.io/metadata.name": namespace}}},
	}
}

// TestBlocking: policies block what none of them allows.
func TestBlocking(t *testing.T) {
	const allowAll, denyAll = "{podSelector: {}, policyTypes: [Egress], egress: [{}]}", "{podSelector: {}, policyTypes: [Egress]}"
	egress := func(rule string) string {
		return "{podSelector: {matchLabels: {app: cart}}, policyTypes: [Egress], egress: [" + rule + "]}"
	}
	ingress := func(rule string) string {
		return "{podSelector: {matchLabels: {app: broker}}, policyTypes: [Ingress], ingress: [" + rule + "]}"
	}
	for name, tt := range map[string]struct {
		namespace string
		specs     []string
		blocked   bool
	}{
		"none":                        {"shop", nil, false},
		"deny":                        {"shop", []string{denyAll}, true},
		"of another namespace":        {"till", []string{denyAll}, false},
		"of other pods":               {"shop", []string{"{podSelector: {matchLabels: {app: till}}, policyTypes: [Egress]}"}, false},
		"of the other direction":      {"shop", []string{"{podSelector: {}, policyTypes: [Ingress]}"}, false},
		"deny and allow":              {"shop", []string{denyAll, allowAll}, false},
		"another port":                {"shop", []string{egress("{ports: [{port: 443}]}")}, true},
		"the port":                    {"shop", []string{egress("{ports: [{port: 443}, {port: 9443, protocol: TCP}]}")}, false},
		"a range":                     {"shop", []string{egress("{ports: [{port: 9000, endPort: 9500}]}")}, false},
		"a range below":               {"shop", []string{egress("{ports: [{port: 9000, endPort: 9442}]}")}, true},
		"another protocol":            {"shop", []string{egress("{ports: [{port: 9443, protocol: UDP}]}")}, true},
		"a named port":                {"shop", []string{egress("{ports: [{port: grpc}]}")}, false},
		"another named port":          {"shop", []string{egress("{ports: [{port: admin}]}")}, true},
		"the namespace":               {"shop", []string{egress("{to: [{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: credence}}}]}")}, false},
		"another namespace":           {"shop", []string{egress("{to: [{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: till}}}]}")}, true},
		"pods of the own namespace":   {"shop", []string{egress("{to: [{podSelector: {}}]}")}, true},
		"other pods of the namespace": {"shop", []string{egress("{to: [{namespaceSelector: {}, podSelector: {matchLabels: {app: till}}}]}")}, true},
		"a block":                     {"shop", []string{egress("{to: [{ipBlock: {cidr: 10.0.0.0/8}}]}")}, false},
		"a block without it":          {"shop", []string{egress("{to: [{ipBlock: {cidr: 10.0.0.0/8, except: [10.0.0.0/24]}}]}")}, true},
		"another block":               {"shop", []string{egress("{to: [{ipBlock: {cidr: 192.168.0.0/16}}]}")}, true},
		"brokers deny":                {"credence", []string{ingress("")}, true},
		"brokers allow":               {"credence", []string{ingress("{from: [{namespaceSelector: {}}], ports: [{port: grpc}]}")}, false},
		"brokers allow others":        {"credence", []string{ingress("{from: [{podSelector: {}}]}")}, true},
	} {
		t.Run(name, func(t *testing.T) {
			var policies []networkingv1.NetworkPolicy
			for _, text := range tt.specs {
				p := networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Name: "p", Namespace: tt.namespace}}
				if err := yaml.UnmarshalStrict([]byte(text), &p.Spec); err != nil {
					t.Fatal(err)
				}
				policies = append(policies, p)
			}
			from, to := end("cart-1", "shop", "10.1.0.1", map[string]string{"app": "cart"}), end("broker-1", "credence", "10.0.0.1", map[string]string{"app": "broker"})
			got := slices.Concat(netpolicy.Egress(policies, from, to, 9443, corev1.ProtocolTCP), netpolicy.Ingress(policies, from, to, 9443, corev1.ProtocolTCP))
			if blocked := len(got) > 0; blocked != tt.blocked || blocked && got[0] != tt.namespace+"/p" {
				t.Errorf("blocking are %q, want %t", got, tt.blocked)
			}
		})
	}
}

// TestUnknownPeer: what is not known does not count as blocking.
func TestUnknownPeer(t *testing.T) {
	pod := end("cart-1", "shop", "10.1.0.1", nil)
	policy := networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Name: "p", Namespace: "shop"}, Spec: networkingv1.NetworkPolicySpec{
		PolicyTypes: []networkingv1.PolicyType{networkingv1.PolicyTypeEgress},
		Egress:      []networkingv1.NetworkPolicyEgressRule{{To: []networkingv1.NetworkPolicyPeer{{NamespaceSelector: &metav1.LabelSelector{MatchLabels: map[string]string{"x": "y"}}}}}},
	}}
	policies := []networkingv1.NetworkPolicy{policy}
	if got := netpolicy.Egress(policies, pod, netpolicy.End{}, 53, corev1.ProtocolUDP); got != nil {
		t.Errorf("to an unknown pod: blocking are %q", got)
	}
	broker := end("broker-1", "credence", "10.0.0.1", nil)
	broker.Namespace = nil
	if got := netpolicy.Egress(policies, pod, broker, 9443, corev1.ProtocolTCP); got != nil {
		t.Errorf("to an unknown namespace: blocking are %q", got)
	}
}
