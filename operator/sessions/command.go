package sessions

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sync/errgroup"

	"github.com/credence-iam/credence/broker/clip"
	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/debugapi"
	"github.com/credence-iam/credence/operator/finding"
	"github.com/credence-iam/credence/operator/installation"
)

// Command is something that all brokers do with the sessions of one role.
type Command struct {
	// Name is the word in the command line.
	Name string
	// Path is the page of the brokers.
	Path string
	// Past is the word for what was done.
	Past string
	// Effect says what happens to pods, in sentences.
	Effect string
}

// The commands.
var (
	Renew = Command{
		Name: "renew", Path: debugapi.RenewPath, Past: "renewed",
		Effect: "Brokers fetch new sessions for live pods, and serve the current ones meanwhile. Pods get the new ones when their sidecars call next.",
	}
	Drop = Command{
		Name: "drop", Path: debugapi.DropPath, Past: "dropped",
		Effect: "Brokers forget these sessions and fetch new ones for live pods. Pods keep the credentials that they have until their sidecars call next.\n" +
			"The credentials stay valid in AWS. To end them there, revoke the role's sessions in IAM before this command.",
	}
)

// CheckRole returns an error if role is an invalid ARN. A name can be checked only with a [Snapshot].
func CheckRole(role string) error {
	if !strings.HasPrefix(role, "arn:") {
		return nil
	}
	if _, err := credential.ParseRoleARN(role); err != nil {
		return fmt.Errorf("--role: %w", err)
	}
	return nil
}

// RoleOf returns the ARN of the role that has that name or ARN. A name must be that of one role in the snapshot.
func (s Snapshot) RoleOf(name string) (string, error) {
	if strings.HasPrefix(name, "arn:") {
		return name, CheckRole(name)
	}
	var roles []string
	for _, row := range s.Rows(Query{Role: name}) {
		if _, err := credential.ParseRoleARN(row.Role); err == nil && !slices.Contains(roles, row.Role) {
			roles = append(roles, row.Role)
		}
	}
	switch len(roles) {
	case 0:
		return "", fmt.Errorf("no broker has a session of a role with the name %q; use the role's whole ARN to reach all brokers nevertheless", name)
	case 1:
		return roles[0], nil
	}
	return "", fmt.Errorf("%d roles have the name %q; use one of the ARNs: %s", len(roles), name, first(roles, 5))
}

// Preview prints what the command will touch in each broker. cluster names the cluster, which can be another one than the
// user thinks.
func (c Command) Preview(w io.Writer, s Snapshot, role, cluster string) error {
	var out strings.Builder
	_, _ = fmt.Fprintf(&out, "%s the sessions of %s in %d brokers of namespace %s, %s:\n\n", c.Name, finding.Printable(role), len(s.Brokers), s.Namespace, finding.Printable(cluster))
	t := newTable(&out, maxWide, "BROKER", "SESSIONS", "PODS", "NAMESPACES", "NOTE")
	for _, b := range s.Brokers {
		sessions, pods := 0, 0
		var namespaces []string
		for _, g := range b.Page.Grants {
			if g.Role == role {
				sessions, pods = sessions+1, pods+g.Pods
				namespaces = append(namespaces, g.Namespaces...)
			}
		}
		slices.Sort(namespaces)
		cells := []string{b.Name, strconv.Itoa(sessions), strconv.Itoa(pods), first(slices.Compact(namespaces), 5), ""}
		if b.Err != nil {
			cells = []string{b.Name, "?", "?", "?", b.Err.Error()}
		}
		t.row(cells...)
	}
	_ = t.tabs.Flush() // into a buffer
	_, _ = fmt.Fprintf(&out, "\n%s\n", c.Effect)
	_, err := io.WriteString(w, out.String())
	return err
}

// Done is what one broker did.
type Done struct {
	Broker   string `json:"broker"`
	Sessions int    `json:"sessions"`
	// Error is why the command failed, empty if it did not. The broker may have carried it out nevertheless.
	Error string `json:"error,omitempty"`
}

// Run sends the command to all brokers that run now, at once. It fails only if they cannot be listed, or if they require a
// token that it cannot get.
func (c Command) Run(ctx context.Context, client *installation.Client, found *installation.Installation, role string) ([]Done, error) {
	brokers, err := brokersOf(ctx, client, found.Namespace)
	if err != nil {
		return nil, err
	}
	token, err := client.CommandToken(ctx, found)
	if err != nil {
		return nil, err
	}
	all := make([]Done, len(brokers))
	var group errgroup.Group
	group.SetLimit(readersAtOnce)
	for n, b := range brokers {
		group.Go(func() error {
			all[n].Broker = b.Pod.Name
			result, err := b.Post(ctx, c.Path, role, token)
			if err != nil {
				all[n].Error = clip.Runes(err.Error(), 2*maxWide)
			}
			all[n].Sessions = result.Sessions
			return nil
		})
	}
	return all, group.Wait()
}

// Report prints what the brokers did, and reports whether all of them succeeded.
func (c Command) Report(w io.Writer, role string, all []Done, format Format) (ok bool, err error) {
	failed := 0
	var out strings.Builder
	for _, d := range all {
		if d.Error != "" {
			failed++
			_, _ = fmt.Fprintf(&out, "broker %s: failed: %s\n", finding.Printable(d.Broker), finding.Printable(d.Error))
			continue
		}
		_, _ = fmt.Fprintf(&out, "broker %s: %s %d sessions\n", finding.Printable(d.Broker), c.Past, d.Sessions)
	}
	if failed > 0 {
		_, _ = fmt.Fprintf(&out, "%d of %d brokers failed; run the command again, it does no harm to the others\n", failed, len(all))
	}
	if format == JSON {
		return failed == 0, finding.WriteJSON(w, map[string]any{"command": c.Name, "role": role, "brokers": all})
	}
	_, err = io.WriteString(w, out.String())
	return failed == 0, err
}
