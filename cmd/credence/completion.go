package main

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/metadata"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
)

const (
	// completionTimeout limits one completion, because a user waits for it while typing.
	completionTimeout = 2 * time.Second
	// maxCompletions limits the names that a completion lists. No terminal shows more.
	maxCompletions = 500
)

// newCompletion returns the command completion.
func newCompletion() *cobra.Command {
	shells := map[string]func(*cobra.Command) error{
		"bash":       func(c *cobra.Command) error { return c.Root().GenBashCompletionV2(c.OutOrStdout(), true) },
		"zsh":        func(c *cobra.Command) error { return c.Root().GenZshCompletion(c.OutOrStdout()) },
		"fish":       func(c *cobra.Command) error { return c.Root().GenFishCompletion(c.OutOrStdout(), true) },
		"powershell": func(c *cobra.Command) error { return c.Root().GenPowerShellCompletionWithDesc(c.OutOrStdout()) },
	}
	names := slices.Sorted(maps.Keys(shells))
	return &cobra.Command{
		Use:   "completion " + strings.Join(names, "|"),
		Short: "write a script with which a shell completes commands, flags, namespaces and pods",
		Long: `Writes a script for your shell. The shell then completes commands, flags, contexts, namespaces and pods.

For the plugin "kubectl credence", kubectl's own completion is enough. It needs a second link to this program in your
PATH, named ` + completer + `.`,
		Example: `  # This shell
  source <(credence completion bash)

  # Each new shell
  credence completion bash > ~/.local/share/bash-completion/completions/credence
  credence completion zsh > "${fpath[1]}/_credence"
  credence completion fish > ~/.config/fish/completions/credence.fish`,
		ValidArgs: names,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) != 1 || shells[args[0]] == nil {
				return wrongFlags(fmt.Errorf("name one shell: %s", strings.Join(names, ", ")))
			}
			return nil
		},
		RunE: func(command *cobra.Command, args []string) error { return shells[args[0]](command) },
	}
}

// complete adds completions to the commands of root. A command whose usage has POD completes the names of pods.
func complete(root *cobra.Command, c *cluster) {
	ofKubeconfig := func(names func(clientcmdapi.Config) []string) cobra.CompletionFunc {
		return func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
			config, err := c.loader().RawConfig()
			if err != nil {
				return nil, cobra.ShellCompDirectiveNoFileComp
			}
			return names(config), cobra.ShellCompDirectiveNoFileComp
		}
	}
	flags := map[string]cobra.CompletionFunc{
		"context": ofKubeconfig(func(k clientcmdapi.Config) []string { return slices.Sorted(maps.Keys(k.Contexts)) }),
		"cluster": ofKubeconfig(func(k clientcmdapi.Config) []string { return slices.Sorted(maps.Keys(k.Clusters)) }),
		"user":    ofKubeconfig(func(k clientcmdapi.Config) []string { return slices.Sorted(maps.Keys(k.AuthInfos)) }),

		"namespace": c.completeNamespaces, "credence-namespace": c.completeNamespaces,
		"pod":                       c.completePods,
		"on-shadowed":               cobra.FixedCompletions([]string{"refuse", "warn"}, cobra.ShellCompDirectiveNoFileComp),
		"sidecar-image-pull-policy": cobra.FixedCompletions([]string{"Always", "IfNotPresent", "Never"}, cobra.ShellCompDirectiveNoFileComp),
		"sidecar-log-level":         cobra.FixedCompletions([]string{"debug", "info", "warn", "error"}, cobra.ShellCompDirectiveNoFileComp),
	}
	each(root, func(command *cobra.Command) {
		for name, f := range flags {
			if command.Flag(name) != nil {
				_ = command.RegisterFlagCompletionFunc(name, f) // It fails if the command has done so itself.
			}
		}
		if command.ValidArgsFunction == nil && strings.Contains(command.Use, "POD") {
			command.ValidArgsFunction = c.completePods
		}
	})
}

// completeNamespaces completes the names of namespaces.
func (c *cluster) completeNamespaces(command *cobra.Command, _ []string, _ string) ([]string, cobra.ShellCompDirective) {
	return c.completeObjects(command, "namespaces", "")
}

// completePods completes the names of pods of the namespace.
func (c *cluster) completePods(command *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	namespace, err := c.namespaceOrDefault()
	if err != nil || len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	return c.completeObjects(command, "pods", namespace)
}

// completeObjects returns the names of objects. It reads only metadata.
func (c *cluster) completeObjects(command *cobra.Command, resource, namespace string) ([]string, cobra.ShellCompDirective) {
	client, err := c.client()
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	objects, err := metadata.NewForConfig(client.Config)
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	ctx, stop := context.WithTimeout(command.Context(), completionTimeout)
	defer stop()
	list, err := objects.Resource(corev1.SchemeGroupVersion.WithResource(resource)).Namespace(namespace).List(ctx, metav1.ListOptions{Limit: maxCompletions})
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	names := make([]string, 0, len(list.Items))
	for _, item := range list.Items {
		names = append(names, item.Name)
	}
	return names, cobra.ShellCompDirectiveNoFileComp
}
