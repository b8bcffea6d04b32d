package cache_test

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/time/rate"

	"github.com/credence-iam/credence/broker/cache"
)

// place is where the fetch of a key stood among all.
func (s *source) place(key string) int {
	return slices.IndexFunc(s.recorded(), func(f fetch) bool { return f.key == key })
}

// A class that asks for very much is behind itself, and not before the others.
func TestClassesTakeTurns(t *testing.T) {
	const many = 2000
	t.Run("callers", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			s := new(source).slow(10 * time.Millisecond)
			c := start(t, s, cache.Config[string]{Concurrency: 1, Rate: rate.Inf})
			var callers sync.WaitGroup
			get := func(key, class string) {
				callers.Go(func() {
					if _, err := c.Get(t.Context(), key, class); err != nil {
						t.Error(err)
					}
				})
			}
			for i := range many {
				get(fmt.Sprintf("greedy/%d", i), "greedy")
			}
			synctest.Wait()
			for i := range 3 {
				get(fmt.Sprintf("modest/%d", i), "modest")
			}
			callers.Wait()
			var places []int // who of them came first is not known
			for i := range 3 {
				places = append(places, s.place(fmt.Sprintf("modest/%d", i)))
			}
			slices.Sort(places)
			for i, at := range places {
				if at > 2+2*(i+1) {
					t.Errorf("request %d of the modest class was number %d", i, at)
				}
			}
		})
	})
	t.Run("ahead", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			s := new(source).slow(10 * time.Millisecond)
			c := start(t, s, cache.Config[string]{Concurrency: 1, Rate: rate.Inf})
			for class, n := range map[string]int{"greedy": many, "a": 3, "b": 3} {
				for i := range n {
					if err := c.Retain(fmt.Sprintf("%s/%d", class, i), class); err != nil {
						t.Error(err)
					}
				}
			}
			time.Sleep(many * 15 * time.Millisecond)
			if n := s.count(); n != many+6 {
				t.Fatalf("%d fetches", n)
			}
			for _, class := range []string{"a", "b"} {
				for i := range 3 {
					// Three classes take turns, three times; one fetch may have begun before there were others.
					if at := s.place(fmt.Sprintf("%s/%d", class, i)); at > 1+3*3 {
						t.Errorf("key %d of class %s was number %d", i, class, at)
					}
				}
			}
		})
	})
	t.Run("latecomers", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			s := new(source).slow(10 * time.Millisecond)
			c := start(t, s, cache.Config[string]{Concurrency: 1, Rate: rate.Inf})
			add := func(class string) {
				for i := range many {
					if err := c.Retain(fmt.Sprintf("%s/%d", class, i), class); err != nil {
						t.Error(err)
					}
				}
			}
			add("early")
			time.Sleep(10 * time.Second) // which is half of it
			add("late")
			before := s.count()
			time.Sleep(2 * time.Second)
			late := 0
			for _, f := range s.recorded()[before:] {
				if strings.HasPrefix(f.key, "late/") {
					late++
				}
			}
			if n := s.count() - before; !within(time.Duration(late), time.Duration(n*2/5), time.Duration(n*3/5)) {
				t.Errorf("of %d fetches %d were for the class that came later", n, late)
			}
		})
	})
	t.Run("who asks again keeps the place", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			s := new(source).slow(100 * time.Millisecond)
			c := start(t, s, cache.Config[string]{Concurrency: 1, Rate: rate.Inf})
			var callers sync.WaitGroup
			get := func(key string) { callers.Go(func() { mustGet(t, c, key) }) }
			for i := range 100 {
				get(fmt.Sprint("before-", i))
			}
			synctest.Wait()
			keep(t, c, "impatient")
			callers.Go(func() {
				for {
					ctx, cancel := context.WithTimeout(t.Context(), time.Second)
					_, err := c.Get(ctx, "impatient", "")
					cancel()
					if err == nil {
						return
					}
				}
			})
			synctest.Wait()
			for i := range 100 {
				get(fmt.Sprint("after-", i))
			}
			callers.Wait()
			if at := s.place("impatient"); at > 101 {
				t.Errorf("it was number %d", at)
			}
		})
	})
	t.Run("first come, first served within a class", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			s := new(source).slow(10 * time.Millisecond)
			c := start(t, s, cache.Config[string]{Concurrency: 1, Rate: rate.Inf})
			var callers sync.WaitGroup
			for i := range 50 {
				callers.Go(func() { mustGet(t, c, fmt.Sprintf("%03d", i)) })
				synctest.Wait()
			}
			callers.Wait()
			var order []string
			for _, f := range s.recorded() {
				order = append(order, f.key)
			}
			if !slices.IsSorted(order) {
				t.Errorf("the order is %s", strings.Join(order, " "))
			}
		})
	})
}
