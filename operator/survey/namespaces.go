package survey

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/policy"
	"github.com/credence-iam/credence/certs"
	"github.com/credence-iam/credence/operator/installation"
)

// Tally counts objects and keeps a few of their names and of the commands that fix them.
type Tally struct {
	Count              int
	Examples, Commands []string
}

// MaxExamples is how many names and commands a [Tally] keeps.
const MaxExamples = 5

// Add counts one object. The command is empty if there is none.
func (t *Tally) Add(name, command string) {
	t.Count++
	if len(t.Examples) < MaxExamples && !slices.Contains(t.Examples, name) {
		t.Examples = append(t.Examples, name)
	}
	if command != "" && len(t.Commands) < MaxExamples && !slices.Contains(t.Commands, command) {
		t.Commands = append(t.Commands, command)
	}
}

// String returns the names.
func (t *Tally) String() string {
	text := strings.Join(t.Examples, ", ")
	if t.Count > len(t.Examples) {
		text += ", …"
	}
	return text
}

// Namespaces is what is known of all namespaces.
type Namespaces struct {
	Total       int
	OptedIn     map[string]bool
	Levels      map[string]int // PodSecurity level of opted-in ones → number
	BadLabel    Tally          // inject=true and the like
	BadLevel    Tally
	AnyRole     Tally // permit all roles
	AccountRole Tally // permit all roles of an account
	Nothing     Tally // permit none
	Invalid     Tally // with the error
}

// EnforceLabel is the label with the level that PodSecurity enforces.
const EnforceLabel = "pod-security.kubernetes.io/enforce"

// ValidLevel reports whether PodSecurity knows the level. Without a label, it is privileged.
func ValidLevel(level string) bool {
	return slices.Contains([]string{"", "privileged", "baseline", "restricted"}, level)
}

// prepare sets what all checks need of the installation.
func (s *Snapshot) prepare(limits *policy.File) {
	prefix := installation.Arg(s.Found.WebhookArgs(), "annotation-prefix")
	keys, err := policy.NewKeys(prefix)
	if err != nil {
		keys, _ = policy.NewKeys(policy.DefaultPrefix)
	}
	s.Keys = keys
	base, err := credential.ParseRoleBase(installation.Arg(s.Found.WebhookArgs(), "base-arn"))
	if err != nil { // The brokers know it from STS. Here, any account will do.
		base, _ = credential.ParseRoleBase("arn:aws:iam::" + unknownAccount + ":role/")
	}
	s.Rules, err = policy.New(policy.Config{Keys: keys, Base: base})
	if err != nil {
		s.Rules = &policy.Rules{}
	}
	if limits != nil {
		_ = s.Rules.Use(*limits) // Its parser has checked it.
	}
}

// Accounts that no namespace permits, unless it permits all.
const (
	unknownAccount = "000000000000"
	otherAccount   = "918273645546"
)

// accounts finds the accounts that an annotation names.
var accounts = regexp.MustCompile(`\b[0-9]{12}\b`)

// maxAccounts bounds how many accounts of a namespace are tried.
const maxAccounts = 10

// Add looks at one namespace.
func (n *Namespaces) Add(s *Snapshot, ns *corev1.Namespace) {
	n.Total++
	label, labeled := ns.Labels[s.Keys.Name(policy.Inject)]
	if !s.Keys.OptedIn(ns.Labels) {
		if labeled && label != "disabled" {
			n.BadLabel.Add(ns.Name+" ("+label+")", s.Target.Command("kubectl label --overwrite namespace %s %s=%s", ns.Name, s.Keys.Name(policy.Inject), policy.Enabled))
		}
		return
	}
	n.OptedIn[ns.Name] = true
	level := ns.Labels[EnforceLabel]
	n.Levels[level]++
	if !ValidLevel(level) {
		n.BadLevel.Add(ns.Name+" ("+level+")", s.Target.Command("kubectl label --overwrite namespace %s %s=restricted", ns.Name, EnforceLabel))
	}
	about := policy.Namespace{Name: ns.Name, Labels: ns.Labels, Annotations: ns.Annotations}
	permits := func(account string) error {
		for _, name := range []string{"x7qz-check", "check/w4/9k-other"} {
			request := s.Keys.Request(map[string]string{s.Keys.Name(policy.Role): "arn:aws:iam::" + account + ":role/" + name})
			if _, err := s.Rules.Grant(policy.Pod{Namespace: ns.Name, Name: "check", UID: "check", ServiceAccount: "default", Request: request}, about); err != nil {
				return err
			}
		}
		return nil
	}
	show := s.Target.Command("kubectl get namespace %s -o yaml", ns.Name)
	err := permits(otherAccount)
	refused, _ := errors.AsType[*credential.Error](err)
	switch {
	case err == nil:
		n.AnyRole.Add(ns.Name, show)
		return
	case refused == nil:
	case refused.Reason == credential.ReasonNothingPermitted || refused.Reason == credential.ReasonRulesNamespace:
		n.Nothing.Add(ns.Name, show)
		return
	case refused.Reason == credential.ReasonAnnotationInvalid:
		n.Invalid.Add(fmt.Sprintf("%s (%.200s)", ns.Name, refused.Message), show)
		return
	}
	named := accounts.FindAllString(ns.Annotations[s.Keys.Name(policy.Permitted)]+" "+ns.Annotations[s.Keys.Name(policy.AllowedRoles)], maxAccounts)
	if base := accounts.FindString(installation.Arg(s.Found.WebhookArgs(), "base-arn")); base != "" {
		named = append(named, base)
	} else {
		named = append(named, unknownAccount)
	}
	for _, account := range named {
		if permits(account) == nil {
			if account == unknownAccount {
				account = "the brokers"
			}
			n.AccountRole.Add(ns.Name+" (account "+account+")", show)
			return
		}
	}
}

func (g *gatherer) namespaces(ctx context.Context) (Namespaces, error) {
	n := Namespaces{OptedIn: make(map[string]bool), Levels: make(map[string]int)}
	if g.s.Scope != "" {
		ns, err := g.kube.CoreV1().Namespaces().Get(ctx, g.s.Scope, metav1.GetOptions{})
		if err == nil {
			n.Add(g.s, ns)
		}
		return n, err
	}
	err := pages(metav1.ListOptions{}, func(o metav1.ListOptions) (*corev1.NamespaceList, error) {
		return g.kube.CoreV1().Namespaces().List(ctx, o)
	}, func(list *corev1.NamespaceList) {
		for i := range list.Items {
			n.Add(g.s, &list.Items[i])
		}
	})
	return n, err
}

// Published are the ConfigMaps with the brokers' roots.
type Published struct {
	Roots   []*x509.Certificate          // in the namespace of Credence
	Digests map[string][sha256.Size]byte // :: namespace → digest of its roots
	Err     error                        // of the roots in the namespace of Credence
}

// rootsKey is the key of the roots in the ConfigMap.
const rootsKey = "roots.pem"

// Add looks at one ConfigMap.
func (p *Published) Add(s *Snapshot, m *corev1.ConfigMap) {
	p.Digests[m.Namespace] = sha256.Sum256([]byte(m.Data[rootsKey]))
	if m.Namespace == s.Namespace {
		p.Roots, p.Err = certs.ParseRoots([]byte(m.Data[rootsKey]))
	}
}

func (g *gatherer) published(ctx context.Context) (Published, error) {
	p := Published{Digests: make(map[string][sha256.Size]byte)}
	name := g.s.TrustName()
	scopes := []string{metav1.NamespaceAll}
	if g.s.Scope != "" {
		scopes = []string{g.s.Namespace, g.s.Scope}
	}
	for _, scope := range scopes {
		err := pages(metav1.ListOptions{FieldSelector: "metadata.name=" + name}, func(o metav1.ListOptions) (*corev1.ConfigMapList, error) {
			return g.kube.CoreV1().ConfigMaps(scope).List(ctx, o)
		}, func(list *corev1.ConfigMapList) {
			for i := range list.Items {
				p.Add(g.s, &list.Items[i])
			}
		})
		if err != nil {
			return p, err
		}
	}
	return p, nil
}

// TrustName returns the name of the ConfigMaps with the brokers' roots.
func (s *Snapshot) TrustName() string {
	if name := installation.Arg(s.Found.WebhookArgs(), "trust-config-map"); name != "" {
		return name
	}
	return installation.TrustConfigMap
}
