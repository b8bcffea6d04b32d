package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/credence-iam/credence/cmd/internal/program"
	"github.com/credence-iam/credence/operator/check"
	"github.com/credence-iam/credence/operator/finding"
	"github.com/credence-iam/credence/operator/installation"
)

// checkOptions has the flags of check.
type checkOptions struct {
	before, quiet bool
	wait          time.Duration
	output        *output
	ignore        []string
}

// newCheck returns the command check.
func newCheck(c *cluster) *cobra.Command {
	var o checkOptions
	command := &cobra.Command{
		Use:   "check",
		Short: "find what is wrong with the installation",
		Long: `Checks the installation: versions, webhook, certificates, brokers, sessions, namespaces and pods. Each finding names the
cause, the person who can fix it, and the commands. With -n, it looks at the pods of one namespace only.
It exits with 0 if all is well, and with 1 if something failed or has a warning. It changes nothing.`,
		Example: `  credence check
  credence check --pre --credence-namespace=credence
  credence check --wait=3m --quiet`,
		Args: noArguments,
	}
	f := command.Flags()
	f.BoolVar(&o.before, "pre", false, "check the cluster and your rights before an installation")
	f.BoolVar(&o.quiet, "quiet", false, "print only what is not ok")
	f.DurationVar(&o.wait, "wait", 0, "check again until all is well, at most for this `time`")
	o.output = newOutput(command, formatJSON)
	f.StringSliceVar(&o.ignore, "ignore", nil, "`IDs` of checks to leave out, separated by commas; docs/check.md has them")
	command.RunE = func(command *cobra.Command, _ []string) error {
		if err := o.validate(); err != nil {
			return wrongFlags(err)
		}
		return runCheck(command, c, o)
	}
	return command
}

func (o checkOptions) validate() error {
	if o.wait < 0 {
		return fmt.Errorf("--wait: %s is negative", o.wait)
	}
	for _, id := range o.ignore {
		if ids := check.IDs(); !slices.Contains(ids, id) {
			return fmt.Errorf("--ignore: there is no check %q; there are %s", id, strings.Join(ids, ", "))
		}
	}
	return nil
}

func runCheck(command *cobra.Command, c *cluster, o checkOptions) error {
	client, err := c.client()
	if err != nil {
		return err
	}
	cfg := check.Config{Version: program.Version(), Namespace: c.overrides.Context.Namespace, Ignore: o.ignore, Target: c.target()}
	once := func(ctx context.Context) (*check.Result, error) {
		if o.before {
			namespace := c.credence
			if namespace == "" {
				namespace = installation.DefaultNamespace
			}
			return check.Before(ctx, client, namespace, cfg)
		}
		found, err := client.Find(ctx, c.credence)
		if errors.Is(err, installation.ErrNone) {
			return nil, fmt.Errorf("%w; check --pre looks at a cluster before an installation", err)
		}
		if err != nil {
			return nil, err
		}
		return check.Run(ctx, client, found, cfg)
	}
	var result *check.Result
	if o.wait > 0 {
		result, err = check.Wait(command.Context(), o.wait, once, func(cause string) {
			_, _ = fmt.Fprintln(command.ErrOrStderr(), "waiting:", cause)
		})
	} else {
		result, err = once(command.Context())
	}
	if err != nil {
		return err
	}
	out := command.OutOrStdout()
	if o.output.json() {
		err = finding.WriteJSON(out, result)
	} else {
		err = result.Write(out, finding.Style{Quiet: o.quiet, Color: colored(out)})
	}
	if err == nil && !result.Healthy() {
		return errFound
	}
	return err
}
