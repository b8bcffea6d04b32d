package program_test

import (
	"bytes"
	"encoding/json"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/credence-iam/credence/cmd/internal/program"
)

// TestLoggedDurationsAndTimes: durations are in seconds, times are RFC 3339, and zero times are left out.
func TestLoggedDurationsAndTimes(t *testing.T) {
	var out bytes.Buffer
	log := program.NewLogger(&out, slog.LevelInfo)
	until := time.Date(2026, 5, 4, 14, 0, 0, 0, time.FixedZone("CEST", 2*60*60))
	log.With("with", 250*time.Millisecond).Info("Retrying",
		"retry_in", 1500*time.Millisecond, "any", any(time.Minute), "none", time.Duration(0), "behind", -2*time.Second,
		"held_until", time.Time{}, "expiration", until, "count", 3, "text", "1h",
		slog.Group("group", "wait", 90*time.Second, "never", time.Time{}))
	log.Debug("Below the level")

	var got map[string]any
	if err := json.Unmarshal(out.Bytes(), &got); err != nil {
		t.Fatalf("%q is not one JSON line: %v", out.String(), err)
	}
	if at, err := time.Parse(time.RFC3339, got["time"].(string)); err != nil || at.IsZero() {
		t.Errorf("time is %v", got["time"])
	}
	delete(got, "time")
	want := map[string]any{
		"level": "INFO", "msg": "Retrying", "with": 0.25,
		"retry_in": 1.5, "any": 60.0, "none": 0.0, "behind": -2.0,
		"expiration": "2026-05-04T12:00:00Z", "count": 3.0, "text": "1h",
		"group": map[string]any{"wait": 90.0},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("logged (-want +got):\n%s", diff)
	}
}

// TestProgramsLogAlike: each server program uses NewLogger.
func TestProgramsLogAlike(t *testing.T) {
	for _, server := range []string{"broker", "sidecar", "webhook"} {
		files, err := filepath.Glob(filepath.Join("..", "..", server, "*.go"))
		if err != nil || len(files) == 0 {
			t.Fatalf("no files of %s: %v", server, err)
		}
		uses := 0
		for _, name := range files {
			if strings.HasSuffix(name, "_test.go") {
				continue
			}
			text, err := os.ReadFile(name)
			if err != nil {
				t.Fatal(err)
			}
			for at, line := range strings.Split(string(text), "\n") {
				if strings.Contains(line, "slog.NewJSONHandler") || strings.Contains(line, "slog.NewTextHandler") {
					t.Errorf("%s:%d creates its own logger; use program.NewLogger", name, at+1)
				}
			}
			uses += strings.Count(string(text), "program.NewLogger(")
		}
		if uses != 1 {
			t.Errorf("%s creates %d loggers, want 1", server, uses)
		}
	}
}
