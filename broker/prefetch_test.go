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

// keeper counts what is kept.
type keeper struct {
	most int // distinct roles, if not 0

	mu   sync.Mutex
	kept map[string]int // :: role name → Keep calls not released; guarded by mu
}

func (k *keeper) add(g policy.Grant, n int) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.kept[g.Role().Name()] += n
	if k.kept[g.Role().Name()] == 0 {
		delete(k.kept, g.Role().Name())
	}
}

func (k *keeper) Retain(g policy.Grant, _ string) error {
	k.mu.Lock()
	full := k.most > 0 && len(k.kept) == k.most && k.kept[g.Role().Name()] == 0
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
	if !maps.Equal(k.kept, want) {
		t.Errorf("kept %v, want %v", k.kept, want)
	}
}

// pods are the pods of a namespace, and a Prefetch that follows them.
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

// run follows the pods until the test ends.
func (p *pods) run() {
	ctx, cancel := context.WithCancel(p.t.Context())
	p.t.Cleanup(cancel)
	go func() { _ = p.prefetch.Run(ctx, p.rules) }()
}

// set gives a pod a role; an empty one ends the pod.
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
		sessions := &keeper{kept: map[string]int{}}
		p := newPods(t, sessions)
		// Far more changes than any buffer, before anybody looks: none is lost.
		for i := range 5000 {
			p.set(fmt.Sprintf("pod-%d", i), "a")
		}
		if n := p.prefetch.Pending(); n != 5000 {
			t.Errorf("%d pods are pending", n)
		}
		p.run()
		synctest.Wait()
		sessions.want(t, map[string]int{"a": 5000})
		if n := p.prefetch.Pending(); n != 0 {
			t.Errorf("%d pods are pending after all", n)
		}

		p.set("pod-0", "b")
		p.set("pod-1", "")
		synctest.Wait()
		sessions.want(t, map[string]int{"a": 4998, "b": 1})

		for range 3 {
			p.prefetch.Changed("shop/pod-0") // nothing new
		}
		synctest.Wait()
		sessions.want(t, map[string]int{"a": 4998, "b": 1})

		p.mu.Lock()
		p.permitted = ".*/a"
		p.mu.Unlock()
		p.prefetch.Changed("shop/pod-0")
		synctest.Wait()
		sessions.want(t, map[string]int{"a": 4998})
	})
}

// What other brokers own is for them to keep, until they are gone.
func TestPrefetchOfWhatOthersOwn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sessions := &keeper{kept: map[string]int{}}
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

// What a full namespace could not have, it has as soon as there is room.
func TestPrefetchOfAFullNamespace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sessions := &keeper{most: 2, kept: map[string]int{}}
		p := newPods(t, sessions)
		p.run()
		for _, name := range []string{"a", "b", "c", "d"} {
			p.set(name, name)
			synctest.Wait()
		}
		sessions.want(t, map[string]int{"a": 1, "b": 1})
		p.set("c", "") // which waited, and is gone
		synctest.Wait()
		if n := p.prefetch.Waiting(); n != 1 {
			t.Errorf("%d pods wait", n)
		}
		p.set("d", "") // and this one goes while it is about to have its turn
		p.set("a", "")
		p.set("d", "d")
		synctest.Wait()
		sessions.want(t, map[string]int{"b": 1, "d": 1})
		// A pod may change to what takes its own place.
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

// The pods of a namespace, however many, are looked at in turn with those of others, whichever came first.
func TestPrefetchTakesNamespacesInTurn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		keys, err := policy.NewKeys(policy.DefaultPrefix)
		fatal(t, err)
		rules, err := policy.New(policy.Config{Keys: keys})
		fatal(t, err)
		var looked []string // only Run calls Lookup
		var prefetch *broker.Prefetch
		prefetch, err = broker.NewPrefetch(broker.PrefetchConfig{
			Sessions: &keeper{kept: map[string]int{}}, Logger: slog.New(slog.DiscardHandler),
			Lookup: func(key string) (policy.Pod, policy.Namespace, bool) {
				if looked = append(looked, key); len(looked) == 4 {
					prefetch.Changed("late/1", "hog/0") // hog/0 has been looked at, and is again
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
			t.Errorf("%d are pending, want 103", n)
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
			t.Errorf("looked at %q last, %d are pending", looked[104], prefetch.Pending())
		}
	})
}
