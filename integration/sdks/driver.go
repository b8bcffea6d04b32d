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

	cmd   *exec.Cmd
	stdin io.WriteCloser
	lines chan []byte // closed when it ends
	log   *os.File
}

// startDriver starts the program and waits until it has said who it is. What it says besides goes to the file
// log. env is its whole environment, and dir its working folder.
func startDriver(ctx context.Context, command, env []string, dir, log string) (_ *driver, err error) {
	d := &driver{lines: make(chan []byte)}
	d.cmd = exec.Command(command[0], command[1:]...) //nolint:gosec,noctx // a client of our table, until it is stopped
	d.cmd.Env, d.cmd.Dir = env, dir
	d.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if d.log, err = os.OpenFile(log, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600); err != nil {
		return nil, fmt.Errorf("opening a driver's log: %w", err)
	}
	defer func() {
		if err != nil {
			_ = d.log.Close()
		}
	}()
	d.cmd.Stderr = d.log
	if d.stdin, err = d.cmd.StdinPipe(); err != nil {
		return nil, fmt.Errorf("starting a driver: %w", err)
	}
	stdout, err := d.cmd.StdoutPipe()
	if err != nil {
		return nil, fmt.Errorf("starting a driver: %w", err)
	}
	if err := process.Launch(d.cmd); err != nil {
		return nil, fmt.Errorf("starting a driver: %w", err)
	}
	go d.read(stdout)
	if err := d.receive(ctx, &d.hello); err != nil {
		d.stop()
		return nil, fmt.Errorf("starting %q, whose log is %s: %w", command, log, err)
	}
	if d.Client == "" || d.Version == "" {
		d.stop()
		return nil, fmt.Errorf("starting %q: it says neither name nor version", command)
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

// ask sends one command and returns the answer.
func (d *driver) ask(ctx context.Context, command string) (answer, error) {
	began := time.Now()
	if _, err := io.WriteString(d.stdin, command+"\n"); err != nil {
		return answer{}, fmt.Errorf("sending %q: %w", command, err)
	}
	var a answer
	if err := d.receive(ctx, &a); err != nil {
		return answer{}, fmt.Errorf("waiting for the answer to %q: %w", command, err)
	}
	a.took = time.Since(began)
	return a, nil
}

// receive reads one line into v.
func (d *driver) receive(ctx context.Context, v any) error {
	ctx, cancel := context.WithTimeoutCause(ctx, answerTimeout, fmt.Errorf("nothing came within %v", answerTimeout))
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
	// Not reaped before Wait below, so the number of the group is still its own.
	_ = syscall.Kill(-d.cmd.Process.Pid, syscall.SIGKILL)
	for range d.lines {
		// Until read has ended, which Wait must not run beside.
	}
	_ = d.cmd.Wait() // killed on purpose
	_ = d.log.Close()
}
