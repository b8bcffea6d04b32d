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
// A client that is not installed is reported as not run, which is no failure. One whose driver cannot be built or
// started, and anything else than what is expected, makes the exit status 1, after all results are written. Ctrl-C
// ends all programs that were started, and writes nothing; a second one does not wait for them.
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
	// From the first signal on, another one has its usual effect.
	done := context.AfterFunc(ctx, func() {
		stop()
		fmt.Fprintln(os.Stderr, "sdks: ending what was started; Ctrl-C again ends this at once")
	})
	err := run(ctx, os.Args[1:], os.Stderr)
	interrupted := ctx.Err() != nil
	done()
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
	return finish(report, o, root, progress)
}

// finish writes what was found, and says how it is.
func finish(report *Report, o options, root string, progress io.Writer) error {
	say := func(format string, args ...any) { _, _ = fmt.Fprintf(progress, format+"\n", args...) }
	figures := filepath.Join(root, ".build", "sdks", "sdks.json")
	if err := report.write(figures); err != nil {
		return err
	}
	say("\nAll figures are in %s.", figures)
	file := filepath.Join(root, pagePath)
	switch {
	case len(o.only) > 0:
		say("%s is as it was: with -only it is not written.", file)
	case o.life != defaultLife:
		say("%s is as it was: with another -life than %v it is not written.", file, defaultLife)
	default:
		if err := os.WriteFile(file, page(report), 0o644); err != nil { //nolint:gosec // G306: a page is for all to read.
			return fmt.Errorf("writing the page: %w", err)
		}
		say("The page is written to %s; \"git diff\" shows what is new.", file)
	}
	unmet := report.unmet()
	for _, line := range unmet {
		say("NOT AS EXPECTED: %s", line)
	}
	if len(unmet) > 0 {
		return fmt.Errorf("%d results are not as expected; what is expected stands in integration/sdks/clients.go", len(unmet))
	}
	cells, rows := 0, 0
	for _, row := range report.Rows {
		if row.run() {
			cells, rows = cells+len(row.Cells), rows+1
		}
	}
	say("All is as expected: %d results of %d clients and paths; %d were not run.", cells, rows, len(report.Rows)-rows)
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
func measure(ctx context.Context, o options, root string, progress io.Writer) (report *Report, err error) {
	_, _ = fmt.Fprintln(progress, "This takes some minutes: it builds Credence, starts a control plane, and lets sessions end twice. Ctrl-C ends it.")
	control, err := cluster.Start(ctx, cluster.Config{Progress: progress})
	if err != nil {
		return nil, err
	}
	defer func() {
		switch {
		case ctx.Err() != nil:
		case err != nil:
			control.Run().KeepLogs()
			err = fmt.Errorf("%w\nlogs are kept for a day in %s", err, control.Logs())
		case len(report.unmet()) > 0:
			control.Run().KeepLogs()
			_, _ = fmt.Fprintf(progress, "Logs of all programs are kept for a day in %s.\n", control.Logs())
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
	dir := control.Run().Dir()
	m := &matrix{world: &real{stack: credence, dir: dir, logs: control.Logs()}, life: o.life, progress: progress, heavy: make(chan struct{}, heavySideBySide)}
	defer m.close()
	f := finder{root: root, bin: filepath.Join(dir, "bin"), home: filepath.Join(dir, "homes", "finder"), progress: progress}
	if err := os.MkdirAll(f.home, 0o700); err != nil {
		return nil, fmt.Errorf("making a home: %w", err)
	}
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
