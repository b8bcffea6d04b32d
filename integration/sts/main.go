// Command sts runs ststest, the STS double, as a process.
//
// Its first line on stdout is "listening on http://ADDRESS". Each call adds one line
// of JSON, without secrets. The command exits on SIGINT or SIGTERM.
//
// The environment has the keys of the broker's own credentials in AWS_ACCESS_KEY_ID
// and AWS_SECRET_ACCESS_KEY.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/credence-iam/credence/broker/assume/ststest"
	"github.com/credence-iam/credence/broker/credential"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:], os.Getenv, os.Stdout); err != nil && !errors.Is(err, flag.ErrHelp) {
		fmt.Fprintln(os.Stderr, "sts:", err)
		os.Exit(1)
	}
}

// run serves until ctx is canceled.
func run(ctx context.Context, args []string, getenv func(string) string, stdout io.Writer) error {
	flags := flag.NewFlagSet("sts", flag.ContinueOnError)
	listen := flags.String("listen", "127.0.0.1:0", "`address` to listen on; port 0 chooses a free one")
	account := flags.String("account", "123456789012", "AWS `account` of the broker's own credentials")
	latency := flags.Duration("latency", 0, "`time` to wait before each response to AssumeRole")
	limit := flags.Duration("session-life", 0, "maximum session `duration`; 0 sets none")
	if err := flags.Parse(args); err != nil {
		return err
	}
	cfg := ststest.Config{
		Account:         *account,
		AccessKeyID:     getenv("AWS_ACCESS_KEY_ID"),
		SecretAccessKey: credential.NewSecret(getenv("AWS_SECRET_ACCESS_KEY")),
		Default:         ststest.Behavior{Latency: *latency},
	}
	if cfg.AccessKeyID == "" || cfg.SecretAccessKey.Empty() {
		return errors.New("the broker's own credentials are missing; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
	}
	if *limit > 0 {
		cfg.SessionDuration = func(requested time.Duration) time.Duration { return min(requested, *limit) }
	}
	cfg.OnCall = func(c ststest.Call) { _ = json.NewEncoder(stdout).Encode(c) } // the service continues without a reader
	server, err := ststest.New(cfg)
	if err != nil {
		return err
	}
	l, err := new(net.ListenConfig).Listen(ctx, "tcp", *listen)
	if err != nil {
		return fmt.Errorf("listening on --listen %s: %w", *listen, err)
	}
	if _, err := fmt.Fprintf(stdout, "listening on http://%s\n", l.Addr()); err != nil {
		return fmt.Errorf("announcing the address: %w", err)
	}
	s := &http.Server{Handler: server, ReadHeaderTimeout: 10 * time.Second}
	defer context.AfterFunc(ctx, func() { _ = s.Close() })()
	if err := s.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serving STS: %w", err)
	}
	return nil
}
