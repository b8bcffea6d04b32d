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

// ownerMinAge is the minimum time between two reads of the owner. While the garbage collector deletes thousands of ConfigMaps,
// each deletion invalidates the owner.
const ownerMinAge = time.Second

// owner caches the UID of the object that owns all ConfigMaps. A recreated object has another UID, and the garbage collector
// deletes the ConfigMaps of the old one.
type owner struct {
	meta metadata.Interface
	name string // empty: no owner

	mu    sync.Mutex
	known types.UID // empty before the first read; guarded by mu
	read  time.Time // guarded by mu
	err   error     // of the last read; guarded by mu
	stale bool      // known may be wrong; guarded by mu
}

// invalidate makes the next call of uid read the owner.
func (o *owner) invalidate() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.stale = true
}

// uid returns the owner's UID; empty if no owner is configured. It returns an error if the configured owner does not exist: then
// Credence is being uninstalled, and a ConfigMap that is written now would stay.
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
		o.known, o.err = "", fmt.Errorf("reading %s %s, the owner of the ConfigMaps: %w", ownerKind, o.name, err)
		return "", o.err
	}
	o.known, o.err, o.stale = m.UID, nil, false
	return o.known, nil
}
