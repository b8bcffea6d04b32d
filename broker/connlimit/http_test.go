package connlimit_test

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"testing"
	"time"

	"github.com/credence-iam/credence/broker/connlimit"
)

// A kept-alive connection is not idle when its next request begins to arrive: another connection gives way.
func TestNextRequestOfAConnection(t *testing.T) {
	limiter, err := connlimit.New(connlimit.Config{Max: 2, MaxWaiting: 1, RequestTime: time.Minute})
	if err != nil {
		t.Fatal(err)
	}
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	begun := make(chan struct{}, 9)
	server := &http.Server{ReadHeaderTimeout: time.Minute, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		begun <- struct{}{}
		body, err := io.ReadAll(r.Body)
		fmt.Fprint(w, len(body), err)
	})}
	connlimit.HTTP(server)
	idle, changed := make(chan struct{}, 9), server.ConnState
	server.ConnState = func(conn net.Conn, state http.ConnState) {
		if changed(conn, state); state == http.StateIdle {
			idle <- struct{}{}
		}
	}
	served := make(chan error, 1)
	go func() { served <- server.Serve(limiter.Listen(inner)) }()
	t.Cleanup(func() {
		_ = server.Close()
		if err := <-served; !errors.Is(err, http.ErrServerClosed) {
			t.Error(err)
		}
	})
	dial := func(address string) (net.Conn, *bufio.Reader) {
		t.Helper()
		conn, err := (&net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(address)}}).DialContext(t.Context(), "tcp", inner.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = conn.Close() })
		_ = conn.SetDeadline(time.Now().Add(time.Minute)) // only a failing test reaches it
		return conn, bufio.NewReader(conn)
	}
	send := func(conn net.Conn, text string) {
		t.Helper()
		if _, err := io.WriteString(conn, text); err != nil {
			t.Fatal(err)
		}
	}
	const headers = "POST / HTTP/1.1\r\nHost: test\r\nContent-Length: 2\r\n\r\n"
	read := func(from *bufio.Reader) error {
		response, err := http.ReadResponse(from, nil)
		if err != nil {
			return err
		}
		defer response.Body.Close()
		if body, err := io.ReadAll(response.Body); err != nil || string(body) != "2 <nil>" {
			return fmt.Errorf("the response is %q, %w", body, err)
		}
		return nil
	}
	first, fromFirst := dial("127.0.0.1")
	second, fromSecond := dial("127.0.0.1")
	exchange := func(conn net.Conn, from *bufio.Reader) {
		t.Helper()
		send(conn, headers+"ab")
		<-begun
		if err := read(from); err != nil {
			t.Fatal(err)
		}
		<-idle
	}
	exchange(first, fromFirst) // both are idle then, the first for longer
	exchange(second, fromSecond)
	send(first, headers+"a")
	<-begun
	third, fromThird := dial("127.0.0.2")
	send(third, headers+"ab")
	if err := read(fromThird); err != nil {
		t.Errorf("connection of another address: %v", err)
	}
	_, _ = io.WriteString(first, "b")
	if err := read(fromFirst); err != nil {
		t.Fatalf("connection with the arriving request: %v", err)
	}
	if err := read(fromSecond); !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("idle connection: %v", err)
	}
}
