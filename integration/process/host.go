//go:build unix

package process

import (
	"context"
	"net"
	"os/exec"
)

// A Host is where programs of a run can run and find each other: this machine, or one of namespaces.
type Host interface {
	// Start starts a program of the run there.
	Start(Command) (*Process, error)
	// Address is the IP address at which servers there listen.
	Address() string
	// Dial connects from there to an IP address.
	Dial(ctx context.Context, network, address string) (net.Conn, error)
	// Listen listens there on an IP address.
	Listen(ctx context.Context, network, address string) (net.Listener, error)
	// Launch starts a command that sees the network there, and otherwise what its caller sees. It does not
	// belong to the run.
	Launch(*exec.Cmd) error
}

// Loopback returns this machine as a host: programs listen on its loopback address, and need no root.
func (r *Run) Loopback() Host { return loopback{r} }

type loopback struct{ run *Run }

func (l loopback) Start(c Command) (*Process, error) { return l.run.Start(c) }
func (l loopback) Address() string                   { return "127.0.0.1" }
func (l loopback) Launch(cmd *exec.Cmd) error        { return cmd.Start() }

func (l loopback) Dial(ctx context.Context, network, address string) (net.Conn, error) {
	return new(net.Dialer).DialContext(ctx, network, address)
}

func (l loopback) Listen(ctx context.Context, network, address string) (net.Listener, error) {
	return new(net.ListenConfig).Listen(ctx, network, address)
}
