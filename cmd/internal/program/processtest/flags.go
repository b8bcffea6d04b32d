package processtest

import (
	"flag"
	"slices"
	"testing"
)

// CheckFlags fails for each flag that define defines and that no row of a table is about, and for each row of a flag that
// there is not. A flag whose effect no row can show is in exempt, with the reason.
func CheckFlags[O any](t *testing.T, define func(*flag.FlagSet) func([]string) (O, error), rows []string, exempt map[string]string) {
	t.Helper()
	f := flag.NewFlagSet("program", flag.ContinueOnError)
	define(f)
	f.VisitAll(func(f *flag.Flag) {
		switch reason, excused := exempt[f.Name]; {
		case excused && reason == "":
			t.Errorf("--%s is exempt without a reason", f.Name)
		case excused == slices.Contains(rows, f.Name):
			t.Errorf("--%s must have a row that shows what it changes, or a reason in the list of exemptions why it can have none (and not both)", f.Name)
		}
	})
	for _, name := range rows {
		if f.Lookup(name) == nil {
			t.Errorf("there is a row for --%s, and no such flag", name)
		}
	}
	for name := range exempt {
		if f.Lookup(name) == nil {
			t.Errorf("--%s is exempt, and there is no such flag", name)
		}
	}
}
