package trust

import (
	"context"
	"fmt"
	"sync"
	"time"

	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/metadata"
)

const ownerKind = "ClusterRole"

// ownerMinAge is the least time between two reads of the owner. While the garbage collector deletes
// thousands of ConfigMaps, each of them doubts the owner.
const ownerMinAge = time.Second

// owner knows the UID of the object that owns all ConfigMaps. One that was deleted and made again is
// another owner, and what the old one owned is deleted.
type owner struct {
	meta metadata.Interface
	name string // empty: there is none

	mu    sync.Mutex
	known types.UID // empty before the first read; guarded by mu
	read  time.Time // guarded by mu
	err   error     // of the last read; guarded by mu
	stale bool      // whether known may be wrong; guarded by mu
}

// invalidate has the owner read again before it is used next.
func (o *owner) invalidate() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.stale = true
}

// uid is the owner's; empty when there is none to be. Without an owner that should be, nothing is
// published: it is gone because Credence is being uninstalled, and what is written now would stay.
func (o *owner) uid(ctx context.Context) (types.UID, error) {
	if o.name == "" {
		return "", nil
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if (o.known != "" && !o.stale) || (!o.read.IsZero() && time.Since(o.read) < ownerMinAge) {
		return o.known, o.err
	}
	ctx, cancel := context.WithTimeout(ctx, writeTimeout)
	defer cancel()
	m, err := o.meta.Resource(rbacv1.SchemeGroupVersion.WithResource("clusterroles")).Get(ctx, o.name, metav1.GetOptions{})
	o.read = time.Now()
	if err != nil {
		o.known, o.err = "", fmt.Errorf("reading %s %s, which is to own the ConfigMaps: %w", ownerKind, o.name, err)
		return "", o.err
	}
	o.known, o.err, o.stale = m.UID, nil, false
	return o.known, nil
}
