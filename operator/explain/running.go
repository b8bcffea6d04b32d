package explain

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/debugapi"
	"github.com/credence-iam/credence/broker/placement"
	"github.com/credence-iam/credence/broker/policy"
	"github.com/credence-iam/credence/operator/finding"
	"github.com/credence-iam/credence/operator/installation"
	"github.com/credence-iam/credence/operator/snapshot"
	"github.com/credence-iam/credence/sidecar/contract"
)

// start is the step of the sidecar's container.
func (s subject) start() []finding.Finding {
	const step = "sidecar"
	if s.Pod.Status.Phase == corev1.PodSucceeded || s.Pod.Status.Phase == corev1.PodFailed {
		return []finding.Finding{unsure(step, "the pod has ended (%s), so it has no credentials any more", s.Pod.Status.Phase)}
	}
	status := s.SidecarStatus()
	if status == nil {
		for _, c := range s.Pod.Status.Conditions {
			if c.Type == corev1.PodScheduled && c.Status == corev1.ConditionFalse {
				return []finding.Finding{failed(step, "the pod is not scheduled: "+short(c.Message), finding.Remedy{
					Who: finding.ClusterAdmin, What: "make room for the pod, or change what it requires of a node", Commands: []string{s.in("describe", "pod", s.Pod.Name)}})}
			}
		}
		return []finding.Finding{unsure(step, "the kubelet has not started the pod yet")}
	}
	if w := status.State.Waiting; w != nil {
		return s.waiting(step, status, w)
	}
	if status.State.Running == nil {
		return []finding.Finding{unsure(step, "the sidecar has ended")}
	}
	since := status.State.Running.StartedAt.Time
	text := "it has run for " + age(s.Now.Sub(since))
	if status.RestartCount > 0 {
		text += ", after " + count(int(status.RestartCount), "restart")
		if t := status.LastTerminationState.Terminated; t != nil {
			text += ", the last one because of " + t.Reason
		}
	}
	if status.Started == nil || !*status.Started {
		text += "; the other containers wait for its first credentials, " + env(s.Sidecar(), contract.StartTimeout) + " at most"
	}
	switch state := s.sidecarState(); {
	case state.failure.Reason != "":
		text += fmt.Sprintf("; its last attempt failed %s ago with %s", age(s.Now.Sub(state.failure.Time)), state.failure.Reason)
	case !state.session.Expiration.IsZero():
		text += fmt.Sprintf("; it serves a session until %s (access key %s)", clock(state.session.Expiration), state.session.AccessKeyID)
	}
	return append(s.unknown(step, snapshot.SourceLog), passed(step, "%s", text))
}

// waiting returns why the sidecar's container does not start.
func (s subject) waiting(step string, status *corev1.ContainerStatus, w *corev1.ContainerStateWaiting) []finding.Finding {
	switch w.Reason {
	case "ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "RegistryUnavailable":
		return []finding.Finding{failed("sidecar image", fmt.Sprintf("the node cannot pull the sidecar's image %s: %s", s.Sidecar().Image, short(w.Reason+": "+w.Message)), s.image())}
	case "ContainerCreating", "PodInitializing":
		mount, ok := s.message(func(m snapshot.Message) bool {
			// The kubelet's caches are not ready in the first seconds of a pod.
			return (m.Reason == "FailedMount" || m.Reason == "FailedCreatePodSandBox") && !strings.Contains(m.Text, "failed to sync")
		})
		if ok && !strings.Contains(mount.Text, installation.TrustConfigMap) && s.Now.Sub(mount.Time) < 5*time.Minute {
			return []finding.Finding{failed(step, "the kubelet cannot start the pod: "+short(mount.Text), finding.Remedy{
				Who: finding.Author, What: "fix what the kubelet reports", Commands: []string{s.in("describe", "pod", s.Pod.Name)}})}
		}
		return []finding.Finding{passed(step, "the kubelet has not started it yet")}
	}
	text := fmt.Sprintf("the sidecar waits with %s: %s", w.Reason, short(w.Message))
	if t := status.LastTerminationState.Terminated; t != nil {
		text += fmt.Sprintf("; it ended with %s: %s", t.Reason, short(t.Message))
	}
	return []finding.Finding{failed(step, text, finding.Remedy{
		Who: finding.ClusterAdmin, What: "see why it ends; a sidecar that runs out of memory needs the annotation sidecar-memory", Page: "docs/settings.md",
		Commands: []string{s.in("logs", s.Pod.Name, "-c", contract.ContainerName, "--previous")}})}
}

// image returns the remedy of a sidecar image that nodes cannot pull.
func (s subject) image() finding.Remedy {
	i := s.Installation.Found
	r := finding.Remedy{Who: finding.ClusterAdmin, What: "correct the image of the sidecar (the chart's value images.sidecar), or let the nodes pull it, then recreate the pod", Page: "docs/settings.md"}
	if s.Judge.Injector != nil && s.Judge.Injector.Image() != s.Sidecar().Image {
		r.Who, r.What, r.Commands = finding.Author, "recreate the pod: the webhook has another image by now", s.recreate()
		return r
	}
	// The images of one version have one registry and one tag.
	if d := i.Webhook; d != nil && len(d.Spec.Template.Spec.Containers) > 0 {
		if image := strings.Replace(d.Spec.Template.Spec.Containers[0].Image, "credence-webhook", "credence-sidecar", 1); image != s.Sidecar().Image && strings.Contains(image, "credence-sidecar") {
			r.Commands = s.setArg(installation.WebhookName, i.WebhookArgs(), "sidecar-image", image)
		}
	}
	r.Commands = append(r.Commands, s.recreate()...)
	return r
}

// env returns the value of the variable that sets a flag of the sidecar.
func env(sidecar *corev1.Container, flag string) string {
	for _, v := range sidecar.Env {
		if v.Name == contract.Env(flag) {
			return v.Value
		}
	}
	return ""
}

// maxSkew is the difference of two clocks that harms: the broker refuses tokens that begin more than a minute ahead.
const maxSkew = time.Minute

// clocks is the step of the clocks of the nodes, compared with that of the API server.
func (s subject) clocks() []finding.Finding {
	const step = "clocks"
	harmless := s.hasCredentials()
	wrong := func(whose string, by time.Duration) []finding.Finding {
		direction := "ahead of"
		if by < 0 {
			direction, by = "behind", -by
		}
		return []finding.Finding{unless(harmless, failed(step, fmt.Sprintf("the clock %s is %s %s the API server's", whose, age(by), direction), s.setClock(whose)))}
	}
	for _, b := range s.Installation.Brokers {
		if b.Clock.Abs() > maxSkew {
			return wrong("of node "+b.Pod.Spec.NodeName+" (broker "+b.Pod.Name+")", b.Clock)
		}
	}
	// The kubelet sets the start time, and the API server the time of creation.
	if start := s.Pod.Status.StartTime; start != nil && s.Pod.CreationTimestamp.Sub(start.Time) > maxSkew {
		return wrong("of node "+s.Pod.Spec.NodeName+" (the pod)", start.Sub(s.Pod.CreationTimestamp.Time))
	}
	if n := len(s.Log); n > 0 && s.Log[n-1].Time.Sub(s.Now) > maxSkew {
		return wrong("of node "+s.Pod.Spec.NodeName+" (the pod)", s.Log[n-1].Time.Sub(s.Now))
	}
	failure := s.sidecarState().failure
	switch {
	case failure.Reason == credential.ReasonTokenEarly, failure.Reason == credential.ReasonTokenExpired, strings.Contains(failure.Error, "node's clock"),
		strings.Contains(failure.Error, "broker's clock"), strings.Contains(failure.Error, "not yet valid: current time"):
		return []finding.Finding{unless(harmless, failed(step, "a clock is wrong: "+short(failure.Error), s.setClock("of the node that the message names")))}
	}
	return []finding.Finding{passed(step, "nodes and API server agree to a minute")}
}

// trust is the step of the brokers' root certificates.
func (s subject) trust() []finding.Finding {
	const step = "trust"
	harmless := s.hasCredentials()
	name := "ConfigMap " + s.NamespaceName + "/" + installation.TrustConfigMap
	restart := s.inCredence("rollout", "restart", "deployment/"+installation.BrokerName)
	if s.TrustGone {
		return []finding.Finding{unless(harmless, failed(step, name+" is missing, which the brokers write and the sidecar mounts", finding.Remedy{
			Who: finding.ClusterAdmin, What: "have the brokers write it again: they do so when they start, and by themselves if they have their rights", Page: "docs/certificates.md",
			Commands: []string{s.inCredence("scale", "deployment", installation.BrokerName, "--replicas=2"), restart}}))}
	}
	if failure := s.sidecarState().failure; failure.Reason == credential.ReasonBrokerUnreachable && isTLS(failure.Error) {
		remedy := finding.Remedy{Who: finding.ClusterAdmin, What: "have the brokers publish their roots again", Commands: []string{restart}, Page: "docs/certificates.md"}
		if strings.Contains(failure.Error, "expired") {
			remedy = s.renew("broker")
		}
		return []finding.Finding{unless(harmless, failed(step, "the sidecar does not accept the brokers' certificate: "+short(failure.Error), remedy))}
	}
	for _, b := range s.Installation.Brokers {
		switch tls := b.TLS; {
		case tls == nil:
		case !s.Now.Before(tls.Until):
			return []finding.Finding{unless(harmless, failed(step, "the certificate of broker "+b.Pod.Name+" expired "+clock(tls.Until), s.renew("broker")))}
		case tls.Untrusted != "":
			return []finding.Finding{unless(harmless, failed(step, fmt.Sprintf("%s does not have the root of the certificate of broker %s: %s", name, b.Pod.Name, short(tls.Untrusted)),
				finding.Remedy{Who: finding.ClusterAdmin, What: "have the brokers publish their roots again", Commands: []string{restart}, Page: "docs/certificates.md"}))}
		}
	}
	if s.Trust == nil {
		return s.unknown(step, snapshot.SourceTrust)
	}
	return []finding.Finding{passed(step, "%s has the brokers' roots", name)}
}

// token is the step of the sidecar's token.
func (s subject) token() []finding.Finding {
	const step = "token"
	var projected *corev1.ServiceAccountTokenProjection
	for _, v := range s.Pod.Spec.Volumes {
		if v.Projected == nil || !slices.ContainsFunc(s.Sidecar().VolumeMounts, func(m corev1.VolumeMount) bool { return m.Name == v.Name }) {
			continue
		}
		for _, source := range v.Projected.Sources {
			if source.ServiceAccountToken != nil {
				projected = source.ServiceAccountToken
			}
		}
	}
	if projected == nil {
		return []finding.Finding{failed(step, "the sidecar has no token for the brokers", finding.Remedy{Who: finding.Author, What: "recreate the pod", Commands: s.recreate()})}
	}
	found, harmless := s.Installation.Found, s.hasCredentials()
	audience := func(args []string) string {
		if args == nil {
			return "" // It is not known.
		}
		if value := installation.Arg(args, "audience"); value != "" {
			return value
		}
		return "credence-broker" // the default of both programs
	}
	webhook, broker := audience(found.WebhookArgs()), audience(found.BrokerArgs())
	switch {
	case webhook != "" && broker != "" && webhook != broker:
		deployment, args, value := installation.BrokerName, found.BrokerArgs(), webhook
		if projected.Audience == broker {
			deployment, args, value = installation.WebhookName, found.WebhookArgs(), broker
		}
		f := failed(step, fmt.Sprintf("the webhook requests tokens for audience %q, and the brokers accept %q", webhook, broker), finding.Remedy{
			Who: finding.ClusterAdmin, What: "use one audience for both (the chart's value audience sets it)", Commands: s.setArg(deployment, args, "audience", value), Page: "docs/errors.md"})
		return []finding.Finding{unless(harmless || projected.Audience == broker, f)}
	case broker != "" && projected.Audience != broker:
		return []finding.Finding{unless(harmless, failed(step, fmt.Sprintf("the pod has a token for audience %q, and the brokers accept %q", projected.Audience, broker), finding.Remedy{
			Who: finding.Author, What: "recreate the pod, so that it gets a token for the present audience", Commands: s.recreate(), Page: "docs/errors.md"}))}
	case strings.HasPrefix(string(s.sidecarState().failure.Reason), "TOKEN_") && s.sidecarState().failure.Reason == credential.ReasonTokenAudience:
		return []finding.Finding{unless(harmless, failed(step, short(s.sidecarState().failure.Error), finding.Remedy{
			Who: finding.ClusterAdmin, What: "set --audience of webhook and brokers to one value (the chart's value audience), then recreate the pod", Commands: s.recreate(), Page: "docs/errors.md"}))}
	}
	life := 2 * time.Hour
	if projected.ExpirationSeconds != nil {
		life = time.Duration(*projected.ExpirationSeconds) * time.Second
	}
	return []finding.Finding{passed(step, "its audience is %s; the kubelet renews it at 80%% of its %s", projected.Audience, age(life))}
}

// ours reports whether a grant of a broker is that of the pod. A broker still has the grants of pods that have ended, and the
// page does not show all by which two differ: but no live pod uses those.
func (s subject) ours(g debugapi.Grant, basis policy.Basis) bool {
	if own := basis.Grant; !own.IsZero() {
		return g.Grant == own.String() && g.Pods > 0 && g.ExternalID == (own.ExternalID() != "") && g.SessionPolicy == (own.SessionPolicy() != "") &&
			g.PolicyARNs == len(own.PolicyARNs()) && g.Tags == len(own.Tags()) && g.Duration == own.Duration().Seconds()
	}
	settings, err := s.PolicyPod().Request.Settings()
	return err == nil && settings.Role != "" && strings.HasSuffix(g.Role, settings.Role) && slices.Contains(g.Namespaces, s.NamespaceName)
}

// session is the step of the brokers that own the pod's session.
func (s subject) session() []finding.Finding {
	const step = "session"
	if s.Judge.Rules == nil {
		return nil
	}
	basis, err := s.basis()
	if err != nil && !errors.Is(err, policy.ErrNoBase) {
		return nil
	}
	key := policy.RoutingKey(env(s.Sidecar(), contract.RoutingKey))
	if slices.ContainsFunc(s.Sidecar().Env, func(v corev1.EnvVar) bool { return v.Name == contract.Env(contract.PodUID) }) {
		key = key.ForPod(string(s.Pod.UID))
	}
	ranked := placement.Rank(string(key), s.addresses())
	all := s.unknown(step, snapshot.SourceGrants)
	for at, address := range ranked[:min(len(ranked), placement.Owners)] {
		for _, b := range s.Installation.Brokers {
			if b.Pod.Status.PodIP != address.String() || !b.Known {
				continue
			}
			owner := fmt.Sprintf("broker %s, its %s owner, ", b.Pod.Name, []string{"first", "second"}[at])
			n := slices.IndexFunc(b.Grants, func(g debugapi.Grant) bool { return s.ours(g, basis) })
			switch {
			case n < 0:
				all = append(all, passed(step, "%sdoes not have it", owner))
			case b.Grants[n].Expiration == nil:
				all = append(all, passed(step, "%shas none; %s failed", owner, count(b.Grants[n].Failures, "attempt")))
			default:
				g := b.Grants[n]
				all = append(all, passed(step, "%shas it until %s, access key %s, for %s", owner, clock(*g.Expiration), g.AccessKeyID, count(g.Pods, "pod")))
			}
		}
	}
	return all
}

// sts is the step of the response of STS.
func (s subject) sts() []finding.Finding {
	const step = "STS"
	if s.Judge.Rules == nil || s.readyBrokers() == 0 { // The step of the brokers says whether they reach STS.
		return nil
	}
	basis, _ := s.basis()
	reason, message := s.sidecarState().failure.Reason, s.sidecarState().failure.Error
	for _, b := range s.Installation.Brokers {
		for _, g := range b.Grants {
			if s.ours(g, basis) && strings.HasPrefix(g.Reason, "STS_") {
				reason, message = credential.Reason(g.Reason), g.Message
			}
		}
	}
	harmless := s.hasCredentials()
	switch reason {
	case credential.ReasonSTSDenied:
		all := s.denied(step, basis, message)
		all[0] = unless(harmless, all[0])
		return all
	case credential.ReasonSTSRejected:
		return []finding.Finding{unless(harmless, failed(step, short(message), finding.Remedy{
			Who: finding.Author, What: "change the annotation that the message names, or the role in IAM", Page: "docs/errors.md"}))}
	case credential.ReasonSTSThrottled:
		return []finding.Finding{unless(harmless, failed(step, "STS limits the calls of the brokers' account: "+short(message), finding.Remedy{
			Who: finding.ClusterAdmin, What: "see what else in the account calls STS, lower the chart's value broker.stsRate, or use the STS of another region (aws.region); brokers retry by themselves",
			Commands: []string{s.inCredence("logs", "-l", "app.kubernetes.io/component=broker", "--tail=20")}, Page: "docs/operations.md#credencestsfailing"}))}
	case credential.ReasonSTSUnavailable:
		return []finding.Finding{unless(harmless, failed(step, "the brokers get no response of STS: "+short(message), s.reachSTS()))}
	default: // Another step has it.
	}
	if harmless {
		return []finding.Finding{passed(step, "it gave the session")}
	}
	return nil
}

// denied returns the findings about a role that STS refuses. AWS has one answer for several causes, so each is a finding
// that says how to tell.
func (s subject) denied(step string, basis policy.Basis, message string) []finding.Finding {
	role, identity := basis.Role, s.Installation.Identity
	if identity == "" {
		identity = "BROKERS_ROLE_ARN"
	}
	settings, _ := s.PolicyPod().Request.Settings()
	actions := []string{"sts:AssumeRole"}
	if basis.Grant.Tags() != nil || strings.Contains(message, "sts:TagSession") {
		actions = append(actions, "sts:TagSession")
	}
	if basis.Grant.SourceIdentity() != "" || strings.Contains(message, "sts:SetSourceIdentity") {
		actions = append(actions, "sts:SetSourceIdentity")
	}
	statement := m{"Effect": "Allow", "Principal": m{"AWS": identity}, "Action": actions}
	if settings.ExternalID != "" {
		statement["Condition"] = m{"StringEquals": m{"sts:ExternalId": settings.ExternalID}}
	}
	name := role.String()[strings.LastIndexByte(role.String(), '/')+1:]
	document := encode(m{"Version": "2012-10-17", "Statement": []m{statement}})
	iam := func(words ...string) string { return finding.Shell(append([]string{"aws", "iam"}, words...)...) }
	look := iam("get-role", "--role-name", name, "--query", "Role.AssumeRolePolicyDocument")
	update := iam("update-assume-role-policy", "--role-name", name, "--policy-document", document)
	if len(actions) > 1 && !strings.Contains(message, "check that it exists") {
		return []finding.Finding{failed(step, short(message), finding.Remedy{
			Who: finding.AWSAdmin, What: "add this statement to the trust policy of the role (the last command replaces the whole policy)", Commands: []string{look, update}, Page: "docs/aws.md"})}
	}
	possible := func(text string, who finding.Person, what string, commands ...string) finding.Finding {
		return finding.Finding{Step: step, State: finding.Unknown, Text: text, Remedy: &finding.Remedy{Who: who, What: what, Commands: commands}}
	}
	external := "its trust policy requires an external id (the output has sts:ExternalId), and the pod sends none"
	if settings.ExternalID != "" {
		external = "its trust policy requires another external id than the pod's (the output has sts:ExternalId)"
	}
	resource := m{"Version": "2012-10-17", "Statement": []m{{"Effect": "Allow", "Action": actions, "Resource": role.String()}}}
	brokers := strings.TrimSuffix(identity[strings.LastIndexByte(identity, '/')+1:], "_ARN")
	return []finding.Finding{
		failed(step, fmt.Sprintf("STS refuses %s to the brokers (AccessDenied), which has one of four causes, below", role), finding.Remedy{
			Who: finding.AWSAdmin, What: "look at the role's trust policy in account " + role.Account() + " to tell which cause it is", Commands: []string{look}, Page: "docs/aws.md"}),
		possible("the role does not exist (the command fails with NoSuchEntity)", finding.AWSAdmin, "make the role, or correct the pod's annotation "+s.key(policy.Role),
			iam("create-role", "--role-name", name, "--assume-role-policy-document", document)),
		possible("its trust policy does not name "+identity, finding.AWSAdmin, "add this statement to it (the command replaces the whole policy)", update),
		possible(external, finding.Author, "annotate the pod with it", s.annotate(m{s.key(policy.ExternalID): "EXTERNAL_ID"})...),
		possible("the brokers may not assume it (all of the above is right)", finding.AWSAdmin, "allow it in the policies of the brokers' role, and in those of the organization",
			iam("put-role-policy", "--role-name", brokers, "--policy-name", "assume-"+name, "--policy-document", encode(resource))),
	}
}

// trial is the step of a request for credentials from inside the pod.
func (s subject) trial() []finding.Finding {
	const step = "trial"
	switch {
	case s.Trial == nil:
		return s.unknown(step, snapshot.SourceTrial)
	case s.Trial.Succeeded:
		return []finding.Finding{passed(step, "%s", short(s.Trial.Line))}
	}
	return []finding.Finding{failed(step, "a container in the pod gets no credentials: "+short(s.Trial.Line), finding.Remedy{
		Who: finding.Author, What: "see the reason; if the sidecar has credentials, look for a program on its port, and for a policy between containers",
		Commands: []string{s.in("logs", s.Pod.Name, "-c", contract.ContainerName, "--tail=5")}, Page: "docs/errors.md"})}
}
