// Package connections attacks real servers as clients without a token can, and looks at what that costs the servers, and those
// who have a token. Attackers whose own memory would be counted with the server's run in a process of their own.
package connections

import (
	"net"
	"os"
	"runtime"
	"runtime/metrics"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/yaml"

	"github.com/credence-iam/credence/integration/siege/attack"
)

func TestMain(m *testing.M) {
	if !attack.Main() {
		os.Exit(m.Run())
	}
}

// fourAddresses are where attackers are that have more than one.
var fourAddresses = []string{"127.0.0.2", "127.0.0.3", "127.0.0.4", "127.0.0.5"}

// startAttack starts a process that keeps n connections from each source in a step of that name, until the test ends.
func startAttack(t *testing.T, address, alpn, name string, sources []string, n int) *attack.Process {
	t.Helper()
	a, err := attack.Start(t.Context(), attack.Plan{Step: name, Address: address, ALPN: alpn, Sources: sources, Connections: n})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(a.Stop)
	return a
}

// counted is a listener that counts the bytes read from its connections, and knows how many are open.
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
	a := startAttack(t, l.Addr().String(), alpn, name, []string{"127.0.0.1"}, n)
	full := func() bool {
		return l.open.Load() == int64(n) && a.Held() == int64(n) && l.read.Load() == a.Sent()
	}
	for {
		if refused() || a.Opened() > int64(4*n) {
			return 0 // the server does not let the attack hold n connections
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
