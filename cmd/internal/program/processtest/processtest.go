// Package processtest runs the programs for their tests.
//
// [Start] runs a program as a process of its own: the test binary once more, with its own flags, environment, standard
// output and signals. [CheckFlags] holds a test's table to the flags that the program has. It knows no program, and
// links no more than the standard library into the test of one.
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

// Patience is how long [Await] waits, and a program is given to end. Both take milliseconds; it is for machines under
// load.
const Patience = time.Minute

const (
	// variable marks the environment of a process that is to be the program.
	variable = "PROCESSTEST_RUN"
	// hostsVariable has the path of the file that is to be its /etc/hosts.
	hostsVariable = "PROCESSTEST_HOSTS"
	// exitHosts is the exit code of a process that cannot have it.
	exitHosts = 70
)

// Main runs main, which must exit, in a process that [Start] has started. In any other process it returns, and the
// tests run. TestMain calls it first, so that the test binary is the program too.
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
	// Stdout holds the standard output of the process, unless a file was given for that.
	Stdout *Output
	// Stderr holds the standard error of the process: its log.
	Stderr *Output

	cmd   *exec.Cmd
	fails bool // the test wants it to fail
	ended chan struct{}
	err   error // why it failed; to be read once ended is closed
}

// Command says how to start a program.
type Command struct {
	Args []string
	// Env is the environment, NAME=VALUE. Nothing else is in it but what every process needs.
	Env []string
	// Stdout takes standard output. Nil: [Process.Stdout] does.
	Stdout *os.File
	// Hosts is a file that is /etc/hosts for this program alone, in a mount namespace of its own. Empty: the machine's.
	// Where the kernel gives no such namespace, the test is skipped.
	Hosts string
	// Drain is a test, above the one that starts the program, that the program may run on until after SIGTERM. It is for
	// programs that take seconds to shut down: many can do so at once. Nil: the test that starts it.
	Drain *testing.T
}

// Start starts the program that the test binary is: see [Main]. When the test ends, the program gets SIGTERM and must
// end with exit code 0; its log is in the test's log if the test has failed.
func Start(t *testing.T, c Command) *Process {
	t.Helper()
	binary, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	p := &Process{Stdout: new(Output), Stderr: new(Output), ended: make(chan struct{})}
	// Not on the test's context, which ends before its cleanups and would kill the program.
	p.cmd = exec.CommandContext(context.WithoutCancel(t.Context()), binary, c.Args...) //nolint:gosec // this very binary
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
			t.Skip("not run: only Linux gives a process an /etc/hosts of its own")
		}
	}
	if err := p.cmd.Start(); err != nil && c.Hosts != "" {
		t.Skip("not run: the kernel gives this process no mount namespace: ", err)
	} else if err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(p.ended)
		p.err = p.cmd.Wait()
	}()
	wait := func(t *testing.T) {
		if err := p.Wait(); err != nil && !p.fails {
			t.Errorf("the program ended with %v: %s\n%s", err, strings.Join(c.Args, " "), p.Stderr.end())
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
func (p *Process) Terminate() { _ = p.cmd.Process.Signal(syscall.SIGTERM) } // the program may have ended

// Wait waits for the program to end. It kills a program that does not. The error says why it failed: an exit code, or
// that it was killed.
func (p *Process) Wait() error {
	timeout := time.NewTimer(Patience)
	defer timeout.Stop()
	select {
	case <-p.ended:
		return p.err
	case <-timeout.C:
		_ = p.cmd.Process.Kill()
		<-p.ended
		return errors.Join(errors.New("it did not end after SIGTERM"), p.err)
	}
}

// MustFail waits for a program that cannot go on. It must end with that exit code, and with words that have the text.
func (p *Process) MustFail(t *testing.T, code int, text string) {
	t.Helper()
	p.fails = true
	exit, ok := errors.AsType[*exec.ExitError](p.Wait())
	lines := strings.Split(strings.TrimSpace(p.Stderr.String()), "\n")
	at := max(0, len(lines)-2) // where the command line is wrong, a hint follows
	if words := strings.Join(lines[at:], " "); !ok || exit.ExitCode() != code || !strings.Contains(words, text) {
		t.Errorf("the program ended with %v, and %q; want exit code %d, and %q", exit, words, code, text)
	}
}

// Await waits until the condition holds, for [Patience] at most, and ends the test if it never does, or if a program
// that it is about has ended.
func (p *Process) Await(t *testing.T, what string, condition func() bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), Patience)
	defer cancel()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !condition() {
		select {
		case <-p.ended:
			t.Fatalf("the program ended with %v instead of: %s", p.err, what)
		case <-ctx.Done():
			t.Fatalf("this has not happened: %s", what)
		case <-tick.C:
		}
	}
}

// Logged waits for a log record of that message, and returns the first one.
func (p *Process) Logged(t *testing.T, message string) (record map[string]any) {
	t.Helper()
	p.Await(t, "the log has "+message, func() bool {
		if lines := p.Stderr.Lines("msg", message); len(lines) > 0 {
			record = lines[0]
		}
		return record != nil
	})
	return record
}
