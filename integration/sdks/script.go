//go:build unix

package main

import (
	"bufio"
	"bytes"
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
	// responseTimeout limits the start of a script and each call: an SDK with its default retries needs a fifth of it.
	responseTimeout = 60 * time.Second
	// maxLine limits a line of a script: the text of an error has some kilobytes.
	maxLine = 256 << 10
)

// errTimeout is the error of a script that reaches responseTimeout.
var errTimeout = fmt.Errorf("no line came within %v", responseTimeout)

// hello is the first line of a script.
type hello struct {
	Client  string `json:"client"`
	Version string `json:"version"`
}

// output is the line that a script writes for a command.
type output struct {
	ARN    string `json:"arn"`
	Key    string `json:"access_key_id"`
	Region string `json:"region"`
	Error  string `json:"error"`
	Code   string `json:"code"`
}

// script is a client that runs: it reads commands, one per line, and responds to each with a line of JSON. One goroutine
// at a time uses it.
type script struct {
	hello

	cmd   *exec.Cmd
	stdin io.WriteCloser
	lines chan []byte // closed when the program has exited
	turns chan struct{}
	err   error // of the first call without a line: the next line might belong to that call
}

// startScript starts a script and waits for its first line. env is its whole environment, dir its working folder, and
// the file log gets its standard error. A call of the script takes one of turns, if there are any.
func startScript(ctx context.Context, command, env []string, dir, log string, turns chan struct{}) (*script, error) {
	failed := func(err error) (*script, error) {
		return nil, fmt.Errorf("starting %q, whose log is %s: %w", command, log, err)
	}
	cmd := exec.Command(command[0], command[1:]...) //nolint:gosec,noctx // a client of the table, until stop
	cmd.Env, cmd.Dir = env, dir
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	stderr, err := os.OpenFile(log, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return failed(err)
	}
	defer func() { _ = stderr.Close() }() // the program has a copy
	cmd.Stderr = stderr
	s := &script{cmd: cmd, lines: make(chan []byte), turns: turns}
	if s.stdin, err = cmd.StdinPipe(); err != nil {
		return failed(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return failed(err)
	}
	if err := process.Launch(cmd); err != nil {
		return failed(err)
	}
	go func() {
		defer close(s.lines)
		scanner := bufio.NewScanner(stdout)
		scanner.Buffer(nil, maxLine)
		for scanner.Scan() {
			s.lines <- bytes.Clone(scanner.Bytes())
		}
	}()
	err = s.receive(ctx, &s.hello)
	if err == nil && (s.Client == "" || s.Version == "") {
		err = errors.New("its first line lacks the name or the version")
	}
	if err != nil {
		s.stop()
		return failed(err)
	}
	return s, nil
}

// call sends one command and returns the script's output. After an error, every call fails.
func (s *script) call(ctx context.Context, command string) (a output, err error) {
	if s.err != nil {
		return output{}, fmt.Errorf("sending %q after an error: %w", command, s.err)
	}
	defer func() { s.err = err }()
	if s.turns != nil {
		s.turns <- struct{}{}
		defer func() { <-s.turns }()
	}
	if err := ctx.Err(); err != nil {
		return output{}, fmt.Errorf("sending %q: %w", command, err)
	}
	if _, err := io.WriteString(s.stdin, command+"\n"); err != nil {
		return output{}, fmt.Errorf("sending %q: %w", command, err)
	}
	if err := s.receive(ctx, &a); err != nil {
		return output{}, fmt.Errorf("waiting for the line for %q: %w", command, err)
	}
	return a, nil
}

// receive reads one line into v.
func (s *script) receive(ctx context.Context, v any) error {
	ctx, cancel := context.WithTimeoutCause(ctx, responseTimeout, errTimeout)
	defer cancel()
	select {
	case line, ok := <-s.lines:
		if !ok {
			return errors.New("the script exited")
		}
		if err := json.Unmarshal(line, v); err != nil {
			return fmt.Errorf("the line %.200q is not JSON: %w", line, err)
		}
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// stop kills the script with its process group. It must be called once.
func (s *script) stop() {
	_ = s.stdin.Close()
	_ = syscall.Kill(-s.cmd.Process.Pid, syscall.SIGKILL) // not reaped before Wait, so the number is still its own
	for range s.lines {
		// Wait must not run beside the reader.
	}
	_ = s.cmd.Wait() // killed on purpose
}
