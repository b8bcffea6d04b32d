package program

import (
	"io"
	"log/slog"
)

// NewLogger returns the logger of a server program: JSON, one line per record. A duration is a number of
// seconds, such as 1.5. A time is RFC 3339 in UTC. A zero time means none, so it is left out.
func NewLogger(w io.Writer, level slog.Leveler) *slog.Logger {
	return slog.New(slog.NewJSONHandler(w, &slog.HandlerOptions{Level: level, ReplaceAttr: readable}))
}

// readable formats values for a reader of the log. By default, slog writes a duration in nanoseconds.
func readable(_ []string, a slog.Attr) slog.Attr {
	switch a.Value.Kind() {
	case slog.KindDuration:
		a.Value = slog.Float64Value(a.Value.Duration().Seconds())
	case slog.KindTime:
		if a.Value.Time().IsZero() {
			return slog.Attr{}
		}
		a.Value = slog.TimeValue(a.Value.Time().UTC())
	default:
	}
	return a
}
