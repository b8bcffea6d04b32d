//go:build unix

package release_test

import (
	"regexp"
	"testing"

	"sigs.k8s.io/yaml"
)

// TestInstallPageVersion compares the versions in the commands of docs/install.md with the chart's. They change together.
func TestInstallPageVersion(t *testing.T) {
	var chart struct{ Version, AppVersion string }
	if err := yaml.Unmarshal(read(t, "../../charts/credence/Chart.yaml"), &chart); err != nil {
		t.Fatal(err)
	}
	if chart.Version != chart.AppVersion {
		t.Errorf("Chart.yaml has version %s and appVersion %s", chart.Version, chart.AppVersion)
	}
	found := regexp.MustCompile(`(?:--version |download/v|tags/v|:|credence-)(\d+\.\d+\.\d+[-.0-9a-z]*?)(?:$|[ /\n\x60]|\.tgz)`).
		FindAllStringSubmatch(string(read(t, "../../docs/install.md")), -1)
	if len(found) < 5 {
		t.Fatalf("docs/install.md has the versions %q, want at least 5", found)
	}
	for _, match := range found {
		if match[1] != chart.Version {
			t.Errorf("docs/install.md has %q, the chart version %s", match[0], chart.Version)
		}
	}
}
