//go:build unix

package process

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
)

// Command describes a program to run.
type Command struct {
	// Name is the name of the log. Required. It can be used again after the program has exited; the log
	// is then continued.
	Name string
	// Path is the program's file. Required.
	Path string
	// Args are the arguments. Default: none.
	Args []string
	// Env is added to PATH and to HOME, which is the run's folder. The program inherits nothing else: the user's
	// variables must not change a test.
	Env []string
	// Launch starts the prepared command. Default: [Launch]. It can start the command in other namespaces.
	Launch func(*exec.Cmd) error
}

// Process is a started program.
type Process struct {
	name    string
	command Command
	pid     int
	log     string
	from    int64 // size of the log at the start
	code    int   // the exit code, set before done is closed

	done     chan struct{} // closed when the program has exited
	mu       sync.Mutex
	exited   bool // the number must not be used any more
	stopping bool
	err      error
}

// Start starts a program. Its working folder is the run's, and its log has standard output and error. It leads a process
// group of its own, so Ctrl-C reaches only the owner, which then decides.
func (r *Run) Start(c Command) (*Process, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.lock == nil {
		return nil, fmt.Errorf("starting %s: the run is closed", c.Name)
	}
	if c.Name == "" || c.Name != filepath.Base(c.Name) {
		return nil, fmt.Errorf("starting %s: %q is no name of a log", c.Path, c.Name)
	}
	r.processes = slices.DeleteFunc(r.processes, (*Process).Ended)
	if slices.ContainsFunc(r.processes, func(p *Process) bool { return p.name == c.Name }) {
		return nil, fmt.Errorf("starting %s: a program with this name runs", c.Name)
	}
	p := &Process{name: c.Name, command: c, log: filepath.Join(r.Logs(), c.Name+".log"), done: make(chan struct{})}
	log, err := os.OpenFile(p.log, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return nil, fmt.Errorf("opening the log of %s: %w", c.Name, err)
	}
	defer func() { _ = log.Close() }() // the program has a copy
	if p.from, err = log.Seek(0, io.SeekEnd); err != nil {
		return nil, fmt.Errorf("opening the log of %s: %w", c.Name, err)
	}
	cmd := exec.Command(c.Path, c.Args...) //nolint:gosec,noctx // the caller's program, until Stop
	cmd.Dir = r.dir
	cmd.Env = append([]string{"PATH=" + os.Getenv("PATH"), "HOME=" + r.dir}, c.Env...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	launch := c.Launch
	if launch == nil {
		launch = Launch
	}
	if err := launch(cmd); err != nil {
		return nil, fmt.Errorf("starting %s: %w", c.Name, err)
	}
	p.pid = cmd.Process.Pid
	r.processes = append(r.processes, p)
	go p.wait(cmd, r.report)
	return p, nil
}

// Kill kills the running program of that name with SIGKILL, as the kernel does when memory is short. It returns the command
// with which Start starts the program again, on the same machine.
func (r *Run) Kill(name string) (Command, error) {
	r.mu.Lock()
	i := slices.IndexFunc(r.processes, func(p *Process) bool { return p.name == name && !p.Ended() })
	if i < 0 {
		r.mu.Unlock()
		return Command{}, fmt.Errorf("killing %s: no program of this name runs", name)
	}
	p := r.processes[i]
	r.mu.Unlock()
	p.Stop(0)
	return p.command, nil
}

// Launch starts cmd, whose SysProcAttr must be set. On Linux the kernel kills the program when this process dies.
func Launch(cmd *exec.Cmd) error { return start(cmd) }

// signalGroup sends a signal to a group whose leader is not reaped, so that the number is still its own.
func signalGroup(leader int, sig syscall.Signal) error {
	if err := syscall.Kill(-leader, sig); err != nil && !errors.Is(err, syscall.ESRCH) {
		return fmt.Errorf("sending %v to process group %d: %w", sig, leader, err)
	}
	return nil
}

// wait waits until the program exits, and kills the rest of its group.
func (p *Process) wait(cmd *exec.Cmd, report func(error)) {
	var err error
	if waitExited(p.pid) {
		// Until cmd.Wait reaps it, the program is a zombie, and no other group can have its number.
		p.mu.Lock()
		p.exited = true
		err = signalGroup(p.pid, syscall.SIGKILL)
		p.mu.Unlock()
	}
	exit := cmd.Wait()
	p.code = cmd.ProcessState.ExitCode()
	p.mu.Lock()
	p.exited = true
	if !p.stopping {
		cause := "exit status 0"
		if exit != nil {
			cause = exit.Error()
		}
		err = errors.Join(fmt.Errorf("%s exited unexpectedly (%s), %s", p.name, cause, p.tail()), err)
	}
	p.err = err
	p.mu.Unlock()
	close(p.done)
	if err != nil && report != nil {
		report(err)
	}
}

// signal signals the process group and reports whether it did. It does nothing after the program has exited.
func (p *Process) signal(sig syscall.Signal) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.exited {
		return false
	}
	p.stopping = true
	return signalGroup(p.pid, sig) == nil
}

// PID returns the process number.
func (p *Process) PID() int { return p.pid }

// Log returns the path of the log.
func (p *Process) Log() string { return p.log }

// Done returns a channel that is closed when the program has exited.
func (p *Process) Done() <-chan struct{} { return p.done }

// Ended reports whether the program has exited.
func (p *Process) Ended() bool {
	select {
	case <-p.done:
		return true
	default:
		return false
	}
}

// Err returns why the program exited, with the end of its log; nil while it runs, and after Stop.
func (p *Process) Err() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.err
}

// ExitCode waits until the program has exited and returns its exit code, also after Stop; -1 if a signal ended it.
func (p *Process) ExitCode() int {
	<-p.done
	return p.code
}

// Stop sends SIGTERM to the program and its process group, and SIGKILL if it has not exited after grace; with a grace of
// 0, SIGKILL at once. It returns when the program has exited, and can be called again.
func (p *Process) Stop(grace time.Duration) {
	if grace > 0 && p.signal(syscall.SIGTERM) {
		timer := time.NewTimer(grace)
		defer timer.Stop()
		select {
		case <-p.done:
			return
		case <-timer.C:
		}
	}
	p.signal(syscall.SIGKILL)
	<-p.done
}

// readyInterval is the time between probes of WaitReady: short beside the seconds that programs need to start.
const readyInterval = 50 * time.Millisecond

// WaitReady calls probe until it succeeds, the program exits, or ctx ends. A call gets at most a second: a server that
// starts can leave a request without a response. The error has the end of the log, and wraps [syscall.EADDRINUSE] if
// the program exited because its port was taken.
func (p *Process) WaitReady(ctx context.Context, probe func(context.Context) error) error {
	ticker := time.NewTicker(readyInterval)
	defer ticker.Stop()
	for {
		attempt, cancel := context.WithTimeout(ctx, time.Second)
		err := probe(attempt)
		cancel()
		// If the program failed to get its port, another server may have responded to the probe.
		if p.Ended() {
			return p.startError()
		}
		if err == nil {
			return nil
		}
		select {
		case <-p.done:
			return p.startError()
		case <-ctx.Done():
			return fmt.Errorf("waiting for %s to be ready: %w (last: %w), %s", p.name, context.Cause(ctx), err, p.tail())
		case <-ticker.C:
		}
	}
}

// startError returns why a program exited before it was ready.
func (p *Process) startError() error {
	err := p.Err()
	if err == nil {
		return fmt.Errorf("waiting for %s to be ready: it was stopped", p.name)
	}
	// The log has the text of the system, "address already in use".
	if strings.Contains(err.Error(), "already in use") {
		return fmt.Errorf("%w: %w", syscall.EADDRINUSE, err)
	}
	return err
}

// Limits of the part of a log in an error, from its end. A line of a Kubernetes component has some 200 bytes.
const (
	tailLines = 20
	tailBytes = 16 << 10
)

// tail describes the end of this program's part of the log.
func (p *Process) tail() string {
	content, err := os.ReadFile(p.log)
	if err == nil && int64(len(content)) > p.from {
		content = content[p.from:]
		content = bytes.TrimSpace(content[max(0, len(content)-tailBytes):])
		if lines := strings.Split(string(content), "\n"); len(content) > 0 {
			return "its log " + p.log + " ends with:\n" + strings.Join(lines[max(0, len(lines)-tailLines):], "\n")
		}
	}
	return "nothing in its log " + p.log
}
