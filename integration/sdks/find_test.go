//go:build unix

package main

import (
	"os"
	"path/filepath"
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
