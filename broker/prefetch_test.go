package broker_test

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"testing"
	"testing/synctest"

	"github.com/credence-iam/credence/broker"
	"github.com/credence-iam/credence/broker/cache"
	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/policy"
)

// keeper counts retained grants.
type keeper struct {
	limit int // distinct roles, if not 0

	mu       sync.Mutex
	retained map[string]int // :: role name → Retain calls without a Release; guarded by mu
}

func (k *keeper) add(g policy.Grant, n int) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.retained[g.Role().Name()] += n
	if k.retained[g.Role().Name()] == 0 {
		delete(k.retained, g.Role().Name())
	}
}

func (k *keeper) Retain(g policy.Grant, _ string) error {
	k.mu.Lock()
	full := k.limit > 0 && len(k.retained) == k.limit && k.retained[g.Role().Name()] == 0
	k.mu.Unlock()
	if full {
		return cache.ErrTenantFull
	}
	k.add(g, 1)
	return nil
}

func (k *keeper) Release(g policy.Grant, _ string) { k.add(g, -1) }

func (k *keeper) want(t *testing.T, want map[string]int) {
	t.Helper()
	k.mu.Lock()
	defer k.mu.Unlock()
	if !maps.Equal(k.retained, want) {
		t.Errorf("retained %v, want %v", k.retained, want)
	}
}

// pods are the pods of a namespace, with a Prefetch.
type pods struct {
	t        *testing.T
	prefetch *broker.Prefetch
	rules    *policy.Rules

	mu        sync.Mutex
	roles     map[string]string // :: pod key → its role; guarded by mu
	permitted string            // guarded by mu
	foreign   map[string]bool   // :: routing key → whether other brokers own it; guarded by mu
}

func newPods(t *testing.T, sessions broker.Retainer) *pods {
	t.Helper()
	keys, err := policy.NewKeys(policy.DefaultPrefix)
	if err != nil {
		t.Fatal(err)
	}
	base, err := credential.BaseOf("aws", "123456789012")
	if err != nil {
		t.Fatal(err)
	}
	rules, err := policy.New(policy.Config{Keys: keys, Base: base})
	if err != nil {
		t.Fatal(err)
	}
	p := &pods{t: t, rules: rules, roles: map[string]string{}, permitted: ".*", foreign: map[string]bool{}}
	p.prefetch, err = broker.NewPrefetch(broker.PrefetchConfig{
		Sessions: sessions, Logger: slog.New(slog.DiscardHandler),
		Owns: func(key string) bool {
			p.mu.Lock()
			defer p.mu.Unlock()
			return !p.foreign[key]
		},
		Lookup: func(key string) (policy.Pod, policy.Namespace, bool) {
			p.mu.Lock()
			defer p.mu.Unlock()
			role, ok := p.roles[key]
			return policy.Pod{Namespace: "shop", Name: key, UID: key, Request: keys.Request(map[string]string{keys.Name(policy.Role): role})},
				policy.Namespace{
					Name: "shop", Labels: map[string]string{keys.Name(policy.Inject): policy.Enabled},
					Annotations: map[string]string{keys.Name(policy.Permitted): p.permitted},
				}, ok
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// run runs the prefetch until the test ends.
func (p *pods) run() {
	ctx, cancel := context.WithCancel(p.t.Context())
	p.t.Cleanup(cancel)
	go func() { _ = p.prefetch.Run(ctx, p.rules) }()
}

// set sets the role of a pod; an empty role removes the pod.
func (p *pods) set(name, role string) {
	key := "shop/" + name
	p.mu.Lock()
	p.roles[key] = role
	if role == "" {
		delete(p.roles, key)
	}
	p.mu.Unlock()
	p.prefetch.Changed(key)
}

func TestPrefetchFollowsPods(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sessions := &keeper{retained: map[string]int{}}
		p := newPods(t, sessions)
		// Prefetch loses none of far more changes than any buffer has room for.
		for i := range 5000 {
			p.set(fmt.Sprintf("pod-%d", i), "a")
		}
		if n := p.prefetch.Pending(); n != 5000 {
			t.Errorf("%d pods are pending, want 5000", n)
		}
		p.run()
		synctest.Wait()
		sessions.want(t, map[string]int{"a": 5000})
		if n := p.prefetch.Pending(); n != 0 {
			t.Errorf("at the end %d pods are pending, want 0", n)
		}

		p.set("pod-0", "b")
		p.set("pod-1", "")
		synctest.Wait()
		sessions.want(t, map[string]int{"a": 4998, "b": 1})
		a, ok := p.prefetch.Grant("shop/pod-4999")
		if n := len(p.prefetch.Pods(a)); !ok || a.Role().Name() != "a" || n != 4998 {
			t.Errorf("the last pod has role %s, as %d pods", a.Role(), n)
		}
		b, ok := p.prefetch.Grant("shop/pod-0")
		if keys := p.prefetch.Pods(b); !ok || b.Role().Name() != "b" || !slices.Equal(keys, []string{"shop/pod-0"}) {
			t.Errorf("the first pod has role %s, as %q", b.Role(), keys)
		}
		if _, ok := p.prefetch.Grant("shop/pod-1"); ok {
			t.Error("a deleted pod has a grant")
		}

		for range 3 {
			p.prefetch.Changed("shop/pod-0") // no change
		}
		synctest.Wait()
		sessions.want(t, map[string]int{"a": 4998, "b": 1})

		p.mu.Lock()
		p.permitted = ".*/a"
		p.mu.Unlock()
		p.prefetch.Changed("shop/pod-0")
		synctest.Wait()
		sessions.want(t, map[string]int{"a": 4998})
		if keys := p.prefetch.Pods(b); len(keys) > 0 {
			t.Errorf("a grant that is not retained has the pods %q", keys)
		}
	})
}

// Prefetch retains no grant that other brokers own, until they are gone.
func TestPrefetchLeavesSessionsOfOtherOwners(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sessions := &keeper{retained: map[string]int{}}
		p := newPods(t, sessions)
		keys, err := policy.NewKeys(policy.DefaultPrefix)
		fatal(t, err)
		foreign := func(role string, is bool) {
			key, err := policy.Pod{Request: keys.Request(map[string]string{keys.Name(policy.Role): role})}.RoutingKey()
			fatal(t, err)
			p.mu.Lock()
			p.foreign[string(key)] = is
			p.mu.Unlock()
			p.prefetch.Changed("shop/1", "shop/2", "shop/3")
			synctest.Wait()
		}
		p.run()
		foreign("b", true)
		p.set("1", "a")
		p.set("2", "b")
		p.set("3", "b")
		synctest.Wait()
		sessions.want(t, map[string]int{"a": 1})
		foreign("b", false)
		sessions.want(t, map[string]int{"a": 1, "b": 2})
		foreign("a", true)
		sessions.want(t, map[string]int{"b": 2})
		p.set("1", "b")
		synctest.Wait()
		sessions.want(t, map[string]int{"b": 3})
	})
}

// A pod of a full namespace gets its grant as soon as there is room.
func TestPrefetchOfAFullNamespace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sessions := &keeper{limit: 2, retained: map[string]int{}}
		p := newPods(t, sessions)
		p.run()
		for _, name := range []string{"a", "b", "c", "d"} {
			p.set(name, name)
			synctest.Wait()
		}
		sessions.want(t, map[string]int{"a": 1, "b": 1})
		p.set("c", "") // waited, and is gone
		synctest.Wait()
		if n := p.prefetch.Waiting(); n != 1 {
			t.Errorf("%d pods wait", n)
		}
		p.set("d", "") // is gone just before its turn
		p.set("a", "")
		p.set("d", "d")
		synctest.Wait()
		sessions.want(t, map[string]int{"b": 1, "d": 1})
		// A pod can change to a grant that takes the place of its own.
		p.set("b", "e")
		synctest.Wait()
		sessions.want(t, map[string]int{"d": 1, "e": 1})
		p.set("d", "")
		p.set("e", "")
		p.set("b", "")
		synctest.Wait()
		sessions.want(t, map[string]int{})
	})
}

// Namespaces take turns, one pod each, however many pods one of them has.
func TestPrefetchTakesNamespacesInTurn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		keys, err := policy.NewKeys(policy.DefaultPrefix)
		fatal(t, err)
		rules, err := policy.New(policy.Config{Keys: keys})
		fatal(t, err)
		var looked []string // only Run calls Lookup
		var prefetch *broker.Prefetch
		prefetch, err = broker.NewPrefetch(broker.PrefetchConfig{
			Sessions: &keeper{retained: map[string]int{}}, Logger: slog.New(slog.DiscardHandler),
			Lookup: func(key string) (policy.Pod, policy.Namespace, bool) {
				if looked = append(looked, key); len(looked) == 4 {
					prefetch.Changed("late/1", "hog/0") // Run has looked at hog/0, and must do so again
				}
				return policy.Pod{}, policy.Namespace{}, false
			},
		})
		fatal(t, err)
		var hog []string
		for i := range 100 {
			hog = append(hog, fmt.Sprint("hog/", i))
		}
		prefetch.Changed(hog...)
		prefetch.Changed("shop/1", "shop/2", "shop/1", "team/1")
		if n := prefetch.Pending(); n != 103 {
			t.Errorf("%d pods are pending, want 103", n)
		}
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		go func() { _ = prefetch.Run(ctx, rules) }()
		synctest.Wait()
		want := []string{"hog/0", "shop/1", "team/1", "hog/1", "shop/2", "hog/2", "late/1", "hog/3"}
		if len(looked) != 105 || !slices.Equal(looked[:len(want)], want) {
			t.Errorf("looked at %d pods, first at %q, want 105 and %q", len(looked), looked[:min(len(looked), len(want))], want)
		}
		if looked[104] != "hog/0" || prefetch.Pending() != 0 {
			t.Errorf("looked at %q last, and %d are pending, want hog/0 and none", looked[104], prefetch.Pending())
		}
	})
}
