package explain

import (
	"fmt"
	"slices"
	"strings"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"

	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/operator/finding"
	"github.com/credence-iam/credence/operator/installation"
	"github.com/credence-iam/credence/operator/netpolicy"
	"github.com/credence-iam/credence/operator/snapshot"
)

// installation is the step that finds Credence.
func (s subject) installation() []finding.Finding {
	const step = "installation"
	found := s.Installation.Found
	if found == nil {
		return []finding.Finding{failed(step, installation.ErrNone.Error(), finding.Remedy{Who: finding.ClusterAdmin, What: "install Credence", Page: "docs/install.md"})}
	}
	var all []finding.Finding
	for _, problem := range found.Problems {
		if !apierrors.IsNotFound(problem) {
			if f := unsure(step, "%s", snapshot.ProblemOf(problem)); !slices.Contains(all, f) {
				all = append(all, f)
			}
			continue
		}
		all = append(all, unless(s.hasCredentials(), failed(step, "a part of Credence is missing: "+short(problem.Error()), finding.Remedy{
			Who: finding.ClusterAdmin, What: "install it again", Commands: s.reinstall(), Page: "docs/install.md"})))
	}
	return append(all, passed(step, "Credence is in namespace %s", found.Namespace))
}

// rulesFile is the step of the rules file.
func (s subject) rulesFile() []finding.Finding {
	const step = "rules file"
	if s.Judge.RulesErr == nil {
		return nil
	}
	// Programs that run keep the last valid file. Programs that start do not start with it.
	f := failed(step, "the rules file is invalid: "+short(s.Judge.RulesErr.Error())+"; running webhooks and brokers keep the last valid one, and new ones do not start", finding.Remedy{
		Who: finding.ClusterAdmin, What: "correct the rules file (the chart's value rules)", Page: "docs/rules.md",
		Commands: []string{s.inCredence("edit", "configmap", installation.RulesConfigMap)},
	})
	starts := ready(s.Installation.WebhookPods) > 0 && s.readyBrokers() > 0
	return []finding.Finding{unless(starts, f)}
}

// ready counts the pods that are ready.
func ready(pods []corev1.Pod) (n int) {
	for i := range pods {
		if installation.Ready(&pods[i]) {
			n++
		}
	}
	return n
}

func (s subject) readyBrokers() (n int) {
	for _, b := range s.Installation.Brokers {
		if installation.Ready(&b.Pod) {
			n++
		}
	}
	return n
}

// down returns the failure of a Deployment without a ready pod; false if it has one, or is not known.
func (s subject) down(step, what string, d *appsv1.Deployment, pods []corev1.Pod) (finding.Finding, bool) {
	if d == nil || ready(pods) > 0 {
		return finding.Finding{}, false
	}
	if d.Spec.Replicas != nil && *d.Spec.Replicas == 0 {
		return failed(step, fmt.Sprintf("no %s runs: Deployment %s/%s has 0 replicas", what, d.Namespace, d.Name), finding.Remedy{
			Who: finding.ClusterAdmin, What: "start it", Commands: []string{
				s.inCredence("scale", "deployment", d.Name, "--replicas=2"), s.inCredence("rollout", "status", "deployment/"+d.Name)},
		}), true
	}
	if s.Problems[snapshot.SourceBrokers] != "" {
		return finding.Finding{}, false // No pod could be listed.
	}
	text := fmt.Sprintf("no %s is ready", what)
	if len(pods) == 0 {
		text = fmt.Sprintf("no %s runs: Deployment %s/%s has no pod", what, d.Namespace, d.Name)
	}
	for i := range pods {
		if why := installation.Trouble(&pods[i]); why != "" {
			text += ": pod " + pods[i].Name + ": " + short(why)
			break
		}
	}
	return failed(step, text, finding.Remedy{Who: finding.ClusterAdmin, What: "see why its pods are not ready", Page: "docs/operations.md", Commands: []string{
		s.inCredence("describe", "pods", "-l", "app.kubernetes.io/component="+what), s.inCredence("logs", "-l", "app.kubernetes.io/component="+what, "--tail=20"),
	}}), true
}

// webhook returns what keeps the API server from injecting a pod of the namespace.
func (s subject) webhook(step string) (all []finding.Finding) {
	i := &s.Installation
	found := i.Found
	switch c := i.Configuration; {
	case i.ConfigurationGone:
		all = append(all, failed(step, "MutatingWebhookConfiguration credence is missing, so the API server calls no webhook", finding.Remedy{
			Who: finding.ClusterAdmin, What: "install it again", Commands: append(s.reinstall(), s.recreate()...), Page: "docs/install.md"}))
	case c == nil:
		all = append(all, s.unknown(step, snapshot.SourceConfiguration)...)
	case len(c.Webhooks) == 0 || s.Namespace != nil && s.optedIn() && !netpolicy.Selects(c.Webhooks[0].NamespaceSelector, s.Namespace.Labels):
		all = append(all, failed(step, "MutatingWebhookConfiguration credence leaves out namespace "+s.NamespaceName, finding.Remedy{
			Who: finding.ClusterAdmin, What: "change its namespaceSelector (the chart's value webhook.namespaceSelector), or use another namespace",
			Commands: []string{s.kubectl("get", "mutatingwebhookconfiguration", "credence", "-o", "jsonpath={.webhooks[0].namespaceSelector}")}}))
	}
	if f, ok := s.down(step, "webhook", found.Webhook, i.WebhookPods); ok && s.Problems[snapshot.SourceBrokers] == "" {
		if tls := i.WebhookTLS; tls == nil || s.Now.Before(tls.Until) {
			return append(all, f)
		}
	}
	switch tls := i.WebhookTLS; {
	case tls == nil && s.Problems[snapshot.SourceBrokers] != "":
		all = append(all, s.unknown(step, snapshot.SourceBrokers)...)
	case tls == nil:
		all = append(all, s.unknown(step, snapshot.SourceCertificate)...)
	case !s.Now.Before(tls.Until):
		all = append(all, failed(step, "the webhook's certificate expired "+clock(tls.Until)+", so the API server does not accept it", s.renew("webhook")))
	case s.Now.Before(tls.From):
		all = append(all, failed(step, "the webhook's certificate is valid from "+clock(tls.From)+" only; a clock is wrong", s.setClock("of the node of the webhook, or of the certificate's issuer")))
	case tls.Untrusted != "" && i.Configuration != nil:
		all = append(all, failed(step, "the API server does not trust the webhook's certificate, because the caBundle of MutatingWebhookConfiguration credence has other roots: "+short(tls.Untrusted), s.trustWebhook()))
	}
	if len(all) == 0 {
		all = append(all, passed(step, "the webhook is configured; %d of %s ready", ready(i.WebhookPods), count(len(i.WebhookPods), "pod")))
	}
	return all
}

// webhookCall returns the remedy of a failed call of the webhook, by the API server's message.
func (s subject) webhookCall(cause string) finding.Remedy {
	switch {
	case strings.Contains(cause, "has expired"):
		return s.renew("webhook")
	case strings.Contains(cause, "x509"):
		return s.trustWebhook()
	case strings.Contains(cause, "no endpoints available"), strings.Contains(cause, "not found"):
		return finding.Remedy{Who: finding.ClusterAdmin, What: "see why no webhook was ready", Commands: []string{
			s.inCredence("get", "pods", "-l", "app.kubernetes.io/component=webhook")}, Page: "docs/operations.md"}
	default:
		return finding.Remedy{Who: finding.ClusterAdmin, What: "let the API server reach port 9443 of the webhook's pods", Commands: []string{
			s.inCredence("get", "networkpolicies"), s.inCredence("get", "pods", "-l", "app.kubernetes.io/component=webhook", "-o", "wide")}, Page: "docs/network.md"}
	}
}

// secretOf returns the Secret from which a Deployment mounts its certificate.
func secretOf(d *appsv1.Deployment) string {
	if d != nil {
		for _, v := range d.Spec.Template.Spec.Volumes {
			if v.Name == "tls" && v.Secret != nil {
				return v.Secret.SecretName
			}
		}
	}
	return "SECRET"
}

// renew returns the remedy of an expired certificate.
func (s subject) renew(component string) finding.Remedy {
	d := s.Installation.Found.Webhook
	if component == "broker" {
		d = s.Installation.Found.Broker
	}
	return finding.Remedy{
		Who: finding.ClusterAdmin, What: "have cert-manager issue it again, or replace the Secret if you make it yourself", Page: "docs/certificates.md",
		Commands: []string{s.inCredence("delete", "secret", secretOf(d)), s.inCredence("describe", "certificate", "credence-"+component)},
	}
}

// trustWebhook returns the remedy of a wrong caBundle.
func (s subject) trustWebhook() finding.Remedy {
	configuration := func(patch string) string {
		return s.kubectl("patch", "mutatingwebhookconfiguration", "credence", "--type=json") + ` -p "` + patch + `"`
	}
	roots := s.inCredence("get", "secret", secretOf(s.Installation.Found.Webhook), "-o", `jsonpath={.data.ca\.crt}`)
	return finding.Remedy{
		Who: finding.ClusterAdmin, What: "put the roots of the webhook's certificate into the configuration, which cert-manager's cainjector does if it runs", Page: "docs/certificates.md",
		Commands: []string{configuration(`[{\"op\":\"add\",\"path\":\"/webhooks/0/clientConfig/caBundle\",\"value\":\"$(` + roots + `)\"}]`)},
	}
}

func (s subject) setClock(which string) finding.Remedy {
	return finding.Remedy{Who: finding.ClusterAdmin, What: "set the clock " + which + ", with NTP or chrony", Commands: []string{
		s.kubectl("get", "nodes", "-o", "wide"), "timedatectl status # on the node"}, Page: "docs/aws.md#clocks"}
}

// brokers is the step of the brokers' pods and rights.
func (s subject) brokers() []finding.Finding {
	const step = "brokers"
	i := &s.Installation
	harmless := !s.running() || s.hasCredentials()
	if len(i.MissingRights) > 0 {
		return []finding.Finding{unless(harmless, failed(step, "the brokers may not read pods and namespaces: "+strings.Join(i.MissingRights, ", ")+" is missing", finding.Remedy{
			Who: finding.ClusterAdmin, What: "give them their rights again",
			Commands: append(s.reinstall(), s.inCredence("rollout", "restart", "deployment/"+installation.BrokerName)), Page: "docs/install.md"}))}
	}
	if s.Problems[snapshot.SourceBrokers] != "" {
		return s.unknown(step, snapshot.SourceBrokers)
	}
	var pods []corev1.Pod
	for _, b := range i.Brokers {
		pods = append(pods, b.Pod)
	}
	f, isDown := s.down(step, "broker", i.Found.Broker, pods)
	for _, b := range i.Brokers {
		if isDown && b.Problem != "" {
			return []finding.Finding{unless(harmless, s.brokerProblem(b))}
		}
	}
	if isDown {
		return []finding.Finding{unless(harmless, f)}
	}
	if s.sidecarState().failure.Reason == credential.ReasonAPIServerUnavailable {
		return []finding.Finding{unless(harmless, failed(step, "the brokers cannot read this pod: "+short(s.sidecarState().failure.Error), finding.Remedy{
			Who: finding.ClusterAdmin, What: "see whether the brokers reach the API server and have their rights",
			Commands: []string{
				s.kubectl("auth", "can-i", "watch", "pods", "-A", "--as=system:serviceaccount:"+s.credence()+":"+installation.BrokerName),
				s.inCredence("logs", "-l", "app.kubernetes.io/component=broker", "--tail=20"),
			}, Page: "docs/operations.md"}))}
	}
	return append(s.unknown(step, snapshot.SourceRBAC), passed(step, "%d of %s ready", ready(pods), count(len(pods), "broker")))
}

// brokerProblem returns the failure of a broker that says itself why it is not ready.
func (s subject) brokerProblem(b snapshot.Broker) finding.Finding {
	problem := b.Problem // one line for each check that fails
	for line := range strings.Lines(problem) {
		if strings.HasPrefix(line, "AWS identity: ") {
			problem = line // The others wait for it.
		}
	}
	text := fmt.Sprintf("no broker is ready: pod %s: %s", b.Pod.Name, short(problem))
	switch {
	case strings.Contains(b.Problem, "own credentials"), strings.Contains(b.Problem, "no AWS credentials"), strings.Contains(b.Problem, "web identity"),
		strings.Contains(b.Problem, "assume the role of --assume-role"):
		return failed("broker's AWS credentials", text, s.ownKeys())
	case strings.Contains(b.Problem, "listed yet"), strings.Contains(b.Problem, "API server"):
		return failed("brokers", text, finding.Remedy{Who: finding.ClusterAdmin, What: "see whether the brokers have their rights and reach the API server", Commands: []string{
			s.kubectl("auth", "can-i", "watch", "pods", "-A", "--as=system:serviceaccount:"+s.credence()+":"+installation.BrokerName),
		}, Page: "docs/operations.md"})
	case strings.Contains(b.Problem, "STS"):
		return failed("STS", text, s.reachSTS())
	case strings.Contains(b.Problem, "it expired at"):
		return failed("brokers", text, s.renew("broker"))
	}
	return failed("brokers", text, finding.Remedy{Who: finding.ClusterAdmin, What: "see what the brokers wait for", Page: "docs/operations.md", Commands: []string{
		s.inCredence("logs", b.Pod.Name, "--tail=20")}})
}

// reachSTS returns the remedy of an STS that the brokers cannot use.
func (s subject) reachSTS() finding.Remedy {
	return finding.Remedy{Who: finding.ClusterAdmin, What: "check the brokers' egress to STS, their DNS and proxy, and the chart's values aws.region and aws.stsEndpoint; brokers retry by themselves", Page: "docs/operations.md#when-sts-is-down",
		Commands: []string{
			s.inCredence("logs", "-l", "app.kubernetes.io/component=broker", "--tail=20"),
			s.inCredence("get", "networkpolicies"),
			s.inCredence("get", "deployment", installation.BrokerName, "-o", "jsonpath={.spec.template.spec.containers[0].args}"),
		}}
}

// ownKeys returns the remedy of brokers whose own AWS credentials do not work. It names the Secret that has them.
func (s subject) ownKeys() finding.Remedy {
	r := finding.Remedy{Who: finding.ClusterAdmin, What: "give the brokers AWS credentials that work, then restart them", Page: "docs/operations.md#a-broker-is-not-ready-because-of-aws"}
	if d := s.Installation.Found.Broker; d != nil && len(d.Spec.Template.Spec.Containers) > 0 {
		values, secret := m{}, ""
		for _, v := range d.Spec.Template.Spec.Containers[0].Env {
			if strings.HasPrefix(v.Name, "AWS_") && v.ValueFrom != nil && v.ValueFrom.SecretKeyRef != nil {
				values[v.ValueFrom.SecretKeyRef.Key], secret = strings.TrimPrefix(v.Name, "AWS_"), v.ValueFrom.SecretKeyRef.Name
			}
		}
		if secret != "" {
			r.Commands = append(r.Commands, s.inCredence("patch", "secret", secret, "--type=merge", "-p", encode(m{"stringData": values})))
			r.What = "put an access key that works into Secret " + secret + ", then restart the brokers"
		}
	}
	r.Commands = append(r.Commands, s.inCredence("rollout", "restart", "deployment/"+installation.BrokerName))
	return r
}

// ownCredentials is the step of the brokers' own AWS credentials.
func (s subject) ownCredentials() []finding.Finding {
	const step = "broker's AWS credentials"
	text := ""
	if failure := s.sidecarState().failure; failure.Reason == credential.ReasonBrokerCredentials {
		text = failure.Error
	}
	for _, b := range s.Installation.Brokers {
		for _, g := range b.Grants {
			if installation.Ready(&b.Pod) && g.Reason == string(credential.ReasonBrokerCredentials) {
				text = g.Message
			}
		}
	}
	if text == "" || s.readyBrokers() == 0 { // The step of the brokers has it.
		return nil
	}
	return []finding.Finding{unless(!s.running() || s.hasCredentials(), failed(step, short(text), s.ownKeys()))}
}

// clock returns a time for a reader.
func clock(t time.Time) string { return t.UTC().Format("2006-01-02 15:04:05 UTC") }
