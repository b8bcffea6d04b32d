//go:build linux

// Package machine makes Linux machines of namespaces, for the nodes of a cluster. Each is a process tree with its own
// network, mounts, process numbers and host name.
//
// A machine leaves nothing behind. Its first process dies with its owner. Then the kernel kills all others, and removes
// mounts and network devices with the namespaces, which have no names. A machine needs root, and no installed program.
//
// It is no container: it has the file system of the real machine, except for /proc, /run and changes to /var. Its
// programs can damage files like any program of root.
package machine

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/credence-iam/credence/integration/process"
)

// Config configures a machine.
type Config struct {
	// Run owns the machine's processes. Required.
	Run *process.Run
	// Name is the host name, and the name of the first process in the run. Required.
	Name string
	// Init is the path of the program in this package's folder init. Required.
	Init string
}

// Machine is a running machine. It stops with its run, or by Stop. Its methods can be called concurrently, except those
// that change its network.
type Machine struct {
	run     *process.Run
	name    string
	init    *process.Process
	address netip.Addr // invalid: in no network

	mu       sync.Mutex
	programs []*process.Process // in order of their start; some may have exited
}

var _ process.Host = (*Machine)(nil)

// namespaces are the kinds of namespaces of a machine.
const namespaces = unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWNET | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC

// Possible returns nil if machines can be made, and otherwise the cause. It makes namespaces and mounts on a thread of
// its own, which removes them with its end.
func Possible() error {
	if os.Geteuid() != 0 {
		return errors.New("machines need root")
	}
	result := make(chan error, 1)
	onOwnThread(func() {
		if err := unix.Unshare(unix.CLONE_FS | unix.CLONE_NEWNS | unix.CLONE_NEWNET | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC); err != nil {
			result <- fmt.Errorf("making namespaces: %w", err)
			return
		}
		result <- probeMounts()
	})
	return <-result
}

// probeMounts makes the mounts of a machine.
func probeMounts() error {
	if err := unix.Mount("none", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("making mounts private: %w", err)
	}
	if err := unix.Mount("run", "/run", "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, ""); err != nil {
		return fmt.Errorf("mounting a tmpfs: %w", err)
	}
	for _, dir := range []string{"/run/upper", "/run/work"} {
		if err := os.Mkdir(dir, 0o700); err != nil {
			return fmt.Errorf("making a folder: %w", err)
		}
	}
	if err := unix.Mount("var", "/var", "overlay", 0, "lowerdir=/var,upperdir=/run/upper,workdir=/run/work"); err != nil {
		return fmt.Errorf("mounting an overlay: %w", err)
	}
	return nil
}

// startTimeout limits a start, which takes milliseconds on an idle machine.
const startTimeout = 30 * time.Second

// Start starts a machine without programs, and with a loopback device only.
func Start(ctx context.Context, c Config) (*Machine, error) {
	if os.Geteuid() != 0 {
		return nil, fmt.Errorf("starting machine %s: machines need root", c.Name)
	}
	init, err := c.Run.Start(process.Command{
		Name: c.Name, Path: c.Init, Args: []string{c.Name},
		Launch: func(cmd *exec.Cmd) error {
			cmd.SysProcAttr.Cloneflags = namespaces
			return process.Launch(cmd)
		},
	})
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	if err := init.WaitReady(ctx, func(context.Context) error {
		log, err := os.ReadFile(init.Log())
		if err == nil && !bytes.HasSuffix(log, []byte("ready\n")) {
			err = errors.New("its log does not say that it is ready")
		}
		return err
	}); err != nil {
		init.Stop(0)
		return nil, err
	}
	return &Machine{run: c.Run, name: c.Name, init: init}, nil
}

// Name returns the host name.
func (m *Machine) Name() string { return m.name }

// PID returns the number of the first process, as seen from outside, for example for nsenter.
func (m *Machine) PID() int { return m.init.PID() }

// Stop kills everything in the machine.
func (m *Machine) Stop() {
	m.mu.Lock()
	programs := m.programs
	m.programs = nil
	m.mu.Unlock()
	// The end of the first process kills all others, but the run would report them as unexpected exits.
	for _, p := range slices.Backward(programs) {
		p.Stop(0)
	}
	m.init.Stop(0)
}

// Address returns the first address in the machine's network; "invalid IP" without a network.
func (m *Machine) Address() string { return m.address.String() }

// Start starts a program of the run in the machine.
func (m *Machine) Start(c process.Command) (*process.Process, error) {
	// There is no parent-death signal: the thread that starts the program ends at once. The machine's end kills it.
	c.Launch = func(cmd *exec.Cmd) error { return m.inside(namespaces, cmd.Start) }
	p, err := m.run.Start(c)
	if err == nil {
		m.mu.Lock()
		m.programs = append(m.programs, p)
		m.mu.Unlock()
	}
	return p, err
}

// Output runs a program in the machine and returns its standard output. An error has its standard error.
func (m *Machine) Output(ctx context.Context, stdin io.Reader, path string, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, path, args...) //nolint:gosec // the caller's program
	cmd.Stdin = stdin
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := m.inside(namespaces, cmd.Start)
	if err == nil {
		err = cmd.Wait()
	}
	if err != nil {
		return nil, fmt.Errorf("running %s in machine %s: %w\n%s", path, m.name, err, bytes.TrimSpace(stderr.Bytes()))
	}
	return stdout.Bytes(), nil
}

// Launch starts a command in the machine's network. All else is the caller's, and no run owns it.
func (m *Machine) Launch(cmd *exec.Cmd) error { return m.inside(unix.CLONE_NEWNET, cmd.Start) }

// Dial connects from the machine's network. The address must be an IP address.
func (m *Machine) Dial(ctx context.Context, network, address string) (conn net.Conn, err error) {
	err = m.inside(unix.CLONE_NEWNET, func() error {
		conn, err = new(net.Dialer).DialContext(ctx, network, address)
		return err //nolint:wrapcheck // it names the address
	})
	return conn, err
}

// Listen listens in the machine's network.
func (m *Machine) Listen(ctx context.Context, network, address string) (listener net.Listener, err error) {
	err = m.inside(unix.CLONE_NEWNET, func() error {
		listener, err = new(net.ListenConfig).Listen(ctx, network, address)
		return err //nolint:wrapcheck // it names the address
	})
	return listener, err
}

// inside calls f on a thread in some of the machine's namespaces.
func (m *Machine) inside(which int, f func() error) error {
	// A pidfd names the same process even if the number is reused.
	handle, err := unix.PidfdOpen(m.PID(), 0)
	if err != nil {
		return fmt.Errorf("entering machine %s: %w", m.name, err)
	}
	defer func() { _ = unix.Close(handle) }()
	if m.init.Ended() {
		return fmt.Errorf("entering machine %s: it has exited", m.name)
	}
	result := make(chan error, 1)
	onOwnThread(func() {
		// Threads share their root and working folders, and such a thread must not enter mounts.
		err := unix.Unshare(unix.CLONE_FS)
		if err == nil {
			err = unix.Setns(handle, which)
		}
		if err != nil {
			result <- fmt.Errorf("entering machine %s: %w", m.name, err)
			return
		}
		result <- f()
	})
	return <-result
}

// onOwnThread calls f on a thread that no other goroutine uses.
func onOwnThread(f func()) {
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() != unix.Getpid() {
			f() // without an unlock, the thread ends with the goroutine
			return
		}
		// This is the main thread, which cannot end. Hold it until f has another one.
		taken := make(chan struct{})
		onOwnThread(func() { close(taken); f() })
		<-taken
		runtime.UnlockOSThread()
	}()
}
