//go:build unix

package main

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// shellDriver starts a driver that is a shell script.
func shellDriver(t *testing.T, script string) (*driver, string, error) {
	t.Helper()
	dir := t.TempDir()
	log := filepath.Join(dir, "log")
	d, err := startDriver(t.Context(), []string{"/bin/sh", "-c", script}, []string{"PATH=" + os.Getenv("PATH"), "WORD=x"}, dir, log)
	if err == nil {
		t.Cleanup(d.stop)
	}
	return d, log, err
}

const greeting = `echo '{"client":"double","version":"1.2"}'; `

func TestDriverAnswersEachCommandWithALine(t *testing.T) {
	t.Parallel()
	d, log, err := shellDriver(t, greeting+`echo noise >&2
while read -r command; do
	case $command in
	call) echo '{"arn":"arn:x","access_key_id":"ASIAX","error":""}' ;;
	*) echo "{\"error\":\"$command, $WORD\",\"code\":\"C\"}" ;;
	esac
done`)
	if err != nil {
		t.Fatal(err)
	}
	if d.hello != (hello{"double", "1.2"}) {
		t.Errorf("it is taken for %+v", d.hello)
	}
	a, err := d.ask(t.Context(), "call")
	if err != nil || a.ARN != "arn:x" || a.Key != "ASIAX" || a.Error != "" {
		t.Errorf("call was answered %+v, %v", a, err)
	}
	a, err = d.ask(t.Context(), "other")
	if err != nil || a.Error != "other, x" || a.Code != "C" {
		t.Errorf("other was answered %+v, %v", a, err)
	}
	if text, _ := os.ReadFile(log); string(text) != "noise\n" {
		t.Errorf("the log has %q", text)
	}
}

func TestDriverThatIsNone(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct{ script, want string }{
		"ends":                  {"exit 3", "ended"},
		"writes something else": {"echo hello; cat", "line of JSON"},
		"has no name":           {`echo '{"version":"1"}'; cat`, "neither name nor version"},
		"writes without end":    {`yes | tr -d '\n'`, "ended"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			if _, _, err := shellDriver(t, test.script); err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("starting it: %v, want %q", err, test.want)
			}
		})
	}
}

func TestDriverThatStops(t *testing.T) {
	t.Parallel()
	d, _, err := shellDriver(t, greeting+"sleep 1000")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := d.ask(ctx, "call"); !errors.Is(err, context.Canceled) {
		t.Errorf("without an answer, and ctx at its end: %v", err)
	}
	if d, _, err = shellDriver(t, greeting+"read -r command; echo '{'; sleep 1000"); err != nil {
		t.Fatal(err)
	}
	if _, err := d.ask(t.Context(), "call"); err == nil || !strings.Contains(err.Error(), "line of JSON") {
		t.Errorf("answered with half an object: %v", err)
	}
	// That stop, which the test's end calls, ends the script and its child is seen by the test ending at all.
}
