// Package connections attacks real servers as clients without a token can, and looks at what that costs the servers, and those
// who have a token. Attackers whose own memory would be counted with the server's run in a process of their own.
package connections

import (
	"bufio"
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"os"
	"os/exec"
	"runtime"
	"runtime/metrics"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/yaml"

	"github.com/credence-iam/credence/integration/siege/attack"
)

// steps are the attacks by name, so that another process can be asked for one.
var steps = map[string]attack.Step{
	"silence after the handshake":    attack.Nothing,
	"silence after SETTINGS":         attack.Silent,
	"an open call":                   attack.OpenCall,
	"large headers":                  attack.LargeHeaders(1, 19<<10),
	"large headers twice":            attack.LargeHeaders(1, 13<<10),
	"large headers in 16 streams":    attack.LargeHeaders(16, 17<<10),
	"everything at once":             attack.Everything(19<<10, 27<<10),
	"one byte a time":                attack.Drip(100 * time.Millisecond),
	"calls by nobody":                attack.Calls("nobody"),
	"connecting again":               attack.Reconnect,
	"resets":                         attack.Resets,
	"many headers":                   attack.ManyHeaders(1, 19<<10),
	"many headers in 16 streams":     attack.ManyHeaders(16, 19<<10),
	"a message in crumbs":            attack.CrumbledMessage(2000),
	"a ClientHello without end":      attack.UnfinishedHello(15 << 10),
	"a long ClientHello without end": attack.UnfinishedHello(63 << 10),
	"an idle connection":             attack.KeepAlive("/healthz"),
	"a head without end":             attack.OpenHead(4800),
	"a large head without end":       attack.OpenHead(40 << 10),
	"many headers without end":       attack.ManyHeads(4800),
	"a body that does not come":      attack.OpenBody(4800, 6<<20, 0),
	"a body without end":             attack.OpenBody(4800, 6<<20, 100*time.Millisecond),
}

// Environment of a process that attacks.
const (
	attackName    = "SIEGE_ATTACK"
	attackAddress = "SIEGE_ADDRESS"
	attackCount   = "SIEGE_CONNECTIONS"
	attackALPN    = "SIEGE_ALPN"    // "": without TLS
	attackSources = "SIEGE_SOURCES" // addresses, each with that many connections
)

func TestMain(m *testing.M) {
	if name := os.Getenv(attackName); name != "" {
		attackAsProcess(steps[name])
		return
	}
	os.Exit(m.Run())
}

// attackAsProcess attacks until standard input ends, and says how far it is: connections held, and bytes sent.
func attackAsProcess(step attack.Step) {
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		defer cancel()
		_, _ = bufio.NewReader(os.Stdin).ReadByte()
	}()
	n, _ := strconv.Atoi(os.Getenv(attackCount))
	var count attack.Count
	var running sync.WaitGroup
	for source := range strings.FieldsSeq(os.Getenv(attackSources)) {
		target := attack.Target{Address: os.Getenv(attackAddress), Source: source}
		if alpn := os.Getenv(attackALPN); alpn != "" {
			target.TLS = anyServer(alpn)
		}
		running.Go(func() { attack.Run(ctx, target, n, step, &count) })
	}
	for ctx.Err() == nil {
		fmt.Println(count.Opened(), count.Held(), count.Sent())
		time.Sleep(5 * time.Millisecond)
	}
	running.Wait()
}

// anyServer is TLS of a client that does not care whom it attacks.
func anyServer(alpn string) *tls.Config {
	return &tls.Config{InsecureSkipVerify: true, NextProtos: []string{alpn}}
}

// attacking is a process that attacks.
type attacking struct{ opened, held, sent atomic.Int64 }

// fourAddresses are where attackers are that have more than one.
const fourAddresses = "127.0.0.2 127.0.0.3 127.0.0.4 127.0.0.5"

// startAttack starts a process that keeps n connections from each source in a step of that name, until the test ends. It has
// one processor. A process of its own also keeps its goroutines out of the server's queues, as they are in life.
func startAttack(t *testing.T, address, alpn, name, sources string, n int) *attacking {
	t.Helper()
	if steps[name] == nil {
		t.Fatalf("there is no attack %q", name)
	}
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^$")
	cmd.Env = append(os.Environ(), attackName+"="+name, attackAddress+"="+address, attackCount+"="+strconv.Itoa(n), attackALPN+"="+alpn, attackSources+"="+sources, "GOMAXPROCS=1")
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	a := new(attacking)
	read := make(chan struct{})
	go func() {
		defer close(read)
		for lines := bufio.NewScanner(out); lines.Scan(); {
			var opened, held, sent int64
			if _, err := fmt.Sscan(lines.Text(), &opened, &held, &sent); err == nil {
				a.opened.Store(opened)
				a.held.Store(held)
				a.sent.Store(sent)
			}
		}
	}()
	t.Cleanup(func() {
		_ = in.Close()
		<-read
		_ = cmd.Wait()
	})
	return a
}

// counted is a listener that counts what is read from its connections, and knows how many are open.
type counted struct {
	net.Listener
	read, open atomic.Int64
}

func (l *counted) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	l.open.Add(1)
	return &countedConn{conn.(*net.TCPConn), l, sync.Once{}}, nil
}

// countedConn has the type of TCP's buffers, but not TCP itself, which the server would take for granted.
type countedConn struct {
	*net.TCPConn
	of   *counted
	once sync.Once
}

func (c *countedConn) Read(b []byte) (int, error) {
	n, err := c.TCPConn.Read(b)
	c.of.read.Add(int64(n))
	return n, err
}

func (c *countedConn) Close() error {
	c.once.Do(func() { c.of.open.Add(-1) })
	return c.TCPConn.Close()
}

// listen listens on loopback until the test ends.
func listen(t *testing.T) *counted {
	t.Helper()
	l, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	return &counted{Listener: l}
}

// memory returns the bytes of this process that are in use: objects that are reachable, and stacks.
func memory() uint64 {
	runtime.GC()
	runtime.GC() // what pools held is free only now
	samples := []metrics.Sample{{Name: "/memory/classes/heap/objects:bytes"}, {Name: "/memory/classes/heap/stacks:bytes"}}
	metrics.Read(samples)
	return samples[0].Value.Uint64() + samples[1].Value.Uint64()
}

// perConnection returns what one connection holds of the server behind l, in bytes, with n of them under attack.
func perConnection(t *testing.T, l *counted, alpn, name string, n int, refused func() bool) uint64 {
	t.Helper()
	before := memory()
	a := startAttack(t, l.Addr().String(), alpn, name, "127.0.0.1", n)
	full := func() bool {
		return l.open.Load() == int64(n) && a.held.Load() == int64(n) && l.read.Load() == a.sent.Load()
	}
	for {
		if refused() || a.opened.Load() > int64(4*n) {
			return 0 // it does not let them have what they want
		}
		if !full() {
			time.Sleep(time.Millisecond)
			continue
		}
		after := memory()
		if !full() {
			continue // meanwhile the server has closed some
		}
		if after < before {
			return 0
		}
		return (after - before) / uint64(n)
	}
}

// allowance is what a connection may hold here, of a server whose bounds are made for that many bytes.
func allowance(held uint64) uint64 {
	if raceDetector {
		return held + held/4
	}
	return held
}

// memoryLimit returns the limit that the chart gives a component, in bytes.
func memoryLimit(t *testing.T, component string) int64 {
	t.Helper()
	text, err := os.ReadFile("../../../charts/credence/values.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var values map[string]struct {
		Resources corev1.ResourceRequirements `json:"resources"`
	}
	var all map[string]any
	if err := yaml.Unmarshal(text, &all); err != nil {
		t.Fatal(err)
	}
	part, err := yaml.Marshal(map[string]any{component: all[component]})
	if err != nil {
		t.Fatal(err)
	}
	if err := yaml.Unmarshal(part, &values); err != nil {
		t.Fatal(err)
	}
	limits := values[component].Resources.Limits
	limit := limits.Memory().Value()
	if limit == 0 {
		t.Fatalf("the chart gives %s no memory limit", component)
	}
	return limit
}
