package policy

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/policy/pattern"
)

// permit refuses the role of that ARN unless the namespace permits it.
func (r *Rules) permit(e *evaluation, role string, ns Namespace) error {
	permitted, hasPermitted := ns.Annotations[r.names.permitted]
	allowed, hasAllowed := ns.Annotations[r.names.allowedRoles]
	if !hasPermitted && !hasAllowed {
		return credential.Errorf(credential.ErrDenied, credential.ReasonNothingPermitted,
			"namespace %q permits no roles; annotate it with %q, a regular expression that matches %s",
			ns.Name, r.names.permitted, role)
	}
	if hasPermitted {
		if ok, err := e.answer(permittedText, permitted, role, matchExpression); err != nil {
			return invalidNamespace(ns, r.names.permitted, err)
		} else if ok {
			return nil
		}
	}
	needsBase := false
	if hasAllowed {
		ok, err := e.answer(allowedText, allowed, role, matchAllowed)
		switch {
		case ok:
			return nil
		case err == errNeedsBase: //nolint:errorlint // It is never wrapped.
			needsBase = true
		case err != nil:
			return invalidNamespace(ns, r.names.allowedRoles, err)
		}
	}
	if needsBase {
		return r.needsBase(fmt.Sprintf("annotation %q of namespace %q has names that are not full ARNs", r.names.allowedRoles, ns.Name))
	}
	var reasons []string
	if hasPermitted {
		reasons = append(reasons, fmt.Sprintf("annotation %q is %s and must match the whole ARN", r.names.permitted, quote(permitted)))
	}
	if hasAllowed {
		reasons = append(reasons, fmt.Sprintf("annotation %q is %s and none of its globs matches the whole ARN", r.names.allowedRoles, quote(allowed)))
	}
	return credential.Errorf(credential.ErrDenied, credential.ReasonRoleNotPermitted,
		"namespace %q does not permit role %s: its %s; change the namespace's annotation, or the pod's %q",
		ns.Name, role, strings.Join(reasons, ", and its "), r.keys.Name(Role))
}

// maxQuoted is how much of a namespace's annotation a message quotes, in bytes: a few ARNs.
const maxQuoted = 200

// quote returns the beginning of a text for a message: in backquotes, so that expressions and JSON appear as written, or in
// quotes with escapes if it has characters beyond printable ASCII.
func quote(text string) string {
	more := ""
	if len(text) > maxQuoted {
		text, more = strings.ToValidUTF8(text[:maxQuoted], ""), "…"
	}
	if strings.ContainsFunc(text, func(r rune) bool { return r < ' ' || r > '~' || r == '`' }) {
		return fmt.Sprintf("%q", text) + more
	}
	return "`" + text + "`" + more
}

// matchExpression reports whether a text of [Permitted] matches the role of that ARN.
func matchExpression(e *evaluation, text, role string) (bool, error) {
	compiled, err := compile(e, permittedText, text, pattern.Compile)
	if err != nil {
		return false, err
	}
	return compiled.Match(role)
}

// errNeedsBase is the error if no full ARN in [AllowedRoles] matches, and its other names need a base ARN.
var errNeedsBase = errors.New("names need a base ARN")

// matchAllowed reports whether a text of [AllowedRoles] matches the role of that ARN.
func matchAllowed(e *evaluation, text, role string) (bool, error) {
	globs, err := compile(e, allowedText, text, pattern.ParseGlobs)
	if err != nil {
		return false, err
	}
	r := e.rules
	for _, g := range globs {
		// The part that the base ARN adds before a glob has no *, so both parts can be matched one after the other.
		rest, ok := role, true
		if !strings.HasPrefix(g.First(), "arn:") {
			if r.base.IsZero() {
				err = errNeedsBase
				continue
			}
			rest, ok = strings.CutPrefix(role, r.before(g))
		}
		if ok && g.Match(rest) {
			return true, nil
		}
	}
	return false, err
}

// before returns the text that completes a glob to an ARN, as the base completes names of roles: a /PATH/NAME is in the
// base's account, without the base's own path.
func (r *Rules) before(g pattern.Glob) string {
	if strings.HasPrefix(g.First(), "/") {
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
				"namespace %q does not permit pods to set session tag %q; add it to the namespace's %q",
				ns.Name, tag.Key, r.keys.Name(PermittedTags))
		}
	}
	return nil
}

// invalidNamespace refuses because the namespace's own annotation is invalid: an invalid annotation permits nothing.
func invalidNamespace(ns Namespace, name string, err error) error {
	return &credential.Error{
		Kind: credential.ErrInvalid, Reason: credential.ReasonAnnotationInvalid,
		Message: fmt.Sprintf("annotation %q of namespace %q: %v", name, ns.Name, err),
	}
}
