// Package processtest runs the programs of Credence in their tests.
//
// [Start] runs a program as a separate process: it runs the test binary again, with its own flags, environment, standard
// output and signals. [CheckFlags] compares a test's table with the flags of the program. The package knows no program,
// and links only the standard library into a program's test.
package processtest

import (
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"
)

// Patience is how long [Process.Await] waits for a condition, and [Process.Wait] for the program to exit. Both take
// milliseconds, but machines can be busy.
const Patience = time.Minute

const (
	// variable marks a process that is the program.
	variable = "PROCESSTEST_RUN"
	// hostsVariable has the path of the file to mount as /etc/hosts.
	hostsVariable = "PROCESSTEST_HOSTS"
	// exitHosts is the exit code of a process that cannot mount it.
	exitHosts = 70
)

// Main runs main, which must exit, in a process that [Start] has started. In any other process it returns. TestMain calls
// it first, so that the test binary can be the program.
func Main(main func()) {
	if os.Getenv(variable) != "" {
		if err := useHosts(os.Getenv(hostsVariable)); err != nil {
			_, _ = os.Stderr.WriteString(err.Error() + "\n")
			os.Exit(exitHosts)
		}
		main()
		os.Exit(0)
	}
}

// Process is a program that runs until the test ends.
type Process struct {
	// Stdout has the standard output of the process, unless [Command.Stdout] is set.
	Stdout *Output
	// Stderr has the standard error of the process, its log.
	Stderr *Output

	cmd   *exec.Cmd
	fails bool // the test expects a failure
	ended chan struct{}
	err   error // why it failed; set when ended is closed
}

// Command is how to start a program.
type Command struct {
	Args []string
	// Env is the environment, NAME=VALUE. A few variables that each process needs are added.
	Env []string
	// Stdout receives standard output. Nil: [Process.Stdout].
	Stdout *os.File
	// Hosts is a file that the program sees as /etc/hosts, in its own mount namespace. If the kernel does not permit that,
	// the test is skipped. Empty: the machine's file.
	Hosts string
	// Drain is a parent of the test that starts the program. The program may run until Drain ends, after a SIGTERM. Programs
	// that take seconds to shut down can so do it in parallel. Nil: the test that starts it.
	Drain *testing.T
}

// Start starts the test binary as the program, see [Main]. When the test ends, the program gets SIGTERM and must exit with
// code 0. If the test has failed, the program's log is in the test's log.
func Start(t *testing.T, c Command) *Process {
	t.Helper()
	binary, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	p := &Process{Stdout: new(Output), Stderr: new(Output), ended: make(chan struct{})}
	// The test's context ends before its cleanups, and would kill the program.
	p.cmd = exec.CommandContext(context.WithoutCancel(t.Context()), binary, c.Args...) //nolint:gosec // It runs this test binary.
	p.cmd.Env = append([]string{variable + "=1", "HOME=" + t.TempDir()}, c.Env...)
	for _, name := range []string{"PATH", "TMPDIR", "GOCOVERDIR", "GORACE"} {
		if value, ok := os.LookupEnv(name); ok {
			p.cmd.Env = append(p.cmd.Env, name+"="+value)
		}
	}
	p.cmd.Stdout, p.cmd.Stderr = io.Writer(p.Stdout), p.Stderr
	if c.Stdout != nil {
		p.cmd.Stdout = c.Stdout
	}
	if c.Hosts != "" {
		p.cmd.Env = append(p.cmd.Env, hostsVariable+"="+c.Hosts)
		if p.cmd.SysProcAttr = mountNamespace(); p.cmd.SysProcAttr == nil {
			t.Skip("not run: only on Linux can a process have its own /etc/hosts")
		}
	}
	if err := p.cmd.Start(); err != nil && c.Hosts != "" {
		t.Skip("not run: the kernel does not permit a mount namespace: ", err)
	} else if err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(p.ended)
		p.err = p.cmd.Wait()
	}()
	wait := func(t *testing.T) {
		if err := p.Wait(); err != nil && !p.fails {
			t.Errorf("the program exited with %v: %s\n%s", err, strings.Join(c.Args, " "), p.Stderr.end())
		}
	}
	if c.Drain != nil {
		c.Drain.Cleanup(func() { wait(c.Drain) })
	}
	t.Cleanup(func() {
		p.Terminate()
		if c.Drain == nil {
			wait(t)
		}
		if t.Failed() {
			t.Logf("%s\n%s", strings.Join(c.Args, " "), p.Stderr.end())
		}
	})
	return p
}

// Terminate sends SIGTERM. It does not wait.
func (p *Process) Terminate() { _ = p.cmd.Process.Signal(syscall.SIGTERM) } // it fails if the program has exited

// Wait waits for the program to exit. If it does not, Wait kills it. The error says why it failed: an exit code, or that
// it was killed.
func (p *Process) Wait() error {
	timeout := time.NewTimer(Patience)
	defer timeout.Stop()
	select {
	case <-p.ended:
		return p.err
	case <-timeout.C:
		_ = p.cmd.Process.Kill()
		<-p.ended
		return errors.Join(errors.New("it did not exit after SIGTERM"), p.err)
	}
}

// MustFail waits for a program that fails. It must exit with that code, and its last lines must contain the text.
func (p *Process) MustFail(t *testing.T, code int, text string) {
	t.Helper()
	p.fails = true
	exit, ok := errors.AsType[*exec.ExitError](p.Wait())
	lines := strings.Split(strings.TrimSpace(p.Stderr.String()), "\n")
	at := max(0, len(lines)-2) // after an error in the command line, a hint follows
	if words := strings.Join(lines[at:], " "); !ok || exit.ExitCode() != code || !strings.Contains(words, text) {
		t.Errorf("the program exited with %v and %q, want exit code %d and %q", exit, words, code, text)
	}
}

// Await waits until condition holds, for at most [Patience]. The test ends if it never does, or if the program exits first.
func (p *Process) Await(t *testing.T, event string, condition func() bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), Patience)
	defer cancel()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !condition() {
		select {
		case <-p.ended:
			t.Fatalf("the program exited with %v before: %s", p.err, event)
		case <-ctx.Done():
			t.Fatalf("timeout while waiting until: %s", event)
		case <-tick.C:
		}
	}
}

// Logged waits for a log record with that message, and returns the first one.
func (p *Process) Logged(t *testing.T, message string) (record map[string]any) {
	t.Helper()
	p.Await(t, "the program has logged "+message, func() bool {
		if lines := p.Stderr.Lines("msg", message); len(lines) > 0 {
			record = lines[0]
		}
		return record != nil
	})
	return record
}
