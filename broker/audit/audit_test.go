package audit_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/credence-iam/credence/broker/audit"
	"github.com/credence-iam/credence/broker/credential"
)

// sink is a writer that can fail.
type sink struct {
	mu  sync.Mutex
	buf bytes.Buffer
	err error
}

func (s *sink) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil {
		return 0, s.err
	}
	return s.buf.Write(p)
}

func (s *sink) fail(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.err = err
}

func (s *sink) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.buf.String()
}

func newLog(t testing.TB, w io.Writer, required bool) *audit.Log {
	t.Helper()
	l, err := audit.New(audit.Config{Writer: w, Required: required, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func TestEveryDecisionIsOneLine(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var out sink
		l := newLog(t, &out, false)
		ctx, cancel := context.WithCancel(t.Context())
		var running sync.WaitGroup
		running.Go(func() { _ = l.Run(ctx) })
		want := []audit.Entry{
			{Decision: audit.Allow, Namespace: "shop", Pod: "cart\n{", Role: "arn:aws:iam::123456789012:role/cart", AccessKeyID: "ASIAEXAMPLE"},
			{Decision: audit.Deny, Reason: credential.ReasonTokenExpired},
		}
		for _, e := range want {
			if err := l.Record(e); err != nil {
				t.Fatal(err)
			}
		}
		synctest.Wait()
		lines := strings.Split(strings.TrimSuffix(out.String(), "\n"), "\n")
		if len(lines) != len(want) {
			t.Fatalf("%d lines, want %d:\n%s", len(lines), len(want), out.String())
		}
		for i, line := range lines {
			var got audit.Entry
			if err := json.Unmarshal([]byte(line), &got); err != nil {
				t.Fatalf("line %d: %v", i, err)
			}
			if got.Time.IsZero() || got.Pod != want[i].Pod || got.Decision != want[i].Decision || got.Reason != want[i].Reason {
				t.Errorf("line %d is %s, want %+v", i, line, want[i])
			}
		}
		cancel()
		running.Wait()
	})
}

func TestRunWritesQueuedLinesAtTheEnd(t *testing.T) {
	var out sink
	l := newLog(t, &out, false)
	if err := l.Record(audit.Entry{Decision: audit.Allow}); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := l.Run(ctx); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(out.String(), "allow") {
		t.Errorf("the queued line was not written: %q", out.String())
	}
}

func TestLossIsCountedOrRefused(t *testing.T) {
	for _, required := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			var out sink
			l := newLog(t, &out, required)
			// Run is not called, so the buffer fills up.
			var err error
			n := 0
			for ; n < 1<<20 && l.Lost() == 0; n++ {
				err = l.Record(audit.Entry{Decision: audit.Allow})
			}
			if l.Lost() != 1 {
				t.Fatalf("required=%v: after %d entries %d are lost, want 1", required, n, l.Lost())
			}
			if refused := errors.Is(err, credential.ErrUnavailable); refused != required {
				t.Errorf("required=%v: Record returned %v", required, err)
			}
		})
	}
}

func TestRequiredAuditRefusesWhileTheWriterFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var out sink
		l := newLog(t, &out, true)
		ctx, cancel := context.WithCancel(t.Context())
		var running sync.WaitGroup
		running.Go(func() { _ = l.Run(ctx) })
		out.fail(errors.New("disk full"))
		_ = l.Record(audit.Entry{Decision: audit.Allow})
		synctest.Wait()
		if err := l.Record(audit.Entry{Decision: audit.Allow}); credential.ReasonOf(err) != credential.ReasonAuditUnavailable {
			t.Errorf("Record while the writer fails: %v", err)
		}
		out.fail(nil)
		time.Sleep(2 * time.Second)
		if err := l.Record(audit.Entry{Decision: audit.Allow}); err != nil {
			t.Errorf("Record after the writer recovered: %v", err)
		}
		cancel()
		running.Wait()
		if got := strings.Count(out.String(), "\n"); got != 2 || l.Lost() != 1 {
			t.Errorf("%d lines written and %d lost, want 2 and 1", got, l.Lost())
		}
	})
}

func TestFailedWriteLosesNoLineUncounted(t *testing.T) {
	for _, required := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			out := &faulty{failures: 1, taken: 10}
			l := newLog(t, out, required)
			const lines = 100
			for range lines {
				_ = l.Record(audit.Entry{Decision: audit.Allow, Pod: "cart"})
			}
			ctx, cancel := context.WithCancel(t.Context())
			var running sync.WaitGroup
			running.Go(func() { _ = l.Run(ctx) })
			time.Sleep(5 * time.Second)
			cancel()
			running.Wait()
			complete := 0
			for line := range strings.SplitSeq(strings.TrimSuffix(out.buf.String(), "\n"), "\n") {
				if json.Valid([]byte(line)) {
					complete++
				}
			}
			if lost := int(l.Lost()); complete+lost != lines || required != (lost == 0) {
				t.Errorf("required=%v: %d complete lines and %d lost, of %d", required, complete, lost, lines)
			}
		})
	}
}

// faulty writes a few bytes of its first writes and fails.
type faulty struct {
	failures, taken int
	buf             bytes.Buffer
}

func (f *faulty) Write(p []byte) (int, error) {
	if f.failures == 0 {
		return f.buf.Write(p)
	}
	f.failures--
	f.buf.Write(p[:f.taken])
	return f.taken, errors.New("disk full")
}
