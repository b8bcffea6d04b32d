package connlimit_test

import (
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/credence-iam/credence/broker/connlimit"
)

// world is a listener and its clients. The test chooses the addresses of the clients.
type world struct {
	t        *testing.T
	limiter  *connlimit.Limiter
	incoming chan net.Conn
	listener net.Listener
	ended    chan struct{}
	end      sync.Once
	slow     bool // the server closes a connection only when the test calls closed
	links    []*link
}

// side is the server's side of a connection.
type side struct {
	net.Conn
	addr net.Addr
	link *link
}

func (s side) RemoteAddr() net.Addr { return s.addr }

func (w *world) Accept() (net.Conn, error) {
	select {
	case c := <-w.incoming:
		return c, nil
	case <-w.ended:
		return nil, net.ErrClosed
	}
}

func (w *world) Close() error   { w.end.Do(func() { close(w.ended) }); return nil }
func (w *world) Addr() net.Addr { return &net.TCPAddr{} }

func newWorld(t *testing.T, cfg connlimit.Config) *world {
	t.Helper()
	if cfg.RequestTime == 0 {
		cfg.RequestTime = time.Minute
	}
	limiter, err := connlimit.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	w := &world{t: t, limiter: limiter, incoming: make(chan net.Conn, 1), ended: make(chan struct{})}
	w.listener = limiter.Listen(w)
	served := make(chan struct{})
	go func() {
		defer close(served)
		for {
			c, err := w.listener.Accept()
			if err != nil {
				return
			}
			c.(*connlimit.Conn).Conn.(side).link.accepted.Store(c.(*connlimit.Conn))
		}
	}()
	t.Cleanup(func() { _ = w.listener.Close(); <-served })
	return w
}

// link is one connection from a client.
type link struct {
	name     string
	accepted atomic.Pointer[connlimit.Conn]
	client   net.Conn
}

// server returns the server's connection; nil until the server has accepted it.
func (l *link) server() *connlimit.Conn { return l.accepted.Load() }

// connect opens a connection from an address, and waits until all immediate effects are done.
func (w *world) connect(address string) *link {
	w.t.Helper()
	if !w.slow {
		w.links = slices.DeleteFunc(w.links, func(l *link) bool { return l.closed() })
	}
	client, server := net.Pipe()
	l := &link{name: address, client: client}
	w.incoming <- side{server, &net.TCPAddr{IP: net.ParseIP(address), Port: 1}, l}
	synctest.Wait()
	w.links = append(w.links, l)
	w.t.Cleanup(func() {
		if l.server() != nil {
			_ = l.server().Close()
		}
		_ = l.client.Close()
	})
	return l
}

// closed reports whether the Limiter has closed the connection. If so, closed also closes the server's side, as servers do.
func (l *link) closed() bool {
	synctest.Wait()
	_ = l.client.SetReadDeadline(time.Now().Add(time.Nanosecond))
	_, err := l.client.Read(make([]byte, 1))
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrClosedPipe) {
		if l.server() != nil {
			_ = l.server().Close()
		}
		return true
	}
	return false
}

func open(links []*link) (names []string) {
	for _, l := range links {
		if !l.closed() {
			names = append(names, l.name)
		}
	}
	return names
}

func count(names []string, name string) (n int) {
	for _, s := range names {
		if s == name {
			n++
		}
	}
	return n
}

func TestAddressesShareEqually(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, connlimit.Config{Max: 12})
		var links []*link
		for range 12 { // one address gets all places, because no other address needs any
			links = append(links, w.connect("10.0.0.1"))
		}
		if n := len(open(links)); n != 12 {
			t.Fatalf("%d of 12 connections of the only address are open", n)
		}
		quiet := w.connect("10.0.0.5")
		for range 100 {
			for _, address := range []string{"10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.4"} {
				links = append(links, w.connect(address))
				links = slices.DeleteFunc(links, func(l *link) bool { return l.closed() })
			}
		}
		if quiet.closed() {
			t.Error("the only connection of an address gave way to addresses with many connections")
		}
		names := open(links)
		for _, address := range []string{"10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.4"} {
			if n := count(names, address); n < 2 || n > 3 {
				t.Errorf("%s has %d of the 11 connections that four addresses share, want 2 or 3", address, n)
			}
		}
		if s := w.limiter.Stats(); s.Unauthenticated != 12 || s.Closed[connlimit.Crowded] == 0 {
			t.Errorf("stats are %+v", s)
		}
	})
}

func TestOrderOfClosing(t *testing.T) {
	for name, test := range map[string]struct {
		newcomer string
		want     []string // connections of the largest address, in the order in which they are closed
	}{
		"for another address":  {"10.0.0.2", []string{"idle 3", "idle 2", "arriving 4", "arriving 5", "answering 0"}},
		"for the same address": {"10.0.0.1", []string{"idle 3", "idle 2", "arriving 4", "arriving 5", "newcomer 0"}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, connlimit.Config{Max: 6})
				var links []*link
				add := func(l *link, name string) { l.name = name; links = append(links, l) }
				for i, stage := range []string{"answering", "answering", "idle", "idle", "arriving", "arriving"} {
					l := w.connect("10.0.0.1")
					add(l, fmt.Sprint(stage, " ", i))
					if stage != "arriving" {
						l.server().Begin()
					}
				}
				links[3].server().End()
				links[2].server().End()
				var got []string
				for i := range test.want {
					time.Sleep(2 * time.Second) // so that the connections are older than minAge
					l := w.connect(test.newcomer)
					add(l, fmt.Sprint("newcomer ", i))
					if l.server() != nil {
						l.server().Begin() // so that it is not the next to be closed
					}
					for i := 0; i < len(links); {
						if !links[i].closed() {
							i++
							continue
						}
						got = append(got, links[i].name)
						links = slices.Delete(links, i, i+1)
					}
				}
				if test.newcomer == "10.0.0.2" {
					// Both addresses have three connections now, so a fourth newcomer takes no place.
					test.want = []string{"idle 3", "idle 2", "arriving 4", "newcomer 3", "newcomer 4"}
				} else {
					test.want[4] = "newcomer 4"
				}
				if diff := cmp.Diff(test.want, got); diff != "" {
					t.Errorf("closed (-want +got):\n%s", diff)
				}
			})
		})
	}
}

// If clients connect faster than the server can serve them, it still serves some of them.
func TestNewcomersOfACrowd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, connlimit.Config{Max: 4})
		var first []*link
		for i := range 4 {
			first = append(first, w.connect(fmt.Sprint("10.0.0.", i)))
		}
		time.Sleep(900 * time.Millisecond)
		for i := range 50 {
			if same, other := w.connect("10.0.0.1"), w.connect(fmt.Sprint("10.0.1.", i)); !same.closed() || !other.closed() {
				t.Fatal("a newcomer displaced a connection younger than a second, of an address with no more connections")
			}
		}
		if n := len(open(first)); n != 4 {
			t.Errorf("%d of the first 4 are open", n)
		}
		time.Sleep(200 * time.Millisecond)
		if other := w.connect("10.0.1.1"); other.closed() || !first[0].closed() {
			t.Error("the oldest connection is older than a second, but did not give way")
		}
	})
}

func TestRequestTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, connlimit.Config{Max: 9, RequestTime: 5 * time.Second, IdleTime: 10 * time.Second})
		silent, served, known := w.connect("10.0.0.1"), w.connect("10.0.0.1"), w.connect("10.0.0.2")
		time.Sleep(4 * time.Second)
		served.server().Begin()
		known.server().Begin()
		time.Sleep(2 * time.Second)
		if !silent.closed() || served.closed() {
			t.Fatal("only the silent connection must be closed, not the one whose request arrived in time")
		}
		time.Sleep(time.Hour)
		if served.closed() {
			t.Fatal("a connection was closed while the server was answering its request")
		}
		served.server().End()
		time.Sleep(9 * time.Second)
		served.server().Begin()
		time.Sleep(time.Minute)
		if served.closed() {
			t.Fatal("a connection was closed while the server was answering its second request")
		}
		served.server().End()
		time.Sleep(11 * time.Second)
		if !served.closed() {
			t.Error("an idle connection was not closed")
		}
		if s := w.limiter.Stats(); s.Closed[connlimit.Late] != 2 {
			t.Errorf("%d late connections were counted, want 2", s.Closed[connlimit.Late])
		}
	})
}

func TestBytes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, connlimit.Config{Max: 9, HandshakeBytes: 10, RequestBytes: 20})
		l := w.connect("10.0.0.1")
		send := func(n int) error {
			go func() { _, _ = l.client.Write([]byte(strings.Repeat("x", n))) }()
			_, err := io.ReadFull(l.server(), make([]byte, n))
			return err
		}
		if err := send(10); err != nil {
			t.Fatal(err)
		}
		l.server().Handshaken()
		for range 3 {
			if err := send(20); err != nil {
				t.Fatal(err)
			}
			l.server().Begin()
			l.server().End()
		}
		if err := send(21); err == nil || !l.closed() {
			t.Errorf("reading one byte too many: %v", err)
		}
		if s := w.limiter.Stats(); s.Closed[connlimit.Flood] != 1 || s.Unauthenticated != 0 {
			t.Errorf("stats are %+v", s)
		}
		l = w.connect("10.0.0.1")
		if err := send(11); err == nil {
			t.Error("a handshake may have as many bytes as a request")
		}
	})
}

// Networks take turns, and the addresses in each.
func TestHandshakesOfNetworksInTurns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, connlimit.Config{Max: 100, Handshakes: 1})
		var began []string
		links := make(map[string]*link)
		for _, address := range []string{"1::1", "1::1", "1::1", "1::2", "1::3", "2::1", "2::2", "3::1"} {
			l := w.connect("2001:db8:0:" + address)
			name := fmt.Sprint(address, " ", len(links))
			links[name] = l
			go func() { _, _ = l.client.Write([]byte("x")) }()
			go func() {
				if _, err := l.server().Read(make([]byte, 1)); err == nil {
					began = append(began, name)
				}
			}()
			synctest.Wait()
		}
		for range len(links) - 1 {
			links[began[len(began)-1]].server().Handshaken()
			synctest.Wait()
		}
		want := []string{"1::1 0", "1::1 1", "2::1 5", "3::1 7", "1::2 3", "2::2 6", "1::3 4", "1::1 2"}
		if diff := cmp.Diff(want, began); diff != "" {
			t.Errorf("order of handshakes (-want +got):\n%s", diff)
		}
	})
}

// An address with many connections waits for its own handshakes. Another address does not wait for them.
func TestHandshakesInTurns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, connlimit.Config{Max: 100, Handshakes: 1})
		var began []string
		links := make(map[string]*link)
		hello := func(address, name string) {
			l := w.connect(address)
			links[name] = l
			go func() {
				_, _ = l.client.Write([]byte("x"))
			}()
			go func() {
				if _, err := l.server().Read(make([]byte, 1)); err == nil {
					began = append(began, name)
				}
			}()
			synctest.Wait()
		}
		for i := range 5 {
			hello("10.0.0.1", fmt.Sprint("many ", i))
		}
		hello("10.0.0.2", "few 0")
		hello("10.0.0.2", "few 1")
		if diff := cmp.Diff([]string{"many 0"}, began); diff != "" {
			t.Fatalf("handshakes that are computed at once (-want +got):\n%s", diff)
		}
		_ = links["many 1"].server().Close() // which takes it out of the queue
		for range 5 {
			links[began[len(began)-1]].server().Handshaken()
			synctest.Wait()
		}
		if diff := cmp.Diff([]string{"many 0", "many 2", "few 0", "many 3", "few 1", "many 4"}, began); diff != "" {
			t.Errorf("order of handshakes (-want +got):\n%s", diff)
		}
		// The last connection still has its turn. Its Close ends the turn, and so does a Read for more data.
		_ = links["many 4"].server().Close()
		hello("10.0.0.3", "another")
		go func() { _, _ = links["another"].server().Read(make([]byte, 1)) }()
		synctest.Wait()
		hello("10.0.0.3", "last")
		if began[len(began)-1] != "last" {
			t.Errorf("a turn was lost; the handshakes were %v", began)
		}
	})
}

func TestAuthenticatedStay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, connlimit.Config{Max: 2, MaxAuthenticated: 4})
		enter := func(name, tenant string) (l *link, ok bool) {
			time.Sleep(2 * time.Second) // so that the other connections are older than minAge
			l = w.connect("10.0.0.1")
			l.name = name
			l.server().Begin()
			return l, l.server().Authenticated(tenant, name)
		}
		var shop []*link
		for i := range 4 {
			l, ok := enter(fmt.Sprint("shop ", i), "shop")
			if !ok {
				t.Fatalf("there is no room for call %d of 4", i)
			}
			shop = append(shop, l)
		}
		for range 20 {
			w.connect("10.0.0.1").closed()
			w.connect("10.0.0.2").closed()
		}
		if n := len(open(shop)); n != 4 {
			t.Fatalf("unknown connections displaced %d of 4 authenticated ones", 4-n)
		}
		fifth, ok := enter("shop 4", "shop")
		if ok || fifth.closed() {
			t.Error("the fifth call of a tenant with all four places must be refused in a response")
		}
		fifth.server().End()
		bank, ok := enter("bank", "bank")
		if diff := cmp.Diff([]string{"shop 0", "shop 1", "shop 2"}, open(shop)); !ok || bank.closed() || diff != "" {
			t.Errorf("call of another tenant: there is room: %t; open connections of the first tenant (-want +got):\n%s", ok, diff)
		}
		shop[1].server().End()
		if _, ok = enter("shop 5", "shop"); !ok || !shop[1].closed() {
			t.Error("an idle connection of the same tenant did not give way")
		}
		if s := w.limiter.Stats(); s.Authenticated != 4 || s.Unauthenticated > 2 {
			t.Errorf("stats are %+v", s)
		}
	})
}

func TestOneCaller(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, connlimit.Config{Max: 20, MaxAuthenticated: 10, MaxPerCaller: 2})
		enter := func(caller string) (*link, bool) {
			l := w.connect("10.0.0.1")
			l.server().Begin()
			return l, l.server().Authenticated("shop", caller)
		}
		first, _ := enter("cart")
		enter("cart")
		if _, ok := enter("cart"); ok {
			t.Error("a caller has three connections, want at most two")
		}
		if _, ok := enter("till"); !ok {
			t.Error("a caller has no connection, because another has two")
		}
		_ = first.server().Close()
		if _, ok := enter("cart"); !ok {
			t.Error("a closed connection still counts")
		}
	})
}

// An IPv4 address can have two forms.
func TestAddresses(t *testing.T) {
	for _, test := range []struct {
		many, few string
		same      bool
	}{
		{"2001:db8:0:1::1", "2001:db8:0:1:ffff::2", false},
		{"2001:db8:0:1::1", "2001:db8:0:1::1", true},
		{"2001:db8:0:1::1", "2001:db8:0:2::1", false},
		{"::ffff:10.0.0.1", "10.0.0.1", true},
		{"10.0.0.1", "10.0.0.2", false},
	} {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t, connlimit.Config{Max: 2})
			few := w.connect(test.few)
			time.Sleep(2 * time.Second)
			w.connect(test.many)
			w.connect(test.many)
			if closed := few.closed(); closed != test.same {
				t.Errorf("%s and %s count for one address: %t, want %t", test.many, test.few, closed, test.same)
			}
		})
	}
}

// A machine can have all addresses of an IPv6 network, so networks share equally. Many pods can be in one, so its addresses
// share its part.
func TestNetworksShareEqually(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, connlimit.Config{Max: 8, MaxWaiting: 8})
		quiet := w.connect("2001:db8:0:1::1")
		var machine, pod []*link
		for i := range 30 {
			pod = append(pod, w.connect("2001:db8:0:1::2"))
			machine = append(machine, w.connect(fmt.Sprintf("2001:db8:0:2::%x", i)))
		}
		if quiet.closed() {
			t.Error("the only connection of an address gave way to an address in its network")
		}
		time.Sleep(100 * time.Millisecond)
		entered := func(links []*link) (n int) {
			for _, l := range links {
				if l.server() != nil && !l.closed() {
					n++
				}
			}
			return n
		}
		if n := entered(pod); n != 3 {
			t.Errorf("a pod has %d of 8 connections, want the 3 that the other pod of its network leaves", n)
		}
		if n := entered(machine); n != 4 {
			t.Errorf("a machine with many addresses has %d of 8 connections, want 4", n)
		}
		// A second connection of the quiet address takes the place of its neighbor, not that of another network.
		again := w.connect("2001:db8:0:1::1")
		if again.server() == nil || again.closed() || entered(pod) != 2 || entered(machine) != 4 {
			t.Errorf("then the pod has %d connections and the machine %d, want 2 and 4", entered(pod), entered(machine))
		}
	})
}

// A busy address of a network does not protect the other connections of the network.
func TestBusyAddressProtectsNoNetwork(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, connlimit.Config{Max: 4})
		for _, address := range []string{"2001:db8:0:1::1", "2001:db8:0:1::1", "2001:db8:0:1::2", "2001:db8:0:1::3"} {
			w.connect(address)
		}
		busy, waits := w.links[:2], w.links[2]
		time.Sleep(2 * time.Second)
		for _, l := range busy {
			l.server().Begin()
		}
		if other := w.connect("2001:db8:0:2::1"); other.server() == nil || other.closed() || !waits.closed() || busy[0].closed() || busy[1].closed() {
			t.Errorf("open: %q, want a connection of 2001:db8:0:2::1 in place of that of 2001:db8:0:1::2", open(w.links))
		}
	})
}

// A connection that the Limiter has closed holds memory until the server closes it too. So the number of such connections
// is limited.
func TestServerThatFallsBehind(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, connlimit.Config{Max: 16, MaxWaiting: 3})
		w.slow = true
		if got := connlimit.MaxOpen(16); got != 18 {
			t.Errorf("MaxOpen(16) = %d, want 18", got)
		}
		var links []*link
		for range 18 {
			time.Sleep(time.Second)
			links = append(links, w.connect("10.0.0.1"))
		}
		late := w.connect("10.0.0.2")
		if late.server() != nil || late.closed() {
			t.Fatal("a connection was accepted while the server had two connections to close")
		}
		if !links[0].closed() { // which also closes the server's side
			t.Fatal("the oldest was not closed")
		}
		if synctest.Wait(); late.server() == nil {
			t.Error("there is room, but the connection still waits")
		}
	})
}

func TestListenerThatClosesWhileItWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, connlimit.Config{Max: 1, MaxWaiting: 1})
		w.slow = true
		first := w.connect("10.0.0.1")
		second := w.connect("10.0.0.1")
		time.Sleep(2 * time.Second)
		third := w.connect("10.0.0.1")
		fourth := w.connect("10.0.0.2")
		if first.server() == nil || second.server() != nil || third.server() == nil || fourth.server() != nil {
			t.Fatal("the test needs one connection that waits for room, and one that waits for the server")
		}
		_ = w.listener.Close()
		if !second.closed() || !fourth.closed() || third.closed() {
			t.Error("a closing listener must close only the connections that the server has not accepted")
		}
	})
}

// Waiting connections get places when others close, and each address gets equally many.
func TestWaiting(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, connlimit.Config{Max: 4, MaxWaiting: 6})
		var many, few []*link
		for range 8 {
			many = append(many, w.connect("10.0.0.1"))
		}
		for range 4 {
			few = append(few, w.connect("10.0.0.2"))
		}
		accepted := func(links []*link) (n int) {
			for _, l := range links {
				if !l.closed() && l.server() != nil {
					n++
				}
			}
			return n
		}
		if m, f := accepted(many), accepted(few); m != 2 || f != 2 {
			t.Fatalf("of 4 places, one address has %d and another %d, want 2 each", m, f)
		}
		if s := w.limiter.Stats(); s.Waiting != 6 || s.Closed[connlimit.Crowded] != 2 {
			t.Fatalf("stats are %+v", s)
		}
		// A closed connection makes room.
		few[0].server().Begin()
		_ = few[0].server().Close()
		if synctest.Wait(); few[2].server() == nil || accepted(many) != 2 {
			t.Error("the place of an address with fewer connections went to another address")
		}
		time.Sleep(2 * time.Minute)
		if s := w.limiter.Stats(); s.Waiting != 0 || s.Unauthenticated != 0 {
			t.Errorf("after RequestTime, stats are %+v", s)
		}
	})
}

// An idle connection gives way to a waiting one.
func TestWaitingForAnIdleOne(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, connlimit.Config{Max: 2, MaxWaiting: 2})
		one, two := w.connect("10.0.0.1"), w.connect("10.0.0.1")
		one.server().Begin()
		two.server().Begin()
		other := w.connect("10.0.0.1")
		if other.server() != nil {
			t.Fatal("three connections are open, want at most two")
		}
		one.server().End()
		if one.closed() {
			t.Fatal("a connection was closed before its response could leave")
		}
		time.Sleep(time.Second)
		if synctest.Wait(); other.server() == nil || !one.closed() || two.closed() {
			t.Error("the idle connection did not give way to the waiting one")
		}
	})
}

// If the server responds within a second, no response is lost, however many connections wait.
func TestResponsesAreNotCutOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, connlimit.Config{Max: 4, MaxWaiting: 2})
		var busy []*link
		for range 4 {
			l := w.connect("10.0.0.1")
			l.server().Begin()
			busy = append(busy, l)
		}
		other := w.connect("10.0.0.2")
		time.Sleep(900 * time.Millisecond)
		if n := len(open(busy)); n != 4 || other.server() != nil {
			t.Fatalf("%d of 4 responses continue, and another address has a place: %v", n, other.server() != nil)
		}
		time.Sleep(200 * time.Millisecond)
		if n := len(open(busy)); n != 3 || other.server() == nil {
			t.Errorf("after a second, %d of 4 responses continue, and another address has a place: %v", n, other.server() != nil)
		}
	})
}

func TestConfig(t *testing.T) {
	for _, cfg := range []connlimit.Config{{}, {Max: 1}, {RequestTime: 1}, {Max: -1, RequestTime: 1}} {
		if _, err := connlimit.New(cfg); err == nil {
			t.Errorf("New accepts %+v", cfg)
		}
	}
	if len(connlimit.Causes()) != len(connlimit.Stats{}.Closed) {
		t.Error("Causes has another length than Stats.Closed")
	}
}

// After any sequence of events, the limits hold, and the stats are correct.
func TestRandomLives(t *testing.T) {
	for seed := range uint64(20) {
		synctest.Test(t, func(t *testing.T) {
			random := rand.New(rand.NewPCG(seed, 1))
			w := newWorld(t, connlimit.Config{
				Max: 8, MaxAuthenticated: 5, MaxWaiting: 3, RequestTime: 5 * time.Second, IdleTime: 3 * time.Second, Handshakes: 2,
			})
			var links []*link
			for range 2000 {
				if random.IntN(3) == 0 || len(links) == 0 {
					address := netip.AddrFrom16([16]byte{0: 0xfd, 7: byte(random.IntN(2)), 15: byte(random.IntN(3))})
					if seed%2 == 0 {
						address = netip.AddrFrom4([4]byte{10, 0, 0, byte(random.IntN(4))})
					}
					links = append(links, w.connect(address.String()))
				}
				l := links[random.IntN(len(links))]
				if l.server() == nil {
					continue
				}
				switch random.IntN(7) {
				case 0:
					go func() { _, _ = l.client.Write([]byte("x")) }()
					go func() { _, _ = l.server().Read(make([]byte, 1)) }()
				case 1:
					l.server().Handshaken()
				case 2:
					l.server().Begin()
				case 3:
					l.server().Authenticated(string('a'+rune(random.IntN(3))), "")
				case 4:
					l.server().End()
				case 5:
					_ = l.server().Close()
				case 6:
					time.Sleep(time.Duration(random.IntN(1000)) * time.Millisecond)
				}
				for n := len(links) + 1; n > len(links); { // closing one can let another in, for which one more gives way
					n = len(links)
					links = slices.DeleteFunc(links, func(l *link) bool { return l.closed() })
				}
				s := w.limiter.Stats()
				if s.Unauthenticated > 8 || s.Authenticated > 5 || s.Waiting > 3 || s.Unauthenticated+s.Authenticated+s.Waiting != len(links) {
					t.Fatalf("seed %d: %d connections are open, but stats are %+v", seed, len(links), s)
				}
			}
			for range 4 { // closing connections lets waiting ones in
				for _, l := range links {
					if l.server() != nil {
						_ = l.server().Close()
					}
				}
				synctest.Wait()
			}
			if s := w.limiter.Stats(); s.Unauthenticated+s.Authenticated != 0 {
				t.Errorf("seed %d: no connection is open, but stats are %+v", seed, s)
			}
		})
	}
}
