package policy

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/policy/pattern"
)

// File is the content of the optional rules file: limits of the cluster admin on what namespaces permit and pods request. It
// permits nothing that a namespace does not permit.
//
// The json tags are the names of its fields in the file. Package rulesfile reads it.
type File struct {
	// KubernetesTags adds facts about the pod as tags to sessions: with session scope service-account the namespace and the
	// service account, with scope pod the pod's name and UID too. With scope role, no fact is true for all pods of a session.
	KubernetesTags bool `json:"kubernetesTags"`
	// TransitiveTags are the keys of the tags that stay when a session assumes another role. Default: none, because the next
	// role in the chain cannot change a transitive tag.
	TransitiveTags []string `json:"transitiveTags"`
	// SourceIdentity is the source of the session that CloudTrail shows, for all roles that the session assumes. Trust
	// policies must allow sts:SetSourceIdentity. Default: none.
	SourceIdentity SourceIdentity `json:"sourceIdentity"`
	// Namespaces has one entry for each kind of namespace. Only the first entry that matches a namespace applies. So a refusal
	// names one entry, forced tags cannot contradict each other, and an exception goes above the rule. A namespace that no
	// entry matches may use no role. Required.
	Namespaces []NamespaceRules `json:"namespaces"`
}

// NamespaceRules is one entry: the limits of the namespaces that it matches. An absent list allows nothing, and "*" allows
// everything.
type NamespaceRules struct {
	// Match are globs of the names of namespaces, in which * stands for any characters. Required.
	Match []string `json:"match"`
	// Accounts are the AWS accounts whose roles pods may use: ids of 12 digits, or "*".
	Accounts []string `json:"accounts"`
	// Roles are globs of roles. A glob that begins with "arn:" matches the whole ARN. Any other matches path and name, such as
	// "/team/*", and begins with / or *. A * stands for slashes too.
	Roles []string `json:"roles"`
	// ExternalIDs are globs of the external ids that pods may set.
	ExternalIDs []string `json:"externalIDs"`
	// SessionNames are globs of the session names that pods may set, instead of the default name.
	SessionNames []string `json:"sessionNames"`
	// MaxDuration is the maximum of the session duration, from 15m to 12h. Default: 12h. A maximum below the default duration
	// shortens the sessions of pods that set no duration.
	MaxDuration time.Duration `json:"maxDuration"`
	// ForcedTags are added to every session, and replace the pod's tags of the same keys. In a value, {namespace} and
	// {serviceAccount} stand for those of the pod.
	ForcedTags map[string]string `json:"forcedTags"`
}

// SourceIdentity determines the source identity of sessions.
type SourceIdentity string

// The source identities.
const (
	// SourceNone sets none. The default.
	SourceNone SourceIdentity = "none"
	// SourceServiceAccount is NAMESPACE.SERVICEACCOUNT, shortened to the length that STS allows. Pods of different service
	// accounts then share no session.
	SourceServiceAccount SourceIdentity = "service-account"
	// SourceSessionName is the name of the session.
	SourceSessionName SourceIdentity = "session-name"
)

// Placeholders in the values of forced tags.
const (
	namespacePlaceholder      = "{namespace}"
	serviceAccountPlaceholder = "{serviceAccount}"
)

// Bounds of a rules file.
const (
	// maxEntries and maxMatches bound the globs that each decision tries: some microseconds.
	maxEntries = 1000
	maxMatches = 1000
	// maxListed bounds each of the other lists of an entry: each decision tries one or two.
	maxListed = 1000
	// maxForcedTags leaves room for the four tags of Kubernetes.
	maxForcedTags = maxTags - 4
	// maxNamespaceGlob: the name of a namespace has at most 63 characters.
	maxNamespaceGlob = 100
)

// Use replaces the rules file by f. Its error names the invalid field; the previous file then stays in force. Use may be
// called while decisions are made: each decision uses one file.
func (r *Rules) Use(f File) error {
	l, err := f.compile()
	if err != nil {
		return err
	}
	l.generation = strconv.FormatUint(r.generations.Add(1), 10)
	r.limits.Store(l)
	return nil
}

// Check returns the error that [Rules.Use] would return.
func (f File) Check() error {
	_, err := f.compile()
	return err
}

// compile checks f, and returns it compiled.
func (f File) compile() (*limits, error) {
	l := &limits{kubernetesTags: f.KubernetesTags, transitive: slices.Clone(f.TransitiveTags), source: f.SourceIdentity}
	switch f.SourceIdentity {
	case "":
		l.source = SourceNone
	case SourceNone, SourceServiceAccount, SourceSessionName:
	default:
		return nil, fmt.Errorf("sourceIdentity: %.100q is none of %q", f.SourceIdentity, []SourceIdentity{SourceNone, SourceServiceAccount, SourceSessionName})
	}
	if len(f.TransitiveTags) > maxTags {
		return nil, fmt.Errorf("transitiveTags: has %d keys, STS allows %d", len(f.TransitiveTags), maxTags)
	}
	for i, key := range f.TransitiveTags {
		if err := checkTagKey(key, f.TransitiveTags[:i]); err != nil {
			return nil, fmt.Errorf("transitiveTags[%d]: %w", i, err)
		}
	}
	switch n := len(f.Namespaces); {
	case n == 0:
		return nil, errors.New("namespaces: has no entry, so every pod would be refused")
	case n > maxEntries:
		return nil, fmt.Errorf("namespaces: has %d entries, the limit is %d", n, maxEntries)
	}
	total := 0
	for _, n := range f.Namespaces {
		total += len(n.Match)
	}
	if total > maxMatches {
		return nil, fmt.Errorf("namespaces: match %d globs together, the limit is %d", total, maxMatches)
	}
	var matches []string // of all entries above
	for i, n := range f.Namespaces {
		e, err := n.compile(i, matches)
		if err != nil {
			return nil, fmt.Errorf("namespaces[%d].%w", i, err)
		}
		l.entries = append(l.entries, e)
		matches = append(matches, n.Match...)
	}
	return l, nil
}

// compile checks one entry. before are the globs of the entries above it.
func (n NamespaceRules) compile(at int, before []string) (entry, error) {
	e := entry{maxDuration: n.MaxDuration}
	if len(n.Match) == 0 {
		return entry{}, errors.New("match: is required, as a list of globs of namespaces")
	}
	for i, text := range n.Match {
		if text == "" || len(text) > maxNamespaceGlob || !onlyOf(text, "-*") || strings.ToLower(text) != text {
			return entry{}, fmt.Errorf("match[%d]: %.100q must be the name of a namespace, of lower-case letters, digits and -, with * for any characters", i, text)
		}
		// Only a * of the earlier glob can match a * of the later one, so the earlier glob matches all names that the later
		// one matches.
		if j := slices.IndexFunc(before, func(b string) bool { return pattern.NewGlob(b).Match(text) }); j >= 0 {
			return entry{}, fmt.Errorf("match[%d]: %q is never reached, because %q comes before it and the first entry that matches decides", i, text, before[j])
		}
	}
	e.name = fmt.Sprintf("namespaces[%d], %q", at, n.Match[0])
	if len(n.Match) > 1 {
		e.name = fmt.Sprintf("namespaces[%d], %q and others", at, n.Match[0])
	}
	for _, list := range []struct {
		name  string
		from  []string
		to    *[]pattern.Glob
		check func(string) error
	}{
		{"match", n.Match, &e.match, func(string) error { return nil }},
		{"accounts", n.Accounts, &e.accounts, checkAccount},
		{"roles", n.Roles, &e.roles, checkRoleGlob},
		{"externalIDs", n.ExternalIDs, &e.externalIDs, checkGlobOf(maxExternalID, externalIDMarks)},
		{"sessionNames", n.SessionNames, &e.sessionNames, checkGlobOf(maxSessionName, sessionNameMarks)},
	} {
		if len(list.from) > maxListed {
			return entry{}, fmt.Errorf("%s: has %d entries, the limit is %d", list.name, len(list.from), maxListed)
		}
		for i, text := range list.from {
			if err := cmp.Or(list.check(text), pattern.CheckStars(text)); err != nil {
				return entry{}, fmt.Errorf("%s[%d]: %w", list.name, i, err)
			}
			*list.to = append(*list.to, pattern.NewGlob(text))
		}
	}
	if d := n.MaxDuration; d != 0 && (d < minDuration || d > maxDuration || d%time.Second != 0) {
		return entry{}, fmt.Errorf("maxDuration: %s is out of bounds: whole seconds from %s to %s", d, minDuration, maxDuration)
	}
	if len(n.ForcedTags) > maxForcedTags {
		return entry{}, fmt.Errorf("forcedTags: has %d keys, the limit is %d", len(n.ForcedTags), maxForcedTags)
	}
	var keys []string
	for _, key := range slices.Sorted(maps.Keys(n.ForcedTags)) {
		value := n.ForcedTags[key]
		if err := checkTagKey(key, keys); err != nil {
			return entry{}, fmt.Errorf("forcedTags: %w", err)
		}
		if slices.ContainsFunc(kubernetesTags, func(k string) bool { return strings.EqualFold(k, key) }) {
			return entry{}, fmt.Errorf("forcedTags: tag key %q is reserved for kubernetesTags", key)
		}
		if literal := fillPlaceholders(value, "", ""); !isTagText(literal, 0, maxTagValue) {
			return entry{}, fmt.Errorf("forcedTags: the value of %q must have at most %d letters, digits, blanks or any of _.:/=+-@, and %s or %s",
				key, maxTagValue, namespacePlaceholder, serviceAccountPlaceholder)
		}
		e.forced = append(e.forced, Tag{Key: key, Value: value})
		keys = append(keys, key)
	}
	return e, nil
}

func checkAccount(text string) error {
	if text != "*" && !credential.IsAccount(text) {
		return fmt.Errorf("%.100q is not an AWS account id of 12 digits, and not *", text)
	}
	return nil
}

func checkRoleGlob(text string) error {
	for i := range len(text) {
		if text[i] <= ' ' || text[i] > '~' {
			return fmt.Errorf("%.100q has a character that no role's ARN has", text)
		}
	}
	switch {
	case len(text) > maxPolicy:
		return fmt.Errorf("has %d characters, a role's ARN has at most %d", len(text), maxPolicy)
	case strings.HasPrefix(text, "arn:"), strings.HasPrefix(text, "/"), strings.HasPrefix(text, "*"):
		return nil
	}
	return fmt.Errorf("%.100q must begin with arn: for a whole ARN, or with / or * for path and name: /%.60s is that name without a path", text, text)
}

// checkGlobOf checks globs of texts that have letters, digits and marks.
func checkGlobOf(longest int, marks string) func(string) error {
	return func(text string) error {
		if text == "" || len(text) > longest || !onlyOf(text, marks+"*") {
			return fmt.Errorf("%.100q must have 1 to %d letters, digits or any of %s, with * for any characters", text, longest, marks)
		}
		return nil
	}
}

func fillPlaceholders(value, namespace, serviceAccount string) string {
	if !strings.Contains(value, "{") {
		return value
	}
	value = strings.ReplaceAll(value, namespacePlaceholder, namespace)
	return strings.ReplaceAll(value, serviceAccountPlaceholder, serviceAccount)
}
