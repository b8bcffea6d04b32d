package typo

import (
	"strings"
	"testing"
)

func TestEditDistance(t *testing.T) {
	for _, tt := range []struct {
		a, b string
		want int
	}{
		{"", "", 0},
		{"role", "role", 0},
		{"role", "", 4},
		{"role", "rol", 1},
		{"role", "rolle", 1},
		{"role", "rule", 1},
		{"role", "roel", 1}, // a transposition is one edit
		{"role", "orel", 2},
		{"imds", "role", 4},
	} {
		if got := editDistance(tt.a, tt.b); got != tt.want {
			t.Errorf("editDistance(%q, %q) = %d, want %d", tt.a, tt.b, got, tt.want)
		}
		if got := editDistance(tt.b, tt.a); got != tt.want {
			t.Errorf("editDistance(%q, %q) = %d, want %d", tt.b, tt.a, got, tt.want)
		}
	}
}

func TestNearest(t *testing.T) {
	names := []string{"region", "role", "duration"}
	for text, want := range map[string]string{
		"roel":                                  "role",
		"Region":                                "region",
		"duraton":                               "duration",
		"":                                      "role",
		"duration" + strings.Repeat("x", 1<<20): "duration", // a longer table would take hours
		strings.Repeat("x", 63) + "duration":    "region",   // the bytes beyond the limit do not count
	} {
		if got := Nearest(text, names); got != want {
			t.Errorf("Nearest(%.80q) = %q, want %q", text, got, want)
		}
	}
}
