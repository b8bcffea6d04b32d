package versions

import "testing"

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
		if got := Image(image).Version(); got != want {
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
		{"(devel)", "v1.0.0", 0}, {"", "v1.0.0", 0}, {"unknown", "", 0}, {"v0.0.0-1", "v1.9.0", 0}, {"v1.0.0", "v2.0.0", 1000},
	} {
		if got := Apart(tt.a, tt.b); got != tt.want {
			t.Errorf("%s and %s are %d apart, want %d", tt.a, tt.b, got, tt.want)
		}
	}
}
