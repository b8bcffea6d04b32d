//go:build unix

package certmanager_test

import (
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/credence-iam/credence/integration/certmanager"
	"github.com/credence-iam/credence/integration/tools"
)

// TestChartRunsTheBuiltProgram renders the chart. That cert-manager works is shown by the tests on nodes, which fail
// without it.
func TestChartRunsTheBuiltProgram(t *testing.T) {
	if testing.Short() && !tools.Built(tools.Helm) {
		t.Skip("-short, and helm is not built (go run ./integration/tools/install helm)")
	}
	helm, err := tools.Path(t.Context(), tools.Helm, os.Stderr)
	if err != nil {
		t.Fatal(err)
	}
	args, err := certmanager.Helm(t.Context(), t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	args[0] = "template"
	cmd := exec.CommandContext(t.Context(), helm, args...)
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + t.TempDir()}
	output, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("rendering the chart: %v\n%s", err, output)
	}
	rendered := string(output)
	for text, want := range map[string]int{
		"image: \"" + certmanager.Reference + "\"": 4, " image: ": 4, "imagePullPolicy: Never": 4, "kind: CustomResourceDefinition": 6,
		"value: controller": 1, "value: cainjector": 1, "value: webhook": 1, "value: startupapicheck": 1,
		"helm.sh/resource-policy": 0, "namespace: kube-system": 0, // nothing remains after an uninstallation
	} {
		if got := strings.Count(rendered, text); got != want {
			t.Errorf("the chart has %q %d times, want %d", text, got, want)
		}
	}
}
