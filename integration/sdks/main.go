//go:build unix

// Command sdks runs unmodified AWS SDKs against the real sidecar and the real broker, on a control plane, and
// checks what their users see. "make sdks" gets the SDKs and runs it; SDKS=go-v2,curl chooses clients.
//
// The table sdks has the clients, their scripts, and the expected results. A script is a program with the
// environment of an injected pod. All clients go through the same scenarios: first credentials, many new
// sessions, a renewal, a broker that is unavailable for longer than a session lasts and returns, a refused role,
// slow first credentials, a wrong token, and the region.
//
// A client that is not installed, and any result other than the expected one, makes the exit status 1. If all
// results are as expected, the command updates the generated parts of docs/sdk-compatibility.md for the clients
// that it ran. Ctrl-C stops all programs that it started, and leaves the page as it is.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/credence-iam/credence/broker/assume/ststest"
	"github.com/credence-iam/credence/integration/cluster"
	"github.com/credence-iam/credence/integration/stack"
	"github.com/credence-iam/credence/integration/tools"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second Ctrl-C does not wait
	only := flag.String("only", "", "comma-separated `names` of the clients to run; all by default")
	flag.Parse()
	if err := run(ctx, *only, os.Stderr); err != nil {
		fmt.Fprintln(os.Stderr, "sdks:", err)
		os.Exit(1)
	}
}

// chosen returns the clients of a comma-separated list; all if it is empty.
func chosen(only string) (list []sdk, err error) {
	if only == "" {
		return sdks, nil
	}
	for name := range strings.SplitSeq(only, ",") {
		i := slices.IndexFunc(sdks, func(s sdk) bool { return s.name == name })
		if i < 0 {
			return nil, fmt.Errorf("unknown client %q in -only; the clients are in integration/sdks/sdks.go", name)
		}
		list = append(list, sdks[i])
	}
	return list, nil
}

func run(ctx context.Context, only string, progress io.Writer) error {
	list, err := chosen(only)
	if err != nil {
		return err
	}
	root, err := tools.Checkout()
	if err != nil {
		return err
	}
	rows, missing, faults, err := measure(ctx, list, root, progress)
	if err != nil {
		return err
	}
	if len(faults) > 0 {
		return fmt.Errorf("not as expected by the table in integration/sdks/sdks.go; the page is unchanged:\n%s", strings.Join(faults, "\n"))
	}
	file := filepath.Join(root, pagePath)
	old, err := os.ReadFile(file)
	if err != nil {
		return fmt.Errorf("reading the page: %w", err)
	}
	updated, err := updatePage(string(old), rows)
	if err != nil {
		return fmt.Errorf("updating %s: %w", pagePath, err)
	}
	if err := os.WriteFile(file, []byte(updated), 0o644); err != nil { //nolint:gosec // G306: everybody may read the page.
		return fmt.Errorf("writing the page: %w", err)
	}
	_, _ = fmt.Fprintf(progress, "All results are as expected. Updated %s.\n", pagePath)
	return errors.Join(missing...)
}

// measure starts a control plane with Credence, runs the scenarios there, and stops everything. It returns the rows,
// an error for each client that is missing, and a line for each result that is not as expected.
func measure(ctx context.Context, list []sdk, root string, progress io.Writer) (rows []*row, missing []error, faults []string, err error) {
	_, _ = fmt.Fprintln(progress, "This takes some minutes: two sessions have to expire. Ctrl-C stops it.")
	control, err := cluster.Start(ctx, cluster.Config{Progress: progress})
	if err != nil {
		return nil, nil, nil, err
	}
	defer func() {
		if ctx.Err() == nil && (err != nil || len(faults) > 0) {
			control.Run().KeepLogs()
			_, _ = fmt.Fprintf(progress, "All logs are kept for a day in %s.\n", control.Logs())
		}
		err = errors.Join(err, control.Stop())
	}()
	credence, err := stack.Start(ctx, stack.Config{Cluster: control, Progress: progress, STS: ststest.Config{
		SessionDuration: func(requested time.Duration) time.Duration {
			if requested == shortest {
				return sessionDuration
			}
			return requested
		},
	}})
	if err != nil {
		return nil, nil, nil, err
	}
	defer credence.Close()
	l := newLab(credence, control.Run().Dir(), control.Logs(), progress)
	defer l.close()
	for _, s := range list {
		command, version, err := l.find(ctx, root, s)
		if err != nil {
			missing = append(missing, fmt.Errorf("%s is missing: %w", s.name, err))
			l.report("%s IS MISSING: %v", s.name, err)
			continue
		}
		l.report("%s: %s, version %s", s.name, s.about, version)
		for _, path := range s.paths {
			l.rows = append(l.rows, &row{sdk: s, path: path, command: command, version: version, results: make(map[string]result)})
		}
	}
	if len(l.rows) == 0 {
		return nil, nil, nil, errors.Join(missing...)
	}
	if err := l.run(ctx); err != nil {
		return nil, nil, nil, err
	}
	if faults, err = l.storms(); err != nil {
		return nil, nil, nil, err
	}
	for _, r := range l.rows {
		faults = append(faults, r.faults()...)
	}
	return l.rows, missing, faults, nil
}
