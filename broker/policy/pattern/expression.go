// Package pattern matches role ARNs and other short texts with the patterns that users write: regular expressions and
// globs. It bounds what a pattern costs, in memory and in time, because any user who can annotate a namespace chooses one.
// It does not know what a match permits.
package pattern

import (
	"fmt"
	"regexp"
	"regexp/syntax"
)

const (
	// maxExpression bounds the text of an expression: about sixty ARNs.
	maxExpression = 4 << 10
	// maxSteps bounds the compiled expression, and with it memory and the time to compile it. RE2 compiles repetitions into
	// copies: 4 kB of .{0,1000} make 78 MB. This is twice the need of the longest expression without repetitions. maxVisits
	// bounds the cost of a match.
	maxSteps = 2 * maxExpression
	// maxVisits bounds the cost of a match: how often it visits an instruction of the compiled expression. Package regexp
	// takes time in proportion to that: 2 to 9 ns for each visit with each of its three engines, on an idle machine
	// (BenchmarkVisits). So a match takes 2 ms at most.
	//
	// The expressions of real namespaces need a tenth of it at most, even with the longest ARN: .* makes 3 visits at each
	// character. An alternation visits all of its parts where it begins, and then follows few of them. The limit is for
	// expressions that match the same characters in very many ways, such as (.*){1000}.
	maxVisits = 250_000
	// stepCost is about how many bytes an instruction of a compiled expression takes: 170 for ordinary ones, 256 for
	// character classes (measured), and 40 for the form that visits counts.
	stepCost = 300
)

// Expression is a compiled regular expression that matches whole ARNs. The zero value must not be used.
type Expression struct {
	whole *regexp.Regexp // matches whole ARNs only
	alone *syntax.Prog   // the same without anchors, for visits
}

// Compile returns a compiled expression, and about how many bytes it takes.
func Compile(text string) (e Expression, cost int, err error) {
	if len(text) > maxExpression {
		return Expression{}, 0, fmt.Errorf("has %d characters, the limit is %d", len(text), maxExpression)
	}
	if beyond := beyondASCII.FindString(text); beyond != "" {
		return Expression{}, 0, fmt.Errorf("%.200q has %q, and a role's ARN has letters, digits and marks of ASCII only; write the characters themselves, or a class such as [a-z]", text, beyond)
	}
	// Compile parses the text alone first. An expression such as "a)|(?:.*" is invalid by itself, but inside a group it
	// becomes a valid one that matches everything.
	alone, err := syntax.Parse(text, syntax.Perl)
	if err != nil {
		return Expression{}, 0, fmt.Errorf("%.200q is not a regular expression: %w", text, err)
	}
	n := steps(alone)
	if n > maxSteps {
		return Expression{}, 0, fmt.Errorf("repeats too much: it would compile to %d instructions, the limit is %d", n, maxSteps)
	}
	prog, err := syntax.Compile(alone.Simplify())
	if err != nil {
		return Expression{}, 0, fmt.Errorf("%.200q is not a regular expression: %w", text, err)
	}
	whole, err := regexp.Compile("^(?:" + text + ")$")
	if err != nil {
		return Expression{}, 0, fmt.Errorf("%.200q is not a regular expression: %w", text, err)
	}
	return Expression{whole: whole, alone: prog}, n * stepCost, nil
}

// Match reports whether the expression matches the whole of arn. If that would take more than 250,000 visits to
// instructions, it returns an error and does not match.
func (e Expression) Match(arn string) (bool, error) {
	if visits(e.alone, arn) > maxVisits {
		return false, fmt.Errorf("matching %.700s takes more than %d steps, the limit: the expression has %d instructions, of which too many can match at the same character; "+
			"remove repetitions of repetitions, or write arn:aws:iam::ACCOUNT:role/(NAME|NAME)", arn, maxVisits, len(e.alone.Inst))
	}
	return e.whole.MatchString(arn), nil
}

// beyondASCII finds what expressions for ARNs do not need: characters beyond ASCII, and escapes that name characters by
// number or by Unicode property. Compile refuses them, because package syntax takes seconds for some: (?i)[B-\x{10FFFF}]
// adds each of a million characters to the class, and 4 kB have 200 such classes. Without them, no text of maxExpression
// takes more than 5 ms to compile (BenchmarkCompile).
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
		n *= max(re.Min, re.Max, 1) // Max is -1 for "any number". The parser allows 1,000 at most, nested ones multiplied.
	}
	return n
}

// visits returns the maximum of visits to instructions when prog matches the whole of text, or maxVisits+1 if they are more
// than maxVisits. It takes time in proportion to its result.
//
// At each position it collects all instructions that any way through the program reaches, whatever its priority. No engine
// visits more: the NFA and the backtracker remember the instructions that they visited at a position, and the one-pass
// engine has one instruction at a time.
func visits(prog *syntax.Prog, text string) int {
	var (
		seen  = make([]int, len(prog.Inst))  // :: instruction → 1 + last position at which it was visited
		stack = []uint32{uint32(prog.Start)} //nolint:gosec // An index of Inst. To visit at this position.
		next  []uint32                       // to visit at the next position
		n     int
	)
	for at := 0; at <= len(text) && len(stack) > 0; at++ {
		for len(stack) > 0 {
			pc := stack[len(stack)-1]
			stack = stack[:len(stack)-1]
			if seen[pc] == at+1 {
				continue
			}
			seen[pc] = at + 1
			if n++; n > maxVisits {
				return n
			}
			switch inst := &prog.Inst[pc]; inst.Op {
			case syntax.InstAlt, syntax.InstAltMatch:
				stack = append(stack, inst.Out, inst.Arg)
			case syntax.InstCapture, syntax.InstNop, syntax.InstEmptyWidth: // assumed to match
				stack = append(stack, inst.Out)
			case syntax.InstRune, syntax.InstRune1, syntax.InstRuneAny, syntax.InstRuneAnyNotNL:
				// Byte by byte: a role's ARN is ASCII.
				if at < len(text) && inst.MatchRune(rune(text[at])) {
					next = append(next, inst.Out)
				}
			case syntax.InstMatch, syntax.InstFail:
			}
		}
		stack, next = next, stack // which is empty
	}
	return n
}
