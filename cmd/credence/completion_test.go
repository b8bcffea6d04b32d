package main

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/spf13/cobra"
)

// TestCompletion: contexts come from the kubeconfig, namespaces and pods from the cluster.
func TestCompletion(t *testing.T) {
	kubeconfig := "--kubeconfig=" + running(t, "1.1.0").Kubeconfig(t)
	for _, tt := range []struct{ args, want string }{
		{"credence __complete inject " + kubeconfig + " --context", "test\n:4\n"},
		{"credence __complete inject " + kubeconfig + " -n", "shop\n:4\n"},
		{"kubectl_complete-credence inject " + kubeconfig + " -n", "shop\n:4\n"},
		{"credence __complete version -o", "json\n:4\n"},
		{"credence __complete version --kubeconfig=/none -n", ":4\n"},
	} {
		if _, out, _ := call(t, "", append(strings.Fields(tt.args), "")...); out != tt.want {
			t.Errorf("%s completes\n%swant\n%s", tt.args, out, tt.want)
		}
	}
	root := newRoot("credence")
	c := newCluster(&cobra.Command{})
	c.rules.ExplicitPath = strings.TrimPrefix(kubeconfig, "--kubeconfig=")
	c.overrides.Context.Namespace = "shop"
	root.SetContext(t.Context())
	if names, _ := c.completePods(root, nil, ""); !cmp.Equal(names, []string{"a", "b", "pending"}) {
		t.Errorf("pods are %q", names)
	}
	if names, _ := c.completePods(root, []string{"a"}, ""); names != nil {
		t.Errorf("after one pod, completion offers %q", names)
	}
}
