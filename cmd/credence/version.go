package main

import (
	"errors"
	"io"

	"github.com/spf13/cobra"

	"github.com/credence-iam/credence/cmd/internal/program"
	"github.com/credence-iam/credence/operator/finding"
	"github.com/credence-iam/credence/operator/versions"
)

// newVersion returns the command version.
func newVersion(c *cluster) *cobra.Command {
	var (
		client bool
	)
	command := &cobra.Command{
		Use:   "version",
		Short: "show the versions of this command, of Credence in the cluster and of Kubernetes",
		Long: `Shows the version of this command, of Kubernetes, and of each part of Credence in the cluster: webhook, brokers, and the
sidecars in running pods, which keep their version until their pod is replaced.

Exits with 1 if two parts are more than one minor version apart, or if the cluster is unavailable.`,
		Example: `  credence version
  credence version -o json
  credence version --client`,
		Args: noArguments,
	}
	f := command.Flags()
	output := newOutput(command, formatJSON)
	f.BoolVar(&client, "client", false, "show only the version of this command, without a cluster")
	command.RunE = func(command *cobra.Command, _ []string) error {
		report, failed := versions.Report{Client: program.Version()}, error(nil)
		if !client {
			report, failed = readVersions(command, c)
		}
		write := report.Write
		if output.json() {
			write = func(w io.Writer) error { return finding.WriteJSON(w, report) }
		}
		if err := errors.Join(failed, write(command.OutOrStdout())); err != nil {
			return err
		}
		if report.Found() {
			return errFound
		}
		return nil
	}
	return command
}

// readVersions reads all versions. It returns that of the client in any case.
func readVersions(command *cobra.Command, c *cluster) (versions.Report, error) {
	report := versions.Report{Client: program.Version()}
	client, err := c.client()
	if err != nil {
		return report, err
	}
	namespace, err := c.namespaceOrDefault()
	if err != nil {
		return report, err
	}
	return versions.Read(command.Context(), versions.Config{
		Client: client, Cluster: c.name(client), Version: program.Version(), Target: c.target(), Installed: c.credence, Namespace: namespace,
	})
}
