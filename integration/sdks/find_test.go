//go:build unix

package main

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestVersions(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]version{"1.34.41": {1, 34, 41}, "1.29.27.post1": {1, 29, 27}, "0.0.0": {}} {
		if v, ok := parseVersion(text); !ok || v != want {
			t.Errorf("%q is read as %v, %v", text, v, ok)
		}
	}
	for _, text := range []string{"", "1.2", "1.x.3", "ModuleNotFoundError"} {
		if v, ok := parseVersion(text); ok {
			t.Errorf("%q is read as %v", text, v)
		}
	}
	if v := (version{1, 9, 50}); !v.less(oldBotocore) || oldBotocore.less(v) || v.less(v) {
		t.Error("versions are compared as texts")
	}
}

func TestInstalledProgramsAreFoundOnce(t *testing.T) {
	a, b := t.TempDir(), t.TempDir()
	for path, mode := range map[string]os.FileMode{
		filepath.Join(a, "credence-no-such"): 0o755, filepath.Join(b, "credence-no-such"): 0o755, filepath.Join(b, "credence-no-exec"): 0o644,
	} {
		if err := os.WriteFile(path, nil, mode); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("PATH", a+":"+b+":"+a)
	if diff := cmp.Diff([]string{filepath.Join(a, "credence-no-such"), filepath.Join(b, "credence-no-such")}, installed("credence-no-such")); diff != "" {
		t.Errorf("installed (-want +got):\n%s", diff)
	}
	if found := installed("credence-no-exec"); found != nil {
		t.Errorf("a file that is no program is found: %q", found)
	}
}

// programs makes a folder of shell scripts the whole PATH, but for the system's own.
func programs(t *testing.T, scripts map[string]string) {
	t.Helper()
	dir := t.TempDir()
	for name, script := range scripts {
		if err := os.WriteFile(filepath.Join(dir, name), []byte("#!/bin/sh\n"+script+"\n"), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("PATH", dir+":/usr/bin:/bin")
}

// What the user has set must not be found, since drivers do not get it.
func TestClientsAreFoundWithoutTheUsersEnvironment(t *testing.T) {
	programs(t, map[string]string{"curl": `[ "$(pwd -P)" = "$(cd "$HOME" && pwd -P)" ] && echo "curl 8.1.${CURL_MINOR:-2} ($HOME)"`})
	t.Setenv("CURL_MINOR", "3")
	t.Setenv("HOME", t.TempDir())
	f := finder{home: t.TempDir()}
	found, err := f.curl(t.Context())
	if err != nil || found.version != "8.1.2" {
		t.Errorf("found is %+v, %v", found, err)
	}
	if out, err := f.output(t.Context(), "curl"); err != nil || !strings.Contains(out, "("+f.home+")") {
		t.Errorf("its home is not %s: %q, %v", f.home, out, err)
	}
}

func TestWhatNpmFailsWith(t *testing.T) {
	root := t.TempDir()
	t.Setenv("XDG_CACHE_HOME", t.TempDir())
	t.Setenv("HOME", t.TempDir())
	dir := filepath.Join(root, "integration", "sdks", "clients", "js")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "package.json"), []byte(`{"dependencies": {"aws-sdk": "2.1.0"}}`), 0o600); err != nil {
		t.Fatal(err)
	}
	for script, want := range map[string]struct {
		missing bool
		text    string
	}{
		"echo 'npm ERR! code EUSAGE' >&2; exit 1":           {false, "EUSAGE"},
		"echo 'npm error code ECONNREFUSED' >&2; exit 1":    {true, "ECONNREFUSED"},
		"echo 'npm error code EINTEGRITY' >&2; exit 1":      {false, "EINTEGRITY"},
		"echo 'no such option as code ENOTFOUND'; exit 127": {false, "no such option"},
	} {
		programs(t, map[string]string{"npm": script, "node": ""})
		f := finder{root: root, progress: io.Discard}
		_, err := f.jsV2(t.Context())
		_, missing := errors.AsType[notRun](err)
		if err == nil || missing != want.missing || !strings.Contains(err.Error(), want.text) {
			t.Errorf("npm that does %q is taken as %v, not run: %t", script, err, missing)
		}
		if _, again := f.jsV2(t.Context()); again == nil || again.Error() != err.Error() {
			t.Errorf("the second client that needs it gets %v", again)
		}
	}
	programs(t, map[string]string{"npm": "", "node": ""})
	f := finder{root: root, progress: io.Discard}
	if found, err := f.jsV2(t.Context()); err != nil || found.version != "2.1.0" || filepath.Base(found.command[1]) != "v2.mjs" {
		t.Errorf("found is %+v, %v", found, err)
	}
	if _, err := f.jsV3(t.Context()); err == nil || !strings.Contains(err.Error(), "names no version of @aws-sdk/client-sts") {
		t.Errorf("a package that is not wanted is found: %v", err)
	}
}

func TestDriversThatDoNotBuild(t *testing.T) {
	t.Parallel()
	f := finder{root: t.TempDir(), bin: t.TempDir(), progress: io.Discard}
	_, err := golang("go-v2", "github.com/aws/aws-sdk-go-v2")(&f, t.Context())
	if _, missing := errors.AsType[notRun](err); err == nil || missing {
		t.Errorf("without sources: %v, not run: %t", err, missing)
	}
}

// One client that is not installed, or fails, is no reason to end the run.
func TestClientsAreAdded(t *testing.T) {
	t.Parallel()
	var progress strings.Builder
	m := matrix{progress: &progress}
	for name, err := range map[string]error{"absent": notRun("no such thing"), "failed": errors.New("it does not build\nin line 3"), "there": nil} {
		c := client{name: name, paths: []Path{Container, MetadataV2}, find: func(*finder, context.Context) (installation, error) {
			return installation{version: "1.2.3"}, err
		}}
		if err := m.add(t.Context(), c, nil); err != nil {
			t.Fatal(err)
		}
	}
	reports := make(map[string]Row)
	for _, r := range m.rows {
		reports[r.name()] = r.report
		if r.out() != (r.client.name != "there") {
			t.Errorf("%s is out: %t", r.name(), r.out())
		}
	}
	want := make(map[string]Row)
	for _, path := range []Path{Container, MetadataV2} {
		want["absent-"+string(path)] = Row{Client: "absent", Path: path, NotRun: "no such thing"}
		want["failed-"+string(path)] = Row{Client: "failed", Path: path, Failed: "it does not build"}
		want["there-"+string(path)] = Row{Client: "there", Path: path}
	}
	if diff := cmp.Diff(want, reports); diff != "" {
		t.Errorf("rows (-want +got):\n%s", diff)
	}
	if !strings.Contains(progress.String(), "in line 3") {
		t.Errorf("the user is not told all of the error:\n%s", &progress)
	}
}
