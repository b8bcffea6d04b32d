//go:build linux

// Package machine makes Linux machines of namespaces, for the nodes of a cluster: each is a process tree with
// a network, mounts, process numbers and a host name of its own.
//
// A machine leaves nothing behind: its first process ends with its owner, and when that ends, in whatever
// way, the kernel kills all others, and its mounts and network devices go with the namespaces, which have no
// names that could outlive it. It needs root, and nothing installed.
//
// It is no container: the machine's file system is that of the real machine, except for /proc, /run and
// changes to /var. Programs in it can do harm to files like any program of root.
package machine

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
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

// A Machine runs. It ends with its run, or by Stop. Its methods can be called concurrently, but for those that
// change its network.
type Machine struct {
	run     *process.Run
	name    string
	init    *process.Process
	address net.IP // nil: it is on no network

	mu       sync.Mutex
	programs []*process.Process // those started in it, in this order; some may have ended
}

var _ process.Host = (*Machine)(nil)

// namespaces are those that a machine has of its own.
const namespaces = unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWNET | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC

// Possible returns nil where machines can be made, and otherwise what is in the way. It makes what a machine is
// made of, on a thread that takes all of it along.
func Possible() error {
	if os.Geteuid() != 0 {
		return errors.New("machines need root")
	}
	result := make(chan error, 1)
	onThreadOfItsOwn(func() {
		if err := unix.Unshare(unix.CLONE_FS | unix.CLONE_NEWNS | unix.CLONE_NEWNET | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC); err != nil {
			result <- fmt.Errorf("making namespaces: %w", err)
			return
		}
		result <- probeMounts()
	})
	return <-result
}

// probeMounts makes mounts like those of a machine.
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

// startTimeout bounds a start, which takes milliseconds on an idle machine.
const startTimeout = 30 * time.Second

// Start starts a machine in which nothing runs yet, and whose only network device is its loopback.
func Start(ctx context.Context, c Config) (*Machine, error) {
	if os.Geteuid() != 0 {
		return nil, fmt.Errorf("starting machine %s: it needs root", c.Name)
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
			err = errors.New("it has not said that it is ready")
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

// PID returns the number of the first process, as seen from outside. Its namespaces can be entered by it.
func (m *Machine) PID() int { return m.init.PID() }

// Stop ends everything in the machine at once.
func (m *Machine) Stop() {
	m.mu.Lock()
	programs := m.programs
	m.programs = nil
	m.mu.Unlock()
	// The first process would take all with it. These are told, so that their end is no surprise to the run.
	for _, p := range slices.Backward(programs) {
		p.Stop(0)
	}
	m.init.Stop(0)
}

// Address returns the address that the machine has in its network, and "<nil>" if it is in none.
func (m *Machine) Address() string { return m.address.String() }

// Start starts a program of the run in the machine.
func (m *Machine) Start(c process.Command) (*process.Process, error) {
	// No parent-death signal: the thread that starts it ends at once. The machine's end is its end.
	c.Launch = func(cmd *exec.Cmd) error { return m.inside(namespaces, cmd.Start) }
	p, err := m.run.Start(c)
	if err == nil {
		m.mu.Lock()
		m.programs = append(m.programs, p)
		m.mu.Unlock()
	}
	return p, err
}

// Output runs a program in the machine until it ends, and returns what it has written to its standard
// output. The error of one that failed holds what it has written to its standard error.
func (m *Machine) Output(ctx context.Context, stdin io.Reader, path string, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, path, args...) //nolint:gosec // It runs what it is told.
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

// Launch starts a command that sees the machine's network, and otherwise what the caller sees. It belongs to
// nobody's run.
func (m *Machine) Launch(cmd *exec.Cmd) error { return m.inside(unix.CLONE_NEWNET, cmd.Start) }

// Dial connects from within the machine's network. The address must be one of IP: names are not looked up
// there.
func (m *Machine) Dial(ctx context.Context, network, address string) (conn net.Conn, err error) {
	err = m.inside(unix.CLONE_NEWNET, func() error {
		conn, err = new(net.Dialer).DialContext(ctx, network, address)
		return err //nolint:wrapcheck // It names the address.
	})
	return conn, err
}

// Listen listens within the machine's network.
func (m *Machine) Listen(ctx context.Context, network, address string) (listener net.Listener, err error) {
	err = m.inside(unix.CLONE_NEWNET, func() error {
		listener, err = new(net.ListenConfig).Listen(ctx, network, address)
		return err //nolint:wrapcheck // It names the address.
	})
	return listener, err
}

// inside calls f on a thread that has entered those of the machine's namespaces.
func (m *Machine) inside(which int, f func() error) error {
	// A handle stays the same process even if the number is given to another one.
	handle, err := unix.PidfdOpen(m.PID(), 0)
	if err != nil {
		return fmt.Errorf("entering machine %s: %w", m.name, err)
	}
	defer func() { _ = unix.Close(handle) }()
	if m.init.Ended() {
		return fmt.Errorf("entering machine %s: it has ended", m.name)
	}
	result := make(chan error, 1)
	onThreadOfItsOwn(func() {
		// Threads of one process share their root and working folders, and such may not enter mounts.
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

// onThreadOfItsOwn calls f in a goroutine whose thread nobody else has used or will use.
func onThreadOfItsOwn(f func()) {
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() != unix.Getpid() {
			f() // still locked: the thread ends with the goroutine
			return
		}
		// The main thread can't end, and /proc/self is about it. It is held until another one is taken.
		taken := make(chan struct{})
		onThreadOfItsOwn(func() { close(taken); f() })
		<-taken
		runtime.UnlockOSThread()
	}()
}
