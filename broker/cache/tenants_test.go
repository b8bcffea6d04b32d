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

func TestMaxPerTenant(t *testing.T) {
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
			t.Errorf("of 10,000 keys of one tenant %d are active, and the cache has %d", served, c.Len())
		}
		if _, err := c.Get(t.Context(), "9999", "greedy"); !errors.Is(err, cache.ErrTenantFull) {
			t.Errorf("a caller of a full tenant gets %v", err)
		}
		if _, err := c.Get(t.Context(), "9999", "modest"); err != nil {
			t.Errorf("a caller of another tenant gets %v", err)
		}
		// A key that another tenant already uses counts too.
		if _, err := c.Get(t.Context(), "9999", "greedy"); !errors.Is(err, cache.ErrTenantFull) {
			t.Errorf("a caller of a full tenant gets %v for a cached key", err)
		}
		// A full tenant can request its own keys, and replace a released one.
		if _, err := c.Get(t.Context(), "0", "greedy"); err != nil {
			t.Error(err)
		}
		c.Release("0", "greedy")
		if err := c.Retain("9999", "greedy"); err != nil {
			t.Error(err)
		}
		if err := c.Retain("9998", "greedy"); !errors.Is(err, cache.ErrTenantFull) {
			t.Errorf("one key too many: %v", err)
		}
		// Release without Retain has no effect.
		c.Release("1", "modest")
		c.Release("9999", "modest")
		if err := c.Check(); err != nil {
			t.Error(err)
		}
	})
}

// A released key counts until another key needs its place: a tenant that changes its keys often has no more of them.
func TestReleasedKeysAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := new(source)
		c := start(t, s, cache.Config[string]{MaxPerTenant: 10, Rate: rate.Inf})
		for i := range 1000 {
			key := fmt.Sprint(i)
			if err := c.Retain(key, "changing"); err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Millisecond)
			c.Release(key, "changing")
		}
		if n := c.Len(); n > 10 {
			t.Errorf("the cache has %d keys", n)
		}
		// Keys that were only requested, or that another tenant retains, do not prevent Retain.
		for i := range 10 {
			key := fmt.Sprint("shared-", i)
			if err := c.Retain(key, "other"); err != nil {
				t.Fatal(err)
			}
			if _, err := c.Get(t.Context(), key, "changing"); err != nil {
				t.Fatal(err)
			}
		}
		for i := range 10 {
			if err := c.Retain(fmt.Sprint("own-", i), "changing"); err != nil {
				t.Errorf("key %d: %v", i, err)
			}
		}
		if err := c.Retain("one more", "changing"); !errors.Is(err, cache.ErrTenantFull) {
			t.Errorf("one more: %v", err)
		}
		if err := c.Check(); err != nil {
			t.Error(err)
		}
	})
}

// A key is not evicted during its fetch, with or without callers: its session would be lost, and the end of the fetch would
// find no entry.
func TestFetchesAreNotEvicted(t *testing.T) {
	for name, tt := range map[string]struct{ concurrency, callers int }{
		"in flight, with callers":    {64, 1},
		"in flight, without callers": {64, 0},
		"queued":                     {1, 1},
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
						t.Errorf("a third key got %v, want %v", err, cache.ErrTenantFull)
					}
					if err := c.Retain("d", "shop"); !errors.Is(err, cache.ErrTenantFull) {
						t.Errorf("Retain of a fourth key: %v", err)
					}
				}
				if err := c.Check(); err != nil {
					t.Error(err)
				}
				time.Sleep(time.Minute)
				synctest.Wait()
				for range 2 {
					if err := <-got; err != nil && tt.callers > 0 {
						t.Errorf("a caller whose fetch was in flight got %v", err)
					}
				}
				// The sessions are cached now, and can be evicted.
				mustGet(t, c, "a")
				mustGet(t, c, "b")
				if n := s.count(); n != 2 {
					t.Errorf("%d fetches, want 2: a session was lost", n)
				}
				if _, err := c.Get(t.Context(), "c", "shop"); err != nil {
					t.Errorf("after the fetches, a third key got %v", err)
				}
				if err := c.Check(); err != nil {
					t.Error(err)
				}
			})
		})
	}
}
