// Package survey reads from a cluster what the checks of package check need: Credence's own objects, what its pods serve,
// and counts of namespaces, nodes and pods. It guarantees: it changes nothing and reads no Secret; objects that can be many
// come in pages, and only counts and a few names of them stay in memory; a part that could not be read has its error and
// the missing right, and does not affect the others. It judges nothing.
package survey

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"hash/maphash"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	admissionv1 "k8s.io/api/admissionregistration/v1"
	appsv1 "k8s.io/api/apps/v1"
	authorizationv1 "k8s.io/api/authorization/v1"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/version"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/debugapi"
	"github.com/credence-iam/credence/broker/policy"
	"github.com/credence-iam/credence/operator/finding"
	"github.com/credence-iam/credence/operator/installation"
	"github.com/credence-iam/credence/operator/metrics"
)

// Bounds of one check.
const (
	// atOnce is the number of requests at a time.
	atOnce = 8
	// page is the number of objects in one response. A page of pods takes some 5 MB.
	page = 500
)

// Config configures [Gather].
type Config struct {
	// Version is the version of this program.
	Version string
	// Namespace limits namespaces and pods to one. Default: all.
	Namespace string
	// Quick leaves out all that the first credentials of a new pod do not need.
	Quick bool
	// Limits is the rules file. Default: none.
	Limits *policy.File
	// Target has the flags that choose the cluster.
	Target finding.Cluster
}

// Part is one part of a snapshot, or why it could not be read.
type Part[T any] struct {
	Value T
	Err   error
	Needs string // the right
}

// Forbidden reports whether the user lacks the right.
func (p Part[T]) Forbidden() bool {
	return apierrors.IsForbidden(p.Err) || p.Err != nil && strings.Contains(p.Err.Error(), "is forbidden")
}

// Member is one pod of the webhook or of the brokers.
type Member struct {
	Pod     corev1.Pod
	Served  Part[[]*x509.Certificate] // by its TLS port
	Metrics Part[metrics.Values]
	Waits   string // what a pod that runs and is not ready waits for; empty if unknown
}

// Snapshot is what was seen of a cluster. All checks are pure functions of it.
type Snapshot struct {
	Now       time.Time
	Version   string // of this program
	Namespace string // of Credence
	Scope     string // the only namespace to look at; empty: all
	Target    finding.Cluster
	Found     *installation.Installation
	Keys      policy.Keys
	Rules     *policy.Rules

	Server      Part[*version.Info]
	Nodes       Part[Nodes]
	Webhooks    []Member
	Brokers     []Member
	Own         Part[bool] // whether Webhooks and Brokers are known
	Configs     Part[[]admissionv1.MutatingWebhookConfiguration]
	Policies    Part[[]admissionv1.ValidatingAdmissionPolicy]
	Bindings    Part[[]admissionv1.ValidatingAdmissionPolicyBinding]
	Injected    Part[bool] // whether a PodTemplate was injected
	Daemons     Part[[]string]
	Rights      Part[[]Right]
	Issued      Part[[]unstructured.Unstructured] // Certificates
	Listed      Part[map[string]bool]             // ready pods in the brokers' EndpointSlices
	Grants      Part[Grants]
	Namespaces  Part[Namespaces]
	Published   Part[Published]
	Pods        Part[Pods]
	Destination Part[*corev1.Namespace] // the namespace for an installation to come
	Network     Part[[]networkingv1.NetworkPolicy]
	Yours       Part[[]string] // rights of the user that are missing
	CertManager Part[bool]     // whether a Certificate was accepted in a dry run
}

type gatherer struct {
	client  *installation.Client
	kube    kubernetes.Interface
	objects dynamic.Interface
	s       *Snapshot
}

func newGatherer(client *installation.Client, s *Snapshot) (*gatherer, error) {
	config := rest.CopyConfig(client.Config)
	config.WarningHandler = rest.NoWarnings{}
	objects, err := dynamic.NewForConfig(config)
	if err != nil {
		return nil, err
	}
	// Half of the bytes, and a tenth of the time of JSON: this matters for pods.
	config.ContentType, config.AcceptContentTypes = "application/vnd.kubernetes.protobuf", "application/vnd.kubernetes.protobuf,application/json"
	kube, err := kubernetes.NewForConfig(config)
	return &gatherer{client: client, kube: kube, objects: objects, s: s}, err
}

// read reads one part of the snapshot.
func read[T any](to *Part[T], needs string, get func() (T, error)) func() {
	return func() {
		value, err := get()
		*to = Part[T]{value, err, needs}
	}
}

// all runs the functions, some at a time.
func all(run ...func()) {
	var group errgroup.Group
	group.SetLimit(atOnce)
	for _, f := range run {
		group.Go(func() error { f(); return nil })
	}
	_ = group.Wait() // No function returns an error.
}

// pages lists all objects in pages.
func pages[L metav1.ListInterface](options metav1.ListOptions, list func(metav1.ListOptions) (L, error), each func(L)) error {
	options.Limit = page
	for {
		objects, err := list(options)
		if err != nil {
			return err
		}
		each(objects)
		if options.Continue = objects.GetContinue(); options.Continue == "" {
			return nil
		}
	}
}

// Gather looks at an installation.
func Gather(ctx context.Context, client *installation.Client, found *installation.Installation, cfg Config) *Snapshot {
	s := &Snapshot{Now: time.Now(), Version: cfg.Version, Namespace: found.Namespace, Scope: cfg.Namespace, Target: cfg.Target, Found: found}
	s.prepare(cfg.Limits)
	g, err := newGatherer(client, s)
	if err != nil {
		s.Own.Err = err
		return s
	}
	webhooks, brokers, err := client.Pods(ctx, s.Namespace)
	s.Own = Part[bool]{Err: err, Needs: "list pods in namespace " + s.Namespace}
	for _, pod := range webhooks {
		s.Webhooks = append(s.Webhooks, Member{Pod: pod})
	}
	for _, pod := range brokers {
		s.Brokers = append(s.Brokers, Member{Pod: pod})
	}
	gone := func(m Member) bool { return m.Pod.DeletionTimestamp != nil }
	s.Webhooks, s.Brokers = slices.DeleteFunc(s.Webhooks, gone), slices.DeleteFunc(s.Brokers, gone)
	admission := g.kube.AdmissionregistrationV1()
	run := []func(){
		read(&s.Configs, "list mutatingwebhookconfigurations", func() ([]admissionv1.MutatingWebhookConfiguration, error) {
			list, err := admission.MutatingWebhookConfigurations().List(ctx, metav1.ListOptions{})
			if err != nil {
				return nil, err
			}
			return list.Items, nil
		}),
		read(&s.Listed, "list endpointslices in namespace "+s.Namespace, func() (map[string]bool, error) { return g.endpoints(ctx) }),
		read(&s.Published, g.across("list configmaps"), func() (Published, error) { return g.published(ctx) }),
	}
	for i := range s.Webhooks {
		run = append(run, g.member(ctx, &s.Webhooks[i], "webhook", installation.Port(found.WebhookArgs(), "listen", 9443), installation.Port(found.WebhookArgs(), "admin-listen", installation.BrokerAdminPort), cfg.Quick))
	}
	for i := range s.Brokers {
		run = append(run, g.member(ctx, &s.Brokers[i], "broker", 9443, installation.BrokerAdminPort, cfg.Quick))
	}
	run = append(run, func() {
		read(&s.Namespaces, g.across("list namespaces"), func() (Namespaces, error) { return g.namespaces(ctx) })()
		if cfg.Quick {
			return
		}
		read(&s.Pods, g.across("list pods"), func() (Pods, error) { return g.pods(ctx) })()
	})
	if !cfg.Quick {
		run = append(run, g.clusterParts(ctx)...)
		run = append(run,
			read(&s.Policies, "list validatingadmissionpolicies", func() ([]admissionv1.ValidatingAdmissionPolicy, error) {
				list, err := admission.ValidatingAdmissionPolicies().List(ctx, metav1.ListOptions{})
				if err != nil {
					return nil, err
				}
				return list.Items, nil
			}),
			read(&s.Bindings, "list validatingadmissionpolicybindings", func() ([]admissionv1.ValidatingAdmissionPolicyBinding, error) {
				list, err := admission.ValidatingAdmissionPolicyBindings().List(ctx, metav1.ListOptions{})
				if err != nil {
					return nil, err
				}
				return list.Items, nil
			}),
			read(&s.Injected, "create podtemplates in namespace "+s.Namespace, func() (bool, error) { return g.injects(ctx) }),
			read(&s.Rights, "create subjectaccessreviews", func() ([]Right, error) { return g.rights(ctx) }),
			read(&s.Issued, "list certificates.cert-manager.io in namespace "+s.Namespace, func() ([]unstructured.Unstructured, error) { return g.certificates(ctx) }),
			read(&s.Grants, "create pods/portforward in namespace "+s.Namespace, func() (Grants, error) { return g.grants(ctx) }),
		)
	}
	all(run...)
	return s
}

// clusterParts reads what checks before and after the installation need.
func (g *gatherer) clusterParts(ctx context.Context) []func() {
	s := g.s
	return []func(){
		read(&s.Server, "get /version", func() (*version.Info, error) { return g.kube.Discovery().ServerVersion() }),
		read(&s.Nodes, "list nodes", func() (n Nodes, err error) {
			err = pages(metav1.ListOptions{}, func(o metav1.ListOptions) (*corev1.NodeList, error) { return g.kube.CoreV1().Nodes().List(ctx, o) }, func(list *corev1.NodeList) {
				for i := range list.Items {
					n.Add(s, &list.Items[i])
				}
			})
			return n, err
		}),
		read(&s.Daemons, "list daemonsets in all namespaces", func() (found []string, err error) {
			err = pages(metav1.ListOptions{}, func(o metav1.ListOptions) (*appsv1.DaemonSetList, error) {
				return g.kube.AppsV1().DaemonSets("").List(ctx, o)
			}, func(list *appsv1.DaemonSetList) {
				for _, d := range list.Items {
					for _, c := range d.Spec.Template.Spec.Containers {
						if name := installation.Image(c.Image).Name(); name == "kiam" || name == "kube2iam" {
							found = append(found, d.Namespace+"/"+d.Name)
						}
					}
				}
			})
			return slices.Compact(found), err
		}),
	}
}

// across names a right in the namespaces that are looked at.
func (g *gatherer) across(right string) string {
	if g.s.Scope != "" {
		return right + " in namespace " + g.s.Scope
	}
	if right == "list namespaces" {
		return right
	}
	return right + " in all namespaces"
}

// member reads what one pod of Credence serves.
func (g *gatherer) member(ctx context.Context, m *Member, component string, port, adminPort int, quick bool) func() {
	needs := "create pods/portforward in namespace " + g.s.Namespace
	return func() {
		if m.Pod.Status.Phase != corev1.PodRunning {
			m.Served.Err, m.Metrics.Err = errNotRunning, errNotRunning
			return
		}
		name := "credence-" + component + "." + g.s.Namespace + ".svc"
		read(&m.Served, needs, func() ([]*x509.Certificate, error) { return g.client.Certificates(ctx, &m.Pod, port, name) })()
		if component == "broker" && !installation.Ready(&m.Pod) {
			m.Waits = g.client.Unready(ctx, &m.Pod, adminPort)
		}
		if !quick && adminPort != 0 {
			read(&m.Metrics, needs, func() (metrics.Values, error) {
				text, err := g.client.PodCall(ctx, &m.Pod, http.MethodGet, adminPort, "/metrics", nil)
				if err != nil {
					return nil, err
				}
				values := metrics.Parse(text)
				if len(values) == 0 {
					return nil, errors.New("the page /metrics has no metric of Credence")
				}
				return values, nil
			})()
		}
	}
}

var errNotRunning = errors.New("the pod does not run")

// endpoints returns the names of the pods that the brokers' Service lists as ready.
func (g *gatherer) endpoints(ctx context.Context) (map[string]bool, error) {
	list, err := g.kube.DiscoveryV1().EndpointSlices(g.s.Namespace).List(ctx, metav1.ListOptions{LabelSelector: "kubernetes.io/service-name=" + installation.BrokerName})
	if err != nil {
		return nil, err
	}
	listed := make(map[string]bool)
	for _, slice := range list.Items {
		for _, e := range slice.Endpoints {
			if e.TargetRef != nil && (e.Conditions.Ready == nil || *e.Conditions.Ready) {
				listed[e.TargetRef.Name] = true
			}
		}
	}
	return listed, nil
}

// injects reports whether the webhook injects a PodTemplate. The API server stores nothing.
func (g *gatherer) injects(ctx context.Context) (bool, error) {
	created, err := g.kube.CoreV1().PodTemplates(g.s.Namespace).Create(ctx, &corev1.PodTemplate{
		ObjectMeta: metav1.ObjectMeta{Name: "credence-check", Labels: map[string]string{
			"app.kubernetes.io/name": "credence", "app.kubernetes.io/component": "check",
		}},
		Template: corev1.PodTemplateSpec{
			ObjectMeta: metav1.ObjectMeta{Annotations: map[string]string{g.s.Keys.Name(policy.Role): "check"}},
			Spec:       corev1.PodSpec{Containers: []corev1.Container{{Name: "app", Image: "app:1"}}},
		},
	}, metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}})
	if err != nil {
		return false, err
	}
	return sidecarOf(&created.Template.Spec) != nil, nil
}

// rights asks for each right of the ServiceAccounts.
func (g *gatherer) rights(ctx context.Context) ([]Right, error) {
	wanted := g.s.wantedRights()
	var run []func()
	errs := make([]error, len(wanted))
	for i := range wanted {
		run = append(run, func() {
			var review *authorizationv1.SubjectAccessReview
			review, errs[i] = g.kube.AuthorizationV1().SubjectAccessReviews().Create(ctx, &authorizationv1.SubjectAccessReview{Spec: wanted[i].What}, metav1.CreateOptions{})
			if errs[i] == nil {
				wanted[i].Allowed = review.Status.Allowed
			}
		})
	}
	all(run...)
	return wanted, errors.Join(errs...)
}

var certificatesResource = schema.GroupVersionResource{Group: "cert-manager.io", Version: "v1", Resource: "certificates"}

// certificates returns the Certificates of cert-manager in the namespace of Credence. It returns none without cert-manager.
func (g *gatherer) certificates(ctx context.Context) ([]unstructured.Unstructured, error) {
	list, err := g.objects.Resource(certificatesResource).Namespace(g.s.Namespace).List(ctx, metav1.ListOptions{Limit: page, LabelSelector: "app.kubernetes.io/name=credence"})
	if apierrors.IsNotFound(err) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return list.Items, nil
}

// Grants is what brokers cache for live pods.
type Grants struct {
	Active, Single int   // grants with a session; those that only one broker has
	Refused        Tally // roles that AWS refuses, with the reason
	Failing        Tally // roles whose last fetch failed for another reason, such as an outage
}

// grants reads the debug pages of all brokers.
func (g *gatherer) grants(ctx context.Context) (Grants, error) {
	var (
		mu   sync.Mutex
		seed = maphash.MakeSeed()
		held = make(map[uint64]int)  // :: hash of the grant → broker with a session, from 1; -1 for several
		seen = make(map[uint64]bool) // grants whose last fetch failed
		sum  Grants
		run  []func()
		errs = make([]error, len(g.s.Brokers))
	)
	for i := range g.s.Brokers {
		pod := &g.s.Brokers[i].Pod
		if pod.Status.Phase != corev1.PodRunning {
			continue
		}
		run = append(run, func() {
			errs[i] = g.client.BrokerOf(pod).EachPage(ctx, nil, func(got debugapi.Page) {
				mu.Lock()
				for _, grant := range got.Grants {
					if grant.Pods == 0 {
						continue
					}
					id := maphash.String(seed, grant.Grant)
					// A session that is minutes old may not have reached the second owner.
					if grant.AccessKeyID != "" && (grant.Issued == nil || g.s.Now.Sub(*grant.Issued) > Settle) {
						if first := held[id]; first == 0 {
							held[id] = i + 1
						} else if first != i+1 { // A broker may say twice that it has one.
							held[id] = -1
						}
					}
					if grant.Reason == "" || seen[id] {
						continue
					}
					seen[id] = true
					what := &sum.Failing
					if reason := credential.Reason(grant.Reason); reason == credential.ReasonSTSDenied || reason == credential.ReasonSTSRejected {
						what = &sum.Refused
					}
					users := strings.Join(grant.Namespaces[:min(len(grant.Namespaces), 3)], " ")
					what.Add(fmt.Sprintf("%.200s (%.50s, of namespace %.200s)", grant.Role, grant.Reason, users), "")
				}
				mu.Unlock()
			})
		})
	}
	all(run...)
	for _, only := range held {
		sum.Active++
		if only > 0 {
			sum.Single++
		}
	}
	return sum, errors.Join(errs...)
}

// Settle is more than the time after which a second owner fetches a session, see --settle-time.
const Settle = 4 * time.Minute

// Before looks at a cluster before an installation in a namespace, which need not exist.
func Before(ctx context.Context, client *installation.Client, namespace string, target finding.Cluster) *Snapshot {
	s := &Snapshot{Now: time.Now(), Namespace: namespace, Target: target, Found: &installation.Installation{Namespace: namespace}}
	s.prepare(nil)
	g, err := newGatherer(client, s)
	if err != nil {
		s.Server.Err = err
		return s
	}
	run := append(g.clusterParts(ctx),
		read(&s.Configs, "list mutatingwebhookconfigurations", func() ([]admissionv1.MutatingWebhookConfiguration, error) {
			list, err := g.kube.AdmissionregistrationV1().MutatingWebhookConfigurations().List(ctx, metav1.ListOptions{})
			if err != nil {
				return nil, err
			}
			return list.Items, nil
		}),
		read(&s.Destination, "get namespace "+namespace, func() (*corev1.Namespace, error) {
			ns, err := g.kube.CoreV1().Namespaces().Get(ctx, namespace, metav1.GetOptions{})
			if apierrors.IsNotFound(err) {
				return nil, nil //nolint:nilnil // It need not exist.
			}
			return ns, err
		}),
		read(&s.Network, "list networkpolicies in namespace "+namespace, func() ([]networkingv1.NetworkPolicy, error) {
			list, err := g.kube.NetworkingV1().NetworkPolicies(namespace).List(ctx, metav1.ListOptions{})
			if err != nil {
				return nil, err
			}
			return list.Items, nil
		}),
		read(&s.Yours, "create selfsubjectaccessreviews", func() ([]string, error) { return g.yours(ctx) }),
		read(&s.CertManager, "create certificates.cert-manager.io in namespace default", func() (bool, error) {
			err := g.tryCertificate(ctx)
			if apierrors.IsNotFound(err) {
				return false, nil
			}
			return err == nil, err
		}),
	)
	all(run...)
	return s
}
