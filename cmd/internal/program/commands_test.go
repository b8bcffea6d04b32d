package program

import (
	"context"
	"errors"
	"flag"
	"strings"
	"testing"
)

func TestCommands(t *testing.T) {
	one := Program[[]string]{
		Name:  "thing one",
		Usage: "thing one does one thing.",
		Flags: func(f *flag.FlagSet) func([]string) ([]string, error) {
			return func(args []string) ([]string, error) { return args, nil }
		},
		Run: func(_ context.Context, args []string) error { return errors.New(strings.Join(args, "+")) },
	}
	c := Commands{Name: "thing", Usage: "thing does things.", Commands: []Command{one.Command("do one")}}
	for _, tt := range []struct {
		args           []string
		code           int
		stdout, stderr string
	}{
		{nil, 2, "", "thing: a command is missing\nthing: --help lists the commands\n"},
		{[]string{"two"}, 2, "", "thing: unknown command \"two\"\nthing: --help lists the commands\n"},
		{[]string{"one", "a", "b"}, 1, "", "thing one: a+b\n"},
		{[]string{"one", "--help"}, 0, "thing one does one thing.\n\nFlags:\n", ""},
		{[]string{"one", "--x"}, 2, "", "thing one: flag provided but not defined: -x\nthing one: --help lists the flags\n"},
		{[]string{"--help"}, 0, "thing does things.\n\nCommands:\n  one        do one\n", ""},
		{[]string{"--version"}, 0, "thing ", ""},
	} {
		var stdout, stderr strings.Builder
		if code := c.main(tt.args, &stdout, &stderr); code != tt.code {
			t.Errorf("%q: exit code %d, want %d", tt.args, code, tt.code)
		}
		for stream, text := range map[string][2]string{"standard output": {stdout.String(), tt.stdout}, "standard error": {stderr.String(), tt.stderr}} {
			if !strings.HasPrefix(text[0], text[1]) || (text[1] == "") != (text[0] == "") {
				t.Errorf("%q: %s is %q, want %q", tt.args, stream, text[0], text[1])
			}
		}
	}
}
