//go:build unix

// Command sdks runs the AWS SDKs that are in use, as they are, against the real sidecar and the real broker on a
// control plane, and writes down what their users see.
//
//	go run ./integration/sdks [flags]
//
// Each client is a program of its own below clients, which this one starts with the environment of an injected
// pod. All clients live through the same: first credentials, many new sessions, a renewal, a broker that goes
// away, for longer than credentials last, and comes back; and each meets a refused role, a broker that takes
// longer than a second, a wrong token, and the look-up of the region. What is expected of each stands in the
// code. The results go to docs/sdk-compatibility.md, without figures that change from run to run, and with all
// figures to .build/sdks/sdks.json.
//
// A client that is not installed is reported as not run, which is no failure. Anything else than what is
// expected makes the exit status 1, after all results are written. Ctrl-C ends all programs that were started,
// and writes nothing.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/credence-iam/credence/broker/assume/ststest"
	"github.com/credence-iam/credence/integration/cluster"
	"github.com/credence-iam/credence/integration/stack"
)

// defaultLife is how long sessions last. A broker asks a sidecar to come back no sooner than after half a
// minute, so much less could not be renewed in time.
const defaultLife = 90 * time.Second

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, os.Args[1:], os.Stderr)
	interrupted := ctx.Err() != nil
	stop()
	switch {
	case errors.Is(err, flag.ErrHelp):
	case interrupted:
		fmt.Fprintln(os.Stderr, "sdks: interrupted; nothing was written")
		os.Exit(130) // as shells report Ctrl-C
	case err != nil:
		fmt.Fprintln(os.Stderr, "sdks:", err)
		os.Exit(1)
	}
}

// options are what the flags say.
type options struct {
	life time.Duration
	only []string // names of clients; empty: all
}

func parse(args []string, stderr io.Writer) (o options, err error) {
	flags := flag.NewFlagSet("sdks", flag.ContinueOnError)
	flags.SetOutput(stderr)
	flags.DurationVar(&o.life, "life", defaultLife, "how `long` sessions last, from 70s to 12h; with any but 90s the page is not written")
	only := flags.String("only", "", "comma `list` of clients to run, and not to write the page; default all")
	flags.Usage = func() {
		_, _ = fmt.Fprintln(stderr, "usage: go run ./integration/sdks [flags]\n\nFlags:")
		flags.PrintDefaults()
		_, _ = fmt.Fprintln(stderr, "\nClients:")
		for _, c := range clients {
			_, _ = fmt.Fprintf(stderr, "  %s (%s)\n", c.name, c.about)
		}
	}
	if err := flags.Parse(args); err != nil {
		return o, err
	}
	if *only != "" {
		o.only = strings.Split(*only, ",")
	}
	for _, name := range o.only {
		if !slices.ContainsFunc(clients, func(c client) bool { return c.name == name }) {
			return o, fmt.Errorf("-only: there is no client %q; -h lists them", name)
		}
	}
	switch {
	case flags.NArg() > 0:
		return o, fmt.Errorf("unexpected argument %q: everything is set by flags", flags.Arg(0))
	case o.life < 70*time.Second || o.life > 12*time.Hour:
		return o, errors.New("-life must be from 70s to 12h: a sidecar is told to come back no sooner than after 30s, and at half the life")
	}
	return o, nil
}

func run(ctx context.Context, args []string, progress io.Writer) error {
	o, err := parse(args, progress)
	if err != nil {
		return err
	}
	root, err := checkout(ctx)
	if err != nil {
		return err
	}
	report, err := measure(ctx, o, root, progress)
	if err == nil {
		err = ctx.Err() // what was interrupted is no result
	}
	if err != nil {
		return err
	}
	if err := report.write(filepath.Join(root, ".build", "sdks", "sdks.json")); err != nil {
		return err
	}
	switch {
	case len(o.only) > 0:
		_, _ = fmt.Fprintln(progress, "with -only, the page is not written")
	case o.life != defaultLife:
		_, _ = fmt.Fprintln(progress, "with another -life than the default, the page is not written")
	default:
		if err := os.WriteFile(filepath.Join(root, pagePath), page(report), 0o644); err != nil { //nolint:gosec // G306: a page is for all to read.
			return fmt.Errorf("writing the page: %w", err)
		}
	}
	unmet := report.unmet()
	for _, line := range unmet {
		_, _ = fmt.Fprintln(progress, "NOT AS EXPECTED:", line)
	}
	if len(unmet) > 0 {
		return fmt.Errorf("%d results are not as expected", len(unmet))
	}
	return nil
}

// checkout is the root of the checkout that the working folder lies in.
func checkout(ctx context.Context) (string, error) {
	out, err := exec.CommandContext(ctx, "go", "env", "GOMOD").Output()
	file := strings.TrimSpace(string(out))
	if err == nil && filepath.Base(file) != "go.mod" {
		err = errors.New("run it from within a checkout of Credence")
	}
	if err != nil {
		return "", fmt.Errorf("finding the checkout: %w", err)
	}
	return filepath.Dir(file), nil
}

// measure starts a control plane with Credence on it, runs the matrix there, and ends everything.
func measure(ctx context.Context, o options, root string, progress io.Writer) (_ *Report, err error) {
	control, err := cluster.Start(ctx, cluster.Config{Progress: progress})
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil && ctx.Err() == nil {
			control.Run().KeepLogs()
			err = fmt.Errorf("%w\nlogs are kept for a day in %s", err, control.Logs())
		}
		err = errors.Join(err, control.Stop())
	}()
	credence, err := stack.Start(ctx, stack.Config{Cluster: control, Progress: progress, STS: ststest.Config{
		SessionLife: func(requested time.Duration) time.Duration {
			if requested == shortest {
				return o.life
			}
			return requested
		},
	}})
	if err != nil {
		return nil, err
	}
	defer credence.Close()
	m := &matrix{stack: credence, life: o.life, dir: control.Run().Dir(), logs: control.Logs(), progress: progress}
	defer m.close()
	f := finder{root: root, bin: filepath.Join(control.Run().Dir(), "bin"), progress: progress}
	for _, c := range clients {
		if len(o.only) == 0 || slices.Contains(o.only, c.name) {
			if err := m.add(ctx, c, &f); err != nil {
				return nil, err
			}
		}
	}
	if err := m.run(ctx); err != nil {
		return nil, err
	}
	return m.report(), nil
}
