//go:build unix

package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"syscall"
	"time"

	"github.com/credence-iam/credence/integration/process"
)

const (
	// answerTimeout bounds each answer of a driver, and its start: an SDK that tries as long as it does by
	// default is done in a fifth of that.
	answerTimeout = 60 * time.Second
	// maxLine bounds a line of a driver: an error's text is some kilobytes at most.
	maxLine = 256 << 10
)

// errSilent is what answerTimeout comes to.
var errSilent = fmt.Errorf("nothing came within %v", answerTimeout)

// hello is a driver's first line.
type hello struct {
	Client  string `json:"client"`
	Version string `json:"version"`
}

// answer is a driver's answer to one command.
type answer struct {
	ARN    string `json:"arn"`
	Key    string `json:"access_key_id"`
	Region string `json:"region"`
	Error  string `json:"error"`
	Code   string `json:"code"`

	took time.Duration
}

// driver is a client that runs: a program that obeys commands, one per line, and answers each with a line of
// JSON. It is used by one goroutine at a time.
type driver struct {
	hello

	stdin io.WriteCloser
	lines chan []byte // closed when it ends
	kill  func()      // ends the program, and with it what it writes
	reap  func()      // is called once that has ended
	err   error       // of the first answer that did not come: the next line might be that one
}

// startDriver starts the program and waits until it has said who it is. What it says besides goes to the file
// log. env is its whole environment, and dir its working folder.
func startDriver(ctx context.Context, command, env []string, dir, log string) (_ *driver, err error) {
	cmd := exec.Command(command[0], command[1:]...) //nolint:gosec,noctx // a client of our table, until it is stopped
	cmd.Env, cmd.Dir = env, dir
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	says, err := os.OpenFile(log, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return nil, fmt.Errorf("opening a driver's log: %w", err)
	}
	defer func() { _ = says.Close() }() // the program has its own
	cmd.Stderr = says
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return nil, fmt.Errorf("starting a driver: %w", err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return nil, fmt.Errorf("starting a driver: %w", err)
	}
	if err := process.Launch(cmd); err != nil {
		return nil, fmt.Errorf("starting a driver: %w", err)
	}
	d, err := greet(ctx, stdin, stdout,
		// Not reaped before reap below, so the number of the group is still its own.
		func() { _ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) },
		func() { _ = cmd.Wait() }, // killed on purpose
	)
	if err != nil {
		return nil, fmt.Errorf("starting %q, whose log is %s: %w", command, log, err)
	}
	return d, nil
}

// greet makes a driver of a program that was started, and waits until it has said who it is.
func greet(ctx context.Context, stdin io.WriteCloser, stdout io.Reader, kill, reap func()) (*driver, error) {
	d := &driver{stdin: stdin, lines: make(chan []byte), kill: kill, reap: reap}
	go d.read(stdout)
	err := d.receive(ctx, &d.hello)
	if err == nil && (d.Client == "" || d.Version == "") {
		err = errors.New("it says neither name nor version")
	}
	if err != nil {
		d.stop()
		return nil, err
	}
	return d, nil
}

// read hands on what the driver writes, line by line, until it ends. After stop nobody takes it any more.
func (d *driver) read(stdout io.Reader) {
	defer close(d.lines)
	scanner := bufio.NewScanner(stdout)
	scanner.Buffer(nil, maxLine)
	for scanner.Scan() {
		d.lines <- append([]byte(nil), scanner.Bytes()...)
	}
}

// ask sends one command and returns the answer. After an error, there is none to any further command.
func (d *driver) ask(ctx context.Context, command string) (a answer, err error) {
	if d.err != nil {
		return answer{}, fmt.Errorf("sending %q after what came before: %w", command, d.err)
	}
	defer func() { d.err = err }()
	if err := ctx.Err(); err != nil { // an answer that came with the interrupt lets nothing more begin
		return answer{}, fmt.Errorf("sending %q: %w", command, err)
	}
	began := time.Now()
	if _, err := io.WriteString(d.stdin, command+"\n"); err != nil {
		return answer{}, fmt.Errorf("sending %q: %w", command, err)
	}
	if err := d.receive(ctx, &a); err != nil {
		return answer{}, fmt.Errorf("waiting for the answer to %q: %w", command, err)
	}
	a.took = time.Since(began)
	return a, nil
}

// receive reads one line into v.
func (d *driver) receive(ctx context.Context, v any) error {
	ctx, cancel := context.WithTimeoutCause(ctx, answerTimeout, errSilent)
	defer cancel()
	select {
	case line, ok := <-d.lines:
		if !ok {
			return errors.New("the driver ended")
		}
		if err := json.Unmarshal(line, v); err != nil {
			return fmt.Errorf("it wrote something other than a line of JSON (%.200q): %w", line, err)
		}
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// stop ends the driver and all that it started. It must be called once.
func (d *driver) stop() {
	_ = d.stdin.Close()
	d.kill()
	for range d.lines {
		// Until read has ended, which reap must not run beside.
	}
	d.reap()
}
