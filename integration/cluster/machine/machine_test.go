//go:build linux

package machine_test

import (
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/credence-iam/credence/integration/cluster/machine"
	"github.com/credence-iam/credence/integration/process"
)

// run makes a run, and builds the machines' first program.
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
	build := exec.CommandContext(t.Context(), "go", "build", "-o", init, "./init")
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

func TestAMachineIsOnItsOwn(t *testing.T) {
	r, init := run(t)
	m := start(t, r, init, "lonely")
	if got := output(t, m, "/bin/hostname"); got != "lonely" {
		t.Errorf("its host name is %q", got)
	}
	if got := output(t, m, "/bin/cat", "/proc/1/comm"); got != "init" {
		t.Errorf("its first process is %q", got)
	}
	// Two lines of headings, and the loopback device.
	if got := strings.Split(output(t, m, "/bin/cat", "/proc/net/dev"), "\n"); len(got) != 3 || !strings.Contains(got[2], "lo:") {
		t.Errorf("its network has %q", got)
	}
	// What it writes to /run and /var stays inside, and is the same for all its programs.
	for _, name := range []string{"/run/machine-test", "/var/lib/machine-test"} {
		output(t, m, "/bin/sh", "-c", "echo hello > "+name)
		if got := output(t, m, "/bin/cat", name); got != "hello" {
			t.Errorf("%s holds %q", name, got)
		}
		if _, err := os.Stat(name); !os.IsNotExist(err) {
			t.Errorf("%s is seen outside: %v", name, err)
		}
	}
	// A kubelet's change of the kernel's settings is not one of the real machine's.
	const setting = "/proc/sys/kernel/panic"
	before, err := os.ReadFile(setting)
	if err != nil {
		t.Fatal(err)
	}
	if got := output(t, m, "/bin/sh", "-c", "echo 4711 > "+setting+"; cat "+setting); got != "4711" {
		t.Errorf("%s holds %q inside", setting, got)
	}
	if after, err := os.ReadFile(setting); err != nil || string(after) != string(before) {
		t.Errorf("%s holds %q outside, and held %q (%v)", setting, after, before, err)
	}
	// A mount made inside is not seen outside.
	dir := t.TempDir()
	output(t, m, "/bin/mount", "-t", "tmpfs", "tmpfs", dir)
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil || strings.Contains(string(mounts), dir) {
		t.Errorf("the mount is seen outside (%v)", err)
	}
	if _, err := m.Output(t.Context(), nil, "/bin/sh", "-c", "echo why >&2; exit 3"); err == nil || !strings.Contains(err.Error(), "why") {
		t.Errorf("a program that failed: %v", err)
	}
}

func TestMachinesReachEachOther(t *testing.T) {
	r, init := run(t)
	hub, one, two := start(t, r, init, "hub"), start(t, r, init, "one"), start(t, r, init, "two")
	address := func(last byte) *net.IPNet {
		return &net.IPNet{IP: net.IPv4(10, 99, 0, last), Mask: net.CIDRMask(24, 32)}
	}
	if err := hub.Network(address(1)); err != nil {
		t.Fatal(err)
	}
	for m, last := range map[*machine.Machine]byte{one: 11, two: 12} {
		if err := m.Join(hub, address(last), net.IPv4(10, 99, 0, 1)); err != nil {
			t.Fatal(err)
		}
	}
	listener, err := one.Listen(t.Context(), "tcp", one.Address()+":80")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			_, _ = fmt.Fprint(conn, conn.RemoteAddr())
			_ = conn.Close()
		}
	}()
	for m, from := range map[*machine.Machine]string{hub: "10.99.0.1", two: "10.99.0.12"} {
		conn, err := m.Dial(t.Context(), "tcp", "10.99.0.11:80")
		if err != nil {
			t.Fatal(err)
		}
		said, err := io.ReadAll(conn)
		if err != nil || !strings.HasPrefix(string(said), from+":") {
			t.Errorf("%s is seen as %q (%v)", m.Name(), said, err)
		}
		_ = conn.Close()
	}
	links, err := net.Interfaces()
	if err != nil {
		t.Fatal(err)
	}
	for _, link := range links {
		if link.Name == "machines" || strings.HasPrefix(link.Name, "to-") {
			t.Errorf("%s is seen outside", link.Name)
		}
	}
}

func TestAllEndsWithTheMachine(t *testing.T) {
	r, init := run(t)
	m := start(t, r, init, "mortal")
	p, err := m.Start(process.Command{Name: "sleep", Path: "/bin/sh", Args: []string{"-c", "sleep 3600 & sleep 3600"}})
	if err != nil {
		t.Fatal(err)
	}
	// It can be ended alone, too.
	other, err := m.Start(process.Command{Name: "other", Path: "/bin/sleep", Args: []string{"3600"}})
	if err != nil {
		t.Fatal(err)
	}
	other.Stop(0)
	if p.Ended() {
		t.Fatal("the wrong program has ended")
	}
	inside := output(t, m, "/bin/sh", "-c", "ls -d /proc/[0-9]*")
	if n := len(strings.Fields(inside)); n < 4 {
		t.Fatalf("processes in the machine: %s", inside)
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
		t.Errorf("%s lives on", left[i])
	}
	if _, err := m.Output(t.Context(), nil, "/bin/true"); err == nil {
		t.Error("a machine that has ended ran a program")
	}
}
