package policy

import (
	"encoding/json"
	"fmt"
	"regexp"
	"regexp/syntax"
	"slices"
	"strings"

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
	// stepCost is about how many bytes one step of a compiled expression takes: 170 of ordinary ones,
	// 256 of character classes (measured).
	stepCost = 256
	// globCost and partCost are the same for a glob, and for each of its parts.
	globCost = 64
	partCost = 16
)

// permit refuses the role of that ARN unless the namespace permits it.
func (r *Rules) permit(role string, ns Namespace) error {
	permitted, hasPermitted := ns.Annotations[r.names.permitted]
	allowed, hasAllowed := ns.Annotations[r.names.allowedRoles]
	if !hasPermitted && !hasAllowed {
		return credential.Errorf(credential.ErrDenied, credential.ReasonNothingPermitted,
			"namespace %q permits no roles: annotate it with %q, a regular expression that matches %s",
			ns.Name, r.keys.Name(Permitted), role)
	}
	if hasPermitted {
		expression, err := r.expressions.get(permitted, compile)
		if err != nil {
			return invalidNamespace(ns, r.keys.Name(Permitted), err)
		}
		if expression.MatchString(role) {
			return nil
		}
	}
	needsBase := false
	if hasAllowed {
		globs, err := r.globs.get(allowed, parseGlobs)
		if err != nil {
			return invalidNamespace(ns, r.keys.Name(AllowedRoles), err)
		}
		for _, g := range globs {
			// What the base puts before a glob has no *, so the parts can be matched one by one.
			rest, ok := role, true
			if !strings.HasPrefix(g.first, "arn:") {
				if r.base.IsZero() {
					needsBase = true
					continue
				}
				rest, ok = strings.CutPrefix(role, r.before(g))
			}
			if ok && g.match(rest) {
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

// before is what completes a glob, in the way in which the names of roles are completed: a /PATH/NAME
// stands in the base's account, without the base's own path.
func (r *Rules) before(g glob) string {
	if strings.HasPrefix(g.first, "/") {
		return r.names.account
	}
	return r.names.base
}

// permitTags refuses tags whose keys the namespace does not list.
func (r *Rules) permitTags(tags []Tag, ns Namespace) error {
	if len(tags) == 0 {
		return nil
	}
	var keys []string
	if list := strings.TrimSpace(ns.Annotations[r.names.permittedTags]); list != "" {
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

// compile returns the form of expression that matches whole ARNs only, and about how many bytes it
// takes.
func compile(expression string) (*regexp.Regexp, int, error) {
	if len(expression) > maxExpression {
		return nil, 0, fmt.Errorf("has %d characters, the limit is %d", len(expression), maxExpression)
	}
	// Parsed alone first: an expression such as "a)|(?:.*" is wrong by itself, but would become
	// a valid one that matches everything once it stands in a group.
	alone, err := syntax.Parse(expression, syntax.Perl)
	if err != nil {
		return nil, 0, fmt.Errorf("%q is not a regular expression: %w", expression, err)
	}
	n := steps(alone)
	if n > maxSteps {
		return nil, 0, fmt.Errorf("repeats too much: it would be compiled into %d steps, the limit is %d", n, maxSteps)
	}
	re, err := regexp.Compile("^(?:" + expression + ")$")
	if err != nil {
		return nil, 0, fmt.Errorf("%q is not a regular expression: %w", expression, err)
	}
	return re, n * stepCost, nil
}

// steps estimates how many instructions re compiles to.
func steps(re *syntax.Regexp) int {
	n := 1
	if re.Op == syntax.OpLiteral {
		n = len(re.Rune)
	}
	if re.Op == syntax.OpCharClass {
		n += len(re.Rune) / 16 // a class such as \pL has hundreds of ranges, each of which takes memory
	}
	for _, part := range re.Sub {
		n += steps(part)
	}
	if re.Op == syntax.OpRepeat {
		n *= max(re.Min, re.Max, 1) // Max is -1 for "any number"; no more than 1,000, nested ones multiplied: the parser sees to it
	}
	return n
}

func parseGlobs(list string) ([]glob, int, error) {
	var texts []string
	if err := json.Unmarshal([]byte(list), &texts); err != nil {
		return nil, 0, fmt.Errorf(`is not a JSON list such as ["team-*"]: %w`, err)
	}
	if len(texts) > maxGlobs {
		return nil, 0, fmt.Errorf("has %d entries, the limit is %d", len(texts), maxGlobs)
	}
	globs, cost := make([]glob, len(texts)), 0
	for i, text := range texts {
		globs[i] = newGlob(text)
		cost += globCost + len(text) + partCost*strings.Count(text, "*")
	}
	return globs, cost, nil
}
