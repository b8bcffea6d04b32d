package program

import (
	"context"
	"errors"
	"flag"
	"strings"
	"testing"
)

func TestExitCodesAndMessages(t *testing.T) {
	p := Program[string]{
		Name:  "thing",
		Usage: "thing does a thing.",
		Flags: func(f *flag.FlagSet) func([]string) (string, error) {
			word := f.String("word", "", "the `word` to do")
			return func(args []string) (string, error) {
				if *word == "bad" {
					return "", errors.New("--word=bad: choose another")
				}
				return *word, NoArguments(args)
			}
		},
		Run: func(_ context.Context, word string) error {
			if word == "fail" {
				return errors.New("it failed")
			}
			return nil
		},
	}
	tests := []struct {
		args           []string
		code           int
		stdout, stderr string // prefix of the output; "": no output
	}{
		{nil, 0, "", ""},
		{[]string{"--word=fail"}, 1, "", "thing: it failed\n"},
		{[]string{"--word=bad"}, 2, "", "thing: --word=bad: choose another\nthing: --help lists the flags\n"},
		{[]string{"--wrod=x"}, 2, "", "thing: flag provided but not defined: -wrod\nthing: --help lists the flags\n"},
		{[]string{"more"}, 2, "", `thing: unexpected argument "more"; use flags only`},
		{[]string{"--help"}, 0, "thing does a thing.\n\nFlags:\n  -version\n", ""},
		{[]string{"--version"}, 0, "thing ", ""},
	}
	for _, tt := range tests {
		t.Run(strings.Join(tt.args, " "), func(t *testing.T) {
			var stdout, stderr strings.Builder
			if code := p.main(tt.args, &stdout, &stderr); code != tt.code {
				t.Errorf("exit code %d, want %d", code, tt.code)
			}
			for stream, text := range map[string][2]string{"standard output": {stdout.String(), tt.stdout}, "standard error": {stderr.String(), tt.stderr}} {
				if !strings.HasPrefix(text[0], text[1]) || (text[1] == "") != (text[0] == "") {
					t.Errorf("%s is %q, want %q", stream, text[0], text[1])
				}
			}
		})
	}
}
