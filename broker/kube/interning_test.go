package kube

import (
	"fmt"
	"sync"
	"sync/atomic"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/credence-iam/credence/broker/policy"
)

func metadataOf(i int, role string) *metav1.PartialObjectMetadata {
	m := new(metav1.PartialObjectMetadata)
	m.Namespace, m.Name, m.UID = "shop", fmt.Sprint("p-", i), types.UID(fmt.Sprint("u-", i))
	m.Annotations = map[string]string{policy.DefaultPrefix + "/role": role, "other": m.Name}
	return m
}

// The watch parses no annotations. The first request for them does, once for all pods with equal ones.
func TestAnnotationsAreParsedOnce(t *testing.T) {
	keys, err := policy.NewKeys(policy.DefaultPrefix)
	if err != nil {
		t.Fatal(err)
	}
	var parsed atomic.Int64
	in := &interning{annotations: hasPrefix(keys), parse: func(annotations map[string]string) *policy.Request {
		parsed.Add(1)
		return keys.Request(annotations)
	}}
	var pods []*object
	for i := range 100 {
		pods = append(pods, in.reduce(metadataOf(i, fmt.Sprint("role-", i%2)), nil))
	}
	if n := parsed.Load(); n != 0 {
		t.Errorf("the watch parsed %d annotations, want 0", n)
	}
	var callers sync.WaitGroup
	for i, o := range pods {
		callers.Go(func() {
			s, err := o.request().Settings()
			if want := fmt.Sprint("role-", i%2); err != nil || s.Role != want {
				t.Errorf("pod %d requests role %q (%v), want %q", i, s.Role, err, want)
			}
		})
	}
	callers.Wait()
	if n := parsed.Load(); n != 2 {
		t.Errorf("the annotations were parsed %d times, want once for each of 2 roles", n)
	}
	// An object is the same pointer until a part of it changes, also after its annotations were parsed.
	if in.reduce(metadataOf(0, "role-0"), pods[0]) != pods[0] {
		t.Error("an unchanged pod became another object")
	}
	if in.reduce(metadataOf(0, "role-1"), pods[0]) == pods[0] || in.reduce(metadataOf(2, "role-0"), pods[0]) == pods[0] {
		t.Error("a pod with another role or UID is the same object")
	}
}

// sweep drops the subsets that no object has, and keeps the others.
func TestSweepDropsUnusedSubsets(t *testing.T) {
	in := &interning{annotations: func(string) bool { return true }}
	used := map[*metaSubset]bool{}
	for i := range 3000 {
		if m := in.subset(nil, map[string]string{"a": fmt.Sprint(i)}); i%3 == 0 {
			used[m] = true
		}
	}
	in.sweep(func() map[*metaSubset]bool { return used })
	if len(in.shared) != 1000 {
		t.Errorf("%d subsets are left, want the 1000 in use", len(in.shared))
	}
	if m := in.subset(nil, map[string]string{"a": "0"}); !used[m] {
		t.Error("a subset in use was dropped")
	}
	in.sweep(func() map[*metaSubset]bool { t.Error("sweep looked at all objects for 1000 subsets"); return nil })
}
