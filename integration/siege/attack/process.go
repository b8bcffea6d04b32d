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

// Steps are the attacks by name, so that another process can be told which to run.
var Steps = map[string]Step{
	"silence after the handshake":    Nothing,
	"silence after SETTINGS":         Silent,
	"an open call":                   OpenCall,
	"large headers":                  LargeHeaders(1, 19<<10),
	"large headers twice":            LargeHeaders(1, 13<<10),
	"large headers in 16 streams":    LargeHeaders(16, 17<<10),
	"everything at once":             Everything(19<<10, 27<<10),
	"one byte a time":                Drip(100 * time.Millisecond),
	"calls by nobody":                Calls("nobody"),
	"connecting again":               Reconnect,
	"resets":                         Resets,
	"many headers":                   ManyHeaders(1, 19<<10),
	"many headers in 16 streams":     ManyHeaders(16, 19<<10),
	"a message in crumbs":            CrumbledMessage(2000),
	"a ClientHello without end":      UnfinishedHello(15 << 10),
	"a long ClientHello without end": UnfinishedHello(63 << 10),
	"an idle connection":             KeepAlive("/healthz"),
	"a scrape and then silence":      KeepAlive("/metrics"),
	"a head without end":             OpenHead(4800),
	"a large head without end":       OpenHead(40 << 10),
	"many headers without end":       ManyHeads(4800),
	"a body that does not come":      OpenBody(4800, 6<<20, 0),
	"a body without end":             OpenBody(4800, 6<<20, 100*time.Millisecond),
}

// Plan is one attack.
type Plan struct {
	// Step names one of [Steps].
	Step string
	// Address is the server's HOST:PORT.
	Address string
	// ALPN is the protocol that TLS asks for. Empty: there is no TLS.
	ALPN string
	// Sources are the local IP addresses, each of which has Connections.
	Sources     []string
	Connections int
}

// run attacks until ctx ends.
func (p Plan) run(ctx context.Context, count *Count) {
	var running sync.WaitGroup
	for _, source := range p.Sources {
		target := Target{Address: p.Address, Source: source}
		if p.ALPN != "" {
			target.TLS = AnyServer(p.ALPN)
		}
		running.Go(func() { Run(ctx, target, p.Connections, Steps[p.Step], count) })
	}
	running.Wait()
}

// AnyServer is TLS of a client that does not care whom it attacks.
func AnyServer(alpn string) *tls.Config {
	return &tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS13, NextProtos: []string{alpn}} //nolint:gosec // As it says.
}

// variable of the environment has the plan of a process that attacks.
const variable = "CREDENCE_ATTACK"

// lowest is the priority of a process that attacks, as for setpriority(2). An attacker has a machine of its own in life,
// and must not take the processors from the server here.
const lowest = 19

// Main attacks until standard input ends, if this process was started by [Start], and returns whether it was. Test programs
// whose tests call Start call it first.
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
	_ = syscall.Setpriority(syscall.PRIO_PROCESS, 0, lowest) // without it the server is slower, and no less right
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		defer cancel()
		_, _ = bufio.NewReader(os.Stdin).ReadByte()
	}()
	var count Count
	var running sync.WaitGroup
	running.Go(func() { plan.run(ctx, &count) })
	for ctx.Err() == nil {
		_, _ = fmt.Println(count.Opened(), count.Held(), count.Sent())
		time.Sleep(5 * time.Millisecond)
	}
	running.Wait()
	return true
}

// Process is an attack in a process of its own: its memory does not count with the server's, and its goroutines are not in
// the server's queues.
type Process struct {
	opened, held, sent, mostHeld atomic.Int64

	cmd  *exec.Cmd
	in   io.Closer
	read chan struct{}
}

// Start starts this program again as a process that attacks, with one processor and the lowest priority. The caller must
// Stop it.
func Start(ctx context.Context, plan Plan) (*Process, error) {
	if Steps[plan.Step] == nil {
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

// Stop ends the attack.
func (p *Process) Stop() {
	_ = p.in.Close()
	<-p.read
	_ = p.cmd.Wait()
}

// Opened returns how many connections were opened.
func (p *Process) Opened() int64 { return p.opened.Load() }

// Held returns how many connections are at the end of their step.
func (p *Process) Held() int64 { return p.held.Load() }

// Sent returns how many bytes TCP was given.
func (p *Process) Sent() int64 { return p.sent.Load() }

// String describes what the attack has done.
func (p *Process) String() string {
	return fmt.Sprintf("%d connections opened, %d held at most, %d MB sent", p.Opened(), p.mostHeld.Load(), p.Sent()/1e6)
}
