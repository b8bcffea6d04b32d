package policy

import (
	"encoding/json"
	"fmt"
	"regexp"
	"regexp/syntax"
	"slices"
	"strings"
	"sync"

	"github.com/credence-iam/credence/broker/credential"
)

const (
	// maxExpression bounds the text of a permitted expression: some sixty ARNs.
	maxExpression = 4 << 10
	// maxSteps bounds what it compiles to. RE2 matches in linear time, but compiles repetitions into
	// copies: 4 kB of .{0,1000} make 78 MB, and seconds for each decision. This is twice what the
	// longest expression without repetitions needs, and keeps a decision under a tenth of a second.
	maxSteps = 2 * maxExpression
	// maxGlobs bounds allowed-roles: each decision walks the list.
	maxGlobs = 1000
	// maxExpressions is how many compiled expressions are kept; clusters have fewer namespaces.
	maxExpressions = 10_000
)

// permit refuses role unless the namespace permits it.
func (r *Rules) permit(role credential.RoleARN, ns Namespace) error {
	permitted, hasPermitted := ns.Annotations[r.keys.Name(Permitted)]
	allowed, hasAllowed := ns.Annotations[r.keys.Name(AllowedRoles)]
	if !hasPermitted && !hasAllowed {
		return credential.Errorf(credential.ErrDenied, credential.ReasonNothingPermitted,
			"namespace %q permits no roles: annotate it with %q, a regular expression that matches %s",
			ns.Name, r.keys.Name(Permitted), role)
	}
	if hasPermitted {
		expression, err := r.expressions.compile(permitted)
		if err != nil {
			return invalidNamespace(ns, r.keys.Name(Permitted), err)
		}
		if expression.MatchString(role.String()) {
			return nil
		}
	}
	needsBase := false
	if hasAllowed {
		globs, err := parseGlobs(allowed)
		if err != nil {
			return invalidNamespace(ns, r.keys.Name(AllowedRoles), err)
		}
		for _, glob := range globs {
			if !strings.HasPrefix(glob, "arn:") {
				if r.base.IsZero() {
					needsBase = true
					continue
				}
				glob = r.complete(glob)
			}
			if matchGlob(glob, role.String()) {
				return nil
			}
		}
	}
	if needsBase {
		return r.needsBase(fmt.Sprintf("annotation %q of namespace %q has names that are not full ARNs", r.keys.Name(AllowedRoles), ns.Name))
	}
	return credential.Errorf(credential.ErrDenied, credential.ReasonRoleNotPermitted,
		"namespace %q does not permit role %s: change the pod's %q, or the namespace's %q or %q",
		ns.Name, role, r.keys.Name(Role), r.keys.Name(Permitted), r.keys.Name(AllowedRoles))
}

// complete puts the base before a glob, in the way in which it completes the names of roles: a
// /PATH/NAME stands in the base's account, without the base's own path.
func (r *Rules) complete(glob string) string {
	base := r.base.String()
	if strings.HasPrefix(glob, "/") {
		account, _, _ := strings.Cut(base, "/")
		return account + glob
	}
	return base + glob
}

// permitTags refuses tags whose keys the namespace does not list.
func (r *Rules) permitTags(tags []Tag, ns Namespace) error {
	if len(tags) == 0 {
		return nil
	}
	var keys []string
	if list := strings.TrimSpace(ns.Annotations[r.keys.Name(PermittedTags)]); list != "" {
		var err error
		if keys, err = parseList(list, maxTags); err != nil {
			return invalidNamespace(ns, r.keys.Name(PermittedTags), err)
		}
	}
	for _, tag := range tags {
		if !slices.Contains(keys, tag.Key) {
			return credential.Errorf(credential.ErrDenied, credential.ReasonTagNotPermitted,
				"namespace %q does not permit pods to set session tag %q: add it to the namespace's %q",
				ns.Name, tag.Key, r.keys.Name(PermittedTags))
		}
	}
	return nil
}

// invalidNamespace refuses because the namespace's own annotation is wrong: what cannot be read
// permits nothing.
func invalidNamespace(ns Namespace, name string, err error) error {
	return &credential.Error{
		Kind: credential.ErrInvalid, Reason: credential.ReasonAnnotationInvalid,
		Message: fmt.Sprintf("annotation %q of namespace %q: %v", name, ns.Name, err),
	}
}

// expressionCache keeps compiled expressions, which are asked for at every call. The zero value is
// ready.
type expressionCache struct {
	mu       sync.Mutex
	compiled map[string]*regexp.Regexp // :: expression as written → anchored form; guarded by mu
}

// compile returns the form of expression that matches whole ARNs only.
func (c *expressionCache) compile(expression string) (*regexp.Regexp, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if re, ok := c.compiled[expression]; ok {
		return re, nil
	}
	if len(expression) > maxExpression {
		return nil, fmt.Errorf("has %d characters, the limit is %d", len(expression), maxExpression)
	}
	// Parsed alone first: an expression such as "a)|(?:.*" is wrong by itself, but would become
	// a valid one that matches everything once it stands in a group.
	alone, err := syntax.Parse(expression, syntax.Perl)
	if err != nil {
		return nil, fmt.Errorf("%q is not a regular expression: %w", expression, err)
	}
	if n := steps(alone); n > maxSteps {
		return nil, fmt.Errorf("repeats too much: it would be compiled into %d steps, the limit is %d", n, maxSteps)
	}
	re, err := regexp.Compile("^(?:" + expression + ")$")
	if err != nil {
		return nil, fmt.Errorf("%q is not a regular expression: %w", expression, err)
	}
	if c.compiled == nil || len(c.compiled) >= maxExpressions {
		c.compiled = make(map[string]*regexp.Regexp)
	}
	c.compiled[expression] = re
	return re, nil
}

// steps estimates how many instructions re compiles to.
func steps(re *syntax.Regexp) int {
	n := 1
	if re.Op == syntax.OpLiteral {
		n = len(re.Rune)
	}
	for _, part := range re.Sub {
		n += steps(part)
	}
	if re.Op == syntax.OpRepeat {
		n *= max(re.Min, re.Max) // no more than 1,000, nested ones multiplied: the parser sees to it
	}
	return n
}

func parseGlobs(list string) ([]string, error) {
	var globs []string
	if err := json.Unmarshal([]byte(list), &globs); err != nil {
		return nil, fmt.Errorf(`is not a JSON list such as ["team-*"]: %w`, err)
	}
	if len(globs) > maxGlobs {
		return nil, fmt.Errorf("has %d entries, the limit is %d", len(globs), maxGlobs)
	}
	return globs, nil
}

// matchGlob reports whether the whole of s matches glob, in which * stands for any characters,
// slashes too (kube2iam's form), and everything else for itself.
func matchGlob(glob, s string) bool {
	parts := strings.Split(glob, "*")
	if len(parts) == 1 {
		return glob == s
	}
	rest, ok := strings.CutPrefix(s, parts[0])
	if !ok {
		return false
	}
	last := parts[len(parts)-1]
	for _, part := range parts[1 : len(parts)-1] {
		at := strings.Index(rest, part)
		if at < 0 {
			return false
		}
		rest = rest[at+len(part):]
	}
	return strings.HasSuffix(rest, last)
}
