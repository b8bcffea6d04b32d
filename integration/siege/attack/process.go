package attack

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// Plan is one attack by connections.
type Plan struct {
	// Step is the name of an attack, such as "resets".
	Step string
	// Address is the server's HOST:PORT.
	Address string
	// ALPN is the protocol for TLS. Empty: no TLS.
	ALPN string
	// Sources are local IP addresses, such as 127.0.0.3, with this many Connections each.
	Sources     []string
	Connections int
}

// AnyServer is the TLS configuration of a client that does not verify the server.
func AnyServer(alpn string) *tls.Config {
	return &tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS13, NextProtos: []string{alpn}} //nolint:gosec // As it says.
}

// variable names the environment variable with the plan of an attacking process.
const variable = "CREDENCE_ATTACK"

// lowest is the priority of an attacking process, as for setpriority(2). A real attacker has its own machine, so this one
// must not take the processors from the server.
const lowest = 19

// Main attacks until standard input ends, if [Start] started this process, and reports whether it did. A test program whose
// tests call Start calls Main first.
func Main() bool {
	text := os.Getenv(variable)
	if text == "" {
		return false
	}
	var plan Plan
	if err := json.Unmarshal([]byte(text), &plan); err != nil {
		_, _ = fmt.Fprintln(os.Stderr, "attacking:", err)
		return true
	}
	_ = syscall.Setpriority(syscall.PRIO_PROCESS, 0, lowest) // without it, the server is only slower
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		defer cancel()
		_, _ = bufio.NewReader(os.Stdin).ReadByte()
	}()
	var c count
	var running sync.WaitGroup
	for _, source := range plan.Sources {
		t := target{address: plan.Address, source: source}
		if plan.ALPN != "" {
			t.tls = AnyServer(plan.ALPN)
		}
		running.Go(func() { t.run(ctx, plan.Connections, steps[plan.Step], &c) })
	}
	print := func() { _, _ = fmt.Println(c.opened.Load(), c.held.Load(), c.sent.Load()) }
	for ctx.Err() == nil {
		print()
		time.Sleep(5 * time.Millisecond)
	}
	running.Wait()
	print()
	return true
}

// Process is an attack in a process of its own, so that its memory does not count with the server's, and its goroutines
// do not wait in the server's queues.
type Process struct {
	opened, held, sent, mostHeld atomic.Int64

	cmd  *exec.Cmd
	in   io.Closer
	read chan struct{}
}

// Start starts this program again as an attacking process, with one processor and the lowest priority. The caller must
// Stop it.
func Start(ctx context.Context, plan Plan) (*Process, error) {
	if steps[plan.Step] == nil {
		return nil, fmt.Errorf("there is no attack %q", plan.Step)
	}
	text, err := json.Marshal(plan)
	if err != nil {
		return nil, fmt.Errorf("attacking: %w", err)
	}
	p := &Process{cmd: exec.CommandContext(ctx, os.Args[0], "-test.run=^$"), read: make(chan struct{})} //nolint:gosec // This program.
	p.cmd.Env = append(os.Environ(), variable+"="+string(text), "GOMAXPROCS=1")
	p.cmd.Stderr = os.Stderr
	in, err := p.cmd.StdinPipe()
	out, err2 := p.cmd.StdoutPipe()
	if err := errors.Join(err, err2); err != nil {
		return nil, fmt.Errorf("attacking: %w", err)
	}
	p.in = in
	if err := p.cmd.Start(); err != nil {
		return nil, fmt.Errorf("attacking: %w", err)
	}
	go func() {
		defer close(p.read)
		for lines := bufio.NewScanner(out); lines.Scan(); {
			var opened, held, sent int64
			if _, err := fmt.Sscan(lines.Text(), &opened, &held, &sent); err == nil {
				p.opened.Store(opened)
				p.held.Store(held)
				p.sent.Store(sent)
				p.mostHeld.Store(max(held, p.mostHeld.Load()))
			}
		}
	}()
	return p, nil
}

// Stop ends the attack. The counts are exact afterwards.
func (p *Process) Stop() {
	_ = p.in.Close()
	<-p.read
	_ = p.cmd.Wait()
}

// Opened returns the number of connections that were opened.
func (p *Process) Opened() int64 { return p.opened.Load() }

// Held returns the number of connections that are at the end of their step now.
func (p *Process) Held() int64 { return p.held.Load() }

// Sent returns the number of bytes written to TCP.
func (p *Process) Sent() int64 { return p.sent.Load() }

// String describes what the attack has done.
func (p *Process) String() string {
	return fmt.Sprintf("%d connections opened, at most %d open at the end of their step, %d MB sent", p.Opened(), p.mostHeld.Load(), p.Sent()/1e6)
}
