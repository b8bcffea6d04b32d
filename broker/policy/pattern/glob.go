package pattern

import (
	"encoding/json"
	"fmt"
	"strings"
)

const (
	// maxAllowed bounds the text of a list of globs in bytes: a thousand ARNs of ordinary length, and a millisecond to decode
	// them.
	maxAllowed = 128 << 10
	// maxGlobs bounds a list: a decision that is not cached walks it.
	maxGlobs = 1000
	// maxStars bounds a glob, so that the parts of all globs of a list are matched in a millisecond. Real globs have fewer
	// than five.
	maxStars = 32
	// globCost is about how many bytes a glob takes, and partCost each of its parts.
	globCost = 64
	partCost = 16
)

// Glob is a pattern in which * stands for any characters, slashes too (kube2iam's form), and everything else for itself.
type Glob struct {
	first   string   // up to the first *, or all if there is none
	middle  []string // between two *
	last    string   // after the last *
	literal bool     // there is no *
}

// NewGlob returns the glob of a text, which the caller bounds by [CheckStars].
func NewGlob(text string) Glob {
	parts := strings.Split(text, "*")
	if len(parts) == 1 {
		return Glob{first: text, literal: true}
	}
	return Glob{first: parts[0], middle: parts[1 : len(parts)-1], last: parts[len(parts)-1]}
}

// First returns what the glob has before its first *.
func (g Glob) First() string { return g.first }

// Match reports whether the whole of s matches.
func (g Glob) Match(s string) bool {
	if g.literal {
		return g.first == s
	}
	rest, ok := strings.CutPrefix(s, g.first)
	if !ok {
		return false
	}
	for _, part := range g.middle {
		at := strings.Index(rest, part)
		if at < 0 {
			return false
		}
		rest = rest[at+len(part):]
	}
	return strings.HasSuffix(rest, g.last)
}

// MatchAny reports whether the whole of s matches one of the globs.
func MatchAny(globs []Glob, s string) bool {
	for _, g := range globs {
		if g.Match(s) {
			return true
		}
	}
	return false
}

// ParseGlobs returns the globs of a JSON list, and about how many bytes they take.
func ParseGlobs(list string) (globs []Glob, cost int, err error) {
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
	globs = make([]Glob, len(texts))
	for i, text := range texts {
		if err := CheckStars(text); err != nil {
			return nil, 0, err
		}
		globs[i] = NewGlob(text)
		cost += globCost + len(text) + partCost*strings.Count(text, "*")
	}
	return globs, cost, nil
}

// CheckStars refuses a glob with too many *.
func CheckStars(text string) error {
	if n := strings.Count(text, "*"); n > maxStars {
		return fmt.Errorf("%.100q has %d *, the limit is %d", text, n, maxStars)
	}
	return nil
}
