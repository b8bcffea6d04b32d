package schedule_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"
)

// A tenant that requests very much waits behind itself, and not before the others.
func TestTenantsTakeTurns(t *testing.T) {
	const many = 2000
	for kind, queue := range map[string]func(s *simulation, name, tenant string){
		"callers":    func(s *simulation, name, tenant string) { s.SetWaiting(s.enqueue(name, ""), tenant) },
		"prefetches": func(s *simulation, name, tenant string) { s.enqueue(name, tenant) },
	} {
		t.Run(kind, func(t *testing.T) {
			s := unlimited()
			for n := range many {
				queue(s, fmt.Sprint("greedy/", n), "greedy")
			}
			for _, tenant := range []string{"a", "b"} {
				for n := range 3 {
					queue(s, fmt.Sprintf("%s/%d", tenant, n), tenant)
				}
			}
			want := []string{"greedy/0", "a/0", "b/0", "greedy/1", "a/1", "b/1", "greedy/2", "a/2", "b/2", "greedy/3"}
			got := s.drain()
			if len(got) != many+6 || !slices.Equal(got[:len(want)], want) {
				t.Errorf("the first of %d fetches are %q, want %q", len(got), got[:len(want)], want)
			}
		})
	}
	// One that comes later gets half from then on: neither less nor more to make up for the time before.
	t.Run("latecomers", func(t *testing.T) {
		s := unlimited()
		add := func(tenant string) {
			for n := range many {
				s.enqueue(fmt.Sprintf("%s/%d", tenant, n), tenant)
			}
		}
		add("early")
		for range many / 2 {
			if s.Begin(s.now) == nil {
				t.Fatal("nothing begins")
			}
			s.Finish(s.now, 0, false)
		}
		add("late")
		late := 0
		for _, name := range s.drain()[:200] {
			if strings.HasPrefix(name, "late/") {
				late++
			}
		}
		if late < 99 || late > 101 {
			t.Errorf("of 200 fetches %d are for the tenant that came later", late)
		}
	})
}

// Within a tenant, the first request is served first.
func TestFirstComeFirstServed(t *testing.T) {
	s := unlimited()
	for n := range 50 {
		s.SetWaiting(s.enqueue(fmt.Sprintf("%03d", n), "a"), "a")
	}
	if got := s.drain(); len(got) != 50 || !slices.IsSorted(got) {
		t.Errorf("the order is %q", got)
	}
}

// A caller that returns keeps its place.
func TestReturningCallersKeepTheirPlace(t *testing.T) {
	s := unlimited()
	s.SetWaiting(s.enqueue("first", ""), "")
	impatient := s.enqueue("impatient", "")
	s.SetWaiting(impatient, "")
	s.ClearWaiting(impatient)
	s.SetWaiting(s.enqueue("last", ""), "")
	s.SetWaiting(impatient, "")
	if got := s.drain(); !slices.Equal(got, []string{"first", "impatient", "last"}) {
		t.Errorf("the order is %q", got)
	}
}
