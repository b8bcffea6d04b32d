// Package connections attacks real servers as clients without a token can, and checks the cost for the servers and for
// clients with a token. Attackers run in a process of their own if their memory would count with the server's.
package connections

import (
	"net"
	"os"
	"runtime"
	"runtime/metrics"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/credence-iam/credence/broker/connlimit"
	"github.com/credence-iam/credence/integration/siege/attack"
	"github.com/credence-iam/credence/integration/stack"
)

func TestMain(m *testing.M) {
	if !attack.Main() {
		os.Exit(m.Run())
	}
}

// attackers are the addresses of several attackers.
var attackers = []string{"127.0.0.2", "127.0.0.3", "127.0.0.4", "127.0.0.5"}

// startAttack keeps n connections from each source in a step of this name, until the test ends.
func startAttack(t *testing.T, l *counted, alpn, step string, sources []string, n int) *attack.Process {
	t.Helper()
	if strings.Contains(step, "ClientHello") {
		alpn = "" // the step makes its own
	}
	a, err := attack.Start(t.Context(), attack.Plan{Step: step, Address: l.Addr().String(), ALPN: alpn, Sources: sources, Connections: n})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(a.Stop)
	return a
}

// until waits for a condition, within the test's own time limit.
func until(t *testing.T, condition func() bool) {
	t.Helper()
	for !condition() {
		if t.Context().Err() != nil {
			t.Fatal("the test has ended")
		}
		time.Sleep(time.Millisecond)
	}
}

// counted is a listener that counts its open connections, and the bytes read from them.
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

// countedConn has TCP's buffer methods. It is not a *net.TCPConn, which a server would read directly.
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

// memory returns the bytes that this process uses: reachable objects and stacks.
func memory() uint64 {
	runtime.GC()
	runtime.GC() // frees what pools held
	samples := []metrics.Sample{{Name: "/memory/classes/heap/objects:bytes"}, {Name: "/memory/classes/heap/stacks:bytes"}}
	metrics.Read(samples)
	return samples[0].Value.Uint64() + samples[1].Value.Uint64()
}

// checkMemory checks that one connection under attack uses no more memory of the server behind l than the server's limits
// assume. A server may also close such connections.
func checkMemory(t *testing.T, l *counted, alpn, step string, state func() connlimit.Stats, limit uint64) {
	t.Helper()
	if stack.Race {
		limit += limit / 4 // the race detector makes stacks larger, and keeps less in pools
	}
	const n = 48
	before := memory()
	a := startAttack(t, l, alpn, step, []string{"127.0.0.1"}, n)
	full := func() bool { return l.open.Load() == n && a.Held() == n && l.read.Load() == a.Sent() }
	for {
		if state().Closed[connlimit.Flood] > 0 || a.Opened() > 4*n {
			t.Log("the server closes such connections")
			return
		}
		if !full() {
			time.Sleep(time.Millisecond)
			continue
		}
		after := memory()
		if !full() {
			continue // the server has closed some
		}
		used := (max(after, before) - before) / n
		t.Logf("one connection uses %d bytes", used)
		if used > limit {
			t.Errorf("one connection uses %d bytes, and the limits assume %d", used, limit)
		}
		return
	}
}
