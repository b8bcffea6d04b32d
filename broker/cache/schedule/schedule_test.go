package schedule_test

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/credence-iam/credence/broker/cache/schedule"
)

// start is when every simulation begins.
var start = time.Date(2026, 1, 2, 3, 4, 5, 6, time.UTC)

// key is what a simulation fetches.
type key struct {
	name               string
	duration           time.Duration // of its sessions
	issued, expiration time.Time     // of its current session
	failures           int           // in a row
}

type item = schedule.Item[*key]

// fetch is one fetch that began.
type fetch struct {
	key *key
	at  time.Time
}

// simulation runs a schedule in simulated time. It fetches and renews each key as a store does, and its fetches take no
// time.
type simulation struct {
	*schedule.Schedule[*key]
	now     time.Time
	source  func(*key) schedule.Outcome // default: responds
	retryIn func(failures int) time.Duration
	fetches []fetch
}

func newSimulation(perSecond float64, concurrency int) *simulation {
	return &simulation{
		Schedule: schedule.New[*key](perSecond, concurrency), now: start,
		source:  func(*key) schedule.Outcome { return schedule.Responded },
		retryIn: func(failures int) time.Duration { return min(100*time.Millisecond<<min(failures, 10), 30*time.Second) },
	}
}

// add adds a key whose first session is due now.
func (s *simulation) add(name string, duration time.Duration) *item {
	i := schedule.NewItem(&key{name: name, duration: duration})
	s.At(i, s.now)
	return i
}

// run simulates d.
func (s *simulation) run(t *testing.T, d time.Duration) {
	t.Helper()
	end := s.now.Add(d)
	for idle := 0; idle < 10; idle++ {
		for i := s.Due(s.now); i != nil; i = s.Due(s.now) {
			s.Enqueue(i, "", i.Value.expiration)
		}
		for i := s.Begin(s.now); i != nil; i = s.Begin(s.now) {
			s.fetch(i)
			idle = 0
		}
		wait := s.Wait(s.now)
		if wait > end.Sub(s.now) {
			s.now = end
			return
		}
		if wait > 0 {
			idle = 0
		}
		s.now = s.now.Add(wait)
	}
	t.Fatalf("at %s the schedule wants to be called again at once, but lets nothing begin", s.now)
}

// fetch begins and ends a fetch.
func (s *simulation) fetch(i *item) {
	k := i.Value
	s.fetches = append(s.fetches, fetch{k, s.now})
	outcome := s.source(k)
	s.Finish(s.now, outcome, k.failures > 0)
	if outcome != schedule.Responded {
		k.failures++
		s.At(i, s.now.Add(s.retryIn(k.failures)))
		return
	}
	k.failures, k.issued, k.expiration = 0, s.now, s.now.Add(k.duration)
	s.SetDemand(i, k.duration)
	s.Renew(i, k.issued, k.expiration, s.now)
}

// drain begins and finishes everything that is queued, one fetch per millisecond, and returns the names in order.
func (s *simulation) drain() (names []string) {
	for i := s.Begin(s.now); i != nil; i = s.Begin(s.now) {
		names = append(names, i.Value.name)
		s.Finish(s.now, schedule.Responded, false)
		s.now = s.now.Add(time.Millisecond)
	}
	return names
}

// enqueue queues a fetch for a new key without a session.
func (s *simulation) enqueue(name, tenant string) *item {
	i := schedule.NewItem(&key{name: name})
	s.Enqueue(i, tenant, time.Time{})
	return i
}

// beginAll begins what may begin now.
func (s *simulation) beginAll() (items []*item) {
	for i := s.Begin(s.now); i != nil; i = s.Begin(s.now) {
		items = append(items, i)
	}
	return items
}

// unlimited is a schedule in which one fetch runs at a time, at any rate.
func unlimited() *simulation { return newSimulation(schedule.Unlimited, 1) }

func TestDue(t *testing.T) {
	s := unlimited()
	a, b, c := schedule.NewItem(&key{name: "a"}), schedule.NewItem(&key{name: "b"}), schedule.NewItem(&key{name: "c"})
	if wait := s.Wait(start); wait != schedule.Forever {
		t.Errorf("an empty schedule waits %s", wait)
	}
	s.At(a, start.Add(3*time.Second))
	s.At(b, start.Add(time.Second))
	s.At(c, start.Add(2*time.Second))
	s.At(a, start.Add(4*time.Second)) // replaces the first time
	s.Cancel(c)
	if wait := s.Wait(start); wait != time.Second {
		t.Errorf("the first item is due in %s, want 1s", wait)
	}
	if i := s.Due(start.Add(999 * time.Millisecond)); i != nil {
		t.Errorf("%s is due too early", i.Value.name)
	}
	now := start.Add(time.Minute)
	if wait := s.Wait(now); wait != 0 {
		t.Errorf("an overdue item waits %s", wait)
	}
	if !s.DueAt(a).Equal(start.Add(4*time.Second)) || !s.DueAt(c).IsZero() {
		t.Errorf("a is due at %s and c at %s", s.DueAt(a), s.DueAt(c))
	}
	if first, second, third := s.Due(now), s.Due(now), s.Due(now); first != b || second != a || third != nil {
		t.Errorf("due are %v, %v and %v, want b, a and none", first, second, third)
	}
}

func TestConcurrency(t *testing.T) {
	s := newSimulation(schedule.Unlimited, 2)
	for n := range 3 {
		s.enqueue(fmt.Sprint(n), "")
	}
	if n := len(s.beginAll()); n != 2 {
		t.Errorf("with a concurrency of 2, %d fetches begin", n)
	}
	if wait := s.Wait(s.now); wait != schedule.Forever {
		t.Errorf("only the end of a fetch lets another begin, but Wait returns %s", wait)
	}
	if stats := s.Stats(); stats.Running != 2 || stats.Queued != 1 {
		t.Errorf("stats %+v", stats)
	}
	s.Finish(s.now, schedule.Responded, false)
	if s.Wait(s.now) != 0 || len(s.beginAll()) != 1 {
		t.Error("the end of a fetch lets no other begin")
	}
}

// Fetches with waiting callers come first, then renewals by expiration, then prefetches.
func TestOrder(t *testing.T) {
	s := unlimited()
	hour := start.Add(time.Hour)
	s.enqueue("prefetch 1", "")
	s.enqueue("prefetch 2", "")
	for name, expiration := range map[string]time.Time{"later": hour.Add(time.Second), "sooner": hour, "expired": start.Add(-time.Hour)} {
		s.Enqueue(schedule.NewItem(&key{name: name}), "", expiration)
	}
	// A waiting caller's place does not depend on the session: callers of old keys are served between those of new keys.
	s.SetWaiting(s.enqueue("awaited 1", ""), "")
	renewal := schedule.NewItem(&key{name: "awaited renewal"})
	s.Enqueue(renewal, "", hour)
	s.SetWaiting(renewal, "")
	s.SetWaiting(s.enqueue("awaited 2", ""), "")
	left := s.enqueue("left", "")
	s.SetWaiting(left, "")
	s.ClearWaiting(left)
	dropped := schedule.NewItem(&key{name: "dropped"})
	s.Enqueue(dropped, "", hour)
	s.ForgetSession(dropped)
	s.Dequeue(s.enqueue("dequeued", ""))

	want := "awaited 1, awaited renewal, awaited 2, expired, sooner, later, prefetch 1, prefetch 2, left, dropped"
	if got := strings.Join(s.drain(), ", "); got != want {
		t.Errorf("the order is\n%s, want\n%s", got, want)
	}
}

// A fetch whose result was not used goes before all others that callers wait for.
func TestRequeueKeepsItsTurn(t *testing.T) {
	s := unlimited()
	outdated := s.enqueue("outdated", "")
	s.SetWaiting(outdated, "")
	if s.Begin(s.now) != outdated {
		t.Fatal("it does not begin")
	}
	s.SetWaiting(s.enqueue("other", ""), "")
	s.Finish(s.now, schedule.Responded, false)
	s.Requeue(outdated)
	if got := s.drain(); !slices.Equal(got, []string{"outdated", "other"}) {
		t.Errorf("the order is %q", got)
	}
}

// Random calls leave no item lost, none at two places and nothing counted that is gone.
func TestRandomCalls(t *testing.T) {
	for seed := range uint64(20) {
		random := rand.New(rand.NewPCG(seed, 1))
		s := newSimulation(schedule.Unlimited, 4)
		durations := []time.Duration{0, 30 * time.Second, 15 * time.Minute, time.Hour, 12 * time.Hour}
		var items, running []*item
		for n := range 50 {
			items = append(items, schedule.NewItem(&key{name: fmt.Sprint(n)}))
		}
		for range 5000 {
			i := items[random.IntN(len(items))]
			tenant := fmt.Sprint(random.IntN(5))
			duration := durations[random.IntN(len(durations))]
			inQueue, isRunning := s.Queued(i), slices.Contains(running, i)
			switch what := random.IntN(10); {
			case what == 0 && !inQueue && !isRunning:
				s.At(i, s.now.Add(duration))
			case what == 1 && !inQueue && !isRunning:
				s.Renew(i, s.now, s.now.Add(duration), s.now)
			case what == 2 && !inQueue && !isRunning:
				s.Enqueue(i, tenant, s.now.Add(duration))
			case what == 3 && inQueue:
				s.SetWaiting(i, tenant)
			case what == 4 && inQueue:
				s.ClearWaiting(i)
			case what == 5:
				s.ForgetSession(i)
			case what == 6 && random.IntN(4) == 0:
				s.Dequeue(i)
			case what == 7:
				s.SetDemand(i, duration)
			case what == 8:
				if begun := s.Begin(s.now); begun != nil {
					running = append(running, begun)
				}
			case what == 9 && len(running) > 0:
				s.Finish(s.now, schedule.Responded, false)
				if random.IntN(2) == 0 {
					s.Requeue(running[0])
				}
				running = running[1:]
			default:
				s.now = s.now.Add(time.Duration(random.Int64N(int64(10 * time.Second))))
				s.Due(s.now)
			}
			if err := s.Check(items); err != nil {
				t.Fatal(err)
			}
		}
		for _, i := range items {
			s.Cancel(i)
			s.Dequeue(i)
			s.SetDemand(i, 0)
		}
		if err := s.Check(items); err != nil {
			t.Error(err)
		}
		if stats := s.Stats(); stats.Due != 0 || stats.Queued != 0 || stats.Demand != 0 {
			t.Errorf("an empty schedule has %+v", stats)
		}
	}
}
