//go:build linux

package machine_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/credence-iam/credence/integration/cluster/machine"
	"github.com/credence-iam/credence/integration/process"
)

// run opens a run, and builds the program init.
func run(t *testing.T) (r *process.Run, init string) {
	t.Helper()
	if err := machine.Possible(); err != nil {
		t.Skip(err)
	}
	r, err := process.Open(t.Context(), process.Config{Parent: t.TempDir(), Name: "machines"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	})
	init = filepath.Join(t.TempDir(), "init")
	build := exec.CommandContext(t.Context(), "go", "build", "-trimpath", "-o", init, "./init")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("building init: %v\n%s", err, out)
	}
	return r, init
}

func start(t *testing.T, r *process.Run, init, name string) *machine.Machine {
	t.Helper()
	m, err := machine.Start(t.Context(), machine.Config{Run: r, Name: name, Init: init})
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func output(t *testing.T, m *machine.Machine, path string, args ...string) string {
	t.Helper()
	out, err := m.Output(t.Context(), nil, path, args...)
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(out))
}

// TestMachineIsIsolated guards the real machine, and other tests on it.
func TestMachineIsIsolated(t *testing.T) {
	r, init := run(t)
	m := start(t, r, init, "lonely")
	if got := output(t, m, "/bin/hostname"); got != "lonely" {
		t.Errorf("the host name is %q", got)
	}
	if got := output(t, m, "/bin/cat", "/proc/1/comm"); got != "init" {
		t.Errorf("the first process is %q", got)
	}
	// There are two lines of headings and the loopback device.
	if got := strings.Split(output(t, m, "/bin/cat", "/proc/net/dev"), "\n"); len(got) != 3 || !strings.Contains(got[2], "lo:") {
		t.Errorf("the network has %q", got)
	}
	// Changes to /run and /var stay inside, and are visible to all programs there.
	for _, name := range []string{"/run/machine-test", "/var/lib/machine-test"} {
		output(t, m, "/bin/sh", "-c", "echo hello > "+name)
		if got := output(t, m, "/bin/cat", name); got != "hello" {
			t.Errorf("%s has %q", name, got)
		}
		if _, err := os.Stat(name); !os.IsNotExist(err) {
			t.Errorf("%s is visible outside: %v", name, err)
		}
	}
	// A kubelet's kernel settings are not those of the real machine.
	const setting = "/proc/sys/kernel/panic"
	before, err := os.ReadFile(setting)
	if err != nil {
		t.Fatal(err)
	}
	if got := output(t, m, "/bin/sh", "-c", "echo 4711 > "+setting+"; cat "+setting); got != "4711" {
		t.Errorf("%s has %q inside", setting, got)
	}
	if after, err := os.ReadFile(setting); err != nil || string(after) != string(before) {
		t.Errorf("%s has %q outside, and had %q (%v)", setting, after, before, err)
	}
	// A mount inside is invisible outside.
	dir := t.TempDir()
	output(t, m, "/bin/mount", "-t", "tmpfs", "tmpfs", dir)
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil || strings.Contains(string(mounts), dir) {
		t.Errorf("the mount is visible outside (%v)", err)
	}
	if _, err := m.Output(t.Context(), nil, "/bin/sh", "-c", "echo why >&2; exit 3"); err == nil || !strings.Contains(err.Error(), "why") {
		t.Errorf("a failed program: %v", err)
	}
}

// TestStopKillsEverything guards against nodes that survive a test.
func TestStopKillsEverything(t *testing.T) {
	r, init := run(t)
	m := start(t, r, init, "mortal")
	p, err := m.Start(process.Command{Name: "sleep", Path: "/bin/sh", Args: []string{"-c", "sleep 3600 & sleep 3600"}})
	if err != nil {
		t.Fatal(err)
	}
	// A single program can be stopped.
	other, err := m.Start(process.Command{Name: "other", Path: "/bin/sleep", Args: []string{"3600"}})
	if err != nil {
		t.Fatal(err)
	}
	other.Stop(0)
	if p.Ended() {
		t.Fatal("the wrong program was stopped")
	}
	// The shell needs a moment for its children.
	for deadline := time.Now().Add(time.Minute); len(strings.Fields(output(t, m, "/bin/sh", "-c", "ls -d /proc/[0-9]*"))) < 5; {
		if time.Now().After(deadline) {
			t.Fatal("the program's children do not run")
		}
		time.Sleep(10 * time.Millisecond)
	}
	m.Stop()
	<-p.Done()
	left, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	if i := slices.IndexFunc(left, func(path string) bool {
		line, _ := os.ReadFile(path)
		return string(line) == "sleep\x003600\x00"
	}); i >= 0 {
		t.Errorf("%s is alive", left[i])
	}
	if _, err := m.Output(t.Context(), nil, "/bin/true"); err == nil {
		t.Error("a stopped machine ran a program")
	}
}
