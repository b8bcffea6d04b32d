//go:build unix

package process

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
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
	// Name names the log and the record. Required; a name can be used again once its program has ended,
	// and the log is then continued.
	Name string
	// Path is the program's file. Required.
	Path string
	// Args are its arguments. Default: none.
	Args []string
	// Env is added to an environment of PATH, and HOME, which is the run's folder. Nothing else is
	// inherited: many programs take settings from variables, and the user's must not change a test.
	Env []string
	// Launch starts the prepared command. Default: [Launch]. Set, it can start it elsewhere than where its
	// owner is, such as in other namespaces.
	Launch func(*exec.Cmd) error
}

// A Process is a program that was started.
type Process struct {
	name string
	pid  int
	log  string
	from int64 // size of the log when it started

	done     chan struct{} // closed when it has ended
	mu       sync.Mutex
	gone     bool // it has exited: its number may not be used any more
	stopping bool
	err      error
}

// Start starts a program. Its working folder is the run's, standard output and error go to its log, and it
// leads a process group of its own, so that a Ctrl-C for the owner does not reach it before the owner had
// its say.
func (r *Run) Start(c Command) (*Process, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.lock == nil {
		return nil, fmt.Errorf("starting %s: the run is closed", c.Name)
	}
	if c.Name == "" || c.Name != filepath.Base(c.Name) {
		return nil, fmt.Errorf("starting %s: %q can't name a log", c.Path, c.Name)
	}
	r.processes = slices.DeleteFunc(r.processes, (*Process).Ended)
	if slices.ContainsFunc(r.processes, func(p *Process) bool { return p.name == c.Name }) {
		return nil, fmt.Errorf("starting %s: a program of that name runs", c.Name)
	}
	recPath := filepath.Join(r.dir, recFolder, c.Name+".json")
	p := &Process{name: c.Name, log: filepath.Join(r.Logs(), c.Name+".log"), done: make(chan struct{})}
	log, err := os.OpenFile(p.log, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return nil, fmt.Errorf("opening the log of %s: %w", c.Name, err)
	}
	defer func() { _ = log.Close() }() // the child has its own
	if p.from, err = log.Seek(0, io.SeekEnd); err != nil {
		return nil, fmt.Errorf("opening the log of %s: %w", c.Name, err)
	}
	cmd := exec.Command(c.Path, c.Args...) //nolint:gosec,noctx // runs what it is told, until it is stopped
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
	if err := writeRecord(recPath, p.pid); err != nil {
		return nil, errors.Join(fmt.Errorf("recording %s: %w", c.Name, err), signalGroup(p.pid, syscall.SIGKILL), ignoreExit(cmd.Wait()))
	}
	r.processes = append(r.processes, p)
	go p.wait(cmd, recPath, r.report)
	return p, nil
}

// Launch starts cmd, whose SysProcAttr must be set, so that it ends with this process: by a signal of the
// kernel on Linux; elsewhere the next [Open] or [Sweep] ends what lives on.
func Launch(cmd *exec.Cmd) error { return start(cmd) }

// writeRecord is not atomic: the only reader is a sweep after our death, and takes half a record for none.
func writeRecord(path string, pid int) error {
	rec, err := newRecord(pid)
	if errors.Is(err, os.ErrProcessDone) {
		return nil // wait reports its end
	}
	if err != nil {
		return err
	}
	content, err := json.Marshal(rec)
	if err != nil {
		return fmt.Errorf("encoding: %w", err)
	}
	return os.WriteFile(path, content, 0o600)
}

// ignoreExit drops the error of a program that was killed on purpose.
func ignoreExit(err error) error {
	if _, ok := errors.AsType[*exec.ExitError](err); ok {
		return nil
	}
	return err
}

// signalGroup sends a signal to a group whose leader has not been reaped, so that the number is its own.
func signalGroup(leader int, sig syscall.Signal) error {
	if err := syscall.Kill(-leader, sig); err != nil && !errors.Is(err, syscall.ESRCH) {
		return fmt.Errorf("sending %v to process group %d: %w", sig, leader, err)
	}
	return nil
}

// wait sees the program end, and ends what it left in its group.
func (p *Process) wait(cmd *exec.Cmd, recPath string, report func(error)) {
	var exit, err error
	if waitExited(p.pid) {
		// Until cmd.Wait reaps it the program is a zombie, and the number of its group can't have been given
		// to anybody else. After that nobody may use the number: see signal.
		p.mu.Lock()
		p.gone = true
		err = signalGroup(p.pid, syscall.SIGKILL)
		p.mu.Unlock()
		exit = cmd.Wait()
	} else {
		exit = cmd.Wait()
		p.mu.Lock()
		p.gone = true
		p.mu.Unlock()
	}
	if removeErr := os.Remove(recPath); !errors.Is(removeErr, fs.ErrNotExist) {
		err = errors.Join(err, removeErr)
	}

	p.mu.Lock()
	if !p.stopping {
		cause := "exit status 0"
		if exit != nil {
			cause = exit.Error()
		}
		err = errors.Join(fmt.Errorf("%s ended unexpectedly (%s), %s", p.name, cause, p.tail()), err)
	}
	p.err = err
	p.mu.Unlock()
	close(p.done)
	if err != nil && report != nil {
		report(err)
	}
}

// signal signals the process group, unless the program has ended, and says whether it did.
func (p *Process) signal(sig syscall.Signal) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.gone {
		return false
	}
	p.stopping = true
	return signalGroup(p.pid, sig) == nil
}

// PID returns the process's number.
func (p *Process) PID() int { return p.pid }

// Log returns the path of its log.
func (p *Process) Log() string { return p.log }

// Done is closed when the program has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// Ended says whether Done is closed.
func (p *Process) Ended() bool {
	select {
	case <-p.done:
		return true
	default:
		return false
	}
}

// Err returns why the program ended, with the end of its log; nil while it runs, and when it was stopped.
func (p *Process) Err() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.err
}

// Stop ends the program and its process group: SIGTERM, then SIGKILL if it has not ended after grace. With
// a grace of 0 it is killed at once. It returns when the program has ended; more calls do no harm.
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

// readyInterval is how often WaitReady probes: programs here take seconds to start, so a twentieth of a
// second is not felt.
const readyInterval = 50 * time.Millisecond

// WaitReady calls probe until it succeeds, the program ends, or ctx ends. Each call gets at most a second, since a
// server that has just begun to listen can leave a request without an answer. The error names the log and
// shows its end, and wraps [syscall.EADDRINUSE] when the program ended because its port was taken.
func (p *Process) WaitReady(ctx context.Context, probe func(context.Context) error) error {
	ticker := time.NewTicker(readyInterval)
	defer ticker.Stop()
	for {
		attempt, cancel := context.WithTimeout(ctx, time.Second)
		err := probe(attempt)
		cancel()
		// A probe can be answered by somebody else's server on a port that ours failed to get.
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

// startError is why a program ended that should have become ready.
func (p *Process) startError() error {
	err := p.Err()
	if err == nil {
		return fmt.Errorf("waiting for %s to be ready: it was stopped", p.name)
	}
	// The system says "address already in use"; MinIO makes that "Specified port is already in use".
	if strings.Contains(err.Error(), "already in use") {
		return fmt.Errorf("%w: %w", syscall.EADDRINUSE, err)
	}
	return err
}

// What an error shows of a log: the end, where the cause is. A line of a Kubernetes component is some 200
// bytes long.
const (
	tailLines = 20
	tailBytes = 16 << 10
)

// tail describes the end of what this process has logged, for use in an error.
func (p *Process) tail() string {
	none := "nothing in its log " + p.log
	file, err := os.Open(p.log)
	if err != nil {
		return none
	}
	defer func() { _ = file.Close() }()
	info, err := file.Stat()
	if err != nil {
		return none
	}
	from := max(p.from, info.Size()-tailBytes)
	content, err := io.ReadAll(io.NewSectionReader(file, from, tailBytes))
	content = bytes.TrimSpace(content)
	if err != nil || len(content) == 0 {
		return none
	}
	lines := strings.Split(string(content), "\n")
	return "its log " + p.log + " ends with:\n" + strings.Join(lines[max(0, len(lines)-tailLines):], "\n")
}
