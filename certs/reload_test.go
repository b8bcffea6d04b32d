package certs

import (
	"bytes"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"testing"
)

// TestSwapBetweenTwoReads needs the inside of the package: only a parse function can change a file right after it was read.
func TestSwapBetweenTwoReads(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	write := func(content string) {
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("old")
	var log bytes.Buffer
	r, err := newReloader("test", []string{path}, slog.New(slog.NewTextHandler(&log, nil)),
		func(contents [][]byte) (*string, error) {
			s := string(contents[0])
			if s == "torn" {
				write("new")
				return nil, errors.New("torn")
			}
			return &s, nil
		})
	if err != nil {
		t.Fatal(err)
	}
	write("torn")
	if got, err := r.current(); err != nil || *got != "new" {
		t.Errorf("got %q, error %v; want the value of a second read", *got, err)
	}
	if bytes.Contains(log.Bytes(), []byte("WARN")) {
		t.Errorf("a swap between two reads was logged as a failure:\n%s", &log)
	}
}
