package main

import (
	"fmt"
	"net"
	"strconv"

	"github.com/spf13/cobra"

	"github.com/credence-iam/credence/operator/dashboard"
)

// newDashboard returns the command dashboard.
func newDashboard(c *cluster) *cobra.Command {
	command := &cobra.Command{
		Use:   "dashboard [--port=PORT]",
		Short: "serve a page for your browser with the state of Credence",
		Long: `Serves one page on this machine, for your browser: health, sessions and their time left, STS, refusals, brokers, and
the budget of STS calls. Prints its URL, and serves until you press Ctrl-C. The page only shows, and refreshes itself.

It needs the rights "get deployments", "list pods" and "create pods/portforward" in the namespace of Credence, and
"list events" in all namespaces for the pods that are refused. It says which right is missing.`,
		Example: `  credence dashboard
  credence dashboard --port=8090 --context=production`,
		Args: noArguments,
	}
	port := command.Flags().Uint16("port", 0, "`port` on 127.0.0.1; 0: one that is free")
	command.RunE = func(command *cobra.Command, _ []string) error {
		ctx := command.Context()
		client, found, err := c.find(ctx)
		if err != nil {
			return err
		}
		name := c.name(client)
		gatherer := &dashboard.Gatherer{Client: client, Cluster: name, Namespace: found.Namespace, Target: c.target()}
		d, err := dashboard.New(dashboard.Config{Gather: gatherer.Gather})
		if err != nil {
			return err
		}
		var config net.ListenConfig
		listener, err := config.Listen(ctx, "tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(int(*port))))
		if err != nil {
			return fmt.Errorf("cannot listen; choose another --port, or none: %w", err)
		}
		_, _ = fmt.Fprintf(command.ErrOrStderr(), "Shows Credence in %s, namespace %s, to everyone who knows this URL on this machine. Ctrl-C ends it.\n", name, found.Namespace)
		_, _ = fmt.Fprintf(command.OutOrStdout(), "http://%s%s\n", listener.Addr(), d.Path())
		return d.Serve(ctx, listener)
	}
	return command
}
