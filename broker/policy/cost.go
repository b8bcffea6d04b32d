package policy

import (
	"fmt"
	"regexp"
	"regexp/syntax"
)

// maxVisits bounds the cost of matching a permitted expression with one role: how often a match visits an
// instruction of the compiled expression. Package regexp takes time in proportion to that: 2 to 9 ns for each visit
// with each of its three engines, measured on an idle machine (BenchmarkVisits). So one match takes 2 ms at most.
//
// Expressions that namespaces really have need a tenth of it at most, even with the longest ARN: .* makes 3 visits at
// each character. An alternation visits all of its parts where it begins, and then follows few of them. The limit is
// for expressions that match the same characters in very many ways, such as (.*){1000}.
const maxVisits = 250_000

// expression is a compiled annotation [Permitted].
type expression struct {
	whole *regexp.Regexp // matches whole ARNs only
	alone *syntax.Prog   // the same without anchors, for counting
}

// match reports whether the expression matches the whole of arn. It fails, before it matches, if that takes more than
// maxVisits.
func (e expression) match(arn string) (bool, error) {
	if visits(e.alone, arn) > maxVisits {
		return false, fmt.Errorf("matching %.700s takes more than %d steps, the limit: the expression has %d instructions, of which too many can match at the same character; "+
			"remove repetitions of repetitions, or write arn:aws:iam::ACCOUNT:role/(NAME|NAME)", arn, maxVisits, len(e.alone.Inst))
	}
	return e.whole.MatchString(arn), nil
}

// visits returns how many visits matching prog with the whole of text pays to instructions at most, or a number above
// maxVisits if they are more than that. It takes time in proportion to its result.
//
// It collects, position by position, all instructions that some way through the program reaches, whether it comes
// first or last by the rules of priority. No engine visits more: the NFA and the backtracker remember the
// instructions that they visited at a position, and the one-pass engine has one instruction at a time.
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
			case syntax.InstCapture, syntax.InstNop, syntax.InstEmptyWidth: // assumed to hold
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
