package credential

import (
	"crypto/subtle"
	"fmt"
	"io"
	"log/slog"
)

// redacted replaces a secret in all output.
const redacted = "[redacted]"

// Secret is a string that no formatter, logger or encoder prints. Only [Secret.Reveal] returns its text, so a search for
// that name finds all code that handles the text. The zero Secret is empty.
//
// fmt does not call methods of values in unexported fields. It prints a pointer there as an address. Other printers,
// such as those that show differences in tests, follow pointers, but stop at a function. So the text is in a function
// behind a pointer. The pointer also keeps a Secret comparable with its zero value.
type Secret struct {
	text *func() string
}

// NewSecret wraps text.
func NewSecret(text string) Secret {
	reveal := func() string { return text }
	return Secret{text: &reveal}
}

// Reveal returns the text. Call it only where the text leaves the process on purpose.
func (s Secret) Reveal() string {
	if s.text == nil {
		return ""
	}
	return (*s.text)()
}

// Empty reports whether the text is empty.
func (s Secret) Empty() bool {
	return s.Reveal() == ""
}

// Equal reports whether the texts are equal, in constant time if their lengths are equal.
func (s Secret) Equal(other Secret) bool {
	return subtle.ConstantTimeCompare([]byte(s.Reveal()), []byte(other.Reveal())) == 1
}

// Format implements [fmt.Formatter] for all verbs.
func (s Secret) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, redacted) }

// String implements [fmt.Stringer].
func (s Secret) String() string { return redacted }

// GoString implements [fmt.GoStringer].
func (s Secret) GoString() string { return redacted }

// LogValue implements [slog.LogValuer].
func (s Secret) LogValue() slog.Value { return slog.StringValue(redacted) }

// MarshalText implements [encoding.TextMarshaler], which encoding/json and others use.
func (s Secret) MarshalText() ([]byte, error) { return []byte(redacted), nil }
