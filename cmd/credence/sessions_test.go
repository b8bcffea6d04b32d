package main

import (
	"context"
	"errors"
	"io"
	"os"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

func TestConfirmed(t *testing.T) {
	var asked strings.Builder
	confirmed(t.Context(), strings.NewReader(""), &asked, "context \"prod\x1b[2J\"")
	if want := "\nContinue in context \"prod?[2J\"? [y/N] "; asked.String() != want {
		t.Errorf("the question is %q, want %q", asked.String(), want)
	}
	for text, want := range map[string]bool{"y\n": true, " YES \n": true, "yes": true, "\n": false, "": false, "n\n": false, "yesterday\n": false} {
		if got := confirmed(t.Context(), strings.NewReader(text), io.Discard, ""); got != want {
			t.Errorf("%q: %t", text, got)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	in, _ := io.Pipe() // nobody writes
	if confirmed(ctx, in, io.Discard, "") {
		t.Error("an interrupted command is confirmed")
	}
}

// TestWatch shows again, also after errors, until the user interrupts.
func TestWatch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), 2*watchInterval+time.Second)
		defer cancel()
		command := &cobra.Command{}
		command.SetContext(ctx)
		var errs strings.Builder
		command.SetErr(&errs)
		results, shown := []error{nil, errFound, errors.New("no broker runs")}, 0
		if err := repeat(command, func() error { shown++; return results[shown-1] }); err != nil || shown != 3 || errs.String() != "no broker runs\n" {
			t.Errorf("error %v, shown %d times, messages %q", err, shown, errs.String())
		}
	})
}

// docs/sessions.md names every flag of the commands.
func TestSessionsAreDocumented(t *testing.T) {
	page, err := os.ReadFile("../../docs/sessions.md")
	if err != nil {
		t.Fatal(err)
	}
	root := newRoot("credence")
	command, _, err := root.Find([]string{"sessions"})
	if err != nil {
		t.Fatal(err)
	}
	seen := 0
	for _, c := range append(command.Commands(), command) {
		c.LocalNonPersistentFlags().VisitAll(func(f *pflag.Flag) {
			seen++
			if !strings.Contains(string(page), "`--"+f.Name) && !strings.Contains(string(page), "`-"+f.Shorthand+" ") {
				t.Errorf("docs/sessions.md does not have --%s of %s", f.Name, c.CommandPath())
			}
		})
	}
	if seen < 10 {
		t.Errorf("found %d flags", seen)
	}
}
