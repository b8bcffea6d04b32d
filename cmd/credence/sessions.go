package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"k8s.io/apimachinery/pkg/util/validation"

	"github.com/credence-iam/credence/operator/finding"
	"github.com/credence-iam/credence/operator/installation"
	"github.com/credence-iam/credence/operator/sessions"
)

// newSessions returns the command sessions.
func newSessions(c *cluster) *cobra.Command {
	var (
		q     sessions.Query
		pod   string
		watch bool
	)
	command := &cobra.Command{
		Use:   "sessions [--role ROLE] [--pod NAME] [--failing] [--watch] [-o json|wide]",
		Short: "show the AWS sessions of all brokers",
		Long: `Shows the sessions of all brokers in one table, from each broker's debug page by port-forward.
It exits with 1 if a broker cannot be read, if --failing shows a session, or if --pod shows none.

It needs, in the namespace of Credence: list pods, create pods/portforward.`,
		Example: `  credence sessions --failing
  credence sessions --pod cart-7d4b9c-x2x5q -n shop
  credence sessions drop --role cart`,
		Args: noArguments,
	}
	f := command.Flags()
	f.StringVar(&q.Role, "role", "", "show the sessions of one role: its `ARN` or name")
	f.StringVar(&pod, "pod", "", "show the session of one pod: its `name`, in the namespace of -n")
	f.BoolVar(&q.Failing, "failing", false, "show only sessions whose last fetch failed")
	f.BoolVarP(&watch, "watch", "w", false, "show again every 3 s, until interrupted")
	output := newOutput(command, formatJSON, "wide")
	command.RunE = func(command *cobra.Command, _ []string) error {
		if err := sessions.CheckRole(q.Role); err != nil {
			return wrongFlags(err)
		}
		if pod != "" {
			namespace, err := c.namespaceOrDefault()
			if err != nil {
				return err
			}
			if len(validation.IsDNS1123Subdomain(pod)) > 0 {
				return wrongFlags(fmt.Errorf("--pod: %q is not a valid name of a pod", pod))
			}
			q.Pod = namespace + "/" + pod
		}
		client, found, err := c.find(command.Context())
		if err != nil {
			return err
		}
		show := func() error {
			return c.showSessions(command, client, found.Namespace, q, sessions.Format(output.format))
		}
		if watch {
			return repeat(command, show)
		}
		return show()
	}
	for _, what := range []sessions.Command{sessions.Renew, sessions.Drop} {
		command.AddCommand(newCommand(c, what))
	}
	command.AddCommand(newWho(c))
	return command
}

// showSessions shows all sessions once.
func (c *cluster) showSessions(command *cobra.Command, client *installation.Client, namespace string, q sessions.Query, format sessions.Format) error {
	snapshot, err := sessions.Gather(command.Context(), client, namespace, q)
	if err != nil {
		return err
	}
	rows := snapshot.Rows(q)
	if err := snapshot.Write(command.OutOrStdout(), rows, format); err != nil {
		return err
	}
	switch {
	case snapshot.Failed():
		return errFound
	case len(rows) > 0 && q.Failing:
		return errFound
	case len(rows) > 0 || format == sessions.JSON && q.Pod == "":
		return nil
	case q.Pod != "":
		namespace, name, _ := strings.Cut(q.Pod, "/")
		_, _ = fmt.Fprintf(command.ErrOrStderr(), "no broker has a session for pod %s; the pod's Events may have the reason: %s\n", q.Pod, c.target().Kubectl("-n", namespace, "describe", "pod", name))
		return errFound
	}
	_, _ = fmt.Fprintf(command.ErrOrStderr(), "no session in %d brokers\n", len(snapshot.Brokers))
	return nil
}

// repeat calls show until the user interrupts. An error does not end it, because brokers come and go.
func repeat(command *cobra.Command, show func() error) error {
	ctx, out := command.Context(), command.OutOrStdout()
	for ctx.Err() == nil {
		if isTerminal(out) {
			_, _ = io.WriteString(out, "\x1b[H\x1b[2J")
		}
		if err := show(); err != nil && !errors.Is(err, errFound) && ctx.Err() == nil {
			_, _ = fmt.Fprintln(command.ErrOrStderr(), readable(err))
		}
		wait(ctx, watchInterval)
	}
	return nil
}

// newCommand returns the command that does something with the sessions of a role.
func newCommand(c *cluster, what sessions.Command) *cobra.Command {
	var (
		role string
		yes  bool
	)
	command := &cobra.Command{
		Use:   what.Name + " --role ROLE [--yes] [-o json]",
		Short: what.Name + " the sessions of a role in all brokers",
		Long: strings.ReplaceAll(what.Effect, ". ", ".\n") + `

It shows what it will touch, and waits for a confirmation. It exits with 1 if a broker fails, and names it.
It needs, in the namespace of Credence: list pods, create pods/portforward. If the chart's value rbac.viewer.create is
true, it also needs: create serviceaccounts/token credence-commands.`,
		Example: "  credence sessions " + what.Name + " --role cart\n" +
			"  credence sessions " + what.Name + " --role arn:aws:iam::123456789012:role/cart --yes",
		Args: noArguments,
	}
	f := command.Flags()
	f.StringVar(&role, "role", "", "`ARN` of the role, or its name if only one role has it. Required")
	f.BoolVarP(&yes, "yes", "y", false, "do not wait for a confirmation")
	output := newOutput(command, formatJSON, "wide")
	command.RunE = func(command *cobra.Command, _ []string) error {
		if role == "" {
			return wrongFlags(errors.New("--role is required"))
		}
		if err := sessions.CheckRole(role); err != nil {
			return wrongFlags(err)
		}
		if !yes && !isTerminal(command.InOrStdin()) {
			return errors.New("standard input is no terminal, so nobody can confirm; use --yes")
		}
		client, found, err := c.find(command.Context())
		if err != nil {
			return err
		}
		snapshot, err := sessions.Gather(command.Context(), client, found.Namespace, sessions.Query{Role: role})
		if err != nil {
			return err
		}
		arn, err := snapshot.RoleOf(role)
		if err != nil {
			return err
		}
		if err := what.Preview(command.ErrOrStderr(), snapshot, arn, c.name(client)); err != nil {
			return err
		}
		if !yes && !confirmed(command.Context(), command.InOrStdin(), command.ErrOrStderr(), c.name(client)) {
			return errors.New("not confirmed; nothing was changed")
		}
		all, err := what.Run(command.Context(), client, found, arn)
		if err != nil {
			return err
		}
		ok, err := what.Report(command.OutOrStdout(), arn, all, sessions.Format(output.format))
		if err == nil && !ok {
			err = errFound
		}
		return err
	}
	return command
}

// confirmed asks the user, and reports whether the response is yes. It names the cluster, because the preview may have
// scrolled away.
func confirmed(ctx context.Context, in io.Reader, out io.Writer, cluster string) bool {
	_, _ = fmt.Fprintf(out, "\nContinue in %s? [y/N] ", finding.Printable(cluster))
	line := make(chan string, 1)
	go func() { // Reading cannot be interrupted.
		text, _ := bufio.NewReader(in).ReadString('\n')
		line <- text
	}()
	select {
	case <-ctx.Done():
		return false
	case text := <-line:
		return slices.Contains([]string{"y", "yes"}, strings.ToLower(strings.TrimSpace(text)))
	}
}

// newWho returns the command who.
func newWho(c *cluster) *cobra.Command {
	var (
		s         sessions.Search
		noCluster bool
	)
	command := &cobra.Command{
		Use:   "who [ACCESS_KEY_ID] [--audit FILE]... [--cloudtrail FILE]... [-o json|wide]",
		Short: "show which pods had an access key",
		Long: `Shows which pods had an access key, from the logs and the grants of all brokers and from files of audit lines.
With files of CloudTrail events, it also shows what the key was used for, and which pods had it then. Without
ACCESS_KEY_ID, it does so for all temporary keys in these files.

It exits with 1 if no pod is known, or if a source could not be read to its end.
It needs, in the namespace of Credence: list pods, get pods/log, create pods/portforward. --files-only needs nothing.`,
		Example: `  credence sessions who ASIAIOSFODNN7EXAMPLE
  credence sessions who --audit audit.jsonl --cloudtrail events.json.gz`,
		Args: func(_ *cobra.Command, args []string) error {
			switch {
			case len(args) > 1:
				return usageError{fmt.Errorf("unexpected argument %q; name one access key ID", args[1]), "flags"}
			case len(args) == 1 && !validKey(args[0]):
				return usageError{fmt.Errorf("%.130q is no access key ID; it has 16 to 128 letters and digits, such as ASIAIOSFODNN7EXAMPLE", args[0]), "flags"}
			}
			return nil
		},
	}
	f := command.Flags()
	f.Var((*names)(&s.AuditFiles), "audit", "`file` with lines of the audit log, gzip or not, - for standard input; may be repeated")
	f.Var((*names)(&s.Trails), "cloudtrail", "`file` with CloudTrail events, gzip or not, - for standard input; may be repeated")
	f.BoolVar(&noCluster, "files-only", false, "read only files, not the cluster")
	output := newOutput(command, formatJSON, "wide")
	command.RunE = func(command *cobra.Command, args []string) error {
		if len(args) == 1 {
			s.Key = args[0]
		}
		switch {
		case s.Key == "" && len(s.Trails) == 0:
			return usageError{errors.New("an access key ID or --cloudtrail is required"), "flags"}
		case noCluster && len(s.AuditFiles) == 0:
			return wrongFlags(errors.New("--files-only needs --audit"))
		}
		s.Stdin = interruptible(command.Context(), command.InOrStdin())
		if !noCluster {
			client, found, err := c.find(command.Context())
			if err != nil {
				return err
			}
			s.Client, s.Namespace = client, found.Namespace
		}
		sources, err := s.Gather(command.Context())
		if err != nil {
			return err
		}
		keys := sources.Keys(s.Key)
		if err := sessions.WriteKeys(command.OutOrStdout(), keys, sources.Problems, sessions.Format(output.format)); err != nil {
			return err
		}
		known := func(k sessions.Key) bool { return len(k.Pods) > 0 }
		if !slices.ContainsFunc(keys, known) || len(sources.Problems) > 0 {
			return errFound
		}
		return nil
	}
	return command
}

// validKey reports whether text can be an access key ID (IAM API reference, AccessKey).
func validKey(text string) bool {
	other := func(r rune) bool {
		return r != '_' && (r < '0' || r > '9') && (r < 'A' || r > 'Z') && (r < 'a' || r > 'z')
	}
	return len(text) >= 16 && len(text) <= 128 && !strings.ContainsFunc(text, other)
}
