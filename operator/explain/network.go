package explain

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"

	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/operator/finding"
	"github.com/credence-iam/credence/operator/installation"
	"github.com/credence-iam/credence/operator/netpolicy"
	"github.com/credence-iam/credence/operator/snapshot"
)

const brokerPort = 9443

// network is the step of DNS and of the way to the brokers, as the sidecar saw it.
func (s subject) network() []finding.Finding {
	failure := s.sidecarState().failure
	if failure.Reason != credential.ReasonBrokerUnreachable || isTLS(failure.Error) {
		if s.sidecarState().session.AccessKeyID == "" && failure.Reason == "" {
			return nil
		}
		return []finding.Finding{passed("DNS and network", "the sidecar reached a broker")}
	}
	if s.readyBrokers() == 0 {
		return nil // Nobody can be reached.
	}
	harmless := s.hasCredentials()
	step, symptom := "network", "the sidecar cannot reach the brokers, which are ready"
	if strings.Contains(failure.Error, "DNS has no address") {
		step, symptom = "DNS", "the sidecar cannot look up the brokers, which are ready"
	}
	if blocking, commands := s.blocking(step == "DNS"); len(blocking) > 0 {
		who := finding.NamespaceOwner
		if slices.ContainsFunc(blocking, func(name string) bool { return strings.HasPrefix(name, s.credence()+"/") }) {
			who = finding.ClusterAdmin
		}
		return []finding.Finding{unless(harmless, failed(step, fmt.Sprintf("%s: NetworkPolicy %s does not allow it", symptom, strings.Join(blocking, " and ")), finding.Remedy{
			Who: who, What: "allow the pod to reach DNS and port 9443 of the brokers", Commands: commands, Page: "docs/network.md",
		}))}
	}
	text := symptom + ": " + short(failure.Error)
	if step == "DNS" {
		return []finding.Finding{unless(harmless, failed(step, text, finding.Remedy{
			Who: finding.ClusterAdmin, What: "see whether the cluster's DNS works and knows the brokers' Service", Page: "docs/network.md",
			Commands: []string{s.inCredence("get", "endpointslices", "-l", "kubernetes.io/service-name=credence-broker"), s.kubectl("-n", "kube-system", "get", "pods", "-l", "k8s-app=kube-dns")},
		}))}
	}
	if problems := s.unknown(step, snapshot.SourcePolicies); problems != nil {
		text += "; " + problems[0].Text
	}
	return []finding.Finding{unless(harmless, failed(step, text, finding.Remedy{
		Who: finding.ClusterAdmin, What: "let the pod reach port 9443 of the brokers: check network policies of every kind, and the route between the two nodes", Page: "docs/network.md",
		Commands: []string{s.in("get", "networkpolicies"), s.inCredence("get", "networkpolicies"), s.inCredence("get", "pods", "-l", "app.kubernetes.io/component=broker", "-o", "wide")},
	}))}
}

// isTLS reports whether the error is about a certificate, so the network works.
func isTLS(text string) bool {
	return strings.Contains(text, "x509:") || strings.Contains(text, "tls:")
}

// blocking returns the NetworkPolicies that keep the pod from DNS, or from the brokers, and the commands that allow it.
func (s subject) blocking(dns bool) (names, commands []string) {
	at := slices.IndexFunc(s.Installation.Brokers, func(b snapshot.Broker) bool { return installation.Ready(&b.Pod) })
	if at < 0 {
		return nil, nil
	}
	pod := netpolicy.End{Pod: s.Pod, Namespace: s.Namespace}
	broker := netpolicy.End{Pod: &s.Installation.Brokers[at].Pod, Namespace: s.BrokersNamespace}
	var egress, ingress []string
	if dns {
		egress = netpolicy.Egress(s.Policies, pod, netpolicy.End{}, 53, corev1.ProtocolUDP)
	} else {
		egress = netpolicy.Egress(s.Policies, pod, broker, brokerPort, corev1.ProtocolTCP)
		ingress = netpolicy.Ingress(s.Policies, pod, broker, brokerPort, corev1.ProtocolTCP)
	}
	policy := func(name, namespace string, spec m) string {
		return s.apply(m{"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": m{"name": name, "namespace": namespace}, "spec": spec})
	}
	toBrokers := []m{{"port": brokerPort, "protocol": "TCP"}}
	if len(egress) > 0 {
		commands = append(commands, policy("credence-egress", s.NamespaceName, m{
			"podSelector": m{"matchLabels": m{s.key("injected"): "true"}}, "policyTypes": []string{"Egress"},
			"egress": []m{
				{"ports": []m{{"port": 53, "protocol": "UDP"}, {"port": 53, "protocol": "TCP"}}},
				{"to": []m{{"namespaceSelector": m{"matchLabels": m{corev1.LabelMetadataName: s.credence()}}}}, "ports": toBrokers},
			},
		}))
	}
	if len(ingress) > 0 {
		commands = append(commands, policy("credence-sidecars", s.credence(), m{
			"podSelector": m{"matchLabels": m{"app.kubernetes.io/component": "broker"}}, "policyTypes": []string{"Ingress"},
			"ingress": []m{{"from": []m{{"namespaceSelector": m{"matchLabels": m{s.key("inject"): "enabled"}}}}, "ports": toBrokers}},
		}))
	}
	return append(egress, ingress...), commands
}

// addresses returns the addresses of the ready brokers.
func (s subject) addresses() (all []netip.Addr) {
	for _, b := range s.Installation.Brokers {
		if a, err := netip.ParseAddr(b.Pod.Status.PodIP); err == nil && installation.Ready(&b.Pod) {
			all = append(all, a)
		}
	}
	return all
}
