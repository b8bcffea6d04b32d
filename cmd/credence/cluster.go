package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/credence-iam/credence/cmd/internal/program"
	"github.com/credence-iam/credence/operator/finding"
	"github.com/credence-iam/credence/operator/installation"
)

// watchInterval is the time between two readings of --watch. Each opens connections to brokers, and a kubelet or a sidecar
// needs seconds to react to a change.
const watchInterval = 3 * time.Second

// wait returns after d, or when ctx ends.
func wait(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
}

// cluster is the cluster that the flags of the command line name, as kubectl's flags do.
type cluster struct {
	rules     *clientcmd.ClientConfigLoadingRules
	overrides clientcmd.ConfigOverrides
	// namespace of Credence; empty: find it
	credence string

	loaded clientcmd.ClientConfig // by loader
}

// frequent are the flags of kubectl that --help shows. The others work, too.
var frequent = map[string]bool{"namespace": true, "context": true, "kubeconfig": true}

// newCluster defines the flags of all commands.
func newCluster(root *cobra.Command) *cluster {
	c := &cluster{rules: clientcmd.NewDefaultClientConfigLoadingRules()}
	f := root.PersistentFlags()
	names := clientcmd.RecommendedConfigOverrideFlags("")
	names.ClusterOverrideFlags.APIServer.ShortName = "s"
	clientcmd.BindOverrideFlags(&c.overrides, f, names)
	f.StringVar(&c.rules.ExplicitPath, "kubeconfig", "", "`file` with the access to the cluster")
	f.VisitAll(func(flag *pflag.Flag) { flag.Hidden = !frequent[flag.Name] })
	f.Lookup("namespace").Usage = "`name` of the namespace; by default that of the context"
	f.Lookup("context").Usage = "`name` of the context of the kubeconfig"
	f.StringVar(&c.credence, "credence-namespace", "", "`name` of the namespace in which Credence is installed; by default it is looked for")
	return c
}

// errNoCluster means that nothing says which cluster to use.
var errNoCluster = errors.New("no kubeconfig names a cluster; set --kubeconfig or the variable KUBECONFIG")

// loader returns the access that kubeconfig, flags and, in a pod, the service account give. It reads the kubeconfig once,
// because another program may change its current context meanwhile: a command then names the cluster that it uses.
func (c *cluster) loader() clientcmd.ClientConfig {
	if c.loaded == nil {
		c.loaded = clientcmd.NewNonInteractiveDeferredLoadingClientConfig(c.rules, &c.overrides)
	}
	return c.loaded
}

// client returns access to the cluster.
func (c *cluster) client() (*installation.Client, error) {
	config, err := c.loader().ClientConfig()
	if clientcmd.IsEmptyConfig(err) {
		return nil, errNoCluster
	}
	if err != nil {
		return nil, err
	}
	// A diagnosis makes many small requests at once. The API server has its own limits.
	config.QPS, config.Burst = 100, 200
	// Lists of many pods take a third of the time of JSON.
	config.ContentType = runtime.ContentTypeProtobuf
	config.AcceptContentTypes = runtime.ContentTypeProtobuf + "," + runtime.ContentTypeJSON
	config.UserAgent = "credence/" + program.Version()
	config.WarningHandler = rest.NoWarnings{} // about the API, not about Credence
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
	name, _, err := c.loader().Namespace()
	if clientcmd.IsEmptyConfig(err) {
		err = errNoCluster
	}
	return name, err
}

// target returns the flags that choose the cluster, for the commands of remedies.
func (c *cluster) target() finding.Cluster {
	return finding.Cluster{Context: c.overrides.CurrentContext, Kubeconfig: c.rules.ExplicitPath}
}

// name names the cluster in messages: by its context, or by its address.
func (c *cluster) name(client *installation.Client) string {
	context := c.overrides.CurrentContext
	if raw, err := c.loader().RawConfig(); context == "" && err == nil {
		context = raw.CurrentContext
	}
	if context == "" {
		return "the cluster at " + client.Config.Host
	}
	return fmt.Sprintf("context %q", context)
}
