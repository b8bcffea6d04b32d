// Command credence-sidecar serves a pod's AWS credentials to the SDKs in that pod. The webhook adds it to
// pods as their first container, and sets the environment variables that are the defaults of its flags.
// With the argument probe it waits until the serving process has credentials, and fails now and then to report why there
// are none. With the argument check it requests credentials as an SDK does.
//
// It logs JSON to standard error. It exits with 0 after SIGTERM or SIGINT, with 1 after a failure, and with
// 2 if its flags are invalid. It does not exit because the broker is unavailable.
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
	_ "github.com/credence-iam/credence/cmd/internal/twoprocessors" // saves memory on large nodes, see docs/performance.md
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
		return sidecar.Probe(ctx, o.listen, o.authorization)
	}
	if o.check {
		line, err := sidecar.Check(ctx, os.Getenv("AWS_CONTAINER_CREDENTIALS_FULL_URI"), os.Getenv("AWS_CONTAINER_AUTHORIZATION_TOKEN"))
		if err == nil {
			_, err = fmt.Println(line)
		}
		return err
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
		Source: memorySaver{broker}, Authorization: o.authorization, Metadata: policy.Metadata(o.metadata), Zone: o.zone,
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

// memoryLimit limits the heap during bursts of requests. When idle, the runtime counts 7 MB as its own, of
// which it has used less than 4. So 4 MB of heap remain. With 8 MiB it collected garbage all the time.
const memoryLimit = 11 << 20

// saveMemory turns off the collector's own schedule, which first collects at a heap of 4 MB and then every two
// minutes. The program collects after each fetch instead.
//
// The start allocates 1.4 MB, of which 0.65 MB stay in use. Each fetch allocates 0.13 MB. Anonymous memory after
// the first and the tenth fetch was: 3.3 and 4.6 MB (and growing) with Go's defaults, 3.3 and 5.3 MB with only
// the limit, 2.8 and 3.6 MB with this. GOGC=20 costs 0.8 MB more from the start, because a collector that runs
// during the start needs its own stacks and queues.
func saveMemory() {
	debug.SetGCPercent(-1)
	debug.SetMemoryLimit(memoryLimit)
}

// memorySaver is a source that returns the memory of its connection to the system a second after each fetch. By then,
// the application has the credentials that it may have waited for.
type memorySaver struct{ sidecar.Source }

// Credentials implements [sidecar.Source].
func (m memorySaver) Credentials(ctx context.Context) (credential.Lease, error) {
	defer time.AfterFunc(time.Second, debug.FreeOSMemory)
	return m.Source.Credentials(ctx)
}
