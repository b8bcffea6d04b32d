package check

import (
	"bytes"
	"cmp"
	"crypto/x509"
	"fmt"
	"slices"
	"strings"
	"time"

	admissionv1 "k8s.io/api/admissionregistration/v1"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"

	"github.com/credence-iam/credence/broker/policy"
	"github.com/credence-iam/credence/certs"
	"github.com/credence-iam/credence/operator/finding"
	"github.com/credence-iam/credence/operator/installation"
	"github.com/credence-iam/credence/operator/survey"
)

// Names that the chart gives to objects of admission.
const (
	configuration = installation.Configuration
	entry         = "inject.credence-iam.github.io"
	ownCheck      = "credence-check"
)

func (s *snapshot) reinstall(what string, commands ...string) *finding.Remedy {
	return &finding.Remedy{
		Who: finding.ClusterAdmin, What: what, Page: "docs/install.md",
		Commands: append(commands, s.Target.Command("helm -n %s list", s.Namespace)),
	}
}

// component checks the pods of the webhook or of the brokers.
func (s *snapshot) component(r *results, name string, d *appsv1.Deployment, members []survey.Member, without string) {
	if unread(r, s.Own) {
		return
	}
	want, good := len(members), 0
	if d != nil && d.Spec.Replicas != nil {
		want = int(*d.Spec.Replicas)
	}
	var bad []survey.Member
	for _, m := range members {
		if installation.Ready(&m.Pod) {
			good++
		} else {
			bad = append(bad, m)
		}
	}
	describe := func(pod string) *finding.Remedy {
		return &finding.Remedy{Who: finding.ClusterAdmin, What: "Fix the reason above", Page: "docs/operations.md", Commands: []string{
			s.Target.Command("kubectl -n %s describe pod %s", s.Namespace, pod), s.Target.Command("kubectl -n %s logs %s", s.Namespace, pod),
		}}
	}
	switch {
	case want == 0 && good == 0:
		r.fail("deployment/"+name, &finding.Remedy{Who: finding.ClusterAdmin, What: "Start it", Commands: []string{s.Target.Command("kubectl -n %s scale deployment/%s --replicas=2", s.Namespace, name)}},
			"no %s is wanted (replicas: 0), so %s", strings.TrimPrefix(name, "credence-"), without)
		return
	case good == 0 && len(bad) == 0:
		r.fail("deployment/"+name, &finding.Remedy{Who: finding.ClusterAdmin, What: "See why the pods are not created", Commands: []string{s.Target.Command("kubectl -n %s describe replicaset -l app.kubernetes.io/component=%s", s.Namespace, strings.TrimPrefix(name, "credence-"))}},
			"has no pods, so %s", without)
		return
	case good >= want && len(bad) == 0:
		r.ok("%d of %d ready", good, want)
		return
	}
	for _, m := range bad {
		why := cmp.Or(strings.ReplaceAll(m.Waits, "\n", "; "), installation.Trouble(&m.Pod), "phase "+string(m.Pod.Status.Phase))
		if good == 0 {
			r.fail("pod/"+m.Pod.Name, describe(m.Pod.Name), "not ready, nor is any other, so %s: %s", without, why)
		} else {
			r.warn("pod/"+m.Pod.Name, describe(m.Pod.Name), "not ready, while %d of %d are: %s", good, want, why)
		}
	}
	if len(bad) == 0 {
		r.warn("deployment/"+name, &finding.Remedy{Who: finding.ClusterAdmin, What: "See why pods are missing", Commands: []string{s.Target.Command("kubectl -n %s describe deployment %s", s.Namespace, name)}}, "%d of %d ready", good, want)
	}
}

func webhookPods(s *snapshot, r *results) {
	s.component(r, installation.WebhookName, s.Found.Webhook, s.Webhooks, "annotated pods of opted-in namespaces are refused")
}

// hook returns the entry of the webhook's configuration.
func (s *snapshot) hook() *admissionv1.MutatingWebhook {
	for i := range s.Configs.Value {
		if s.Configs.Value[i].Name != configuration {
			continue
		}
		for j := range s.Configs.Value[i].Webhooks {
			if s.Configs.Value[i].Webhooks[j].Name == entry {
				return &s.Configs.Value[i].Webhooks[j]
			}
		}
	}
	return nil
}

func webhookConfiguration(s *snapshot, r *results) {
	if unread(r, s.Configs) {
		return
	}
	subject := "mutatingwebhookconfiguration/" + configuration
	show := s.Target.Command("kubectl get mutatingwebhookconfiguration %s -o yaml", configuration)
	hook := s.hook()
	if hook == nil {
		r.fail(subject, s.reinstall("Install the chart again"), "it or its entry %s does not exist, so the API server injects no pod", entry)
		return
	}
	var wrong []string
	service := hook.ClientConfig.Service
	if service != nil && (service.Name != installation.WebhookName || service.Namespace != s.Namespace) {
		wrong = append(wrong, fmt.Sprintf("it calls Service %s/%s, not %s/%s", service.Namespace, service.Name, s.Namespace, installation.WebhookName))
	}
	if hook.FailurePolicy != nil && *hook.FailurePolicy != admissionv1.Fail {
		wrong = append(wrong, "its failurePolicy is "+string(*hook.FailurePolicy)+", so without a webhook pods start without a sidecar")
	}
	if hook.NamespaceSelector == nil || hook.NamespaceSelector.MatchLabels[s.Keys.Name(policy.Inject)] != policy.Enabled {
		wrong = append(wrong, fmt.Sprintf("it does not select namespaces by label %s=%s", s.Keys.Name(policy.Inject), policy.Enabled))
	}
	if hook.ObjectSelector != nil && len(hook.ObjectSelector.MatchLabels)+len(hook.ObjectSelector.MatchExpressions) > 0 {
		wrong = append(wrong, "it has an objectSelector, which leaves pods out")
	}
	if !slices.ContainsFunc(hook.Rules, func(rule admissionv1.RuleWithOperations) bool {
		return slices.Contains(rule.Resources, "pods") && slices.Contains(rule.Operations, admissionv1.Create)
	}) {
		wrong = append(wrong, "its rules lack the creation of pods")
	}
	if len(wrong) > 0 {
		r.fail(subject, s.reinstall("Install the chart again, and see who changed it", show+" --show-managed-fields"), "%s", strings.Join(wrong, "; "))
		return
	}
	r.ok("the API server calls it for annotated pods of namespaces with label %s=%s", s.Keys.Name(policy.Inject), policy.Enabled)
}

// lifetime returns when a certificate's renewal is overdue: a fifth of its life before its end, and a week at most.
func lifetime(leaf *x509.Certificate) (renewal time.Time) {
	return leaf.NotAfter.Add(-min(leaf.NotAfter.Sub(leaf.NotBefore)/5, 7*24*time.Hour))
}

// verify checks the certificates that a pod serves against roots. It returns what is wrong.
func verify(served []*x509.Certificate, roots []*x509.Certificate, name string, now time.Time) error {
	pool, intermediates := x509.NewCertPool(), x509.NewCertPool()
	for _, c := range roots {
		pool.AddCert(c)
	}
	for _, c := range served[1:] {
		intermediates.AddCert(c)
	}
	_, err := served[0].Verify(x509.VerifyOptions{Roots: pool, Intermediates: intermediates, DNSName: name, CurrentTime: now})
	return err
}

// serving checks the certificates that the pods of a component serve.
func (s *snapshot) serving(r *results, members []survey.Member, component string, roots []*x509.Certificate, where string) {
	certificate := s.Target.Command("kubectl -n %s describe certificate credence-%s", s.Namespace, component)
	remedy := func(what string) *finding.Remedy {
		return &finding.Remedy{Who: finding.ClusterAdmin, What: what, Page: "docs/certificates.md", Commands: []string{
			certificate, s.Target.Command("kubectl -n %s logs -l app.kubernetes.io/component=%s --tail=-1 --prefix | grep -i certificate", s.Namespace, component),
		}}
	}
	seen, good := 0, 0
	var first *x509.Certificate
	for _, m := range members {
		if m.Pod.Status.Phase != corev1.PodRunning || !installation.Ready(&m.Pod) && m.Served.Err != nil {
			continue // webhook-pods and broker-pods report it
		}
		if unread(r, m.Served) {
			continue
		}
		seen++
		leaf, subject := m.Served.Value[0], "pod/"+m.Pod.Name
		switch err := verify(m.Served.Value, roots, fmt.Sprintf("credence-%s.%s.svc", component, s.Namespace), s.Now); {
		case s.Now.After(leaf.NotAfter):
			r.fail(subject, remedy("Make cert-manager renew the certificate"), "its certificate expired at %s", leaf.NotAfter.UTC().Format(time.RFC3339))
		case err != nil:
			r.fail(subject, remedy("See that the root of the served certificate is in "+where), "its certificate cannot be verified with the roots in %s: %v", where, err)
		case s.Now.After(lifetime(leaf)):
			r.warn(subject, remedy("Make cert-manager renew the certificate"), "its certificate expires at %s and has not been renewed", leaf.NotAfter.UTC().Format(time.RFC3339))
		default:
			good++
		}
		if first == nil || leaf.NotAfter.Before(first.NotAfter) {
			first = leaf
		}
	}
	if good > 0 && good == seen {
		r.ok("verified in %s with %s; expires at %s", some(good, "pod"), where, first.NotAfter.UTC().Format(time.RFC3339))
	}
	if seen == 0 && len(r.findings) == 0 {
		r.add(finding.Unknown, "", nil, "not checked: no pod is ready")
	}
}

func webhookCertificate(s *snapshot, r *results) {
	if unread(r, s.Configs) || unread(r, s.Own) {
		return
	}
	hook := s.hook()
	if hook == nil {
		r.add(finding.Unknown, "", nil, "not checked: there is no webhook configuration")
		return
	}
	inject := &finding.Remedy{Who: finding.ClusterAdmin, What: "See that cert-manager's cainjector runs, or set certificates.roots of the chart", Page: "docs/certificates.md", Commands: []string{
		s.Target.Command("kubectl get pods --all-namespaces -l app.kubernetes.io/component=cainjector"), s.Target.Command("kubectl get mutatingwebhookconfiguration %s -o yaml", configuration),
	}}
	roots, err := certs.ParseRoots(hook.ClientConfig.CABundle)
	switch {
	case len(bytes.TrimSpace(hook.ClientConfig.CABundle)) == 0:
		r.fail("mutatingwebhookconfiguration/"+configuration, inject, "its caBundle is empty, so the API server cannot verify the webhook and refuses annotated pods")
		return
	case err != nil:
		r.fail("mutatingwebhookconfiguration/"+configuration, inject, "its caBundle is invalid: %v", err)
		return
	}
	s.serving(r, s.Webhooks, "webhook", roots, "the caBundle of the webhook configuration")
}

func injection(s *snapshot, r *results) {
	check := slices.ContainsFunc(s.Configs.Value, func(c admissionv1.MutatingWebhookConfiguration) bool { return c.Name == ownCheck })
	switch {
	case s.Configs.Err == nil && !check:
		r.ok("not tried: the chart's check.enabled is false")
	case s.Injected.Err != nil && strings.Contains(s.Injected.Err.Error(), "failed calling webhook"):
		what := "See the pods of the webhook"
		switch text := s.Injected.Err.Error(); {
		case strings.Contains(text, "x509:"):
			what = "See that cert-manager's cainjector runs and has set the caBundle"
		case strings.Contains(text, "deadline exceeded"), strings.Contains(text, "i/o timeout"), strings.Contains(text, "Client.Timeout"), strings.Contains(text, "no route"):
			what = fmt.Sprintf("Allow connections from the control plane to port %d of the webhook's pods in firewalls and network policies", installation.Port(s.Found.WebhookArgs(), "listen", 9443))
		}
		r.fail("", &finding.Remedy{Who: finding.ClusterAdmin, What: what, Page: "docs/network.md", Commands: []string{
			s.Target.Command("kubectl -n %s get pods,endpointslices -l app.kubernetes.io/component=webhook", s.Namespace),
		}}, "%v", s.Injected.Err)
	case unread(r, s.Injected):
	case !s.Injected.Value:
		r.fail("", s.reinstall("Install the chart again"), "the API server returned a PodTemplate without a sidecar: it does not call the webhook")
	default:
		r.ok("the API server calls the webhook, and the webhook injects")
	}
}

// policies of the chart, and whether their binding must deny.
var chartPolicies = []struct {
	name string
	deny bool
	what string
}{
	{"credence-injected", true, "annotated pods could start without a sidecar"},
	{"credence-fixed-keys", true, "users could change the role of a running pod"},
	{"credence-opt-in-label", false, "nothing warns about a wrong value of the opt-in label"},
}

func admissionPolicies(s *snapshot, r *results) {
	if unread(r, s.Policies) || unread(r, s.Bindings) {
		return
	}
	bad := 0
	for _, want := range chartPolicies {
		at := slices.IndexFunc(s.Policies.Value, func(p admissionv1.ValidatingAdmissionPolicy) bool { return p.Name == want.name })
		bound := slices.ContainsFunc(s.Bindings.Value, func(b admissionv1.ValidatingAdmissionPolicyBinding) bool {
			return b.Spec.PolicyName == want.name && (!want.deny || slices.Contains(b.Spec.ValidationActions, admissionv1.Deny))
		})
		problem := ""
		switch {
		case at < 0:
			problem = "does not exist"
		case !bound && want.deny:
			problem = "has no binding that denies"
		case !bound:
			problem = "has no binding"
		case want.deny && (s.Policies.Value[at].Spec.FailurePolicy == nil || *s.Policies.Value[at].Spec.FailurePolicy != admissionv1.Fail):
			problem = "has not the failurePolicy Fail"
		case !strings.Contains(fmt.Sprint(s.Policies.Value[at].Spec), s.Keys.Prefix()+"/"):
			problem = "is not about the prefix " + s.Keys.Prefix()
		default:
			continue
		}
		bad++
		r.fail("validatingadmissionpolicy/"+want.name, s.reinstall("Install the chart again, and see who removed or changed it"), "%s: %s", problem, want.what)
	}
	if bad == 0 {
		r.ok("%d present and bound", len(chartPolicies))
	}
}

func otherWebhooks(s *snapshot, r *results) {
	if unread(r, s.Configs) || unread(r, s.Daemons) {
		return
	}
	if len(s.Daemons.Value) > 0 {
		r.warn("", &finding.Remedy{Who: finding.ClusterAdmin, What: "Opt in one namespace at a time; then remove the DaemonSet and its iptables rules", Page: "docs/annotations.md"},
			"kiam or kube2iam runs, and gives roles by the same annotations: daemonset %s", strings.Join(s.Daemons.Value[:min(len(s.Daemons.Value), survey.MaxExamples)], ", "))
		return
	}
	for _, c := range s.Configs.Value {
		for _, hook := range c.Webhooks {
			if c.Name != configuration && c.Name != ownCheck && strings.Contains(fmt.Sprint(hook.MatchConditions), s.Keys.Prefix()+"/") {
				r.warn("mutatingwebhookconfiguration/"+c.Name, &finding.Remedy{Who: finding.ClusterAdmin, What: "See what it does, and remove it if it gives roles too", Commands: []string{
					s.Target.Command("kubectl get mutatingwebhookconfiguration %s -o yaml", c.Name),
				}}, "it acts on pods with annotations %s/*, too", s.Keys.Prefix())
				return
			}
		}
	}
	for _, c := range s.Configs.Value {
		if strings.Contains(c.Name, "pod-identity-webhook") {
			r.ok("%s sets AWS variables too, for ServiceAccounts with a role of their own; Credence refuses annotated pods that have both", c.Name)
			return
		}
	}
	r.ok("no other program gives roles by annotations")
}
