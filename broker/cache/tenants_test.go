package cache_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/time/rate"

	"github.com/credence-iam/credence/broker/cache"
)

// place returns the index of a key's first fetch among all fetches.
func (s *source) place(key string) int {
	return slices.IndexFunc(s.recorded(), func(f fetch) bool { return f.key == key })
}

// A tenant that requests very much waits behind itself, and not before the others.
func TestTenantsTakeTurns(t *testing.T) {
	const many = 200
	for kind, request := range map[string]func(t *testing.T, c *cache.Cache[string], callers *sync.WaitGroup, key, tenant string){
		"callers": func(t *testing.T, c *cache.Cache[string], callers *sync.WaitGroup, key, tenant string) {
			callers.Go(func() {
				if _, err := c.Get(t.Context(), key, tenant); err != nil {
					t.Error(err)
				}
			})
		},
		"prefetches": func(t *testing.T, c *cache.Cache[string], _ *sync.WaitGroup, key, tenant string) {
			if err := c.Retain(key, tenant); err != nil {
				t.Error(err)
			}
		},
	} {
		t.Run(kind, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := new(source).slow(10 * time.Millisecond)
				c := start(t, s, cache.Config[string]{Concurrency: 1, Rate: rate.Inf})
				var callers sync.WaitGroup
				for i := range many {
					request(t, c, &callers, fmt.Sprintf("greedy/%d", i), "greedy")
				}
				synctest.Wait()
				for i := range 3 {
					request(t, c, &callers, fmt.Sprintf("modest/%d", i), "modest")
				}
				callers.Wait()
				time.Sleep(many * 15 * time.Millisecond)
				for i := range 3 {
					// One fetch is in flight before the others are requested. Which caller is first is not known.
					if at := s.place(fmt.Sprintf("modest/%d", i)); at < 0 || at > 2+2*3 {
						t.Errorf("request %d of the modest tenant was number %d", i, at)
					}
				}
			})
		})
	}
}

func TestClassesAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := new(source)
		c := start(t, s, cache.Config[string]{MaxPerTenant: 500})
		served := 0
		for i := range 10_000 {
			err := c.Retain(fmt.Sprint(i), "greedy")
			switch {
			case err == nil:
				served++
			case !errors.Is(err, cache.ErrTenantFull):
				t.Fatal(err)
			}
		}
		if served != 500 || c.Len() != 500 {
			t.Errorf("of 10,000 keys of one class %d are kept, %d are known", served, c.Len())
		}
		if _, err := c.Get(t.Context(), "9999", "greedy"); !errors.Is(err, cache.ErrTenantFull) {
			t.Errorf("a full class's caller is told %v", err)
		}
		if _, err := c.Get(t.Context(), "9999", "modest"); err != nil {
			t.Errorf("another class is told %v", err)
		}
		// A key that another class has brought in counts all the same.
		if _, err := c.Get(t.Context(), "9999", "greedy"); !errors.Is(err, cache.ErrTenantFull) {
			t.Errorf("a full class's caller for a key that is held is told %v", err)
		}
		// What it has it may ask for, and what it gives back it may have again.
		if _, err := c.Get(t.Context(), "0", "greedy"); err != nil {
			t.Error(err)
		}
		c.Release("0", "greedy")
		if err := c.Retain("9999", "greedy"); err != nil {
			t.Error(err)
		}
		if err := c.Retain("9998", "greedy"); !errors.Is(err, cache.ErrTenantFull) {
			t.Errorf("one more than may be: %v", err)
		}
		// A release that was not preceded by a keep changes nothing.
		c.Release("1", "modest")
		c.Release("9999", "modest")
		if err := c.Check(); err != nil {
			t.Error(err)
		}
	})
}

// What a class has given back counts until its place is wanted: however fast it changes its mind, it has no more.
func TestReleasedKeysAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := new(source)
		c := start(t, s, cache.Config[string]{MaxPerTenant: 10, Rate: rate.Inf})
		for i := range 1000 {
			key := fmt.Sprint(i)
			if err := c.Retain(key, "fickle"); err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Millisecond)
			c.Release(key, "fickle")
		}
		if n := c.Len(); n > 10 {
			t.Errorf("%d keys are known", n)
		}
		// Nor does what was only asked for shut out what is to be kept, though another class keeps it.
		for i := range 10 {
			key := fmt.Sprint("shared-", i)
			if err := c.Retain(key, "other"); err != nil {
				t.Fatal(err)
			}
			if _, err := c.Get(t.Context(), key, "fickle"); err != nil {
				t.Fatal(err)
			}
		}
		for i := range 10 {
			if err := c.Retain(fmt.Sprint("own-", i), "fickle"); err != nil {
				t.Errorf("key %d: %v", i, err)
			}
		}
		if err := c.Retain("one more", "fickle"); !errors.Is(err, cache.ErrTenantFull) {
			t.Errorf("one more: %v", err)
		}
		if err := c.Check(); err != nil {
			t.Error(err)
		}
	})
}

// A key whose fetch is queued or under way is no room for another one, whether a caller still waits for it or not: its
// session would be lost, and the fetch's end would meet an entry that is not known.
func TestFetchesUnderWayAreNoRoom(t *testing.T) {
	for name, tt := range map[string]struct{ concurrency, callers int }{
		"under way, with callers":  {64, 1},
		"under way, all have left": {64, 0},
		"one is queued":            {1, 1},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := (&source{}).slow(10 * time.Second)
				c := start(t, s, cache.Config[string]{MaxPerTenant: 2, Concurrency: tt.concurrency})
				ctx, leave := context.WithCancel(t.Context())
				defer leave()
				got := make(chan error, 2)
				for _, key := range []string{"a", "b"} {
					go func() { _, err := c.Get(ctx, key, "shop"); got <- err }()
					synctest.Wait()
				}
				if tt.callers == 0 {
					leave()
				}
				synctest.Wait()
				for range 3 {
					if _, err := c.Get(t.Context(), "c", "shop"); !errors.Is(err, cache.ErrTenantFull) {
						t.Errorf("a third key was answered %v, want %v", err, cache.ErrTenantFull)
					}
					if err := c.Retain("d", "shop"); !errors.Is(err, cache.ErrTenantFull) {
						t.Errorf("a fourth key is kept: %v", err)
					}
				}
				if err := c.Check(); err != nil {
					t.Error(err)
				}
				time.Sleep(time.Minute)
				synctest.Wait()
				for range 2 {
					if err := <-got; err != nil && tt.callers > 0 {
						t.Errorf("a caller whose fetch was under way got %v", err)
					}
				}
				// The fetched sessions are cached, and give room now.
				mustGet(t, c, "a")
				mustGet(t, c, "b")
				if n := s.count(); n != 2 {
					t.Errorf("%d fetches, want 2: a session was lost", n)
				}
				if _, err := c.Get(t.Context(), "c", "shop"); err != nil {
					t.Errorf("when nothing is under way, a third key was answered %v", err)
				}
				if err := c.Check(); err != nil {
					t.Error(err)
				}
			})
		})
	}
}

