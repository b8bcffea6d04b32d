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

// Pod is what a decision needs to know of a pod.
type Pod struct {
	Namespace      string
	Name           string // may be empty at admission, where the API server has not made it yet
	UID            string // likewise
	ServiceAccount string
	Request        *Request // what its annotations ask for; nil is refused
}

// Namespace is what a decision needs to know of a namespace.
type Namespace struct {
	Name        string
	Labels      map[string]string
	Annotations map[string]string
}

// Grant is one AWS session that some pod may have: everything that AssumeRole is called with, and
// whom the session is shared by. Grants compare with ==, and two pods get the same session exactly
// when their grants are equal. Only [Rules] makes one that is not zero.
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

// Role is the role to assume.
func (g Grant) Role() credential.RoleARN { return g.role }

// SessionName is the RoleSessionName: stable for a pod's life, because some services (MSK) refuse
// to re-authenticate a connection under another one.
func (g Grant) SessionName() string { return g.sessionName }

// ExternalID is sent to STS when not empty.
func (g Grant) ExternalID() string { return g.externalID }

// Tags are the session tags, sorted by key.
func (g Grant) Tags() []Tag {
	var tags []Tag
	for line := range strings.Lines(g.tags) {
		key, value, _ := strings.Cut(strings.TrimSuffix(line, "\n"), "\t")
		tags = append(tags, Tag{Key: key, Value: value})
	}
	return tags
}

// TransitiveTagKeys are the keys of those of the tags that stay with the session when it assumes
// another role, sorted.
func (g Grant) TransitiveTagKeys() []string {
	var keys []string
	for line := range strings.Lines(g.transitiveTags) {
		keys = append(keys, strings.TrimSuffix(line, "\n"))
	}
	return keys
}

// SourceIdentity is sent to STS when not empty.
func (g Grant) SourceIdentity() string { return g.sourceIdentity }

// SessionPolicy is the inline policy that scopes the session down, as compact JSON; empty for none.
func (g Grant) SessionPolicy() string { return g.policy }

// PolicyARNs are the managed policies that scope the session down.
func (g Grant) PolicyARNs() []string {
	if g.policyARNs == "" {
		return nil
	}
	return strings.Split(g.policyARNs, ",")
}

// Duration is the length of the session to ask for.
func (g Grant) Duration() time.Duration { return g.duration }

// IsZero reports whether g grants nothing.
func (g Grant) IsZero() bool { return g == Grant{} }

// String names the role, the session and who shares it, for logs.
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
	// Base completes role names that are not ARNs. The zero value completes none, and such roles
	// give an error that is [ErrNoBase].
	Base credential.RoleBase
	// Cluster names this cluster in default session names, so that CloudTrail tells clusters apart.
	// At most 32 characters that a session name may have. Default "credence".
	Cluster string
	// Chained refuses sessions of more than one hour, because the broker is a role that assumes a role: AWS gives no
	// more then (IAM User Guide, "Role chaining"). Default: STS decides.
	Chained bool
}

// maxCluster leaves half of a session name's 64 characters to what follows the cluster's name.
const maxCluster = 32

// maxChained is the longest session that AWS gives to a role that assumes a role.
const maxChained = time.Hour

// ErrNoBase says that a decision needs the base ARN, and the rules have none.
var ErrNoBase = errors.New("no base ARN is known")

// Rules decides. The zero value refuses everything. Its methods may be called concurrently.
type Rules struct {
	keys    Keys
	base    credential.RoleBase
	cluster string
	chained bool
	names   names
	limits  atomic.Pointer[limits] // nil: there is no rules file

	generations atomic.Uint64 // how many rules files there were
	cache       cache
	gate        gate.Gate
}

// names are texts that each decision needs, made once.
type names struct {
	permitted, allowedRoles, defaultRole, permittedTags, duration string

	base, account string // what stands before the globs of allowed-roles
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
	return &Rules{keys: cfg.Keys, base: cfg.Base, cluster: cfg.Cluster, chained: cfg.Chained, names: names{
		permitted: cfg.Keys.Name(Permitted), allowedRoles: cfg.Keys.Name(AllowedRoles), defaultRole: cfg.Keys.Name(DefaultRole),
		permittedTags: cfg.Keys.Name(PermittedTags), duration: cfg.Keys.Name(Duration),
		base: base, account: account,
	}}, nil
}

// Keys returns the annotation keys in use.
func (r *Rules) Keys() Keys { return r.keys }

// errNoServiceAccount is a fault of ours: every pod has one.
var errNoServiceAccount = errors.New("the pod's service account is not known")

// Decide decides which session the pod may have. A refusal is an [*credential.Error] whose message
// says what to change, on the pod, on its namespace or in the rules file.
//
// A decision like one that the namespace has had before takes some microseconds. Another one takes some milliseconds
// at most, and waits until the namespace has its turn, and not longer than ctx: then the refusal is
// credential.ErrUnavailable.
func (r *Rules) Decide(ctx context.Context, pod Pod, ns Namespace) (Grant, error) {
	return r.decide(ctx.Done(), ns.Name, pod, ns)
}

// Grant is Decide for a caller that goes through the pods of many namespaces, one after the other, such as one that
// prefetches: it waits for a turn that all calls of Grant share, as if they were of one more namespace.
func (r *Rules) Grant(pod Pod, ns Namespace) (Grant, error) {
	return r.decide(nil, noNamespace, pod, ns)
}

// noNamespace has turns of its own at the gate. No namespace has an empty name.
const noNamespace = ""

func (r *Rules) decide(done <-chan struct{}, turn string, pod Pod, ns Namespace) (Grant, error) {
	e := evaluation{rules: r, namespace: ns.Name}
	if grant, err := r.grant(&e, pod, ns); !e.lacks {
		return grant, err
	}
	if !r.gate.Enter(done, turn) {
		return Grant{}, &credential.Error{
			Kind: credential.ErrUnavailable, Reason: credential.ReasonNamespaceBusy, RetryAfter: busyWait,
			Message: fmt.Sprintf("namespace %q has too many pods that need a new decision at the same time; try again", ns.Name),
		}
	}
	defer r.gate.Leave(turn)
	e = evaluation{rules: r, namespace: ns.Name, mayWork: true}
	return r.grant(&e, pod, ns)
}

// busyWait is the least time before a decision that did not get its turn is asked for again.
const busyWait = time.Second

// grant decides by what the evaluation has.
func (r *Rules) grant(e *evaluation, pod Pod, ns Namespace) (Grant, error) {
	if pod.Namespace == "" || pod.Namespace != ns.Name {
		return Grant{}, credential.Errorf(credential.ErrDenied, credential.ReasonNamespaceNotFound,
			"the pod's namespace %q is not known", pod.Namespace)
	}
	if err := r.keys.CheckOptedIn(ns); err != nil {
		return Grant{}, err
	}
	file := r.limits.Load() // once, so that one decision is made by one file
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
	if r.chained && s.Duration > maxChained {
		return Grant{}, credential.Errorf(credential.ErrInvalid, credential.ReasonAnnotationInvalid,
			"annotation %q: AWS gives sessions of 1h at most here, because the broker is a role that assumes a role (role chaining), and not %s: write 1h or less",
			r.names.duration, s.Duration)
	}
	g := Grant{
		role:       role,
		externalID: s.ExternalID,
		policy:     s.SessionPolicy,
		policyARNs: strings.Join(s.PolicyARNs, ","),
		duration:   s.Duration,
	}
	if g.sharedBy, g.sessionName, err = r.share(s, pod); err != nil {
		return Grant{}, err
	}
	tags := s.SessionTags
	if file != nil {
		if err := limit.allow(e, ns.Name, role, arn, s, pod.Request.setsDuration); err != nil {
			return Grant{}, err
		}
		if limit.maxDuration != 0 {
			g.duration = min(g.duration, limit.maxDuration) // less than the default, for those that ask for none
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

// share returns whom the session is shared by, and its name.
func (r *Rules) share(s Settings, pod Pod) (sharedBy, name string, err error) {
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
		return "", "", fmt.Errorf("%.200q is no name of a session: Kubernetes has no such names", name)
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

// resolve returns the role that the pod asks for, completed to an ARN.
func (r *Rules) resolve(s Settings, ns Namespace) (credential.RoleARN, error) {
	said, from, key := s.Role, "annotation ", Role
	if said == "" {
		said, from, key = strings.TrimSpace(ns.Annotations[r.names.defaultRole]), "namespace annotation ", DefaultRole
		if said == "" {
			return credential.RoleARN{}, credential.Errorf(credential.ErrInvalid, credential.ReasonRoleMissing,
				"annotation %q is empty and namespace %q has no %q: set one of them", r.keys.Name(Role), ns.Name, r.keys.Name(DefaultRole))
		}
	}
	if r.base.IsZero() && !strings.HasPrefix(said, "arn:") {
		return credential.RoleARN{}, r.needsBase(fmt.Sprintf("%s%s: %.100q is not a full ARN", from, r.keys.Name(key), said))
	}
	role, err := r.base.Resolve(said)
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
		Message: what + ", and the broker has no base ARN to complete it: write the full ARN, or set the broker's --base-arn",
	}
}

// fit shortens a name to what STS takes in the names of sessions and in source identities, keeping
// names apart by n bytes of a hash of the whole.
func fit(name string, n int) string {
	if len(name) <= maxSessionName {
		return name
	}
	sum := sha256.Sum256([]byte(name))
	suffix := "-" + hex.EncodeToString(sum[:n])
	return name[:maxSessionName-len(suffix)] + suffix
}
