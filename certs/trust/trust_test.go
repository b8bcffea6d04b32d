package trust_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	utilruntime "k8s.io/apimachinery/pkg/util/runtime"
	"k8s.io/client-go/rest"
	"k8s.io/klog/v2"

	"github.com/credence-iam/credence/broker/kube/apitest"
	"github.com/credence-iam/credence/certs"
	"github.com/credence-iam/credence/certs/certstest"
	"github.com/credence-iam/credence/certs/trust"
)

const (
	home = "credence" // the broker's own namespace
	host = "credence-broker.credence.svc"
)

func TestMain(m *testing.M) {
	// One of client-go's error handlers sleeps after a recent error. It compares with a time from outside of the bubble, so it
	// would sleep for 26 years.
	utilruntime.ErrorHandlers = utilruntime.ErrorHandlers[:1]
	klog.SetSlogLogger(slog.New(slog.DiscardHandler))
	m.Run()
}

// settle is longer than the interval at which the leader reads its file.
const settle = 5 * time.Second

// bench is an API server with one opted-in namespace, shop, and a volume that all replicas mount.
type bench struct {
	t      *testing.T
	api    *apitest.Server
	volume string

	mu      sync.Mutex
	refuse  func(apitest.Request) *metav1.Status // nil: refuses nothing; guarded by mu
	applied []string                             // namespaces, in the order of the writes; guarded by mu
}

func newBench(t *testing.T) *bench {
	t.Helper()
	b := &bench{t: t, api: apitest.Start(t), volume: filepath.Join(t.TempDir(), "tls")}
	b.api.Intercept(b.intercept)
	b.api.Put(clusterRole())
	b.namespace(home, "")
	b.namespace("shop", "enabled")
	return b
}

// intercept records each write that refuse allows.
func (b *bench) intercept(r apitest.Request) *metav1.Status {
	b.mu.Lock()
	refuse := b.refuse
	b.mu.Unlock()
	if refuse != nil {
		if status := refuse(r); status != nil {
			return status
		}
	}
	if r.Method != http.MethodPatch {
		return nil
	}
	if query, err := url.ParseQuery(r.Query); err != nil || query.Get("force") != "true" || query.Get("fieldManager") != trust.FieldManager {
		return apitest.Failure(http.StatusBadRequest, metav1.StatusReasonBadRequest, "not our apply")
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.applied = append(b.applied, r.Namespace)
	return nil
}

// refuseBy makes the API server refuse the requests for which f returns a status.
func (b *bench) refuseBy(f func(apitest.Request) *metav1.Status) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.refuse = f
}

// writes returns the namespaces of all writes since the last call.
func (b *bench) writes() []string {
	b.mu.Lock()
	defer b.mu.Unlock()
	all := b.applied
	b.applied = nil
	return all
}

func clusterRole() *rbacv1.ClusterRole {
	return &rbacv1.ClusterRole{ObjectMeta: metav1.ObjectMeta{Name: "credence-broker"}}
}

// ownerUID returns the UID of the present ClusterRole.
func (b *bench) ownerUID() types.UID {
	role := clusterRole()
	b.api.Load(role)
	return role.UID
}

// namespace creates or replaces a namespace with that value of the opt-in label; empty for no label.
func (b *bench) namespace(name, inject string) {
	ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name}}
	if inject != "" {
		ns.Labels = map[string]string{"iam.amazonaws.com/inject": inject}
	}
	b.api.Put(ns)
}

func newConfigMap(namespace string, data map[string]string) *corev1.ConfigMap {
	return &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: "credence-trust"}, Data: data}
}

// configMap returns the ConfigMap with our name in that namespace; nil if there is none.
func (b *bench) configMap(namespace string) *corev1.ConfigMap {
	if m := newConfigMap(namespace, nil); b.api.Load(m) {
		return m
	}
	return nil
}

// edit changes that ConfigMap as another client would.
func (b *bench) edit(namespace string, change func(*corev1.ConfigMap)) {
	b.t.Helper()
	m := b.configMap(namespace)
	if m == nil {
		b.t.Fatalf("namespace %s has no ConfigMap to change", namespace)
	}
	change(m)
	b.api.Put(m)
}

// newCA returns an authority that expires in a year.
func newCA(t *testing.T) *certstest.CA {
	t.Helper()
	return certstest.NewCAWith(t, func(c *x509.Certificate) { c.NotAfter = time.Now().AddDate(1, 0, 0) })
}

// mount writes a leaf that expires in 90 days, and its root, to the volume.
func (b *bench) mount(ca *certstest.CA) *certstest.Leaf {
	b.t.Helper()
	return b.mountWith(ca, time.Now(), time.Now().AddDate(0, 0, 90))
}

func (b *bench) mountWith(ca *certstest.CA, from, to time.Time) *certstest.Leaf {
	b.t.Helper()
	leaf := ca.LeafWith(func(c *x509.Certificate) { c.NotBefore, c.NotAfter = from, to }, host)
	leaf.WriteTo(b.volume)
	return leaf
}

// replica is the part of a broker that handles its certificate.
type replica struct {
	*trust.Trust
	pair *certs.KeyPair
	stop func() // waits until Run has returned
}

func (b *bench) start(change func(*trust.Config)) *replica {
	b.t.Helper()
	r, err := b.tryStart(change)
	if err != nil {
		b.t.Fatal(err)
	}
	return r
}

func (b *bench) tryStart(change func(*trust.Config)) (*replica, error) {
	b.t.Helper()
	pair, err := certs.NewKeyPair(filepath.Join(b.volume, "tls.crt"), filepath.Join(b.volume, "tls.key"), nil)
	if err != nil {
		b.t.Fatal(err)
	}
	cfg := trust.Config{
		REST: b.api.Config(), Pair: pair, RootsFile: filepath.Join(b.volume, "ca.crt"), Namespace: home, ConfigMap: "credence-trust",
		Namespaces: "iam.amazonaws.com/inject=enabled", Owner: "credence-broker", Propagation: trust.DefaultPropagation,
		Logger: slog.New(slog.DiscardHandler),
	}
	if change != nil {
		change(&cfg)
	}
	tr, err := trust.New(cfg)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(b.t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := tr.Run(ctx); err != nil {
			b.t.Errorf("Run returned %v", err)
		}
	}()
	r := &replica{Trust: tr, pair: pair, stop: func() { cancel(); <-done }}
	b.t.Cleanup(r.stop)
	return r, nil
}

func serves(t *testing.T, r *replica, leaf *certstest.Leaf) bool {
	t.Helper()
	cert, err := r.pair.GetCertificate(nil)
	if err != nil {
		t.Fatal(err)
	}
	return cert.Leaf.Equal(leaf.TLS().Leaf)
}

// published returns the indexes of the authorities that a namespace's pods trust.
func (b *bench) published(namespace string, among ...*certstest.CA) (found []int) {
	b.t.Helper()
	m := b.configMap(namespace)
	if m == nil {
		return nil
	}
	roots, err := certs.ParseRoots([]byte(m.Data[trust.RootsKey]))
	if err != nil {
		b.t.Errorf("namespace %s has malformed roots: %v", namespace, err)
	}
	for i, ca := range among {
		if slices.ContainsFunc(roots, ca.Cert.Equal) {
			found = append(found, i)
		}
	}
	if len(found) != len(roots) {
		b.t.Errorf("namespace %s has %d roots, %d of them unknown", namespace, len(roots), len(roots)-len(found))
	}
	return found
}

func (b *bench) want(what, namespace string, among []*certstest.CA, want ...int) {
	b.t.Helper()
	if got := b.published(namespace, among...); !slices.Equal(got, want) {
		b.t.Errorf("%s: namespace %s has roots %v, want %v", what, namespace, got, want)
	}
}

func TestOptedInNamespacesGetTheRoots(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		cas := []*certstest.CA{newCA(t)}
		b.mount(cas[0])
		b.namespace("refusing", "disabled")
		b.namespace("plain", "")
		b.namespace("later", "")
		r := b.start(nil)
		time.Sleep(settle)
		b.want("after the start", "shop", cas, 0)
		b.want("after the start", home, cas, 0)
		for _, namespace := range []string{"refusing", "plain", "later"} {
			b.want("not opted in", namespace, cas)
		}
		if err := r.Err(); err != nil || !r.Leading() {
			t.Errorf("Leading is %v and Err is %v, want true and nil", r.Leading(), err)
		}
		m := b.configMap("shop")
		if m == nil {
			t.Fatal("there is no ConfigMap")
		}
		uid := b.ownerUID()
		if o := m.OwnerReferences; len(o) != 1 || o[0].Kind != "ClusterRole" || o[0].Name != "credence-broker" ||
			o[0].UID != uid || o[0].APIVersion != "rbac.authorization.k8s.io/v1" || o[0].BlockOwnerDeletion != nil {
			t.Errorf("the owner references are %+v", o)
		}
		if len(m.Data) != 1 {
			t.Errorf("the data have more than the roots: %v", m.Data)
		}

		// The first pod may be created right after the label, so the ConfigMap must appear at once.
		b.namespace("later", "enabled")
		synctest.Wait()
		b.want("just labeled", "later", cas, 0)

		// Running pods mount the ConfigMap, so it stays.
		b.namespace("later", "")
		time.Sleep(15 * time.Minute)
		b.want("unlabeled", "later", cas, 0)
	})
}

func TestConfigMapsAreRepaired(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		cas := []*certstest.CA{newCA(t), newCA(t)}
		b.mount(cas[0])
		// Another client has created a ConfigMap with our name.
		b.api.Put(newConfigMap("shop", map[string]string{"theirs": "1", trust.RootsKey: string(cas[1].PEM)}))
		b.start(nil)
		time.Sleep(settle)
		for _, damage := range []struct {
			what string
			do   func(*corev1.ConfigMap)
		}{
			{"nothing", func(*corev1.ConfigMap) {}},
			{"another root", func(m *corev1.ConfigMap) { m.Data[trust.RootsKey] = string(cas[1].PEM) }},
			{"no roots", func(m *corev1.ConfigMap) { delete(m.Data, trust.RootsKey) }},
			{"no owner", func(m *corev1.ConfigMap) { m.OwnerReferences = nil }},
			{"no record", func(m *corev1.ConfigMap) { delete(m.Data, trust.RecordKey) }},
			{"deleted", nil},
		} {
			for _, namespace := range []string{"shop", home} {
				if damage.do == nil {
					b.api.Delete(newConfigMap(namespace, nil))
				} else {
					b.edit(namespace, damage.do)
				}
				time.Sleep(1100 * time.Millisecond) // the least time between two writes
				after := b.configMap(namespace)
				b.want(damage.what, namespace, cas, 0)
				if after == nil || len(after.OwnerReferences) != 1 || (after.Data[trust.RecordKey] != "") != (namespace == home) {
					t.Errorf("%s in %s: repaired to %+v", damage.what, namespace, after)
				} else if damage.what != "deleted" && (after.Data["theirs"] == "1") != (namespace == "shop") {
					t.Errorf("%s in %s: the keys of other clients are %v", damage.what, namespace, after.Data)
				}
			}
		}
		if n := len(b.writes()); n > 15 {
			t.Errorf("%d writes for 11 repairs and the first write, want at most 15", n)
		}
		// Another controller overwrites our data ten times a second.
		for range 100 {
			b.api.Put(newConfigMap("shop", map[string]string{trust.RootsKey: "theirs"}))
			time.Sleep(100 * time.Millisecond)
		}
		if n := len(b.writes()); n < 8 || n > 11 {
			t.Errorf("%d writes in 10 s against another controller, want about one a second", n)
		}
	})
}

func TestNewRootIsPublishedBeforeItsLeafIsServed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		cas := []*certstest.CA{newCA(t), newCA(t)} // with the same name, so that a comparison of names fails
		b.mount(cas[0])
		replicas := []*replica{b.start(nil), b.start(nil)}
		time.Sleep(settle)

		first := b.mount(cas[0])
		for i, r := range replicas {
			if !serves(t, r, first) {
				t.Errorf("replica %d keeps a leaf under the same root pending: %v", i, r.pair.Err())
			}
		}
		time.Sleep(5 * time.Minute)

		second := b.mount(cas[1])
		for i, r := range replicas {
			if !serves(t, r, first) || !errors.Is(r.pair.Err(), certs.ErrPending) {
				t.Errorf("replica %d serves a leaf before its root is published (%v)", i, r.pair.Err())
			}
		}
		time.Sleep(settle)
		b.want("after the file has changed", "shop", cas, 0, 1)
		for range 17 {
			time.Sleep(10 * time.Second)
			for i, r := range replicas {
				if !serves(t, r, first) {
					t.Fatalf("replica %d serves the new leaf less than three minutes after its root was published", i)
				}
			}
		}
		time.Sleep(10 * time.Second)
		for i, r := range replicas {
			if !serves(t, r, second) || r.pair.Err() != nil {
				t.Errorf("replica %d does not serve the new leaf after three minutes: %v", i, r.pair.Err())
			}
		}
		b.want("when the new leaf is served", "shop", cas, 0, 1)
		time.Sleep(settle)
		if record := b.configMap(home).Data[trust.RecordKey]; strings.Count(record, "retired") != 1 {
			t.Errorf("the record does not have exactly one retired root:\n%s", record)
		}
	})
}

func TestRecordOutlivesLeaders(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		cas := []*certstest.CA{newCA(t), newCA(t)}
		b.mount(cas[0])
		one, two := b.start(nil), b.start(nil)
		time.Sleep(settle)
		if one.Leading() == two.Leading() {
			t.Fatalf("Leading is %v and %v, want it of one replica", one.Leading(), two.Leading())
		}
		if two.Leading() {
			one, two = two, one
		}
		b.mount(cas[1])
		time.Sleep(settle)
		b.want("with a second root", "shop", cas, 0, 1)
		record := b.configMap(home).Data[trust.RecordKey]

		// The leader shuts down, and the other replica leads at its next attempt.
		one.stop()
		if one.Leading() {
			t.Error("Leading is true after the leader has shut down")
		}
		b.writes()
		time.Sleep(settle)
		if !two.Leading() {
			t.Fatal("the other replica does not lead")
		}
		if got := b.writes(); len(got) > 0 {
			t.Errorf("a new leader wrote to %v, want no write", got)
		}
		if diff := cmp.Diff(record, b.configMap(home).Data[trust.RecordKey]); diff != "" {
			t.Errorf("the record was changed (-before +after):\n%s", diff)
		}
		// A third replica has only the new pair, and reads the root of the old one from the record.
		two.stop()
		three := b.start(nil)
		time.Sleep(time.Minute)
		b.want("under a third leader", "shop", cas, 0, 1)
		// No replica leads for a day, less five minutes.
		three.stop()
		time.Sleep(24*time.Hour - 5*time.Minute)
		three = b.start(nil)
		time.Sleep(settle)
		b.want("just before a day has passed", "shop", cas, 0, 1)
		time.Sleep(5 * time.Minute)
		b.want("a day later", "shop", cas, 1)
		b.want("a day later", home, cas, 1)
		if err := three.Err(); err != nil {
			t.Error(err)
		}
	})
}

func TestRootsOutsideTheRecordAreRemoved(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		cas := []*certstest.CA{newCA(t), newCA(t)}
		b.mount(cas[0])
		one := b.start(nil)
		time.Sleep(settle)
		one.stop()
		// Another client adds a root while no replica runs.
		b.edit(home, func(m *corev1.ConfigMap) { m.Data[trust.RootsKey] = string(cas[0].PEM) + string(cas[1].PEM) })
		b.start(nil)
		time.Sleep(settle)
		b.want("under the next leader", home, cas, 0)
		b.want("under the next leader", "shop", cas, 0)
	})
}

func TestAnotherReplicaFollowsACrashedLeader(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		cas := []*certstest.CA{newCA(t)}
		b.mount(cas[0])
		crashed := false
		one := b.start(func(c *trust.Config) {
			dial := c.REST.Dial
			c.REST.Dial = func(ctx context.Context, network, address string) (net.Conn, error) {
				if crashed {
					return nil, errors.New("no route")
				}
				return dial(ctx, network, address)
			}
		})
		time.Sleep(settle)
		two := b.start(nil)
		time.Sleep(settle)
		if !one.Leading() || two.Leading() {
			t.Fatal("the first replica is not the only leader")
		}
		crashed = true
		b.api.Cut()
		b.namespace("later", "enabled")
		time.Sleep(time.Minute)
		if one.Leading() || !two.Leading() {
			t.Errorf("after a minute Leading of the crashed replica is %v, of the other %v", one.Leading(), two.Leading())
		}
		b.want("under the second", "later", cas, 0)
	})
}

func TestLeafIsServedWhenTheOldOneIsAboutToExpire(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const left = 70 * time.Minute
		for _, tt := range []struct{ life, last time.Duration }{
			{75 * time.Minute, 7*time.Minute + 30*time.Second}, {90 * 24 * time.Hour, time.Hour},
		} {
			b := newBench(t)
			cas := []*certstest.CA{newCA(t), newCA(t)}
			first := b.mountWith(cas[0], time.Now().Add(left-tt.life), time.Now().Add(left))
			r := b.start(nil)
			time.Sleep(settle)
			b.api.SetDown(true)
			second := b.mount(cas[1])
			time.Sleep(left - tt.last - 2*settle)
			if !serves(t, r, first) {
				t.Errorf("a leaf with a lifetime of %v: the next leaf was served before the last %v, although its root is not published", tt.life, tt.last)
			}
			time.Sleep(3 * settle)
			if !serves(t, r, second) {
				t.Errorf("a leaf with a lifetime of %v: the next leaf is not served in the last %v (%v)", tt.life, tt.last, r.pair.Err())
			}
			r.stop()
		}
	})
}

func TestLeafIsPendingUntilEveryNamespaceHasItsRoot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		cas := []*certstest.CA{newCA(t), newCA(t)}
		b.mount(cas[0])
		b.namespace("stuck", "enabled")
		r := b.start(nil)
		time.Sleep(settle)
		b.want("at first", "stuck", cas, 0)
		b.refuseBy(func(r apitest.Request) *metav1.Status {
			if r.Method == http.MethodPatch && (r.Namespace == "stuck" || r.Namespace == "never") {
				return apitest.Failure(http.StatusForbidden, metav1.StatusReasonForbidden, "a policy says no")
			}
			return nil
		})
		b.namespace("never", "enabled") // no pod runs in a namespace that never had the ConfigMap
		second := b.mount(cas[1])
		time.Sleep(20 * time.Minute)
		b.want("meanwhile", "shop", cas, 0, 1)
		if serves(t, r, second) {
			t.Error("the leaf is served, although one namespace lacks its root")
		}
		if err := r.Err(); err == nil || !strings.Contains(err.Error(), "a policy says no") {
			t.Errorf("Err does not have the reason: %v", err)
		}
		b.refuseBy(nil)
		time.Sleep(10 * time.Minute) // retried every five at least
		b.want("after the policy allows it", "stuck", cas, 0, 1)
		if !serves(t, r, second) || r.Err() != nil {
			t.Errorf("the leaf is still pending: %v; %v", r.pair.Err(), r.Err())
		}
	})
}

// TestTenantsCannotDelayTheLeaf creates ConfigMaps that cannot take our key.
func TestTenantsCannotDelayTheLeaf(t *testing.T) {
	for name, obstacle := range map[string]struct {
		change func(*corev1.ConfigMap)
		status int32
		reason metav1.StatusReason
	}{
		"immutable":   {func(m *corev1.ConfigMap) { m.Immutable = new(true) }, http.StatusUnprocessableEntity, metav1.StatusReasonInvalid},
		"binary data": {func(m *corev1.ConfigMap) { m.BinaryData = map[string][]byte{trust.RootsKey: {}} }, http.StatusUnprocessableEntity, metav1.StatusReasonInvalid},
		"full":        {func(*corev1.ConfigMap) {}, http.StatusRequestEntityTooLarge, metav1.StatusReasonRequestEntityTooLarge},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := newBench(t)
				cas := []*certstest.CA{newCA(t), newCA(t)}
				b.mount(cas[0])
				m := newConfigMap("shop", nil)
				obstacle.change(m)
				b.api.Put(m)
				b.refuseBy(func(r apitest.Request) *metav1.Status {
					if r.Method == http.MethodPatch && r.Namespace == "shop" {
						return apitest.Failure(obstacle.status, obstacle.reason, "it cannot be changed")
					}
					return nil
				})
				r := b.start(nil)
				time.Sleep(settle)
				second := b.mount(cas[1])
				time.Sleep(4 * time.Minute)
				if !serves(t, r, second) {
					t.Errorf("a ConfigMap that cannot be changed keeps the leaf pending: %v", r.pair.Err())
				}
				if err := r.Err(); err == nil || !strings.Contains(err.Error(), "shop") {
					t.Errorf("Err does not name the namespace: %v", err)
				}
			})
		})
	}
}

// TestLeafOfAnExpiredRootIsReplacedAtOnce: a root can expire before its leaves. Then no client can verify the old leaf, so the new
// one need not wait for three minutes.
func TestLeafOfAnExpiredRootIsReplacedAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		short := certstest.NewCAWith(t, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(time.Hour) })
		b.mount(short)
		r := b.start(nil)
		time.Sleep(time.Hour + time.Minute)
		second := b.mount(newCA(t))
		time.Sleep(settle)
		if !serves(t, r, second) {
			t.Errorf("the leaf that no client can verify is still served: %v", r.pair.Err())
		}
	})
}

// TestExpiredLeafIsNotServed: an expired leaf in the files does not replace a valid one.
func TestExpiredLeafIsNotServed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		ca := newCA(t)
		first := b.mount(ca)
		r := b.start(nil)
		time.Sleep(settle)
		b.mountWith(ca, time.Now().Add(-2*time.Hour), time.Now().Add(-time.Hour))
		time.Sleep(settle)
		if !serves(t, r, first) || !errors.Is(r.pair.Err(), certs.ErrPending) {
			t.Errorf("the valid leaf is no longer served: %v", r.pair.Err())
		}
	})
}

// drop sets the annotation, as kubectl annotate does.
func (b *bench) drop(value string) {
	b.edit(home, func(m *corev1.ConfigMap) { m.Annotations = map[string]string{trust.DropAnnotation: value} })
}

func digest(ca *certstest.CA) string {
	sum := sha256.Sum256(ca.Cert.Raw)
	return hex.EncodeToString(sum[:])
}

func TestDropAnnotation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		cas := []*certstest.CA{newCA(t), newCA(t)}
		b.mount(cas[0])
		r := b.start(nil)
		time.Sleep(settle)
		b.drop("not a digest")
		time.Sleep(settle)
		if err := r.Err(); err == nil || !strings.Contains(err.Error(), trust.DropAnnotation) {
			t.Errorf("Err does not report a malformed annotation: %v", err)
		}
		// In openssl's format. The root verifies the served leaf, so it stays for now.
		pairs := slices.Collect(slices.Chunk([]byte(strings.ToUpper(digest(cas[0]))), 2))
		b.drop(string(bytes.Join(pairs, []byte(":"))) + ", " + strings.Repeat("0", 64))
		second := b.mount(cas[1])
		time.Sleep(settle)
		b.want("while its leaf is served", "shop", cas, 0, 1)
		if err := r.Err(); err != nil {
			t.Error(err)
		}
		time.Sleep(3*time.Minute + settle)
		b.want("after the new leaf is served", "shop", cas, 1)
		if !serves(t, r, second) {
			t.Errorf("the new leaf is not served: %v", r.pair.Err())
		}
		// The old root stays dropped, although the file has it again.
		b.mount(cas[0])
		time.Sleep(10 * time.Minute)
		b.want("with the old root in the file again", "shop", cas, 1)
		if !serves(t, r, second) {
			t.Error("a leaf under a dropped root is served")
		}
	})
}

func TestManyNamespaces(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		cas := []*certstest.CA{newCA(t), newCA(t)}
		b.mount(cas[0])
		const many = 1500
		for i := range many {
			b.namespace(fmt.Sprintf("n%04d", i), "enabled")
		}
		r := b.start(nil)
		time.Sleep(time.Minute)
		if got := len(b.writes()); got < many+2 || got > many+4 { // shop, and ours before and after the roots count as published
			t.Errorf("%d writes for %d namespaces and two more", got, many)
		}
		b.mount(cas[1])
		time.Sleep(settle)
		begun := b.writes()
		if n := len(begun); n < 100 || n > int(settle/time.Second)*100+20 {
			t.Fatalf("%d writes in %v", n, settle)
		}
		repaired := begun[20] // Written longer than minRepair ago.
		// Meanwhile one namespace opts in, and another one loses its ConfigMap.
		b.namespace("urgent", "enabled")
		b.api.Delete(newConfigMap(repaired, nil))
		time.Sleep(time.Second)
		got := b.writes()
		for _, namespace := range []string{"urgent", repaired} {
			if i := slices.Index(got, namespace); i < 0 || i > 15 {
				t.Errorf("%s was written as number %d of %d, after namespaces without urgency", namespace, i, len(got))
			}
		}
		time.Sleep(time.Minute)
		for i := range many {
			b.want("at the end", fmt.Sprintf("n%04d", i), cas, 0, 1)
		}
		b.writes()
		r.stop()
		b.start(nil)
		time.Sleep(11 * time.Minute) // The leader compares all every ten minutes.
		// The new process serves the new leaf at once, because it has no other, so the leader retires the old root.
		if got := b.writes(); !slices.Equal(got, []string{home}) {
			t.Errorf("the new leader wrote to %v, want only its own namespace", got)
		}
	})
}

func TestNamespacesThatAreBeingDeleted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		cas := []*certstest.CA{newCA(t)}
		b.mount(cas[0])
		b.api.Put(&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{
			Name: "leaving", Labels: map[string]string{"iam.amazonaws.com/inject": "enabled"}, DeletionTimestamp: new(metav1.Now()),
		}})
		b.namespace("racing", "enabled") // is being deleted, which the watch has not reported yet
		var logged bytes.Buffer
		b.refuseBy(func(r apitest.Request) *metav1.Status {
			if r.Method != http.MethodPatch || r.Namespace != "racing" {
				return nil
			}
			status := apitest.Failure(http.StatusForbidden, metav1.StatusReasonForbidden, "being terminated")
			status.Details = &metav1.StatusDetails{Causes: []metav1.StatusCause{{Type: corev1.NamespaceTerminatingCause}}}
			return status
		})
		r := b.start(func(c *trust.Config) { c.Logger = slog.New(slog.NewTextHandler(&logged, nil)) })
		time.Sleep(settle)
		if slices.Contains(b.writes(), "leaving") {
			t.Error("a namespace that is being deleted was written to")
		}
		r.stop()
		if err := r.Err(); err != nil || strings.Contains(logged.String(), "level=WARN") {
			t.Errorf("error %v, log:\n%s", err, &logged)
		}
	})
}

func TestRecreatedOwner(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		cas := []*certstest.CA{newCA(t)}
		b.mount(cas[0])
		r := b.start(nil)
		time.Sleep(settle)
		// An uninstallation: the garbage collector deletes the owned ConfigMaps.
		b.api.Delete(clusterRole())
		for _, namespace := range []string{"shop", home} {
			b.api.Delete(newConfigMap(namespace, nil))
		}
		time.Sleep(settle)
		b.want("without an owner", "shop", cas)
		if err := r.Err(); err == nil || !strings.Contains(err.Error(), "ClusterRole credence-broker") {
			t.Errorf("Err is %v, want one that names the ClusterRole", err)
		}
		// A new installation while this replica still runs.
		b.api.Put(clusterRole())
		time.Sleep(10 * time.Minute)
		uid := b.ownerUID()
		for _, namespace := range []string{"shop", home} {
			m := b.configMap(namespace)
			if m == nil || len(m.OwnerReferences) != 1 || m.OwnerReferences[0].UID != uid {
				t.Errorf("in %s: %+v, want an owner %v", namespace, m, uid)
			}
		}
		if err := r.Err(); err != nil {
			t.Error(err)
		}
	})
}

func TestBadFilesWithdrawNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		cas := []*certstest.CA{newCA(t), newCA(t)}
		b.mount(cas[0])
		file := filepath.Join(t.TempDir(), "roots")
		r := b.start(func(c *trust.Config) { c.RootsFile = file })
		time.Sleep(settle)
		b.want("no file", "shop", cas)
		if err := r.Err(); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("no file: Err is %v", err)
		}
		var huge []byte
		for range 200 {
			huge = append(huge, cas[1].PEM...)
		}
		for _, step := range []struct {
			what    string
			content []byte
			valid   bool
			want    []int
		}{
			{"empty", nil, false, nil},
			{"valid", cas[0].PEM, true, []int{0}},
			{"malformed", []byte("x"), false, []int{0}},
			{"empty again", nil, false, []int{0}},
			{"too large", huge, false, []int{0}},
			{"another root, which does not verify the leaf", cas[1].PEM, true, []int{0, 1}},
			{"malformed again", []byte("x"), false, []int{0, 1}},
		} {
			if err := os.WriteFile(file, step.content, 0o600); err != nil {
				t.Fatal(err)
			}
			time.Sleep(settle)
			b.want(step.what, "shop", cas, step.want...)
			if err := r.Err(); (err == nil) != step.valid {
				t.Errorf("%s: Err is %v, want an error: %v", step.what, err, !step.valid)
			}
		}
		if record := b.configMap(home).Data[trust.RecordKey]; strings.Contains(record, "retired") {
			t.Errorf("a bad file retired roots:\n%s", record)
		}
		if err := os.WriteFile(file, cas[1].PEM, 0o600); err != nil {
			t.Fatal(err)
		}
		r.stop()
		time.Sleep(25 * time.Hour)
		b.start(func(c *trust.Config) { c.RootsFile = file })
		time.Sleep(settle)
		b.want("a day after the file lost the root of the served leaf", "shop", cas, 0, 1)
	})
}

func TestExpiredRootsAreWithdrawn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		cas := []*certstest.CA{newCA(t), certstest.NewCAWith(t, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(10 * time.Minute) })}
		b.mount(cas[0])
		cas[0].WriteTo(filepath.Join(b.volume, "both"), cas[1])
		b.start(func(c *trust.Config) { c.RootsFile = filepath.Join(b.volume, "both", "ca.crt") })
		time.Sleep(settle)
		b.want("at first", "shop", cas, 0, 1)
		time.Sleep(10 * time.Minute)
		b.want("after its expiration", "shop", cas, 0)
	})
}

func TestWithoutPropagationNoLeafIsPending(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		b.mount(newCA(t))
		r := b.start(func(c *trust.Config) { c.Propagation = 0 })
		time.Sleep(settle)
		second := b.mount(newCA(t))
		if !serves(t, r, second) {
			t.Error("a leaf is pending")
		}
	})
}

func TestNewRefuses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		b.mount(newCA(t))
		for what, change := range map[string]func(*trust.Config){
			"no REST":              func(c *trust.Config) { c.REST = nil },
			"no pair":              func(c *trust.Config) { c.Pair = nil },
			"no logger":            func(c *trust.Config) { c.Logger = nil },
			"no file":              func(c *trust.Config) { c.RootsFile = "" },
			"no namespace":         func(c *trust.Config) { c.Namespace = "" },
			"no name":              func(c *trust.Config) { c.ConfigMap = "" },
			"no selector":          func(c *trust.Config) { c.Namespaces = "" },
			"negative propagation": func(c *trust.Config) { c.Propagation = -1 },
			"broken REST":          func(c *trust.Config) { c.REST = &rest.Config{Host: "://"} },
		} {
			if _, err := b.tryStart(change); err == nil {
				t.Errorf("%s: New returned no error", what)
			}
		}
	})
}

// TestLeaderWithoutItsRecordWithdrawsNothing: a new leader waits until it can read the trust record. With an empty record it would
// withdraw roots of leaves that other replicas still serve.
func TestLeaderWithoutItsRecordWithdrawsNothing(t *testing.T) {
	for what, status := range map[string]*metav1.Status{
		"an error of the server": apitest.Failure(http.StatusInternalServerError, metav1.StatusReasonInternalError, "etcd is electing"),
		"overloaded":             apitest.Failure(http.StatusServiceUnavailable, metav1.StatusReasonServiceUnavailable, "try later"),
		"forbidden":              apitest.Failure(http.StatusForbidden, metav1.StatusReasonForbidden, "RBAC is not synced yet"),
	} {
		for _, long := range []time.Duration{0, 30 * time.Second} { // one failed read, and many
			t.Run(fmt.Sprintf("%s, for %s", what, long), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					b := newBench(t)
					cas := []*certstest.CA{newCA(t), newCA(t)}
					b.mount(cas[0])
					one := b.start(nil)
					time.Sleep(settle)
					b.mount(cas[1])
					time.Sleep(settle)
					b.want("under the first leader", "shop", cas, 0, 1)
					record := b.configMap(home).Data[trust.RecordKey]
					one.stop()

					failed := 0
					until := time.Now().Add(long)
					b.refuseBy(func(r apitest.Request) *metav1.Status {
						b.mu.Lock()
						defer b.mu.Unlock()
						// Every replica lists the ConfigMap of its own namespace when it starts; the next request is the read.
						if r.Method != http.MethodGet || r.Resource != "configmaps" || r.Namespace != home || failed > 1 && !time.Now().Before(until) {
							return nil
						}
						failed++
						return status
					})
					two := b.start(nil)
					for range 600 {
						time.Sleep(100 * time.Millisecond)
						for _, namespace := range []string{"shop", home} {
							if got := b.published(namespace, cas...); !slices.Equal(got, []int{0, 1}) {
								t.Fatalf("namespace %s has roots %v, want both", namespace, got)
							}
						}
					}
					if failed < 2 || !two.Leading() || two.Err() != nil {
						t.Errorf("%d reads failed, want at least 2; Leading of the second replica is %v, Err is %v", failed, two.Leading(), two.Err())
					}
					// The new leader has retired the old root, and its record says when both were published.
					now := b.configMap(home).Data[trust.RecordKey]
					if strings.Count(now, "published") != 2 || strings.Count(record, "published") != 2 {
						t.Errorf("the record is\n%s\nand was\n%s\nwant times of publication of both roots", now, record)
					}
				})
			})
		}
	}
}

// TestRootsCountAsPublishedWhenTheyAre: a root does not count as published before every namespace has it, not even by the
// fraction of a second that the record lacks.
func TestRootsCountAsPublishedWhenTheyAre(t *testing.T) {
	for _, fraction := range []time.Duration{0, time.Millisecond, 300 * time.Millisecond, 999 * time.Millisecond} {
		t.Run(fraction.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := newBench(t)
				cas := []*certstest.CA{newCA(t), newCA(t)}
				first := b.mount(cas[0])
				time.Sleep(fraction)
				one := b.start(nil)
				time.Sleep(settle)
				two := b.start(nil) // One leads; the other knows only the record.
				time.Sleep(settle)
				second := b.mount(cas[1])
				const step = 5 * time.Millisecond
				for len(b.published("shop", cas...)) < 2 || len(b.published(home, cas...)) < 2 {
					time.Sleep(step)
				}
				publishedAt := time.Now().Add(-step)
				time.Sleep(trust.DefaultPropagation - 2*step)
				for i, r := range []*replica{one, two} {
					if !serves(t, r, first) {
						t.Errorf("replica %d serves the new leaf %s after its root was published, less than %s", i, time.Since(publishedAt), trust.DefaultPropagation)
					}
				}
				// The leader reconciles every 2 s, and the record has whole seconds.
				time.Sleep(4 * time.Second)
				for i, r := range []*replica{one, two} {
					if !serves(t, r, second) {
						t.Errorf("replica %d does not serve the new leaf %s after its root was published: %v", i, time.Since(publishedAt), r.pair.Err())
					}
				}
				var record struct {
					Roots []struct{ Published time.Time }
				}
				if err := json.Unmarshal([]byte(b.configMap(home).Data[trust.RecordKey]), &record); err != nil || len(record.Roots) != 2 {
					t.Fatalf("the record has %d roots: %v", len(record.Roots), err)
				}
				latest := slices.MaxFunc(record.Roots, func(a, b struct{ Published time.Time }) int { return a.Published.Compare(b.Published) }).Published
				if latest.Before(publishedAt) {
					t.Errorf("the record says that the root was published at %s, but it was %s later", latest.Format(time.RFC3339Nano), publishedAt.Sub(latest))
				}
			})
		})
	}
}
