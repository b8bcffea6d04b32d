package rulesfile_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/credence-iam/credence/broker/configfile"
	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/policy"
	"github.com/credence-iam/credence/broker/rulesfile"
)

const (
	forShop   = `{"namespaces":[{"match":["shop"],"accounts":["*"],"roles":["*"]}]}`
	forNobody = `{"namespaces":[{"match":["other"]}]}`
	broken    = `{"namespaces":[{"match":["shop"],"role":["*"]}]}`
)

func newRules(t *testing.T) *policy.Rules {
	t.Helper()
	keys, err := policy.NewKeys(policy.DefaultPrefix)
	if err != nil {
		t.Fatal(err)
	}
	rules, err := policy.New(policy.Config{Keys: keys})
	if err != nil {
		t.Fatal(err)
	}
	return rules
}

// reason returns why the rules refuse a pod in namespace shop; empty if they allow it.
func reason(rules *policy.Rules) credential.Reason {
	_, err := rules.Grant(
		policy.Pod{Namespace: "shop", Name: "cart", ServiceAccount: "cart", Request: rules.Keys().Request(map[string]string{"iam.amazonaws.com/role": "arn:aws:iam::123456789012:role/reader"})},
		policy.Namespace{Name: "shop", Labels: map[string]string{"iam.amazonaws.com/inject": "enabled"}, Annotations: map[string]string{"iam.amazonaws.com/permitted": ".*"}})
	return credential.ReasonOf(err)
}

func write(t *testing.T, file, text string) {
	t.Helper()
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func digest(text string) string {
	sum := sha256.Sum256([]byte(text))
	return hex.EncodeToString(sum[:])
}

// lines is a log for concurrent reads and writes.
type lines struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

// take returns the messages since the last call.
func (l *lines) take() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	var messages []string
	for line := range strings.Lines(l.text.String()) {
		_, line, _ = strings.Cut(line, `msg="`)
		message, _, _ := strings.Cut(line, `"`)
		messages = append(messages, message)
	}
	l.text.Reset()
	return messages
}

func TestNewRefuses(t *testing.T) {
	dir, log := t.TempDir(), slog.New(slog.DiscardHandler)
	for name, text := range map[string]string{"broken": broken, "empty": "", "large": forShop + strings.Repeat(" ", 1<<20)} {
		write(t, filepath.Join(dir, name), text)
	}
	for file, want := range map[string]string{
		"":       "Path, Rules and Logger are required",
		"absent": "no such file",
		".":      "is a directory",
		"broken": "line 1: namespaces[0].role: unknown field",
		"empty":  "file is empty",
		"large":  "longer than 1048576 bytes",
	} {
		path := file
		if file != "" {
			path = filepath.Join(dir, file)
		}
		rules := newRules(t)
		f, err := rulesfile.New(rulesfile.Config{Path: path, Rules: rules, Logger: log})
		if err == nil || f != nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), path) {
			t.Errorf("%s: %v, want %q", file, err, want)
		}
		if path != "" && (rulesfile.Check(path) == nil || rulesfile.Check(path).Error() != err.Error()) {
			t.Errorf("%s: Check returns %v, New %v", file, rulesfile.Check(path), err)
		}
		if got := reason(rules); got != "" {
			t.Errorf("%s: after an error the rules refuse with %s", file, got)
		}
	}
	for _, cfg := range []rulesfile.Config{{Path: dir, Logger: log}, {Path: dir, Rules: newRules(t)}} {
		if _, err := rulesfile.New(cfg); err == nil {
			t.Errorf("New(%+v): no error", cfg)
		}
	}
}

// TestFollow changes the file in several ways, with one read each.
func TestFollow(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "rules.yaml")
	write(t, file, forShop)
	const loaded, invalid, recovered = "Loaded the rules file", "Could not use the rules file, keeping the rules in force", "Recovered the rules file, which is again the one in force"
	synctest.Test(t, func(t *testing.T) {
		var log lines
		changes := 0
		rules := newRules(t)
		f, err := rulesfile.New(rulesfile.Config{Path: file, Rules: rules, OnChange: func() { changes++ }, Logger: slog.New(slog.NewTextHandler(&log, nil))})
		if err != nil {
			t.Fatal(err)
		}
		started := time.Now()
		if s := f.Status(); s.Digest != digest(forShop) || !s.Loaded.Equal(started) || s.Err != nil || changes != 0 || strings.Join(log.take(), ";") != loaded {
			t.Fatalf("after New: %+v, %d changes", s, changes)
		}
		if got := reason(rules); got != "" {
			t.Fatalf("after New, the rules refuse with %s", got)
		}
		ctx, stop := context.WithCancel(t.Context())
		ended := make(chan error)
		go func() { ended <- f.Run(ctx) }()
		time.Sleep(time.Second) // Reads are between the steps.

		ok, none := credential.Reason(""), credential.ReasonRulesNamespace
		for _, step := range []struct {
			what    string
			do      func()
			reason  credential.Reason // of the rules in force
			digest  string            // of the file in force
			err     string            // in the status; "" for none
			changes int               // calls of OnChange so far
			log     []string
		}{
			{"no change", func() {}, ok, digest(forShop), "", 0, nil},
			{"another file", func() { write(t, file, forNobody) }, none, digest(forNobody), "", 1, []string{loaded}},
			{"the same file", func() { write(t, file, forNobody) }, none, digest(forNobody), "", 1, nil},
			{"invalid", func() { write(t, file, broken) }, none, digest(forNobody), "line 1: namespaces[0].role: unknown field", 1, []string{invalid}},
			{"still invalid", func() {}, none, digest(forNobody), "unknown field", 1, nil},
			{"another error", func() { write(t, file, "") }, none, digest(forNobody), "file is empty", 1, []string{invalid}},
			{"invalid again", func() { write(t, file, broken) }, none, digest(forNobody), "unknown field", 1, []string{invalid}},
			{"the one in force again", func() { write(t, file, forNobody) }, none, digest(forNobody), "", 1, []string{recovered}},
			{"removed", func() { _ = os.Remove(file) }, none, digest(forNobody), "no such file", 1, []string{invalid}},
			{"still removed", func() {}, none, digest(forNobody), "no such file", 1, nil},
			{"valid", func() { write(t, file, forShop) }, ok, digest(forShop), "", 2, []string{loaded}},
			{"a directory", func() { _ = os.Remove(file); _ = os.Mkdir(file, 0o700) }, ok, digest(forShop), "is a directory", 2, []string{invalid}},
			{"an earlier file", func() { _ = os.Remove(file); write(t, file, forNobody) }, none, digest(forNobody), "", 3, []string{loaded}},
		} {
			step.do()
			before := f.Status()
			time.Sleep(configfile.Interval)
			synctest.Wait()
			s := f.Status()
			if s.Digest != step.digest || (s.Err == nil) != (step.err == "") || s.Err != nil && !strings.Contains(s.Err.Error(), step.err) {
				t.Errorf("%s: status %+v", step.what, s)
			}
			if moved := s.Loaded != before.Loaded; moved != (s.Digest != before.Digest) {
				t.Errorf("%s: loaded at %s, which has changed: %t", step.what, s.Loaded, moved)
			}
			if got := reason(rules); got != step.reason {
				t.Errorf("%s: the rules refuse with %q, want %q", step.what, got, step.reason)
			}
			if changes != step.changes {
				t.Errorf("%s: OnChange was called %d times, want %d", step.what, changes, step.changes)
			}
			if got := log.take(); strings.Join(got, ";") != strings.Join(step.log, ";") {
				t.Errorf("%s: logged %q, want %q", step.what, got, step.log)
			}
		}
		stop()
		if err := <-ended; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
}

// TestConfigMapSwap replaces the file as the kubelet does: it writes a new directory and swaps the link to it.
func TestConfigMapSwap(t *testing.T) {
	dir := t.TempDir()
	swap := func(name, text string) {
		t.Helper()
		if err := os.Mkdir(filepath.Join(dir, name), 0o700); err != nil {
			t.Fatal(err)
		}
		write(t, filepath.Join(dir, name, "rules.yaml"), text)
		next := filepath.Join(dir, "..data_tmp")
		if err := os.Symlink(name, next); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(next, filepath.Join(dir, "..data")); err != nil {
			t.Fatal(err)
		}
	}
	swap("..1", forShop)
	file := filepath.Join(dir, "rules.yaml")
	if err := os.Symlink(filepath.Join("..data", "rules.yaml"), file); err != nil {
		t.Fatal(err)
	}
	synctest.Test(t, func(t *testing.T) {
		rules := newRules(t)
		f, err := rulesfile.New(rulesfile.Config{Path: file, Rules: rules, Logger: slog.New(slog.DiscardHandler)})
		if err != nil {
			t.Fatal(err)
		}
		ctx, stop := context.WithCancel(t.Context())
		ended := make(chan error)
		go func() { ended <- f.Run(ctx) }()
		for i, text := range []string{forNobody, forShop, broken, forNobody} {
			swap("..2"+string(rune('a'+i)), text)
			time.Sleep(configfile.Interval + time.Second)
			synctest.Wait()
			s := f.Status()
			want := digest(text)
			if text == broken {
				want = digest(forShop)
			}
			if s.Digest != want || (s.Err != nil) != (text == broken) {
				t.Errorf("swap %d: %+v", i, s)
			}
		}
		// The directory is missing for a moment, as during the setup of a volume.
		if err := os.Remove(filepath.Join(dir, "..data")); err != nil {
			t.Fatal(err)
		}
		time.Sleep(configfile.Interval)
		synctest.Wait()
		if s := f.Status(); !errors.Is(s.Err, fs.ErrNotExist) || s.Digest != digest(forNobody) || reason(rules) != credential.ReasonRulesNamespace {
			t.Errorf("without the directory: %+v, %s", s, reason(rules))
		}
		stop()
		if err := <-ended; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
}
