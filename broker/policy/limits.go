package policy

import (
	"fmt"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/policy/pattern"
)

// limits are a compiled [File]. They never change.
type limits struct {
	generation     string // differs for each file of the same [Rules]
	kubernetesTags bool
	transitive     []string
	source         SourceIdentity
	entries        []entry
}

// entry is one of [NamespaceRules].
type entry struct {
	name                      string // its place in the file, for messages
	match, accounts, roles    []pattern.Glob
	externalIDs, sessionNames []pattern.Glob
	maxDuration               time.Duration // 0: no limit but STS's
	forced                    []Tag         // sorted by key; values with placeholders
}

// find returns the first entry that matches a namespace.
func (l *limits) find(namespace string) (*entry, error) {
	for i := range l.entries {
		if pattern.MatchAny(l.entries[i].match, namespace) {
			return &l.entries[i], nil
		}
	}
	return nil, credential.Errorf(credential.ErrDenied, credential.ReasonRulesNamespace,
		"no entry in the rules file matches namespace %q, so its pods may not use any role; ask the file's owner to add one", namespace)
}

// allow refuses settings of the pod that the entry does not allow. setsDuration reports whether the pod sets its duration.
func (e *entry) allow(ev *evaluation, namespace string, role credential.RoleARN, arn string, s Settings, setsDuration bool) error {
	keys := ev.rules.keys
	if !pattern.MatchAny(e.accounts, role.Account()) {
		return e.refuse(credential.ReasonRulesAccount, "accounts", namespace, "a role of account "+role.Account(), keys.Name(Role))
	}
	if ok, _ := ev.answer(rulesRoles, ev.file.generation, arn, matchRulesRole); !ok {
		return e.refuse(credential.ReasonRulesRole, "roles", namespace, "role "+arn, keys.Name(Role))
	}
	if s.ExternalID != "" {
		if ok, _ := ev.answer(rulesExternalIDs, ev.file.generation, s.ExternalID, matchRulesExternalID); !ok {
			return e.refuse(credential.ReasonRulesExternalID, "externalIDs", namespace, fmt.Sprintf("external id %.100q", s.ExternalID), keys.Name(ExternalID))
		}
	}
	if s.SessionName != "" {
		if ok, _ := ev.answer(rulesNames, ev.file.generation, s.SessionName, matchRulesName); !ok {
			return e.refuse(credential.ReasonRulesSessionName, "sessionNames", namespace, fmt.Sprintf("session name %q", s.SessionName), keys.Name(SessionName))
		}
	}
	if setsDuration && e.maxDuration != 0 && s.Duration > e.maxDuration {
		return e.refuse(credential.ReasonRulesDuration, "maxDuration", namespace,
			fmt.Sprintf("a session of %s, which is more than %s", s.Duration, e.maxDuration), keys.Name(Duration))
	}
	return nil
}

// matchRulesRole, matchRulesExternalID and matchRulesName report whether a list of the evaluation's entry has a glob that
// matches. Their text argument is the file's generation.
func matchRulesRole(ev *evaluation, _, arn string) (bool, error) {
	_, name, _ := strings.Cut(arn, ":role")
	return slices.ContainsFunc(ev.entry.roles, func(g pattern.Glob) bool {
		if strings.HasPrefix(g.First(), "arn:") {
			return g.Match(arn)
		}
		return g.Match(name)
	}), nil
}

func matchRulesExternalID(ev *evaluation, _, id string) (bool, error) {
	return pattern.MatchAny(ev.entry.externalIDs, id), nil
}

func matchRulesName(ev *evaluation, _, name string) (bool, error) {
	return pattern.MatchAny(ev.entry.sessionNames, name), nil
}

func (e *entry) refuse(reason credential.Reason, field, namespace, what, annotation string) error {
	return credential.Errorf(credential.ErrDenied, reason,
		"the rules file (%s) does not allow namespace %q to have %s; change the pod's %q, or ask the file's owner to change %s",
		e.name, namespace, what, annotation, field)
}

// kubernetesTags are the tag keys of facts about a pod, with the names of EKS Pod Identity.
var kubernetesTags = []string{namespaceTag, serviceAccountTag, podNameTag, podUIDTag}

const (
	namespaceTag      = "kubernetes-namespace"
	serviceAccountTag = "kubernetes-service-account"
	podNameTag        = "kubernetes-pod-name"
	podUIDTag         = "kubernetes-pod-uid"
)

// tags returns the session's tags, sorted by key: the pod's, the forced tags, which replace the pod's tags of the same keys,
// and those of Kubernetes.
func (l *limits) tags(e *entry, s Settings, pod Pod, keys Keys) ([]Tag, error) {
	if len(e.forced) == 0 && !l.kubernetesTags {
		return s.SessionTags, nil
	}
	var tags []Tag
	for _, tag := range s.SessionTags {
		// STS compares keys without regard to case.
		if !slices.ContainsFunc(e.forced, func(f Tag) bool { return strings.EqualFold(f.Key, tag.Key) }) {
			tags = append(tags, tag)
		}
	}
	pods := len(tags) // whose values parse has checked
	for _, tag := range e.forced {
		if strings.Contains(tag.Value, serviceAccountPlaceholder) && pod.ServiceAccount == "" {
			return nil, errNoServiceAccount
		}
		value := fillPlaceholders(tag.Value, pod.Namespace, pod.ServiceAccount)
		if n := utf8.RuneCountInString(value); n > maxTagValue {
			return nil, credential.Errorf(credential.ErrDenied, credential.ReasonRulesTag,
				"the rules file (%s) forces tag %q with %d characters on the pod, and STS allows %d; ask the file's owner to shorten its value",
				e.name, tag.Key, n, maxTagValue)
		}
		tags = append(tags, Tag{Key: tag.Key, Value: value})
	}
	if l.kubernetesTags {
		if s.Scope == ScopeServiceAccount || s.Scope == ScopePod {
			if pod.ServiceAccount == "" {
				return nil, errNoServiceAccount
			}
			tags = append(tags, Tag{namespaceTag, pod.Namespace}, Tag{serviceAccountTag, pod.ServiceAccount})
		}
		if s.Scope == ScopePod {
			tags = append(tags, Tag{podNameTag, pod.Name}, Tag{podUIDTag, pod.UID})
		}
	}
	for _, tag := range tags[pods:] {
		if !isTagText(tag.Value, 0, maxTagValue) {
			return nil, fmt.Errorf("%.300q is not a valid value of tag %q, because Kubernetes has no such names", tag.Value, tag.Key)
		}
	}
	if len(tags) > maxTags {
		return nil, credential.Errorf(credential.ErrDenied, credential.ReasonRulesTag,
			"the session would have %d tags with those of the rules file (%s), and STS allows %d; remove some from the pod's %q",
			len(tags), e.name, maxTags, keys.Name(SessionTags))
	}
	slices.SortFunc(tags, func(a, b Tag) int { return strings.Compare(a.Key, b.Key) })
	return tags, nil
}

// transitiveOf returns the keys of tags that are transitive, one a line. STS refuses a transitive key without a tag.
func (l *limits) transitiveOf(tags []Tag) string {
	var keys strings.Builder
	for _, tag := range tags {
		if slices.ContainsFunc(l.transitive, func(key string) bool { return strings.EqualFold(key, tag.Key) }) {
			keys.WriteString(tag.Key + "\n")
		}
	}
	return keys.String()
}

// sourceIdentity returns the source identity of a session with that name; empty for none.
func (l *limits) sourceIdentity(pod Pod, sessionName string) (string, error) {
	switch l.source {
	case SourceNone:
	case SourceServiceAccount:
		if pod.ServiceAccount == "" {
			return "", errNoServiceAccount
		}
		// No namespace has a dot in its name, so the first dot ends it. Twenty hexadecimal digits of the hash, because this
		// name identifies who did something.
		identity := pod.Namespace + "." + pod.ServiceAccount
		if !isSessionName(identity) {
			return "", fmt.Errorf("%.200q is not a valid source identity, because Kubernetes has no such names", identity)
		}
		return fit(identity, 10), nil
	case SourceSessionName:
		return sessionName, nil
	}
	return "", nil
}
