//go:build unix

package main

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/credence-iam/credence/integration/stack"
	"github.com/credence-iam/credence/integration/tools"
)

// TestDemo runs the demo without nodes, with the role that is not the default.
func TestDemo(t *testing.T) {
	if testing.Short() {
		t.Skip("-short, and the demo takes as long as a user would watch it")
	}
	testDemo(t, onControlPlane, t.TempDir(), "$ awsclient ls reports\n")
}

// TestDemoOnNodes runs the demo with nodes. Their folder is the default one, where a later run finds what a killed test
// leaves.
func TestDemoOnNodes(t *testing.T) {
	if os.Getenv("CREDENCE_E2E") == "" {
		t.Skip("only make e2e runs it, which sets CREDENCE_E2E")
	}
	testDemo(t, func(d *demo) play { return onNodes(d, nil) }, "", "$ kubectl exec -n shop deploy/app -c app -- /awsclient ls reports\n", "Error creating: admission")
}

// TestDemoInTwoParts runs the demo of a machine where nothing is built. Here the builds have nothing to do.
func TestDemoInTwoParts(t *testing.T) {
	if os.Getenv("CREDENCE_E2E") == "" {
		t.Skip("only make e2e runs it, which sets CREDENCE_E2E")
	}
	testDemo(t, func(d *demo) play { return inTwoParts(d, tools.Deployment()) }, "",
		"; meanwhile built kube-scheduler, ", "$ kubectl apply -n shop -f - <<'END'\n   apiVersion: v1\n   kind: Pod\n",
		"$ kubectl exec -n shop deploy/app -c app -- /awsclient ls reports\n", "Error creating: admission")
}

// testDemo runs a demo, which must show these texts and those that every demo shows.
func testDemo(t *testing.T, kind func(*demo) play, runs string, texts ...string) {
	t.Helper()
	if _, err := stack.ReadSources(t.Context()); err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	d := &demo{printer: &printer{out: &out}, role: "other", runs: runs}
	err := d.run(t.Context(), kind(d))
	shown := out.String()
	for name, unwanted := range map[string]string{
		"a JSON Web Token":    `eyJ[\w-]{10,}`,
		"a secret access key": `(?i)secret_?access_?key`,
		"a private key":       `PRIVATE KEY`,
		"an escape sequence":  `\x1b`,
		"a trailing space":    `(?m) $`,
	} {
		if regexp.MustCompile(unwanted).MatchString(shown) {
			t.Fatalf("the demo showed %s; its output is not repeated here", name)
		}
	}
	if err != nil {
		t.Errorf("the demo failed: %v", err)
	}
	for _, want := range append(texts,
		"iam.amazonaws.com/role: other\n",
		"arn:aws:sts::"+stack.Account+":assumed-role/other/",
		"AccessDenied",
		"does not permit role",
		`"decision":"allow"`,
	) {
		if !strings.Contains(shown, want) {
			t.Errorf("the demo did not show %q", want)
		}
	}
	for _, once := range []string{"ConfigMap credence-trust.", "--annotations=iam.amazonaws.com/roel", "CREDENCE_BROKER\n", "runs each command as shown"} {
		if n := strings.Count(shown, once); n != 1 {
			t.Errorf("the demo showed %q %d times, want once", once, n)
		}
	}
	if d.cluster != nil {
		if _, err := os.Stat(d.cluster.Run().Dir()); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("the demo left its folder: %v", err)
		}
	}
	if t.Failed() {
		t.Logf("the demo showed:\n%s", shown)
	}
}

// TestInterruptedDemo cancels the demo while one of its commands runs, as Ctrl-C does.
func TestInterruptedDemo(t *testing.T) {
	if testing.Short() {
		t.Skip("-short, and the demo takes as long as a user would watch it")
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	out := &watcher{text: "kubectl apply", seen: cancel}
	d := &demo{printer: &printer{out: out}, role: "other", runs: t.TempDir()}
	err := d.run(ctx, onControlPlane(d))
	if err == nil || !strings.Contains(err.Error(), "interrupted") {
		t.Errorf("the demo ended with %v, want an error that says that it was interrupted", err)
	}
	if strings.Contains(out.shown.String(), "pod/app created") {
		t.Error("the demo continued")
	}
	if left, err := filepath.Glob(filepath.Join(d.runs, "*", "*")); err != nil || len(left) > 0 { // in folders; a lock file stays
		t.Errorf("the demo left %q (%v)", left, err)
	}
}

// watcher calls seen when a text is written to it.
type watcher struct {
	text  string
	seen  func()
	shown bytes.Buffer
}

func (w *watcher) Write(b []byte) (int, error) {
	if w.text != "" && strings.Contains(string(b), w.text) {
		w.seen()
	}
	return w.shown.Write(b)
}
