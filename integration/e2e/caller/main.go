// Command caller calls the broker ten times a second, as the sidecar of its pod does, each time on a new connection. It
// prints a line for each failed call, and the number of calls from time to time.
//
// It reads the variables that the webhook sets for sidecars.
package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/credence-iam/credence/broker/client"
	"github.com/credence-iam/credence/broker/policy"
	"github.com/credence-iam/credence/certs"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "caller:", err)
		os.Exit(1)
	}
}

const (
	// pause is the time between two calls.
	pause = 100 * time.Millisecond
	// patience is the timeout of a call, as in a sidecar.
	patience = 10 * time.Second
	// every is the number of calls between two lines.
	every = 10
)

func run(ctx context.Context, out io.Writer) error {
	roots, err := certs.NewRoots(os.Getenv("CREDENCE_ROOTS_FILE"), slog.New(slog.NewTextHandler(out, nil)))
	if err != nil {
		return err
	}
	broker, err := client.New(client.Config{
		Target: os.Getenv("CREDENCE_BROKER"), RoutingKey: policy.RoutingKey(os.Getenv("CREDENCE_ROUTING_KEY")),
		TLS: certs.ClientConfig(roots, ""), TokenFile: os.Getenv("CREDENCE_TOKEN_FILE"),
	})
	if err != nil {
		return err
	}
	for calls := 1; ctx.Err() == nil; calls++ {
		call, cancel := context.WithTimeout(ctx, patience)
		_, err := broker.Credentials(call)
		cancel()
		if err != nil && ctx.Err() == nil {
			_, _ = fmt.Fprintln(out, "FAILED", err)
		}
		if calls%every == 0 {
			_, _ = fmt.Fprintln(out, "calls", calls)
		}
		time.Sleep(pause)
	}
	return nil
}
