// Package typo finds the known name that a misspelled one was probably meant to be, for the messages "did you mean …?".
// It knows no names itself.
package typo

import "slices"

// maxText is how much of a text counts, in bytes. It is the maximum that Kubernetes allows for the name of an annotation
// after its prefix. Kubernetes checks that after admission, so the webhook can receive longer names. The table of
// editDistance stays small with it.
const maxText = 63

// Nearest returns the candidate with the smallest edit distance to text; the first one if several have it. Only the first
// 63 bytes of text count. The caller passes at least one candidate, and none longer than a name that a person writes.
func Nearest[T ~string](text T, candidates []T) T {
	text = text[:min(len(text), maxText)]
	return slices.MinFunc(candidates, func(a, b T) int { return editDistance(text, a) - editDistance(text, b) })
}

// editDistance returns the optimal string alignment distance. A transposition, the most frequent typing error, counts as
// one edit.
func editDistance[T ~string](a, b T) int {
	d := make([][]int, len(a)+1)
	for i := range d {
		d[i] = make([]int, len(b)+1)
		d[i][0] = i
	}
	for j := range d[0] {
		d[0][j] = j
	}
	for i := 1; i <= len(a); i++ {
		for j := 1; j <= len(b); j++ {
			cost := 1
			if a[i-1] == b[j-1] {
				cost = 0
			}
			d[i][j] = min(d[i-1][j]+1, d[i][j-1]+1, d[i-1][j-1]+cost)
			if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
				d[i][j] = min(d[i][j], d[i-2][j-2]+1)
			}
		}
	}
	return d[len(a)][len(b)]
}
