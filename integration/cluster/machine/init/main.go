//go:build linux

// Command init is the first process of a machine of package machine. It mounts the machine's file systems, brings up the
// loopback device, prints a line, and reaps orphaned processes until it is killed. Then the kernel kills all processes of
// the machine.
//
//	init HOSTNAME
package main

import (
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "init:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) != 1 {
		return errors.New("usage: init HOSTNAME")
	}
	if os.Getpid() != 1 {
		return errors.New("init must be the first process of a PID namespace; package machine starts it")
	}
	// Notify comes first, so that no exit is missed.
	ended := make(chan os.Signal, 1)
	signal.Notify(ended, unix.SIGCHLD)
	if err := unix.Sethostname([]byte(args[0])); err != nil {
		return fmt.Errorf("setting the host name: %w", err)
	}
	if err := mounts(); err != nil {
		return err
	}
	if err := network(); err != nil {
		return err
	}
	if _, err := fmt.Println("ready"); err != nil {
		return fmt.Errorf("reporting that the machine is ready: %w", err)
	}
	for range ended {
		reap()
	}
	return nil
}

// mounts mounts the machine's own file systems: /proc has only its processes, /run is empty, and /var keeps changes in
// memory, over the real one. They are invisible outside, and vanish with the machine.
func mounts() error {
	for _, m := range []struct {
		source, target, kind, data string
		flags                      uintptr
	}{
		{"none", "/", "", "", unix.MS_REC | unix.MS_PRIVATE}, // no mount is seen outside …
		{"none", "/", "", "", unix.MS_REC | unix.MS_SHARED},  // … and containers see later mounts
		{"proc", "/proc", "proc", "", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC},
		{"run", "/run", "tmpfs", "mode=755", unix.MS_NOSUID | unix.MS_NODEV},
	} {
		if err := unix.Mount(m.source, m.target, m.kind, m.flags, m.data); err != nil {
			return fmt.Errorf("mounting %s at %s: %w", m.source, m.target, err)
		}
	}
	const layers = "/run/machine/var"
	upper, work := filepath.Join(layers, "upper"), filepath.Join(layers, "work")
	for _, dir := range []string{upper, work} {
		if err := os.MkdirAll(dir, 0o755); err != nil { //nolint:gosec // /var has the mode of its upper layer
			return fmt.Errorf("making the layers of /var: %w", err)
		}
	}
	data := "lowerdir=/var,upperdir=" + upper + ",workdir=" + work
	if err := unix.Mount("var", "/var", "overlay", 0, data); err != nil {
		return fmt.Errorf("mounting an overlay at /var: %w", err)
	}
	return shield()
}

// settings are the kernel settings that a kubelet would change for the real machine, with the values that it wants
// (KubeletConfiguration, protectKernelDefaults).
var settings = map[string]string{
	"vm/overcommit_memory":      "1",
	"vm/panic_on_oom":           "0",
	"kernel/panic":              "10",
	"kernel/panic_on_oops":      "1",
	"kernel/keys/root_maxkeys":  "1000000",
	"kernel/keys/root_maxbytes": "25000000",
}

// shield mounts files over those settings, so that programs of the machine read and write the files.
func shield() error {
	for name, value := range settings {
		file := filepath.Join("/run/machine", filepath.Base(name))
		if err := os.WriteFile(file, []byte(value+"\n"), 0o600); err != nil {
			return fmt.Errorf("shielding kernel settings: %w", err)
		}
		err := unix.Mount(file, filepath.Join("/proc/sys", name), "", unix.MS_BIND, "")
		if err != nil && !errors.Is(err, unix.ENOENT) { // the kernel lacks the setting
			return fmt.Errorf("shielding the kernel setting %s: %w", name, err)
		}
	}
	return nil
}

// network brings up the loopback device, and enables forwarding for pods.
func network() error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("finding the loopback device: %w", err)
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return fmt.Errorf("bringing the loopback device up: %w", err)
	}
	for _, setting := range []string{"/proc/sys/net/ipv4/ip_forward", "/proc/sys/net/ipv6/conf/all/forwarding"} {
		if _, err := os.Stat(setting); errors.Is(err, unix.ENOENT) {
			continue // the kernel lacks IPv6
		}
		if err := os.WriteFile(setting, []byte("1"), 0o600); err != nil {
			return fmt.Errorf("enabling forwarding of packets: %w", err)
		}
	}
	return nil
}

// reap reaps all exited children: orphaned processes.
func reap() {
	for {
		pid, err := unix.Wait4(-1, nil, unix.WNOHANG, nil)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if pid <= 0 {
			return
		}
	}
}
