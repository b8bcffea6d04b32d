package processtest

import (
	"flag"
	"slices"
	"testing"
)

// CheckFlags fails for each flag without a row, and for each row without a flag. define defines the flags. rows are the
// names of flags, one per row. exempt has flags without a row, with the reason why no row can show their effect.
func CheckFlags[O any](t *testing.T, define func(*flag.FlagSet) func([]string) (O, error), rows []string, exempt map[string]string) {
	t.Helper()
	f := flag.NewFlagSet("program", flag.ContinueOnError)
	define(f)
	f.VisitAll(func(f *flag.Flag) {
		switch reason, excused := exempt[f.Name]; {
		case excused && reason == "":
			t.Errorf("--%s is exempt without a reason", f.Name)
		case excused == slices.Contains(rows, f.Name):
			t.Errorf("--%s must have either a row that shows what it changes, or a reason in exempt why no row can", f.Name)
		}
	})
	for _, name := range rows {
		if f.Lookup(name) == nil {
			t.Errorf("there is a row for --%s, but no such flag", name)
		}
	}
	for name := range exempt {
		if f.Lookup(name) == nil {
			t.Errorf("--%s is exempt, but there is no such flag", name)
		}
	}
}
