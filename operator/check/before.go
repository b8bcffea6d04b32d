package check

import (
	"slices"
	"strings"

	networkingv1 "k8s.io/api/networking/v1"

	"github.com/credence-iam/credence/operator/finding"
	"github.com/credence-iam/credence/operator/survey"
)

func certManager(s *snapshot, r *results) {
	remedy := &finding.Remedy{Who: finding.ClusterAdmin, What: "Install cert-manager, or set certificates.source=secrets and bring certificates of your own", Page: "docs/install.md", Commands: []string{
		s.Target.Command("kubectl get pods --all-namespaces -l app.kubernetes.io/instance=cert-manager"),
	}}
	switch {
	case s.CertManager.Err != nil && !s.CertManager.Forbidden():
		r.fail("", remedy, "its API does not accept a Certificate in a dry run: %v", s.CertManager.Err)
	case unread(r, s.CertManager):
	case !s.CertManager.Value:
		r.fail("", remedy, "cert-manager is not installed: the API server does not know Certificates")
	default:
		r.ok("its API accepts Certificates")
	}
}

func yourRights(s *snapshot, r *results) {
	if unread(r, s.Yours) {
		return
	}
	var missing survey.Tally
	for _, text := range s.Yours.Value {
		if strings.Contains(text, "create namespaces") && s.Destination.Err == nil && s.Destination.Value != nil {
			continue // It exists.
		}
		missing.Add(text, s.canI(text))
	}
	if missing.Count > 0 {
		r.fail("", &finding.Remedy{Who: finding.ClusterAdmin, What: "Run the installation, or give these rights to the person who does", Commands: missing.Commands, Page: "docs/install.md"},
			"you lack %s: %s", some(missing.Count, "right"), &missing)
		return
	}
	r.ok("you may create all objects of the chart")
}

func existingInstallation(s *snapshot, r *results) {
	if unread(r, s.Configs) {
		return
	}
	for _, c := range s.Configs.Value {
		if c.Name == configuration {
			owner := c.Annotations["meta.helm.sh/release-namespace"]
			r.warn("mutatingwebhookconfiguration/"+configuration, &finding.Remedy{Who: finding.ClusterAdmin, What: "Upgrade the existing installation, or uninstall it first", Page: "docs/upgrade.md", Commands: []string{
				s.Target.Command("helm list --all-namespaces --filter credence"), "credence check",
			}}, "Credence is already installed%s", map[bool]string{true: " in namespace " + owner, false: ""}[owner != ""])
			return
		}
	}
	r.ok("no other installation")
}

func targetPodSecurity(s *snapshot, r *results) {
	if unread(r, s.Destination) {
		return
	}
	if s.Destination.Value == nil {
		r.ok("namespace %s does not exist yet; helm creates it with --create-namespace", s.Namespace)
		return
	}
	level := s.Destination.Value.Labels[survey.EnforceLabel]
	if !survey.ValidLevel(level) {
		r.warn("namespace/"+s.Namespace, &finding.Remedy{Who: finding.ClusterAdmin, What: "Write privileged, baseline or restricted", Commands: []string{
			s.Target.Command("kubectl label --overwrite namespace %s %s=restricted", s.Namespace, survey.EnforceLabel),
		}}, "its label %s has the invalid value %q, which the API server treats as restricted", survey.EnforceLabel, level)
		return
	}
	r.ok("namespace %s admits the pods of Credence, as all PodSecurity levels do", s.Namespace)
}

// deniesAll reports whether a policy selects all pods of its namespace and allows nothing in a direction.
func deniesAll(p networkingv1.NetworkPolicy, direction networkingv1.PolicyType) bool {
	if len(p.Spec.PodSelector.MatchLabels)+len(p.Spec.PodSelector.MatchExpressions) > 0 {
		return false
	}
	if direction == networkingv1.PolicyTypeEgress {
		return slices.Contains(p.Spec.PolicyTypes, direction) && len(p.Spec.Egress) == 0
	}
	return slices.Contains(p.Spec.PolicyTypes, direction) && len(p.Spec.Ingress) == 0
}

func targetNetwork(s *snapshot, r *results) {
	if unread(r, s.Network) {
		return
	}
	for _, p := range s.Network.Value {
		subject := "networkpolicy/" + p.Name
		if deniesAll(p, networkingv1.PolicyTypeIngress) {
			r.warn(subject, &finding.Remedy{Who: finding.ClusterAdmin, What: "Install with the value networkPolicy.enabled=true, which allows what Credence needs", Page: "docs/network.md"},
				"it denies connections to all pods of namespace %s, so the API server would not reach the webhook and sidecars no broker", s.Namespace)
		}
		if deniesAll(p, networkingv1.PolicyTypeEgress) {
			r.warn(subject, &finding.Remedy{Who: finding.ClusterAdmin, What: "Allow the brokers and the webhook connections to the API server and DNS, and the brokers to STS", Page: "docs/network.md"},
				"it denies connections from all pods of namespace %s, so the brokers would not reach STS", s.Namespace)
		}
	}
	if len(r.findings) == 0 {
		r.ok("no network policy of namespace %s denies everything", s.Namespace)
	}
}
