package view_test

import (
	"testing"
	"time"

	"github.com/credence-iam/credence/operator/dashboard/view"
)

func TestShort(t *testing.T) {
	for d, want := range map[time.Duration]string{
		-time.Second: "0 s", 59 * time.Second: "59 s", time.Minute: "1 min", 59*time.Minute + 59*time.Second: "59 min", time.Hour: "1 h",
		90 * time.Minute: "1 h 30 min", 48 * time.Hour: "2 days",
	} {
		if got := view.Short(d); got != want {
			t.Errorf("%s is %q, want %q", d, got, want)
		}
	}
}
