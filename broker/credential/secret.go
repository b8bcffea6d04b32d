package credential

import (
	"crypto/subtle"
	"fmt"
	"io"
	"log/slog"
)

// redacted stands wherever a secret would have been printed.
const redacted = "[redacted]"

// Secret is a string that no formatter, logger or encoder prints. Only [Secret.Reveal] gives its
// text, so the places that handle the text can be found by searching for that name.
//
// fmt does not call the methods of values it reaches through unexported fields. There it prints a
// pointer as an address, and other printers, such as those that report differences in tests, print
// what the pointer leads to, down to a function. So the text sits in a function behind a pointer,
// which also keeps a Secret comparable with its zero value. The zero Secret is empty.
type Secret struct {
	text *func() string
}

// NewSecret wraps text.
func NewSecret(text string) Secret {
	reveal := func() string { return text }
	return Secret{text: &reveal}
}

// Reveal returns the text itself. Call it only where the text leaves the process on purpose.
func (s Secret) Reveal() string {
	if s.text == nil {
		return ""
	}
	return (*s.text)()
}

// Empty reports whether there is no text.
func (s Secret) Empty() bool {
	return s.Reveal() == ""
}

// Equal compares the texts in constant time for texts of equal length.
func (s Secret) Equal(other Secret) bool {
	return subtle.ConstantTimeCompare([]byte(s.Reveal()), []byte(other.Reveal())) == 1
}

// Format implements [fmt.Formatter] for every verb.
func (s Secret) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, redacted) }

// String implements [fmt.Stringer].
func (s Secret) String() string { return redacted }

// GoString implements [fmt.GoStringer].
func (s Secret) GoString() string { return redacted }

// LogValue implements [slog.LogValuer].
func (s Secret) LogValue() slog.Value { return slog.StringValue(redacted) }

// MarshalText implements [encoding.TextMarshaler], which encoding/json and others use.
func (s Secret) MarshalText() ([]byte, error) { return []byte(redacted), nil }
