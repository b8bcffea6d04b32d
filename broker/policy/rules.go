package policy

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"time"

	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/policy/gate"
)

// Pod is the part of a pod that decisions need.
type Pod struct {
	Namespace      string
	Name           string // may be empty at admission, before the API server generates it
	UID            string // likewise
	ServiceAccount string
	Request        *Request // what its annotations request; the rules refuse nil
}

// Namespace is the part of a namespace that decisions need.
type Namespace struct {
	Name        string
	Labels      map[string]string
	Annotations map[string]string
}

// Grant is one AWS session that a pod may have: all inputs of AssumeRole, and which pods share the session. Grants compare
// with ==. Two pods share a session if and only if their grants are equal. Only [Rules] makes a Grant that is not zero.
type Grant struct {
	role           credential.RoleARN
	sessionName    string
	externalID     string
	tags           string // KEY tab VALUE newline for each tag, sorted by key; neither can have a tab or newline
	transitiveTags string // KEY newline for each, sorted
	sourceIdentity string
	policy         string
	policyARNs     string // comma list, sorted
	duration       time.Duration
	sharedBy       string // "", "NAMESPACE/SERVICEACCOUNT" or "NAMESPACE/POD/UID"
}

// Role returns the role to assume.
func (g Grant) Role() credential.RoleARN { return g.role }

// SessionName returns the RoleSessionName. It stays the same while a pod exists, because some services (MSK) refuse to
// re-authenticate a connection under another name.
func (g Grant) SessionName() string { return g.sessionName }

// ExternalID returns the external id to send to STS; empty for none.
func (g Grant) ExternalID() string { return g.externalID }

// Tags returns the session tags, sorted by key.
func (g Grant) Tags() []Tag {
	var tags []Tag
	for line := range strings.Lines(g.tags) {
		key, value, _ := strings.Cut(strings.TrimSuffix(line, "\n"), "\t")
		tags = append(tags, Tag{Key: key, Value: value})
	}
	return tags
}

// TransitiveTagKeys returns the keys of the tags that stay when the session assumes another role, sorted.
func (g Grant) TransitiveTagKeys() []string {
	var keys []string
	for line := range strings.Lines(g.transitiveTags) {
		keys = append(keys, strings.TrimSuffix(line, "\n"))
	}
	return keys
}

// SourceIdentity returns the source identity to send to STS; empty for none.
func (g Grant) SourceIdentity() string { return g.sourceIdentity }

// SessionPolicy returns the inline policy that limits the session, as compact JSON; empty for none.
func (g Grant) SessionPolicy() string { return g.policy }

// PolicyARNs returns the managed policies that limit the session, sorted.
func (g Grant) PolicyARNs() []string {
	if g.policyARNs == "" {
		return nil
	}
	return strings.Split(g.policyARNs, ",")
}

// Duration returns the session duration to request.
func (g Grant) Duration() time.Duration { return g.duration }

// IsZero reports whether g grants nothing.
func (g Grant) IsZero() bool { return g == Grant{} }

// String returns the role, the session name and which pods share the session, for logs.
func (g Grant) String() string {
	s := g.role.String() + " as " + g.sessionName
	if g.sharedBy != "" {
		s += " for " + g.sharedBy
	}
	return s
}

// Config configures [New].
type Config struct {
	// Keys are the annotation keys in use. Required.
	Keys Keys
	// Base completes role names that are not ARNs. The zero value completes none: such a role gives an error that is
	// [ErrNoBase].
	Base credential.RoleBase
	// Cluster is the name of this cluster in default session names, so that CloudTrail shows which cluster a session is of. It
	// has at most 32 of the characters allowed in session names. Default "credence".
	Cluster string
	// RoleChaining refuses sessions of more than one hour, the AWS maximum if the broker's own credentials are those of a
	// role (IAM User Guide, "Role chaining"). Default: STS decides.
	RoleChaining bool
}

// maxCluster leaves half of a session name's 64 characters to the part after the cluster's name.
const maxCluster = 32

// maxChainedDuration is the AWS maximum of the session duration for a role that assumes a role.
const maxChainedDuration = time.Hour

// ErrNoBase is the cause of a refusal if the decision needs a base ARN and the rules have none.
var ErrNoBase = errors.New("no base ARN is known")

// Rules decides which session a pod may have. The zero value refuses everything. Its methods may be called concurrently.
type Rules struct {
	keys    Keys
	base    credential.RoleBase
	cluster string
	chained bool
	names   names
	limits  atomic.Pointer[limits] // nil: there is no rules file

	generations atomic.Uint64 // the number of rules files so far
	cache       cache
	gate        gate.Gate
}

// names are texts that each decision needs; New makes them once.
type names struct {
	permitted, allowedRoles, defaultRole, permittedTags, duration string

	base, account string // completed globs of allowed-roles begin with one of them
}

// New checks cfg and returns its rules.
func New(cfg Config) (*Rules, error) {
	if cfg.Keys.prefix == "" {
		return nil, errors.New("rules without annotation keys would refuse everything")
	}
	if cfg.Cluster == "" {
		cfg.Cluster = "credence"
	}
	if len(cfg.Cluster) > maxCluster || len(cfg.Cluster) < minSessionName || !isSessionName(cfg.Cluster) {
		return nil, fmt.Errorf("cluster name %q must have %d to %d letters, digits or any of _+=,.@-", cfg.Cluster, minSessionName, maxCluster)
	}
	base := cfg.Base.String()
	account, _, _ := strings.Cut(base, "/")
	return &Rules{keys: cfg.Keys, base: cfg.Base, cluster: cfg.Cluster, chained: cfg.RoleChaining, names: names{
		permitted: cfg.Keys.Name(Permitted), allowedRoles: cfg.Keys.Name(AllowedRoles), defaultRole: cfg.Keys.Name(DefaultRole),
		permittedTags: cfg.Keys.Name(PermittedTags), duration: cfg.Keys.Name(Duration),
		base: base, account: account,
	}}, nil
}

// Keys returns the annotation keys in use.
func (r *Rules) Keys() Keys { return r.keys }

// errNoServiceAccount is a bug of ours: every pod has a service account.
var errNoServiceAccount = errors.New("the pod's service account is not known")

// Decide returns the session that the pod may have. A refusal is an [*credential.Error] whose message says what to change
// on the pod, on its namespace or in the rules file.
//
// If the namespace has had such a decision before, Decide takes some microseconds. If not, it waits for the turn of the
// namespace at a [gate.Gate], and then takes some milliseconds at most. If ctx ends first, Decide returns
// credential.ErrUnavailable.
func (r *Rules) Decide(ctx context.Context, pod Pod, ns Namespace) (Grant, error) {
	return r.decide(ctx.Done(), ns.Name, pod, ns)
}

// Grant is Decide for a caller that goes through the pods of many namespaces, such as prefetch. All calls of Grant share one
// turn at the gate, as if they were of one more namespace. Otherwise prefetch would wait behind all callers of a namespace
// with expensive decisions.
func (r *Rules) Grant(pod Pod, ns Namespace) (Grant, error) {
	return r.decide(nil, noNamespace, pod, ns)
}

// noNamespace is the tenant of Grant at the gate. No namespace has an empty name.
const noNamespace = ""

func (r *Rules) decide(done <-chan struct{}, turn string, pod Pod, ns Namespace) (Grant, error) {
	e := evaluation{rules: r, namespace: ns.Name}
	if grant, err := r.grant(&e, pod, ns); !e.incomplete {
		return grant, err
	}
	if !r.gate.Enter(done, turn) {
		return Grant{}, &credential.Error{
			Kind: credential.ErrUnavailable, Reason: credential.ReasonNamespaceBusy, RetryAfter: busyWait,
			Message: fmt.Sprintf("namespace %q has too many pods that need a new decision at the same time; try again", ns.Name),
		}
	}
	defer r.gate.Leave(turn)
	e = evaluation{rules: r, namespace: ns.Name, mayCompute: true}
	return r.grant(&e, pod, ns)
}

// busyWait is the minimum time before a retry of a decision that did not get its turn.
const busyWait = time.Second

// grant decides within one evaluation. Its result is invalid if the evaluation is incomplete.
func (r *Rules) grant(e *evaluation, pod Pod, ns Namespace) (Grant, error) {
	if pod.Namespace == "" || pod.Namespace != ns.Name {
		return Grant{}, credential.Errorf(credential.ErrDenied, credential.ReasonNamespaceNotFound,
			"the pod's namespace %q is not known", pod.Namespace)
	}
	if err := r.keys.CheckOptedIn(ns); err != nil {
		return Grant{}, err
	}
	file := r.limits.Load() // once, so that one decision uses one file
	var limit *entry
	if file != nil {
		var err error
		if limit, err = file.find(ns.Name); err != nil {
			return Grant{}, err
		}
	}
	e.file, e.entry = file, limit
	s, err := pod.Request.Settings()
	if err != nil {
		return Grant{}, err
	}
	role, err := r.resolve(s, ns)
	if err != nil {
		return Grant{}, err
	}
	arn := role.String()
	if err := r.permit(e, arn, ns); err != nil {
		return Grant{}, err
	}
	if err := r.permitTags(s.SessionTags, ns); err != nil {
		return Grant{}, err
	}
	if r.chained && s.Duration > maxChainedDuration {
		return Grant{}, credential.Errorf(credential.ErrInvalid, credential.ReasonAnnotationInvalid,
			"annotation %q: %s exceeds 1h, the AWS maximum if the broker's own credentials are those of a role (role chaining); write 1h or less",
			r.names.duration, s.Duration)
	}
	g := Grant{
		role:       role,
		externalID: s.ExternalID,
		policy:     s.SessionPolicy,
		policyARNs: strings.Join(s.PolicyARNs, ","),
		duration:   s.Duration,
	}
	if g.sharedBy, g.sessionName, err = r.session(s, pod); err != nil {
		return Grant{}, err
	}
	tags := s.SessionTags
	if file != nil {
		if err := limit.allow(e, ns.Name, role, arn, s, pod.Request.setsDuration); err != nil {
			return Grant{}, err
		}
		if limit.maxDuration != 0 {
			g.duration = min(g.duration, limit.maxDuration) // which may be below the default duration
		}
		if tags, err = file.tags(limit, s, pod, r.keys); err != nil {
			return Grant{}, err
		}
		g.transitiveTags = file.transitiveOf(tags)
		if g.sourceIdentity, err = file.sourceIdentity(pod, g.sessionName); err != nil {
			return Grant{}, err
		}
	}
	g.tags = encodeTags(tags)
	return g, nil
}

// session returns which pods share the session, and its name.
func (r *Rules) session(s Settings, pod Pod) (sharedBy, name string, err error) {
	name = r.cluster
	switch s.Scope {
	case ScopeRole:
	case ScopeServiceAccount:
		if pod.ServiceAccount == "" {
			return "", "", errNoServiceAccount
		}
		sharedBy = pod.Namespace + "/" + pod.ServiceAccount
		name += "." + pod.Namespace + "." + pod.ServiceAccount
	case ScopePod:
		sharedBy = pod.Namespace + "/" + pod.Name + "/" + pod.UID
		name += "." + pod.Namespace + "." + pod.Name
	}
	if s.SessionName != "" {
		return sharedBy, s.SessionName, nil
	}
	if !isSessionName(name) {
		return "", "", fmt.Errorf("%.200q is not a valid session name, because Kubernetes has no such names", name)
	}
	return sharedBy, fit(name, 5), nil
}

func encodeTags(tags []Tag) string {
	if len(tags) == 0 {
		return ""
	}
	var b strings.Builder
	for _, tag := range tags {
		b.WriteString(tag.Key)
		b.WriteByte('\t')
		b.WriteString(tag.Value)
		b.WriteByte('\n')
	}
	return b.String()
}

// resolve returns the role that the pod requests, completed to an ARN.
func (r *Rules) resolve(s Settings, ns Namespace) (credential.RoleARN, error) {
	roleText, from, key := s.Role, "annotation ", Role
	if roleText == "" {
		roleText, from, key = strings.TrimSpace(ns.Annotations[r.names.defaultRole]), "namespace annotation ", DefaultRole
		if roleText == "" {
			return credential.RoleARN{}, credential.Errorf(credential.ErrInvalid, credential.ReasonRoleMissing,
				"annotation %q is empty and namespace %q has no %q; set one of them", r.keys.Name(Role), ns.Name, r.keys.Name(DefaultRole))
		}
	}
	if r.base.IsZero() && !strings.HasPrefix(roleText, "arn:") {
		return credential.RoleARN{}, r.needsBase(fmt.Sprintf("%s%s: %.100q is not a full ARN", from, r.keys.Name(key), roleText))
	}
	role, err := r.base.Resolve(roleText)
	if err != nil {
		return credential.RoleARN{}, &credential.Error{
			Kind: credential.ErrInvalid, Reason: credential.ReasonRoleInvalid,
			Message: fmt.Sprintf("%s%s: %v", from, r.keys.Name(key), err),
		}
	}
	return role, nil
}

func (r *Rules) needsBase(what string) error {
	return &credential.Error{
		Kind: credential.ErrInvalid, Reason: credential.ReasonRoleInvalid, Cause: ErrNoBase,
		Message: what + ", and the broker has no base ARN to complete it; write the full ARN, or set the broker's --base-arn",
	}
}

// fit shortens a name to the 64 characters that STS allows for session names and source identities. A shortened name ends
// with n bytes of a hash of the whole, so that two names do not become the same.
func fit(name string, n int) string {
	if len(name) <= maxSessionName {
		return name
	}
	sum := sha256.Sum256([]byte(name))
	suffix := "-" + hex.EncodeToString(sum[:n])
	return name[:maxSessionName-len(suffix)] + suffix
}
