// Command credence-sidecar serves a pod's AWS credentials to the SDKs in that pod. The webhook adds it
// to pods as their first container, and sets the environment variables that are the defaults of its
// flags. With the argument probe it waits until the one that serves has credentials.
//
// It logs JSON to standard error. It exits with 0 after SIGTERM or SIGINT, 1 when it cannot go on,
// and 2 when its flags cannot be right. A broker that is away is no reason to exit.
package main

import (
	"context"
	"fmt"
	"net"
	"os"
	"runtime/debug"
	"time"

	"github.com/credence-iam/credence/broker/client"
	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/policy"
	"github.com/credence-iam/credence/certs"
	"github.com/credence-iam/credence/cmd/internal/program"
	_ "github.com/credence-iam/credence/cmd/internal/twoprocessors" // less memory on large nodes: docs/performance.md
	"github.com/credence-iam/credence/sidecar"
)

func main() {
	program.Program[options]{
		Name:  "credence-sidecar",
		Usage: usage,
		Flags: flags,
		Run:   run,
	}.Main()
}

func run(ctx context.Context, o options) error {
	if o.probe {
		return sidecar.Probe(ctx, o.listen)
	}
	log := program.NewLogger(os.Stderr, o.level)
	roots, err := certs.NewRoots(o.rootsFile, log)
	if err != nil {
		return fmt.Errorf("--roots-file: %w", err)
	}
	broker, err := client.New(client.Config{
		Target: o.broker, DNSName: o.dnsName, RoutingKey: o.key(), TLS: certs.ClientConfig(roots, ""), TokenFile: o.tokenFile,
	})
	if err != nil {
		return fmt.Errorf("--broker: %w", err)
	}
	s, err := sidecar.New(sidecar.Config{
		Source: thrifty{broker}, Authorization: o.authorization, Metadata: policy.Metadata(o.metadata), Zone: o.zone,
		StartTimeout: o.startTimeout, Logger: log,
	})
	if err != nil {
		return err
	}
	listener, err := new(net.ListenConfig).Listen(ctx, "tcp", o.listen)
	if err != nil {
		return fmt.Errorf("--listen: %w", err)
	}
	saveMemory()
	return s.Run(ctx, listener)
}

// memoryLimit is a backstop for bursts of requests. The runtime counts 7 MB as its own at rest, of
// which it has touched less than 4, so it leaves 4 MB of heap; with 8 MiB it collected all the time.
const memoryLimit = 11 << 20

// saveMemory makes the heap be collected when there is something to collect, instead of when it has
// grown to 4 MB, and every two minutes from then on.
//
// Starting allocates 1.4 MB, 0.65 of which stay in use, and each fetch 0.13 MB. Measured over ten
// fetches, by anonymous memory after the first and the last: 3.3 and 4.6 MB (and growing) with Go's
// defaults, 3.3 and 5.3 with the limit alone, 2.8 and 3.6 as it is here. GOGC=20 costs 0.8 MB more from the start:
// a collector that runs while the program starts needs stacks and queues of its own.
func saveMemory() {
	debug.SetGCPercent(-1)
	debug.SetMemoryLimit(memoryLimit)
}

// thrifty is a source that gives the memory of its connection back to the system, a moment later:
// by then the credentials that the application may be waiting for have been served.
type thrifty struct{ sidecar.Source }

// Credentials implements [sidecar.Source].
func (t thrifty) Credentials(ctx context.Context) (credential.Lease, error) {
	defer time.AfterFunc(time.Second, debug.FreeOSMemory)
	return t.Source.Credentials(ctx)
}
