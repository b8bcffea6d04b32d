package main

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"
)

// TestInterrupt: a command that waits for standard input ends when its user interrupts it.
func TestInterrupt(t *testing.T) {
	program, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range []string{"credence explain -f -", "credence inject --broker=b.credence.svc:9443 --sidecar-image=i:1", "credence sessions who --files-only --audit=- ASIAIOSFODNN7EXAMPLE"} {
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		c := exec.CommandContext(ctx, program)
		c.Args = strings.Fields(line)
		c.Env = append(os.Environ(), "KUBECONFIG="+t.TempDir()+"/none")
		in, err := c.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		var out bytes.Buffer
		c.Stdout, c.Stderr = &out, &out
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		// A pipe takes 64 kB. When it has taken more, the command reads it, and so receives signals.
		if _, err := in.Write(bytes.Repeat([]byte("#\n"), 128<<10)); err != nil {
			t.Fatalf("%s: %v: %s", line, err, out.String())
		}
		if err := c.Process.Signal(os.Interrupt); err != nil {
			t.Fatal(err)
		}
		_ = c.Wait()
		if code := c.ProcessState.ExitCode(); code != exitFailed || !strings.Contains(out.String(), "interrupt signal received") || ctx.Err() != nil {
			t.Errorf("%s: exit code %d: %s", line, code, out.String())
		}
		cancel()
	}
}

// TestReadable: errors quote texts of the cluster, which cannot move the cursor of a terminal.
func TestReadable(t *testing.T) {
	if got := readable(errors.New("a\x1b[2J\u202e\tb\nc\u009b")); got != "a?[2J? b\nc?" {
		t.Errorf("text is %q", got)
	}
	if got := readable(errors.New(strings.Repeat("x", 1<<20))); len(got) > maxMessage {
		t.Errorf("text has %d bytes", len(got))
	}
	var messages strings.Builder
	if code := execute(t.Context(), failing(errors.New("x\x1b[2J")), &messages); code != exitFailed || messages.String() != "credence: x?[2J\n" {
		t.Errorf("exit code %d and %q", code, messages.String())
	}
}

// TestInterruptible: what was read before the end of the context is not lost.
func TestInterruptible(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	in, w := io.Pipe()
	r := interruptible(ctx, in)
	go func() { _, _ = io.WriteString(w, "ab") }()
	text := make([]byte, 2)
	if _, err := io.ReadFull(r, text); err != nil || string(text) != "ab" {
		t.Fatalf("%v: %q", err, text)
	}
	cancel()
	if _, err := r.Read(text); !errors.Is(err, context.Canceled) {
		t.Errorf("after the end of the context: %v", err)
	}
	if all, err := io.ReadAll(interruptible(t.Context(), strings.NewReader("abc"))); err != nil || string(all) != "abc" {
		t.Errorf("%v: %q", err, all)
	}
}
