package explain

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/policy"
	"github.com/credence-iam/credence/broker/policy/pattern"
	"github.com/credence-iam/credence/operator/finding"
	"github.com/credence-iam/credence/operator/snapshot"
)

// label is the step of the namespace's label.
func (s subject) label() []finding.Finding {
	const step = "namespace label"
	label := s.key(policy.Inject)
	if s.Namespace == nil {
		return s.unknown(step, snapshot.SourceNamespace)
	}
	if s.optedIn() {
		return []finding.Finding{passed(step, "namespace %s is opted in (%s=%s)", s.NamespaceName, label, policy.Enabled)}
	}
	text := fmt.Sprintf("namespace %s is not opted in: it has no label %s=%s", s.NamespaceName, label, policy.Enabled)
	commands := []string{s.kubectl("label", "namespace", s.NamespaceName, label+"="+policy.Enabled, "--overwrite")}
	if value, ok := s.Namespace.Labels[label]; ok {
		text = fmt.Sprintf("namespace %s is not opted in: its label %s is %q, and only %q opts it in", s.NamespaceName, label, value, policy.Enabled)
	} else if other := s.similar(s.Namespace.Labels, policy.Inject); other != "" {
		text = fmt.Sprintf("namespace %s is not opted in: it has the label %s, which means nothing; the right one is %s=%s", s.NamespaceName, other, label, policy.Enabled)
		commands = append(commands, s.kubectl("label", "namespace", s.NamespaceName, other+"-"))
	} else if _, ok := s.Namespace.Annotations[label]; ok {
		text = fmt.Sprintf("namespace %s is not opted in: it has %s as an annotation, but it must be a label", s.NamespaceName, label)
	}
	return []finding.Finding{failed(step, text, finding.Remedy{
		Who: finding.NamespaceOwner, What: "opt the namespace in, then recreate the pod", Commands: append(commands, s.recreate()...), Page: "docs/annotations.md",
	})}
}

// similar returns a name that was probably meant as key: another name under the prefix, or the same name under another one.
func (s subject) similar(names map[string]string, key policy.Key) string {
	for _, name := range slices.Sorted(maps.Keys(names)) {
		prefix, rest, ok := strings.Cut(name, "/")
		ours := prefix == s.Keys().Prefix() && !slices.Contains([]policy.Key{policy.Permitted, policy.AllowedRoles, policy.DefaultRole, policy.PermittedTags}, policy.Key(rest))
		if ok && rest != "" && name != s.key(key) && (ours || rest == string(key)) {
			return name
		}
	}
	return ""
}

// annotations is the step of the pod's annotations.
func (s subject) annotations() []finding.Finding {
	const step = "pod annotations"
	role, meta := s.key(policy.Role), s.Meta()
	if !s.annotated() {
		text, value := fmt.Sprintf("the pod has no annotation %s, so it requests no role", role), "ROLE"
		remove := m{}
		if other := s.similar(meta.Annotations, policy.Role); other != "" {
			text, value = fmt.Sprintf("the pod has the annotation %s, which means nothing; the right one is %s", other, role), meta.Annotations[other]
			remove[other] = nil
		} else if w := s.Workload; w != nil && w.Meta.Annotations[role] != "" {
			text = fmt.Sprintf("%s has the annotation %s itself, but it must be on the pod template", w.Resource(), role)
			value = w.Meta.Annotations[role]
		}
		remove[role] = value
		return []finding.Finding{failed(step, text, finding.Remedy{
			Who: finding.Author, What: "annotate the pod with its role", Commands: s.annotate(remove), Page: "docs/annotations.md",
		})}
	}
	settings, err := s.Keys().Request(meta.Annotations).Settings()
	if err != nil {
		remedy := finding.Remedy{Who: finding.Author, What: "correct the annotation", Page: "docs/annotations.md"}
		if match := didYouMean.FindStringSubmatch(err.Error()); match != nil {
			remedy.What, remedy.Commands = "correct the name of the annotation", s.annotate(m{match[1]: nil, match[2]: meta.Annotations[match[1]]})
		}
		return []finding.Finding{failed(step, err.Error(), remedy)}
	}
	if settings.Role == "" {
		return []finding.Finding{passed(step, "the pod requests the default role of its namespace")}
	}
	return []finding.Finding{passed(step, "the pod requests role %s", settings.Role)}
}

var didYouMean = regexp.MustCompile(`^annotation "([^"]+)" is unknown; did you mean "([^"]+)"\?$`)

// basis decides on the pod's role. If only the brokers know the account of the role, it takes their account.
func (s subject) basis() (policy.Basis, error) {
	rules := s.Judge.Rules
	basis, err := rules.Basis(s.PolicyPod(), s.PolicyNamespace())
	if errors.Is(err, policy.ErrNoBase) && s.Judge.Rebase != nil {
		if base, parsed := credential.ParseRoleBase(s.baseARN()); parsed == nil {
			return s.Judge.Rebase(base).Basis(s.PolicyPod(), s.PolicyNamespace())
		}
	}
	return basis, err
}

var anyARN = regexp.MustCompile(`arn:[a-z-]+:iam::[0-9]{12}:role/`)

// baseARN returns the ARN that completes names of roles, as far as something in the cluster shows it; empty if nothing does.
func (s subject) baseARN() string {
	state := s.sidecarState()
	for _, text := range []string{state.session.Role, state.failure.Error, s.Installation.Identity} {
		if base := anyARN.FindString(text); base != "" {
			return base
		}
	}
	return ""
}

// permission is the step of the namespace's and the rules file's permission.
func (s subject) permission() []finding.Finding {
	const step = "permission"
	if s.Judge.Rules == nil || s.Namespace == nil || !s.annotated() {
		return nil
	}
	if _, err := s.PolicyPod().Request.Settings(); err != nil {
		return nil // The step before has it.
	}
	basis, err := s.basis()
	e, ok := errors.AsType[*credential.Error](err)
	switch {
	case err == nil:
		by := fmt.Sprintf("annotation %s of namespace %s, by %q", s.key(basis.Key), s.NamespaceName, short(basis.Text))
		if basis.Entry != "" {
			by += fmt.Sprintf(", and by the rules file (%s)", basis.Entry)
		}
		return []finding.Finding{passed(step, "%s is permitted by %s", basis.Role, by)}
	case !ok || e.Reason == credential.ReasonNamespaceNotOpted:
		return nil
	case errors.Is(err, policy.ErrNoBase):
		return []finding.Finding{unsure(step, "only the brokers know the account of the role, because the chart's aws.baseARN is empty; they decide")}
	}
	return []finding.Finding{failed(step, what(e.Message), s.permit(e.Reason, basis.Role.String()))}
}

// permit returns the remedy of a refusal of the role.
func (s subject) permit(reason credential.Reason, role string) finding.Remedy {
	r := finding.Remedy{Who: finding.NamespaceOwner, Page: "docs/annotations.md"}
	permitted := func(expression string) []string {
		return []string{s.kubectl("annotate", "namespace", s.NamespaceName, s.key(policy.Permitted)+"="+expression, "--overwrite")}
	}
	old, has := s.Namespace.Annotations[s.key(policy.Permitted)]
	exact := regexp.QuoteMeta(role)
	switch {
	case strings.HasPrefix(string(reason), "RULES_"):
		return finding.Remedy{
			Who: finding.ClusterAdmin, What: "change the rules file (the chart's value rules) if the namespace may have the role",
			Commands: []string{s.inCredence("edit", "configmap", "credence-rules")}, Page: "docs/rules.md",
		}
	case reason == credential.ReasonNothingPermitted:
		r.What, r.Commands = "permit the role, if the pods of the namespace may have it", permitted(exact)
	case reason == credential.ReasonRoleNotPermitted && !has:
		var globs []string
		_ = json.Unmarshal([]byte(s.Namespace.Annotations[s.key(policy.AllowedRoles)]), &globs) // The decision parsed it.
		r.What = "permit the role, if the pods of the namespace may have it"
		r.Commands = []string{s.kubectl("annotate", "namespace", s.NamespaceName, s.key(policy.AllowedRoles)+"="+encode(append(globs, role)), "--overwrite")}
	case reason == credential.ReasonRoleNotPermitted:
		r.What, r.Commands = widen(old, role, exact, permitted)
	case reason == credential.ReasonTagNotPermitted:
		var tags []string
		if settings, err := s.PolicyPod().Request.Settings(); err == nil {
			for _, tag := range settings.SessionTags {
				tags = append(tags, tag.Key)
			}
		}
		if list := s.Namespace.Annotations[s.key(policy.PermittedTags)]; list != "" {
			tags = append([]string{list}, tags...)
		}
		r.What = "permit the tags, if the pods of the namespace may set them"
		r.Commands = []string{s.kubectl("annotate", "namespace", s.NamespaceName, s.key(policy.PermittedTags)+"="+strings.Join(tags, ","), "--overwrite")}
	case reason == credential.ReasonAnnotationInvalid && has && role != "":
		r.What, r.Commands = "correct the expression; the command permits the pod's role and no other", permitted(exact)
	default:
		return finding.Remedy{Who: finding.Author, What: "correct the annotation", Page: "docs/errors.md"}
	}
	return r
}

// widen returns the remedy for an expression that does not match the role: it says how kiam and kube2iam read such an
// expression, if they did match it.
func widen(old, role, exact string, permitted func(string) []string) (fix string, commands []string) {
	prefix, name, _ := strings.Cut(role, ":role/")
	bare := strings.TrimSuffix(strings.TrimPrefix(old, "^"), "$")
	last := name[strings.LastIndexByte(name, '/')+1:]
	matches := func(expression, text string) bool {
		e, err := regexp.Compile(expression)
		return err == nil && e.MatchString(text)
	}
	whole := prefix + ":role/(?:" + bare + ")"
	switch {
	case (matches("^(?:"+old+")$", name) || matches("^(?:"+old+")$", last)) && matchesWhole(whole, role):
		return "write the expression for the whole ARN: it matches the name of the role only, as kiam compared it before version 4", permitted(whole)
	case strings.Contains(old, "|") && matches("^"+old+"$", role):
		return "write each alternative for the whole ARN: kiam anchored the expression as ^" + old + "$, so that its first part could match the beginning alone", permitted(old + "|" + exact)
	case matches(old, role):
		return "write the expression for the whole ARN: it matches a part of it only", permitted(old + "|" + exact)
	default:
		return "permit the role, if the pods of the namespace may have it", permitted(old + "|" + exact)
	}
}

// matchesWhole reports whether an expression of the annotation would match the role.
func matchesWhole(expression, role string) bool {
	e, _, err := pattern.Compile(expression)
	if err != nil {
		return false
	}
	ok, err := e.Match(role)
	return ok && err == nil
}

// refusal returns the newest message about a pod that could not be created, if the controller still lacks pods.
func (s subject) refusal() (snapshot.Message, bool) {
	if s.File != "" || s.Workload == nil || s.Workload.Wanted > 0 && s.Workload.Pods >= s.Workload.Wanted {
		return snapshot.Message{}, false
	}
	m, ok := s.message(func(m snapshot.Message) bool { return m.Reason == "FailedCreate" })
	if _, text, found := strings.Cut(m.Text, "Error creating: "); found {
		m.Text = text
	}
	return m, ok
}

// These begin the messages of an API server about a pod that it did not create.
const (
	byWebhook     = `denied the request: credence: `
	callOfWebhook = `failed calling webhook "inject.credence-iam.github.io"`
	byPolicy      = `credence-injected`
	byQuota       = `exceeded quota: `
)

// admission is the step of the creation of the pod: the webhook's configuration, its pods and its certificate, and the last
// refusal.
func (s subject) admission() []finding.Finding {
	const step = "admission"
	if s.Installation.Found == nil || !s.annotated() {
		return nil
	}
	harmless := s.running() && s.Sidecar() != nil // New pods need the webhook, this one does not.
	found := s.webhook(step)
	for i := range found {
		found[i] = unless(harmless, found[i])
	}
	if s.Pod == nil && s.File == "" {
		found = append(found, s.unknown(step, snapshot.SourceEvents)...)
	}
	refusal, refused := s.refusal()
	if slices.ContainsFunc(found, func(f finding.Finding) bool { return f.State == finding.Failed }) || !refused || s.Pod != nil || strings.Contains(refusal.Text, byQuota) {
		return found
	}
	since := "the API server refused a pod " + age(s.Now.Sub(refusal.Time)) + " ago: "
	if _, message, ok := strings.Cut(refusal.Text, byWebhook); ok {
		switch {
		case s.refusedNow():
			return found // Another step has it.
		case strings.Contains(message, "which SDKs prefer to the annotated role"):
			return append(found, failed("environment", since+what(message), s.unshadow(message)))
		case !strings.Contains(message, "namespace"):
			// The template has not changed, so another webhook has added what is refused.
			return append(found, failed("pod", since+short(message), finding.Remedy{
				Who: finding.Author, What: "change the pod as the message says; another webhook may have added what it names", Page: "docs/errors.md"}))
		}
		return append(found, unless(true, failed(step, since+short(message)+"; it would be admitted now", finding.Remedy{
			Who: finding.Author, What: "wait until the controller tries again, or restart it", Commands: s.recreate(),
		})))
	}
	if _, cause, ok := strings.Cut(refusal.Text, callOfWebhook); ok {
		return append(found, failed(step, since+short("failed calling webhook"+cause), s.webhookCall(cause)))
	}
	if strings.Contains(refusal.Text, byPolicy) {
		return append(found, failed(step, since+short(refusal.Text), finding.Remedy{
			Who: finding.ClusterAdmin, What: "find the webhook that removes the sidecar, and leave annotated pods out of it",
			Commands: []string{s.kubectl("get", "mutatingwebhookconfigurations")},
		}))
	}
	return append(found, failed(step, since+short(refusal.Text), finding.Remedy{
		Who: finding.Author, What: "change the pod as the message says; it is not from Credence", Commands: []string{s.in("describe", strings.ToLower(s.Workload.Kind), s.Workload.Meta.Name)},
	}))
}

// refusedNow reports whether the webhook would refuse the pod now.
func (s subject) refusedNow() bool {
	if s.Judge.Injector == nil {
		return true
	}
	if _, err := s.inject(); err != nil {
		return true
	}
	_, err := s.basis()
	return err != nil && !errors.Is(err, policy.ErrNoBase)
}

var quotaMessage = regexp.MustCompile(byQuota + `([^,]+), requested: ([^ ]+), used: ([^ ]+), limited: ([^ ]+)`)

// quota is the step of the ResourceQuotas.
func (s subject) quota() []finding.Finding {
	refusal, ok := s.refusal()
	if !ok || !strings.Contains(refusal.Text, byQuota) {
		return nil
	}
	remedy := finding.Remedy{Who: finding.NamespaceOwner, What: "raise the quota, or remove pods; the sidecar counts with each pod", Page: "docs/settings.md"}
	if match := quotaMessage.FindStringSubmatch(refusal.Text); match != nil {
		hard := m{}
		for requested := range strings.SplitSeq(match[2], ",") {
			name, amount, _ := strings.Cut(requested, "=")
			total, err := resource.ParseQuantity(amount)
			for range max(s.Workload.Wanted-s.Workload.Pods, 1) - 1 {
				more, _ := resource.ParseQuantity(amount)
				total.Add(more)
			}
			for used := range strings.SplitSeq(match[3], ",") {
				if value, ok := strings.CutPrefix(used, name+"="); ok && err == nil {
					more, _ := resource.ParseQuantity(value)
					total.Add(more)
					hard[name] = total.String()
				}
			}
		}
		remedy.Commands = append([]string{s.in("patch", "resourcequota", match[1], "--type=merge", "-p", encode(m{"spec": m{"hard": hard}}))}, s.recreate()...)
	}
	return []finding.Finding{failed("quota", "the API server refused a pod "+age(s.Now.Sub(refusal.Time))+" ago: "+short(refusal.Text), remedy)}
}

// setAfter returns when a label or annotation was set, if that was after the creation of the pod. The API server notes the
// time of the last change of each client.
func setAfter(meta *metav1.ObjectMeta, key string, created time.Time) (time.Time, bool) {
	var first time.Time
	for _, entry := range meta.ManagedFields {
		if entry.FieldsV1 == nil || entry.Time == nil || !strings.Contains(entry.FieldsV1.GetRawString(), `"f:`+key+`"`) {
			continue
		}
		if first.IsZero() || entry.Time.Time.Before(first) {
			first = entry.Time.Time
		}
	}
	return first, first.After(created.Add(time.Second))
}

// injection is the step that compares the pod with what the webhook makes.
func (s subject) injection() []finding.Finding {
	const step = "injection"
	if !s.running() || !s.annotated() {
		return nil
	}
	sidecar := s.Sidecar()
	switch {
	case sidecar != nil && s.Pod.Labels[s.key(policy.Injected)] != "true":
		return []finding.Finding{failed(step, fmt.Sprintf("the pod has a sidecar but no label %s, so it is a copy of an injected pod, and the brokers refuse it", s.key(policy.Injected)),
			finding.Remedy{Who: finding.Author, What: "copy the pod with its annotations (kubectl debug --copy-to … --keep-annotations), or create it from its manifest", Page: "docs/errors.md"})}
	case sidecar != nil:
		text := "the pod has the sidecar " + sidecar.Image
		if s.Judge.Injector != nil && sidecar.Image != s.Judge.Injector.Image() {
			text += "; new pods get " + s.Judge.Injector.Image()
		}
		var before []string
		for _, c := range s.Spec().InitContainers[:slices.IndexFunc(s.Spec().InitContainers, func(c corev1.Container) bool { return c.Name == sidecar.Name })] {
			before = append(before, c.Name)
		}
		if len(before) > 0 {
			text += "; init containers that start before it have no credentials: " + strings.Join(before, ", ")
		}
		return []finding.Finding{passed(step, "%s", text)}
	case !s.optedIn():
		return nil // The label is the cause.
	}
	created, remedy := s.Pod.CreationTimestamp.Time, finding.Remedy{Who: finding.Author, What: "recreate the pod", Commands: s.recreate()}
	text := "the pod has no sidecar, although its namespace is opted in and it is annotated: the webhook did not see its creation"
	if w := s.Workload; w != nil && !s.Keys().Annotated(w.Template.Annotations) {
		annotations := m{}
		for name, value := range s.Pod.Annotations {
			if strings.HasPrefix(name, s.Keys().Prefix()+"/") {
				annotations[name] = value
			}
		}
		text = fmt.Sprintf("the pod was annotated after its creation, and its %s does not have the annotation: only admission injects a pod", w.Resource())
		remedy.What, remedy.Commands = "annotate the pod template", s.annotate(annotations)
	} else if at, later := setAfter(&s.Pod.ObjectMeta, s.key(policy.Role), created); later {
		text = fmt.Sprintf("the pod was annotated %s after its creation, and only admission injects a pod", age(at.Sub(created)))
	} else if at, later := setAfter(&s.Namespace.ObjectMeta, s.key(policy.Inject), created); later {
		text = fmt.Sprintf("the pod was created %s before its namespace was opted in, and only admission injects a pod", age(at.Sub(created)))
	} else if c := s.Installation.Configuration; c != nil && c.CreationTimestamp.After(created) {
		text = fmt.Sprintf("the pod was created %s before the webhook was installed, and only admission injects a pod", age(c.CreationTimestamp.Sub(created)))
	}
	return []finding.Finding{failed(step, text, remedy)}
}
