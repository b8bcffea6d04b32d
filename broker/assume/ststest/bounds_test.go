package ststest

import (
	"strconv"
	"testing"
	"testing/synctest"
	"time"
)

// The tests reach the two memory bounds through internals, because requests would take minutes.

func TestCallLogIsBounded(t *testing.T) {
	var l callLog
	l.init(nil)
	for i := range maxCalls + 1 {
		l.end(l.begin(Call{Action: "AssumeRole", SessionName: strconv.Itoa(i)}), 200, "", "")
	}
	calls := l.calls()
	if got, want := len(calls), maxCalls*9/10+1; got != want {
		t.Errorf("%d calls are kept, want %d", got, want)
	}
	if got := calls[len(calls)-1].SessionName; got != strconv.Itoa(maxCalls) {
		t.Errorf("the last call kept is %s, want %d", got, maxCalls)
	}
	if got := l.count("AssumeRole", ""); got != maxCalls+1 {
		t.Errorf("%d calls are counted, want %d", got, maxCalls+1)
	}
}

func TestExpiredSessionsAreForgotten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, err := New(Config{})
		if err != nil {
			t.Fatal(err)
		}
		known := func(id string) bool {
			s.mu.Lock()
			defer s.mu.Unlock()
			_, ok := s.principals[id]
			return ok
		}
		fill := func(n int) {
			for i := range n {
				s.remember("FILL"+strconv.Itoa(i), principal{expires: time.Now().Add(12 * time.Hour)})
			}
		}
		s.remember("OLD", principal{expires: time.Now()})
		time.Sleep(keepExpired + time.Second)
		s.remember("JUST", principal{expires: time.Now()})
		fill(1020)
		if !known("OLD") {
			t.Fatal("swept too early for this test")
		}
		fill(1021)
		if known("OLD") {
			t.Error("a session that expired over an hour ago is still known")
		}
		for _, id := range []string{"JUST", "FILL0", s.baseKeyID} {
			if !known(id) {
				t.Errorf("%.4s was forgotten", id)
			}
		}
	})
}
