package inject

import (
	"fmt"
	"strings"
)

// warnings collects the warnings for one pod. It composes the first [maxWarnings] and counts the others.
//
// A warning has two sentences: what is wrong, and what to do. With ordinary values it has at most 240 characters, because
// the webhook adds a prefix and the API server cuts warnings to 256.
type warnings struct {
	all []string
	// shadowing are the warnings that the pod keeps in an annotation. Nobody sees the warnings of a pod that a controller
	// creates.
	shadowing []string
	more      int // beyond maxWarnings
	hidden    int // the part of more that belongs to shadowing
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

// maxKept is the maximum length of the annotation with warnings, in bytes. The watch cache of each broker holds it, and
// the note of an Event, which has a further sentence, has at most 1,024 bytes.
const maxKept = 700

// kept returns the value of the annotation: one line for each warning that fits, and the number of others.
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
