// Command credence-broker exchanges the identities of injected pods for AWS credentials.
//
// It serves gRPC over TLS on --listen, health, readiness and metrics over plain HTTP on --admin-listen, and the state of
// each grant on --debug-listen. Its own AWS credentials come from the AWS SDK's default chain. Logs go to standard error and
// audit lines to standard output, both as JSON.
package main

import (
	"context"
	"fmt"
	"net"

	"github.com/credence-iam/credence/cmd/internal/program"
)

func main() {
	program.Program[options]{Name: "credence-broker", Usage: usage, Flags: flags, Run: run}.Main()
}

// run builds the parts and runs them until ctx ends.
func run(ctx context.Context, o options) error {
	program.LimitMemory()
	proxies, err := program.DirectCalls()
	if err != nil {
		return err
	}
	p, err := build(ctx, o)
	if err != nil {
		return err
	}
	if proxies != (program.Proxies{}) {
		p.log.InfoContext(ctx, "Found a proxy for calls to AWS", "https_proxy", proxies.HTTPS, "http_proxy", proxies.HTTP)
	}
	l, err := listen(ctx, o)
	if err != nil {
		return err
	}
	return p.run(ctx, o, l)
}

// listeners are where the broker serves.
type listeners struct {
	calls, admin net.Listener
	debug        net.Listener // nil: no debug pages
}

func listen(ctx context.Context, o options) (l listeners, err error) {
	config := new(net.ListenConfig)
	if l.calls, err = config.Listen(ctx, "tcp", o.listen); err != nil {
		return listeners{}, fmt.Errorf("--listen: %w", err)
	}
	if l.admin, err = config.Listen(ctx, "tcp", o.adminListen); err != nil {
		return listeners{}, fmt.Errorf("--admin-listen: %w", err)
	}
	if o.debugListen == "" {
		return l, nil
	}
	if l.debug, err = config.Listen(ctx, "tcp", o.debugListen); err != nil {
		return listeners{}, fmt.Errorf("--%s: %w", debugListenFlag, err)
	}
	return l, nil
}
