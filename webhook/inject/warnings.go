package inject

import (
	"fmt"
	"strings"
)

// warnings collects sentences for the user who creates a pod. Of a pod with many mistakes it composes the first ones
// only, and counts all.
type warnings struct {
	all []string
	// shadowing are those among all that the pod keeps in an annotation, because a controller that creates a pod shows
	// warnings to nobody.
	shadowing []string
	more      int // beyond maxWarnings
	hidden    int // how many of them belong to shadowing
}

func (w *warnings) addf(format string, args ...any) {
	if len(w.all) == maxWarnings {
		w.more++
		return
	}
	w.all = append(w.all, fmt.Sprintf(format, args...))
}

// shadowf adds a warning that the pod keeps.
func (w *warnings) shadowf(format string, args ...any) {
	w.addf(format, args...)
	if w.more > 0 {
		w.hidden++
		return
	}
	w.shadowing = append(w.shadowing, w.all[len(w.all)-1])
}

// maxKept is the maximum length of the annotation with warnings, in bytes. The watch of each broker holds it, and the
// note of an Event, which starts with a sentence of its own, has at most 1,024.
const maxKept = 700

// kept returns the value of the annotation: a line for each warning that fits, and how many do not.
func (w *warnings) kept() string {
	const room = len("\nand 99999 more")
	var text strings.Builder
	for at, warning := range w.shadowing {
		if text.Len()+len("\n")+len(warning) > maxKept-room {
			w.hidden += len(w.shadowing) - at
			break
		}
		if at > 0 {
			text.WriteByte('\n')
		}
		text.WriteString(warning)
	}
	if w.hidden > 0 {
		fmt.Fprintf(&text, "\nand %d more", w.hidden)
	}
	return text.String()
}
