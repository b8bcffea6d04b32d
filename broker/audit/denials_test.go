package audit_test

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/credence-iam/credence/broker/audit"
	"github.com/credence-iam/credence/broker/credential"
)

// running is a log whose Run was called in a synctest bubble.
type running struct {
	*audit.Log
	out  *sink
	stop func() // ends Run, and waits for it
}

func runLog(t *testing.T, required bool) running {
	t.Helper()
	out := new(sink)
	l := newLog(t, out, required)
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { _ = l.Run(ctx) })
	return running{l, out, func() { cancel(); wg.Wait() }}
}

// lines returns the lines that were written.
func (r running) lines(t *testing.T) (all []audit.Entry) {
	t.Helper()
	for line := range strings.Lines(r.out.String()) {
		var e audit.Entry
		if err := json.Unmarshal([]byte(line), &e); err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		all = append(all, e)
	}
	return all
}

// denied returns how many denials the lines stand for.
func denied(lines []audit.Entry) (n int) {
	for _, e := range lines {
		if e.Decision == audit.Deny {
			n += max(e.Count, 1)
		}
	}
	return n
}

func unknownPeer(peer string) audit.Entry {
	return audit.Entry{Decision: audit.Deny, Reason: credential.ReasonTokenMissing, Message: "the call carries no token", Peer: peer}
}

// One client without a token caused 9,188 lines per second, and 50 MB of history were rotated out in 30 s.
func TestOnePeerGetsOneLinePerWindow(t *testing.T) {
	for name, peer := range map[string]struct{ form, want string }{
		"IPv4": {"10.0.0.7:%d", "10.0.0.7"},
		// The caller can choose the last 64 bits, as it can its port.
		"IPv6": {"[fd00:1:2:3::%x]:443", "fd00:1:2:3::/64"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				l := runLog(t, false)
				defer l.stop()
				const perSecond = 9188
				began := time.Now()
				_ = l.Record(unknownPeer(fmt.Sprintf(peer.form, 1)))
				synctest.Wait()
				first := l.lines(t)
				if len(first) != 1 || first[0].Count != 0 || first[0].Peer != fmt.Sprintf(peer.form, 1) {
					t.Fatalf("the first denial must be written at once and unchanged: %+v", first)
				}
				total := 1
				for range 30 {
					for n := range perSecond {
						_ = l.Record(unknownPeer(fmt.Sprintf(peer.form, n+2)))
					}
					total += perSecond
					time.Sleep(time.Second)
				}
				time.Sleep(audit.Window)
				synctest.Wait()
				lines := l.lines(t)
				if len(lines) > 5 {
					t.Errorf("%d lines in %s, want at most 5", len(lines), time.Since(began))
				}
				if n := denied(lines); n != total || l.Lost() != 0 {
					t.Errorf("the lines stand for %d denials and %d are lost, want %d and 0", n, l.Lost(), total)
				}
				for _, e := range lines[1:] {
					if e.Peer != peer.want || e.Reason != credential.ReasonTokenMissing || e.Message == "" || e.Since.Before(began) || !e.Since.Before(e.Time.Add(1)) {
						t.Errorf("a line for repeated denials is %+v", e)
					}
				}
				// After a window without a denial, the next one has its own line again.
				_ = l.Record(unknownPeer(fmt.Sprintf(peer.form, 1)))
				synctest.Wait()
				if again := l.lines(t); len(again) != len(lines)+1 || again[len(lines)].Count != 0 {
					t.Errorf("a denial after a quiet window was not written at once")
				}
			})
		})
	}
}

func TestReasonsAndAddressesAreSeparate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := runLog(t, false)
		defer l.stop()
		for _, peer := range []string{"10.0.0.1:1", "10.0.0.2:1", "[fd00::1]:1", "[fd00:0:0:1::1]:1", "bufconn"} {
			for _, reason := range []credential.Reason{credential.ReasonTokenMissing, credential.ReasonTokenInvalid} {
				_ = l.Record(audit.Entry{Decision: audit.Deny, Reason: reason, Peer: peer})
			}
		}
		synctest.Wait()
		if n := len(l.lines(t)); n != 10 {
			t.Errorf("%d lines, want one for each of 5 addresses and 2 reasons", n)
		}
	})
}

// The number of lines is limited, however many addresses call, and their counts are right.
func TestManyPeersShareALine(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := runLog(t, false)
		const addresses, seconds = 5000, 30
		for range seconds {
			for n := range addresses {
				_ = l.Record(unknownPeer(fmt.Sprintf("10.0.%d.%d:1", n/250, n%250)))
			}
			time.Sleep(time.Second)
		}
		l.stop()
		lines := l.lines(t)
		if limit := 256 + (seconds/10+2)*257; len(lines) > limit {
			t.Errorf("%d lines for %d addresses, want at most %d", len(lines), addresses, limit)
		}
		others := 0
		for _, e := range lines {
			if e.Peer == audit.OtherPeers {
				others += e.Count
				if e.Message != "" || e.Reason != credential.ReasonTokenMissing {
					t.Errorf("the line of other peers is %+v", e)
				}
			}
		}
		if n := denied(lines); n != addresses*seconds || others != (addresses-256)*seconds || l.Lost() != 0 {
			t.Errorf("the lines stand for %d denials, %d of them of other peers, and %d are lost; want %d in all", n, others, l.Lost(), addresses*seconds)
		}
	})
}

// Addresses that no longer call are forgotten, and later ones have lines of their own.
func TestOldPeersAreForgotten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := runLog(t, false)
		defer l.stop()
		for hour := range 3 {
			for n := range 256 {
				_ = l.Record(unknownPeer(fmt.Sprintf("10.%d.0.%d:1", hour, n)))
			}
			time.Sleep(time.Hour)
		}
		synctest.Wait()
		lines := l.lines(t)
		for _, e := range lines {
			if e.Peer == audit.OtherPeers {
				t.Errorf("a line is %+v", e)
			}
		}
		if len(lines) != 3*256 {
			t.Errorf("%d lines, want one for each of %d addresses", len(lines), 3*256)
		}
	})
}

// Pods beyond maxPods have a line for each denial, so that they take no memory.
func TestPodsAreCountedUpToALimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := runLog(t, false)
		for pod := range 1200 {
			for range 12 {
				_ = l.Record(audit.Entry{Decision: audit.Deny, Reason: credential.ReasonRoleNotPermitted, PodUID: fmt.Sprint(pod)})
			}
			synctest.Wait()
		}
		l.stop()
		own := map[string]int{}
		for _, e := range l.lines(t) {
			own[e.PodUID]++
		}
		if own["0"] != 11 || own["1023"] != 11 || own["1024"] != 12 || own["1199"] != 12 || l.Lost() != 0 {
			t.Errorf("lines of pods: %d, %d, %d and %d, want 11, 11, 12 and 12; %d are lost", own["0"], own["1023"], own["1024"], own["1199"], l.Lost())
		}
	})
}

// A verified pod has a line for each denial, up to podLines per window.
func TestPodsHaveTheirOwnLines(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := runLog(t, false)
		deny := func(uid string) {
			_ = l.Record(audit.Entry{Decision: audit.Deny, Reason: credential.ReasonRoleNotPermitted, Namespace: "shop", Pod: "cart", PodUID: uid, Peer: "10.0.0.1:1"})
		}
		for range 8 {
			deny("u-1")
		}
		for range 1000 {
			deny("u-2")
		}
		synctest.Wait()
		own := map[string]int{}
		for _, e := range l.lines(t) {
			own[e.PodUID]++
		}
		if own["u-1"] != 8 || own["u-2"] != 10 {
			t.Errorf("lines written at once: %v, want 8 and 10", own)
		}
		time.Sleep(audit.Window)
		synctest.Wait()
		lines := l.lines(t)
		if last := lines[len(lines)-1]; len(lines) != 19 || last.PodUID != "u-2" || last.Count != 990 || last.Pod != "cart" || last.Peer != "10.0.0.1:1" {
			t.Errorf("%d lines, the last one %+v; want 19, the last one for 990 more denials of u-2", len(lines), last)
		}
		l.stop()
	})
}

// On shutdown, the broker writes the counted denials.
func TestRunWritesCountedDenialsAtTheEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := runLog(t, true)
		for range 5 {
			_ = l.Record(unknownPeer("10.0.0.1:1"))
		}
		synctest.Wait()
		l.stop()
		if lines := l.lines(t); len(lines) != 2 || denied(lines) != 5 {
			t.Errorf("%d lines for %d denials, want 2 for 5", len(lines), denied(lines))
		}
	})
}

// slow is a writer that takes its time, like a busy disk.
type slow struct {
	sink
	took time.Duration
}

func (s *slow) Write(p []byte) (int, error) {
	time.Sleep(s.took)
	return s.sink.Write(p)
}

// If the writer is slow, an allow line is in the next write, and denials never take its space.
func TestAllowsNeverWaitBehindDenials(t *testing.T) {
	for _, required := range []bool{false, true} {
		t.Run(fmt.Sprintf("required=%v", required), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				out := &slow{took: time.Second}
				l := newLog(t, out, required)
				ctx, cancel := context.WithCancel(t.Context())
				var wg sync.WaitGroup
				wg.Go(func() { _ = l.Run(ctx) })
				pod := 0
				flood := func() {
					for n := range 20_000 { // more than all queues hold, of unknown peers and of pods beyond maxPods
						_ = l.Record(unknownPeer(fmt.Sprintf("10.%d.%d.%d:1", n%3, n/250, n%250)))
						pod++
						_ = l.Record(audit.Entry{Decision: audit.Deny, Reason: credential.ReasonRoleNotPermitted, PodUID: fmt.Sprint(pod)})
					}
				}
				for i := range 5 {
					flood()
					id := fmt.Sprintf("ASIA%d", i)
					if err := l.Record(audit.Entry{Decision: audit.Allow, PodUID: "u", AccessKeyID: id}); err != nil {
						t.Fatalf("an allow was refused: %v", err)
					}
					// One write may be in progress. The next one contains the line.
					time.Sleep(2*out.took + time.Millisecond)
					if !strings.Contains(out.String(), id) {
						t.Errorf("the allow line %s waits behind denials", id)
					}
				}
				cancel()
				wg.Wait()
			})
		})
	}
}

// A writer that hangs loses no denial of an unauthenticated peer. Denials without space in the queue are counted, and
// written when the writer works again or at the end.
func TestHangingWriterLosesNoDenial(t *testing.T) {
	for _, seconds := range []int{90, 900} {
		t.Run(fmt.Sprint(seconds), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				out := &slow{took: time.Minute}
				l := newLog(t, out, false)
				ctx, cancel := context.WithCancel(t.Context())
				var wg sync.WaitGroup
				wg.Go(func() { _ = l.Run(ctx) })
				const addresses = 200
				for range seconds {
					for n := range addresses {
						_ = l.Record(unknownPeer(fmt.Sprintf("10.0.0.%d:1", n)))
					}
					time.Sleep(time.Second)
				}
				cancel()
				wg.Wait()
				if n := denied(running{out: &out.sink}.lines(t)); n != addresses*seconds || l.Lost() != 0 {
					t.Errorf("the lines stand for %d denials and %d are lost, want %d and 0", n, l.Lost(), addresses*seconds)
				}
			})
		})
	}
}
