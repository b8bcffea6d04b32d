package broker_test

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"sync"
	"testing"
	"testing/synctest"

	"github.com/credence-iam/credence/broker"
	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/policy"
)

// keeper counts what is kept.
type keeper struct {
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
func (k *keeper) Keep(g policy.Grant)    { k.add(g, 1) }
func (k *keeper) Release(g policy.Grant) { k.add(g, -1) }

func (k *keeper) want(t *testing.T, want map[string]int) {
	t.Helper()
	k.mu.Lock()
	defer k.mu.Unlock()
	if !maps.Equal(k.kept, want) {
		t.Errorf("kept %v, want %v", k.kept, want)
	}
}

func TestPrefetchFollowsPods(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
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
		var mu sync.Mutex
		roles := map[string]string{} // :: pod key → its role; guarded by mu
		permitted := ".*"            // guarded by mu
		sessions := &keeper{kept: map[string]int{}}
		p, err := broker.NewPrefetch(broker.PrefetchConfig{
			Rules: rules, Sessions: sessions, Logger: slog.New(slog.DiscardHandler),
			Lookup: func(key string) (policy.Pod, policy.Namespace, bool) {
				mu.Lock()
				defer mu.Unlock()
				role, ok := roles[key]
				return policy.Pod{Namespace: "shop", Name: key, UID: key, Annotations: map[string]string{keys.Name(policy.Role): role}},
					policy.Namespace{
						Name: "shop", Labels: map[string]string{keys.Name(policy.Inject): policy.Enabled},
						Annotations: map[string]string{keys.Name(policy.Permitted): permitted},
					}, ok
			},
		})
		if err != nil {
			t.Fatal(err)
		}
		set := func(key, role string) {
			mu.Lock()
			roles[key] = role
			if role == "" {
				delete(roles, key)
			}
			mu.Unlock()
			p.Changed(key)
		}
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		// Far more changes than any buffer, before anybody looks: none is lost.
		for i := range 5000 {
			set(fmt.Sprintf("pod-%d", i), "a")
		}
		go func() { _ = p.Run(ctx) }()
		synctest.Wait()
		sessions.want(t, map[string]int{"a": 5000})

		set("pod-0", "b")
		set("pod-1", "")
		synctest.Wait()
		sessions.want(t, map[string]int{"a": 4998, "b": 1})

		for range 3 {
			p.Changed("pod-0") // nothing new
		}
		synctest.Wait()
		sessions.want(t, map[string]int{"a": 4998, "b": 1})

		mu.Lock()
		permitted = ".*/a"
		mu.Unlock()
		p.Changed("pod-0")
		synctest.Wait()
		sessions.want(t, map[string]int{"a": 4998})
	})
}
