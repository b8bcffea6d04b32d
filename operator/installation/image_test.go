package installation_test

import (
	"strings"
	"testing"

	"github.com/credence-iam/credence/operator/installation"
)

func TestImageVersion(t *testing.T) {
	for image, want := range map[string]string{
		"registry.example/credence-broker:1.2.3":             "v1.2.3",
		"registry.example:5000/credence-broker:v1.2.3":       "v1.2.3",
		"registry.example:5000/credence-broker":              "",
		"credence-broker:1.2.3@sha256:0123":                  "v1.2.3",
		"registry.example/credence-broker@sha256:0123":       "",
		"credence-broker:1.2.3-rc.1":                         "v1.2.3-rc.1",
		"credence-broker:latest":                             "",
		"credence-broker:1.2":                                "",
		"credence-broker:v0.0.0-20261129000000-0123456789ab": "",
		"":                              "",
		"credence-broker:\x1b[31m1.2.3": "",
		"credence-broker:99999999999999999999999999.1.1":         "",
		"registry.example/team/credence-broker:0.1.0@sha256:ab:": "v0.1.0",
	} {
		if got := installation.Image(image).Version(); got != want {
			t.Errorf("%q has version %q, want %q", image, got, want)
		}
	}
}

func TestApart(t *testing.T) {
	for _, tt := range []struct {
		a, b string
		want int
	}{
		{"v1.2.3", "1.2.9", 0}, {"v1.2.3", "v1.3.0", 1}, {"v1.3.0", "v1.2.3", 1}, {"v1.0.0", "v1.2.0", 2},
		{"(devel)", "v1.0.0", 0}, {"", "v1.0.0", 0}, {"unknown", "", 0}, {"0.1.0", "v0.1.9", 0}, {"v0.1.0", "0.3.0-rc.1", 2}, {"0.9", "0.1.0", 0}, {"v0.0.0-1", "v1.9.0", 0}, {"v1.0.0", "v2.0.0", 1000},
	} {
		if got := installation.Apart(tt.a, tt.b); got != tt.want {
			t.Errorf("%s and %s are %d apart, want %d", tt.a, tt.b, got, tt.want)
		}
	}
}

func TestImageLabel(t *testing.T) {
	for image, want := range map[string]string{
		"ghcr.io/credence-iam/credence-broker:0.1.0": "credence-broker 0.1.0", "localhost:5000/credence-broker": "credence-broker ", "": " ",
		"credence-broker:v1@sha256:" + strings.Repeat("0", 64):        "credence-broker v1",
		"registry.example:5000/a/b@sha256:0123456789abcdef0123456789": "b sha256:0123456789ab",
	} {
		if got := installation.Image(image).Name() + " " + installation.Image(image).Label(); got != want {
			t.Errorf("%s: %q, want %q", image, got, want)
		}
	}
}

func TestOlder(t *testing.T) {
	for text, want := range map[string]bool{"v1.29.4-eks-1": true, "1.29": true, "v1.30+": false, "1.30": false, "v1.30.0": false, "v2.0.0": false, "": false, "x": false} {
		if got := installation.OlderKubernetes(text, 30); got != want {
			t.Errorf("%s is older than 1.30: %t", text, got)
		}
	}
	for _, tt := range []struct {
		a, b string
		want bool
	}{{"v1.2.3", "1.2.4", true}, {"v1.2.3", "v1.2.3", false}, {"v1.10.0", "v1.9.0", false}, {"", "v1.0.0", false}, {"v1.0.0", "latest", false}} {
		if got := installation.Older(tt.a, tt.b); got != tt.want {
			t.Errorf("%s is older than %s: %t", tt.a, tt.b, got)
		}
	}
}
