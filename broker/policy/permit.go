package policy

import (
	"encoding/json"
	"errors"
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
	// maxSteps bounds the compiled expression, and so memory and the time to compile it. RE2 compiles
	// repetitions into copies: 4 kB of .{0,1000} make 78 MB. This is twice what the longest expression
	// without repetitions needs. maxVisits bounds the cost of a match.
	maxSteps = 2 * maxExpression
	// maxAllowed bounds the text of allowed-roles in bytes: a thousand ARNs of ordinary length, and a
	// millisecond to decode them.
	maxAllowed = 128 << 10
	// maxGlobs bounds allowed-roles: a decision that is not cached walks the list.
	maxGlobs = 1000
	// maxStars bounds a glob, so that the parts of all globs of a list are matched in a millisecond. Real ones have
	// less than five.
	maxStars = 32
	// stepCost is about how many bytes one step of a compiled expression takes: 170 of ordinary ones,
	// 256 of character classes (measured), and 40 in the form that is for counting.
	stepCost = 300
	// globCost and partCost are the same for a glob, and for each of its parts.
	globCost = 64
	partCost = 16
)

// permit refuses the role of that ARN unless the namespace permits it.
func (r *Rules) permit(e *evaluation, role string, ns Namespace) error {
	permitted, hasPermitted := ns.Annotations[r.names.permitted]
	allowed, hasAllowed := ns.Annotations[r.names.allowedRoles]
	if !hasPermitted && !hasAllowed {
		return credential.Errorf(credential.ErrDenied, credential.ReasonNothingPermitted,
			"namespace %q permits no roles: annotate it with %q, a regular expression that matches %s",
			ns.Name, r.names.permitted, role)
	}
	if hasPermitted {
		if ok, err := e.ask(permittedText, permitted, role, matchExpression); err != nil {
			return invalidNamespace(ns, r.names.permitted, err)
		} else if ok {
			return nil
		}
	}
	needsBase := false
	if hasAllowed {
		ok, err := e.ask(allowedText, allowed, role, matchAllowed)
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
	var says []string
	if hasPermitted {
		says = append(says, fmt.Sprintf("annotation %q is %s and must match the whole ARN", r.names.permitted, quote(permitted)))
	}
	if hasAllowed {
		says = append(says, fmt.Sprintf("annotation %q is %s and none of its globs matches the whole ARN", r.names.allowedRoles, quote(allowed)))
	}
	return credential.Errorf(credential.ErrDenied, credential.ReasonRoleNotPermitted,
		"namespace %q does not permit role %s: its %s; change the namespace's annotation, or the pod's %q",
		ns.Name, role, strings.Join(says, ", and its "), r.keys.Name(Role))
}

// maxQuoted bounds what a message quotes of a namespace's annotation, in bytes: a few ARNs.
const maxQuoted = 200

// quote returns the beginning of a text for a message: in backquotes, so that expressions and JSON stay as they were
// written, or in quotes with escapes if it has characters beyond printable ASCII.
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
	compiled, err := meaning(e, permittedText, text, compile)
	if err != nil {
		return false, err
	}
	return compiled.match(role)
}

// errNeedsBase says that no full ARN in [AllowedRoles] matches, and that its names need a base ARN.
var errNeedsBase = errors.New("names need a base ARN")

// matchAllowed reports whether a text of [AllowedRoles] matches the role of that ARN.
func matchAllowed(e *evaluation, text, role string) (bool, error) {
	globs, err := meaning(e, allowedText, text, parseGlobs)
	if err != nil {
		return false, err
	}
	r := e.rules
	for _, g := range globs {
		// What the base puts before a glob has no *, so the parts can be matched one by one.
		rest, ok := role, true
		if !strings.HasPrefix(g.first, "arn:") {
			if r.base.IsZero() {
				err = errNeedsBase
				continue
			}
			rest, ok = strings.CutPrefix(role, r.before(g))
		}
		if ok && g.match(rest) {
			return true, nil
		}
	}
	return false, err
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

// compile returns a compiled text of [Permitted], and about how many bytes it takes.
func compile(text string) (expression, int, error) {
	if len(text) > maxExpression {
		return expression{}, 0, fmt.Errorf("has %d characters, the limit is %d", len(text), maxExpression)
	}
	if beyond := beyondASCII.FindString(text); beyond != "" {
		return expression{}, 0, fmt.Errorf("%.200q has %q, and a role's ARN has letters, digits and marks of ASCII only: write the characters themselves, or a class such as [a-z]", text, beyond)
	}
	// Parsed alone first: an expression such as "a)|(?:.*" is wrong by itself, but would become
	// a valid one that matches everything once it stands in a group.
	alone, err := syntax.Parse(text, syntax.Perl)
	if err != nil {
		return expression{}, 0, fmt.Errorf("%.200q is not a regular expression: %w", text, err)
	}
	n := steps(alone)
	if n > maxSteps {
		return expression{}, 0, fmt.Errorf("repeats too much: it would compile to %d instructions, the limit is %d", n, maxSteps)
	}
	prog, err := syntax.Compile(alone.Simplify())
	if err != nil {
		return expression{}, 0, fmt.Errorf("%.200q is not a regular expression: %w", text, err)
	}
	whole, err := regexp.Compile("^(?:" + text + ")$")
	if err != nil {
		return expression{}, 0, fmt.Errorf("%.200q is not a regular expression: %w", text, err)
	}
	return expression{whole: whole, alone: prog}, n * stepCost, nil
}

// beyondASCII finds what only an expression for other texts than ARNs has: characters beyond ASCII, and escapes that
// name characters by their number or by a property in Unicode. They are refused because package syntax takes seconds
// for some of them: (?i)[B-\x{10FFFF}] adds each of a million characters to the class, and 4 kB have 200 such classes.
// Without them, no text of maxExpression takes more than 5 ms to compile (BenchmarkCompile).
var beyondASCII = regexp.MustCompile(`[^\x00-\x7f]|\\[xpP0-7]`)

// steps estimates how many instructions re compiles to.
func steps(re *syntax.Regexp) int {
	n := 1
	if re.Op == syntax.OpLiteral {
		n = len(re.Rune)
	}
	if re.Op == syntax.OpCharClass {
		n += len(re.Rune) / 16 // a class can have dozens of ranges, each of which takes memory
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
	if len(list) > maxAllowed {
		return nil, 0, fmt.Errorf("has %d characters, the limit is %d", len(list), maxAllowed)
	}
	var texts []string
	if err := json.Unmarshal([]byte(list), &texts); err != nil {
		return nil, 0, fmt.Errorf(`is not a JSON list such as ["team-*"]: %w`, err)
	}
	if len(texts) > maxGlobs {
		return nil, 0, fmt.Errorf("has %d entries, the limit is %d", len(texts), maxGlobs)
	}
	globs, cost := make([]glob, len(texts)), 0
	for i, text := range texts {
		if err := checkStars(text); err != nil {
			return nil, 0, err
		}
		globs[i] = newGlob(text)
		cost += globCost + len(text) + partCost*strings.Count(text, "*")
	}
	return globs, cost, nil
}

// checkStars refuses a glob with too many *.
func checkStars(text string) error {
	if n := strings.Count(text, "*"); n > maxStars {
		return fmt.Errorf("%.100q has %d *, the limit is %d", text, n, maxStars)
	}
	return nil
}
