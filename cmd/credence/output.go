package main

import (
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"
)

// formatJSON is the format that all commands with -o have.
const formatJSON = "json"

// output is the flag -o of a command: the format of its output, empty for text.
type output struct {
	format  string
	allowed []string
}

// newOutput defines the flag.
func newOutput(command *cobra.Command, allowed ...string) *output {
	o := &output{allowed: allowed}
	command.Flags().VarP(o, "output", "o", "`format` of the output: "+o.formats()+"; by default text")
	_ = command.RegisterFlagCompletionFunc("output", cobra.FixedCompletions(allowed, cobra.ShellCompDirectiveNoFileComp)) // The flag exists.
	return o
}

func (o *output) formats() string { return strings.Join(o.allowed, " or ") }

// json reports whether the output is JSON.
func (o *output) json() bool { return o.format == formatJSON }

// String implements [pflag.Value].
func (o *output) String() string { return o.format }

// Type implements [pflag.Value].
func (o *output) Type() string { return "format" }

// Set implements [pflag.Value].
func (o *output) Set(format string) error {
	if !slices.Contains(append(o.allowed, ""), format) {
		return fmt.Errorf("must be %s", o.formats())
	}
	o.format = format
	return nil
}
