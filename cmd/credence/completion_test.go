package main

import (
	"strings"
	"testing"
)

// TestCompletion: contexts come from the kubeconfig, namespaces and pods from the cluster.
func TestCompletion(t *testing.T) {
	kubeconfig := "--kubeconfig=" + running(t, "1.1.0").Kubeconfig(t)
	for _, tt := range []struct{ args, want string }{
		{"credence __complete inject " + kubeconfig + " --context", "test\n:4\n"},
		{"credence __complete inject " + kubeconfig + " -n", "shop\n:4\n"},
		{"kubectl_complete-credence inject " + kubeconfig + " -n", "shop\n:4\n"},
		{"credence __complete version -o", "json\n:4\n"},
		{"credence __complete sessions -o", "json\nwide\n:4\n"},
		{"credence __complete explain " + kubeconfig + " -n shop", "a\nb\npending\n:4\n"},
		{"credence __complete explain a " + kubeconfig + " -n shop", ":4\n"},
		{"credence __complete sessions " + kubeconfig + " -n shop --pod", "a\nb\npending\n:4\n"},
		{"credence __complete sessions who " + kubeconfig + " -n", "shop\n:4\n"},
		{"credence __complete version --kubeconfig=/none -n", ":4\n"},
	} {
		if _, out, _ := call(t, "", append(strings.Fields(tt.args), "")...); out != tt.want {
			t.Errorf("%s completes\n%swant\n%s", tt.args, out, tt.want)
		}
	}
}
