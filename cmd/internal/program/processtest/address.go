package processtest

import (
	"net"
	"testing"
)

// FreeAddress returns a free loopback address. Another process may take it before the program does.
func FreeAddress(t testing.TB) string {
	t.Helper()
	listener, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	Must(t, err)
	defer func() { _ = listener.Close() }()
	return listener.Addr().String()
}

// Must ends the test if err is not nil.
func Must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
