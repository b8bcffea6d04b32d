package main

import (
	"context"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"k8s.io/cli-runtime/pkg/genericclioptions"

	"github.com/credence-iam/credence/operator/installation"
)

// cluster is the cluster that the flags of the command line name, as kubectl's flags do.
type cluster struct {
	flags *genericclioptions.ConfigFlags
	// namespace of Credence; empty: find it
	credence string
}

// frequent are the flags of kubectl that --help shows. The others work, too.
var frequent = map[string]bool{"namespace": true, "context": true, "kubeconfig": true}

// newCluster defines the flags of all commands.
func newCluster(root *cobra.Command) *cluster {
	c := &cluster{flags: genericclioptions.NewConfigFlags(true)}
	f := root.PersistentFlags()
	c.flags.AddFlags(f)
	f.VisitAll(func(flag *pflag.Flag) { flag.Hidden = !frequent[flag.Name] })
	f.Lookup("namespace").Usage = "`name` of the namespace; by default that of the context"
	f.Lookup("context").Usage = "`name` of the context of the kubeconfig"
	f.Lookup("kubeconfig").Usage = "`file` with the access to the cluster"
	f.StringVar(&c.credence, "credence-namespace", "", "`name` of the namespace in which Credence is installed; by default it is looked for")
	return c
}

// client returns access to the cluster.
func (c *cluster) client() (*installation.Client, error) {
	config, err := c.flags.ToRESTConfig()
	if err != nil {
		return nil, err
	}
	// A diagnosis makes many small requests at once. The API server has its own limits.
	config.QPS, config.Burst = 100, 200
	return installation.NewClient(config)
}

// find returns access to the cluster and what it has of Credence.
func (c *cluster) find(ctx context.Context) (*installation.Client, *installation.Installation, error) {
	client, err := c.client()
	if err != nil {
		return nil, nil, err
	}
	found, err := client.Find(ctx, c.credence)
	return client, found, err
}

// namespaceOrDefault returns the namespace of --namespace, or that of the context.
func (c *cluster) namespaceOrDefault() (string, error) {
	name, _, err := c.flags.ToRawKubeConfigLoader().Namespace()
	return name, err
}
