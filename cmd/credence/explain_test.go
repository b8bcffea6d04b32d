package main

import (
	"os"
	"regexp"
	"slices"
	"testing"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// TestExplainIsDocumented: docs/explain.md has every flag of the command, and no other.
func TestExplainIsDocumented(t *testing.T) {
	page, err := os.ReadFile("../../docs/explain.md")
	if err != nil {
		t.Fatal(err)
	}
	var documented, want []string
	for _, row := range regexp.MustCompile("(?m)^\\| (?:`-[a-z]`, )?`--([a-z-]+)` \\|").FindAllSubmatch(page, -1) {
		documented = append(documented, string(row[1]))
	}
	newExplain(newCluster(&cobra.Command{})).Flags().VisitAll(func(f *pflag.Flag) { want = append(want, f.Name) })
	slices.Sort(documented)
	if !slices.Equal(documented, want) || len(want) == 0 {
		t.Errorf("documented are\n%q, there are\n%q", documented, want)
	}
}
