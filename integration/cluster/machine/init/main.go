//go:build linux

// Command init is the first process of a machine of package machine. It makes the machine's own view of the
// file system, brings its loopback device up, and then reaps what is left to it until it is killed. All that
// runs in the machine ends with it: the kernel sees to that.
//
//	init HOSTNAME
//
// Its standard output gets one line when the machine is ready.
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
		return errors.New("it is the first process of no PID namespace: package machine starts it")
	}
	// Before anything is started: a child that ends meanwhile is noticed.
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
		return fmt.Errorf("saying that the machine is ready: %w", err)
	}
	for range ended {
		reap()
	}
	return nil
}

// mounts gives the machine file systems of its own where its programs write outside of the folders that they
// are told: /proc shows its processes alone, /run is empty, and /var keeps changes in memory, over what the
// real one holds. Nothing of it is seen outside, and all of it goes with the machine.
func mounts() error {
	for _, m := range []struct {
		source, target, kind, data string
		flags                      uintptr
	}{
		{"none", "/", "", "", unix.MS_REC | unix.MS_PRIVATE}, // nothing gets out …
		{"none", "/", "", "", unix.MS_REC | unix.MS_SHARED},  // … and containers can be given what is mounted later
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
		if err := os.MkdirAll(dir, 0o755); err != nil { //nolint:gosec // /var gets the mode of its upper layer.
			return fmt.Errorf("making the layers of /var: %w", err)
		}
	}
	data := "lowerdir=/var,upperdir=" + upper + ",workdir=" + work
	if err := unix.Mount("var", "/var", "overlay", 0, data); err != nil {
		return fmt.Errorf("mounting an overlay at /var: %w", err)
	}
	return shield()
}

// settings of the kernel that a kubelet changes, for the whole of the real machine, unless they are as it
// wants them (KubeletConfiguration, protectKernelDefaults). The values are those.
var settings = map[string]string{
	"vm/overcommit_memory":      "1",
	"vm/panic_on_oom":           "0",
	"kernel/panic":              "10",
	"kernel/panic_on_oops":      "1",
	"kernel/keys/root_maxkeys":  "1000000",
	"kernel/keys/root_maxbytes": "25000000",
}

// shield puts files in the place of those settings, so that programs of the machine see and change these
// only.
func shield() error {
	for name, value := range settings {
		file := filepath.Join("/run/machine", filepath.Base(name))
		if err := os.WriteFile(file, []byte(value+"\n"), 0o600); err != nil {
			return fmt.Errorf("shielding the kernel's settings: %w", err)
		}
		err := unix.Mount(file, filepath.Join("/proc/sys", name), "", unix.MS_BIND, "")
		if err != nil && !errors.Is(err, unix.ENOENT) { // a kernel without that setting
			return fmt.Errorf("shielding the kernel's setting %s: %w", name, err)
		}
	}
	return nil
}

// network brings up what every host has: a loopback device, and, for pods, forwarding.
func network() error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("finding the loopback device: %w", err)
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return fmt.Errorf("bringing the loopback device up: %w", err)
	}
	if err := os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0o600); err != nil {
		return fmt.Errorf("switching on the forwarding of IPv4 packets: %w", err)
	}
	return nil
}

// reap takes note of all children that have ended: processes whose own parent ended before them.
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
