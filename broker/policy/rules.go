package policy

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/credence-iam/credence/broker/credential"
)

// Pod is what a decision needs to know of a pod.
type Pod struct {
	Namespace      string
	Name           string // may be empty at admission, where the API server has not made it yet
	UID            string // likewise
	ServiceAccount string
	Annotations    map[string]string
}

// Namespace is what a decision needs to know of a namespace.
type Namespace struct {
	Name        string
	Labels      map[string]string
	Annotations map[string]string
}

// Grant is one AWS session that some pod may have: everything that AssumeRole is called with, and
// whom the session is shared by. Grants compare with ==, and two pods get the same session exactly
// when their grants are equal. Only [Rules.Grant] makes one that is not zero.
type Grant struct {
	role        credential.RoleARN
	sessionName string
	externalID  string
	tags        string // JSON list of Tag, sorted by key; "" for none
	policy      string
	policyARNs  string // comma list, sorted
	duration    time.Duration
	sharedBy    string // "", "NAMESPACE/SERVICEACCOUNT" or "NAMESPACE/POD/UID"
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
	if g.tags != "" {
		// g.tags was made by json.Marshal of []Tag.
		_ = json.Unmarshal([]byte(g.tags), &tags)
	}
	return tags
}

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
}

// maxCluster leaves half of a session name's 64 characters to what follows the cluster's name.
const maxCluster = 32

// ErrNoBase says that a decision needs the base ARN, and the rules have none.
var ErrNoBase = errors.New("no base ARN is known")

// Rules decides. The zero value refuses everything.
type Rules struct {
	keys        Keys
	base        credential.RoleBase
	cluster     string
	expressions expressionCache
}

// New checks cfg and returns its rules.
func New(cfg Config) (*Rules, error) {
	if cfg.Keys.prefix == "" {
		return nil, errors.New("rules without annotation keys would refuse everything")
	}
	if cfg.Cluster == "" {
		cfg.Cluster = "credence"
	}
	if len(cfg.Cluster) > maxCluster || len(cfg.Cluster) < minSessionName || !sessionNameForm.MatchString(cfg.Cluster) {
		return nil, fmt.Errorf("cluster name %q must have %d to %d letters, digits or any of _+=,.@-", cfg.Cluster, minSessionName, maxCluster)
	}
	return &Rules{keys: cfg.Keys, base: cfg.Base, cluster: cfg.Cluster}, nil
}

// Keys returns the annotation keys in use.
func (r *Rules) Keys() Keys { return r.keys }

// Grant decides which session the pod may have. A refusal is an [*credential.Error] whose message
// says what to change, on the pod or on its namespace.
func (r *Rules) Grant(pod Pod, ns Namespace) (Grant, error) {
	if pod.Namespace == "" || pod.Namespace != ns.Name {
		return Grant{}, credential.Errorf(credential.ErrDenied, credential.ReasonNamespaceNotFound,
			"the pod's namespace %q is not known", pod.Namespace)
	}
	if err := r.keys.CheckOptedIn(ns); err != nil {
		return Grant{}, err
	}
	s, err := r.keys.Parse(pod.Annotations)
	if err != nil {
		return Grant{}, err
	}
	role, err := r.resolve(s, ns)
	if err != nil {
		return Grant{}, err
	}
	if err := r.permit(role, ns); err != nil {
		return Grant{}, err
	}
	if err := r.permitTags(s.SessionTags, ns); err != nil {
		return Grant{}, err
	}
	g := Grant{
		role:       role,
		externalID: s.ExternalID,
		policy:     s.SessionPolicy,
		policyARNs: strings.Join(s.PolicyARNs, ","),
		duration:   s.Duration,
	}
	if len(s.SessionTags) > 0 {
		tags, err := json.Marshal(s.SessionTags)
		if err != nil {
			return Grant{}, fmt.Errorf("encoding session tags: %w", err)
		}
		g.tags = string(tags)
	}
	name := r.cluster
	switch s.Scope {
	case ScopeRole:
	case ScopeServiceAccount:
		if pod.ServiceAccount == "" {
			return Grant{}, errors.New("the pod's service account is not known")
		}
		g.sharedBy = pod.Namespace + "/" + pod.ServiceAccount
		name += "." + pod.Namespace + "." + pod.ServiceAccount
	case ScopePod:
		g.sharedBy = pod.Namespace + "/" + pod.Name + "/" + pod.UID
		name += "." + pod.Namespace + "." + pod.Name
	}
	g.sessionName = fitSessionName(name)
	if s.SessionName != "" {
		g.sessionName = s.SessionName
	}
	return g, nil
}

// resolve returns the role that the pod asks for, completed to an ARN.
func (r *Rules) resolve(s Settings, ns Namespace) (credential.RoleARN, error) {
	said, from := s.Role, "annotation "+r.keys.Name(Role)
	if said == "" {
		said, from = strings.TrimSpace(ns.Annotations[r.keys.Name(DefaultRole)]), "namespace annotation "+r.keys.Name(DefaultRole)
		if said == "" {
			return credential.RoleARN{}, credential.Errorf(credential.ErrInvalid, credential.ReasonRoleMissing,
				"annotation %q is empty and namespace %q has no %q: set one of them", r.keys.Name(Role), ns.Name, r.keys.Name(DefaultRole))
		}
	}
	if r.base.IsZero() && !strings.HasPrefix(said, "arn:") {
		return credential.RoleARN{}, r.needsBase(fmt.Sprintf("%s: %.100q is not a full ARN", from, said))
	}
	role, err := r.base.Resolve(said)
	if err != nil {
		return credential.RoleARN{}, &credential.Error{
			Kind: credential.ErrInvalid, Reason: credential.ReasonRoleInvalid,
			Message: fmt.Sprintf("%s: %v", from, err),
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

// fitSessionName shortens name to what STS takes, keeping names apart by a hash of the whole.
func fitSessionName(name string) string {
	if len(name) <= maxSessionName {
		return name
	}
	sum := sha256.Sum256([]byte(name))
	suffix := "-" + hex.EncodeToString(sum[:5])
	return name[:maxSessionName-len(suffix)] + suffix
}
