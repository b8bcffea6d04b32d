package finding

import (
	"fmt"
	"regexp"
	"strings"
)

// plain are words that a shell takes as they are.
var plain = regexp.MustCompile(`^[A-Za-z0-9_./:=@%+,-]+$`)

// Shell returns words as one command line, in which a shell finds exactly these words. Names and values in a cluster are
// the choice of its users, who may hope that an admin pastes them.
func Shell(words ...string) string {
	quoted := make([]string, len(words))
	for i, word := range words {
		if quoted[i] = word; !plain.MatchString(word) {
			quoted[i] = "'" + strings.ReplaceAll(word, "'", `'\''`) + "'"
		}
	}
	return strings.Join(quoted, " ")
}

// Cluster is the cluster of a diagnosis, as the flags of kubectl and helm name it. Commands of remedies have it, so that
// they do not change another cluster. The zero value is the cluster of the kubeconfig's current context.
type Cluster struct {
	// Context and Kubeconfig are the user's flags; empty without one.
	Context, Kubeconfig string
}

// Kubectl returns a command of kubectl.
func (c Cluster) Kubectl(words ...string) string { return c.command("kubectl", "--context=", words) }

// Helm returns a command of helm.
func (c Cluster) Helm(words ...string) string { return c.command("helm", "--kube-context=", words) }

func (c Cluster) command(program, context string, words []string) string {
	all := []string{program}
	if c.Context != "" {
		all = append(all, context+c.Context)
	}
	if c.Kubeconfig != "" {
		all = append(all, "--kubeconfig="+c.Kubeconfig)
	}
	return Shell(append(all, words...)...)
}

// Command returns a command line that begins with kubectl or helm. Each %s stands for one argument, which is quoted.
func (c Cluster) Command(format string, args ...string) string {
	quoted := make([]any, len(args))
	for n, arg := range args {
		quoted[n] = Shell(arg)
	}
	program, rest, _ := strings.Cut(fmt.Sprintf(format, quoted...), " ")
	if program == "helm" {
		return c.Helm() + " " + rest
	}
	return c.Kubectl() + " " + rest
}
