//go:build unix

package main

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/credence-iam/credence/integration/stack"
)

// TestDemo runs the whole demonstration without nodes, with the role that is not the default.
func TestDemo(t *testing.T) {
	if testing.Short() {
		t.Skip("-short, and the demonstration takes as long as a person would watch it")
	}
	testDemo(t, onControlPlane, t.TempDir(), "$ awsclient ls reports\n")
}

// TestDemoOnNodes runs the whole demonstration with nodes.
func TestDemoOnNodes(t *testing.T) {
	if os.Getenv("CREDENCE_E2E") == "" {
		t.Skip("it runs by make e2e, which sets CREDENCE_E2E")
	}
	testDemo(t, onNodes, "", "$ kubectl exec -n shop deploy/app -c app -- /awsclient ls reports\n", "Error creating: admission")
}

// testDemo runs a demonstration, which is to show these texts beside those that all show. Its cluster's folder is
// made in runs: for one with nodes the default, where what a killed test leaves is found.
func testDemo(t *testing.T, kind func(*demo) play, runs string, texts ...string) {
	t.Helper()
	if _, err := stack.ReadSources(t.Context()); err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	d := &demo{printer: newPrinter(&out, false), role: "other", runs: runs}
	err := d.run(t.Context(), kind(d))
	shown := out.String()
	for name, unwanted := range map[string]*regexp.Regexp{
		"a JSON Web Token":     regexp.MustCompile(`eyJ[\w-]{10,}`),
		"a secret access key":  regexp.MustCompile(`(?i)secret_?access_?key`),
		"a private key":        regexp.MustCompile(`PRIVATE KEY`),
		"an escape sequence":   regexp.MustCompile(`\x1b`),
		"a space after a line": regexp.MustCompile(`(?m) $`),
	} {
		if unwanted.MatchString(shown) {
			t.Fatalf("it has shown %s; its output is not repeated here", name)
		}
	}
	for line := range strings.Lines(shown) {
		// One word can't be folded, such as a path that somebody is to copy.
		if words := strings.Fields(strings.TrimSuffix(line, "\\\n")); len(line) > width+1 && len(words) > 1 {
			t.Errorf("it has shown a long line: %s", line)
		}
	}
	if err != nil {
		t.Errorf("it has failed: %v", err)
	}
	for _, want := range append(texts,
		"iam.amazonaws.com/role: other\n",
		"arn:aws:sts::"+stack.Account+":assumed-role/other/",
		"AccessDenied",
		"does not permit role",
		`"decision":"allow"`,
	) {
		if !strings.Contains(shown, want) {
			t.Errorf("it has not shown %q", want)
		}
	}
	if d.cluster != nil {
		if _, err := os.Stat(d.cluster.Run().Dir()); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("it has left its folder: %v", err)
		}
	}
	if t.Failed() {
		t.Logf("It has shown:\n%s", shown)
	}
}

// TestInterruptedDemo cancels the demonstration while a command of it runs, as Ctrl-C does.
func TestInterruptedDemo(t *testing.T) {
	if testing.Short() {
		t.Skip("-short, and the demonstration takes as long as a person would watch it")
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	out := &watcher{text: "kubectl apply", seen: cancel}
	d := &demo{printer: newPrinter(out, false), role: "other", runs: t.TempDir()}
	err := d.run(ctx, onControlPlane(d))
	if err == nil || !strings.Contains(err.Error(), "interrupted") {
		t.Errorf("it ended with %v, want an error that says that it was interrupted", err)
	}
	if strings.Contains(out.shown.String(), "pod/app created") {
		t.Error("it went on")
	}
	if left := folders(t, d.runs); len(left) > 0 {
		t.Errorf("it has left %q", left)
	}
}

// TestFold checks that folding loses nothing but spaces at the folds, and keeps to the width.
func TestFold(t *testing.T) {
	for line, want := range map[string][]string{
		"":               nil,
		"0123456789":     {"0123456789"},
		"012345678 9ab":  {"012345678", "9ab"},
		`{"a":1,"b":23}`: {`{"a":1,`, `"b":23}`},
		"0123456789abc":  {"0123456789", "abc"},
		"012345678é":     {"012345678", "é"},
	} {
		if got := fold(line, 10); !slices.Equal(got, want) {
			t.Errorf("fold(%q) = %q, want %q", line, got, want)
		}
	}
}

// watcher calls seen when a text has been written to it.
type watcher struct {
	text  string
	seen  func()
	shown bytes.Buffer
}

func (w *watcher) Write(b []byte) (int, error) {
	if strings.Contains(string(b), w.text) {
		w.seen()
	}
	return w.shown.Write(b)
}

// folders are the runs in a folder, which has a lock of its own beside them.
func folders(t *testing.T, dir string) (names []string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if e.IsDir() {
			names = append(names, e.Name())
		}
	}
	return names
}
