//go:build unix

package main

import (
	"bytes"
	_ "embed" // for the managed fields
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	metainternalversionscheme "k8s.io/apimachinery/pkg/apis/meta/internalversion/scheme"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer/streaming"
	"k8s.io/apimachinery/pkg/types"

	"github.com/credence-iam/credence/broker/kube/apitest"
	"github.com/credence-iam/credence/broker/policy"
)

// podServer serves what a broker lists and watches, for a broker's memory: the metadata of many pods, generated for each
// response and not stored, and the keys of tokens. It speaks Kubernetes' protobuf, as real API servers do with client-go.
// Package apitest stores objects and speaks JSON.
type podServer struct {
	pods     int
	streams  bool          // it streams lists, as Kubernetes does since 1.34; otherwise it serves pages
	lists    atomic.Int64  // complete lists of pods that it sent, streamed or not
	expire   chan struct{} // a send ends a watch of pods with "410 Gone", so that its client lists again
	keys     signer
	protobuf runtime.SerializerInfo
}

const (
	// The pods have this many roles, in this many namespaces.
	podRoles      = 500
	podNamespaces = 20

	protobuf    = "application/vnd.kubernetes.protobuf"
	resourceVer = "1000000"
	podsPath    = "/api/v1/pods"
)

// servePods serves until the world ends, and returns the path of a kubeconfig file.
func (w *world) servePods(pods int, streams bool) (*podServer, string) {
	s := &podServer{pods: pods, streams: streams, expire: make(chan struct{}), keys: newSigner()}
	for _, info := range metainternalversionscheme.Codecs.SupportedMediaTypes() {
		if info.MediaType == protobuf {
			s.protobuf = info
		}
	}
	server := httptest.NewUnstartedServer(s)
	server.EnableHTTP2 = true
	server.StartTLS()
	w.Cleanup(func() {
		server.CloseClientConnections() // watches
		server.Close()
	})
	file := filepath.Join(w.TempDir(), "kubeconfig")
	ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw})
	check(os.WriteFile(file, fmt.Appendf(nil, `{apiVersion: v1, kind: Config, current-context: bench,
contexts: [{name: bench, context: {cluster: bench, user: bench}}], users: [{name: bench, user: {token: x}}],
clusters: [{name: bench, cluster: {server: %q, certificate-authority-data: %s}}]}`, server.URL, base64.StdEncoding.EncodeToString(ca)), 0o600))
	return s, file
}

// ServeHTTP implements http.Handler.
func (s *podServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	switch r.URL.Path {
	case podsPath:
		s.serve(w, r, s.pods, podMetadata)
	case "/api/v1/namespaces":
		s.serve(w, r, podNamespaces, namespaceMetadata)
	case "/api/v1/serviceaccounts":
		s.serve(w, r, podNamespaces*(1+podRoles/podNamespaces), accountMetadata)
	default:
		s.keys.ServeHTTP(w, r)
	}
}

// serve responds to a list or a watch of count objects.
func (s *podServer) serve(w http.ResponseWriter, r *http.Request, count int, object func(int) *metav1.PartialObjectMetadata) {
	q := r.URL.Query()
	streamed := q.Get("sendInitialEvents") == "true"
	var err error
	switch {
	case streamed && !s.streams:
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(http.StatusUnprocessableEntity)
		const message = "sendInitialEvents is forbidden for watch unless the WatchList feature gate is enabled"
		err = json.NewEncoder(w).Encode(apitest.Failure(http.StatusUnprocessableEntity, metav1.StatusReasonInvalid, message))
	case streamed:
		err = s.watch(w, r, count, object)
	case q.Get("watch") == "true":
		err = s.watch(w, r, 0, object)
	default:
		limit, _ := strconv.Atoi(q.Get("limit"))
		from, _ := strconv.Atoi(q.Get("continue"))
		err = s.page(w, count, from, limit, object)
	}
	if err != nil && r.Context().Err() == nil {
		panic(err) // the client's connection fails
	}
}

func (s *podServer) page(w http.ResponseWriter, count, from, limit int, object func(int) *metav1.PartialObjectMetadata) error {
	list := &metav1.PartialObjectMetadataList{TypeMeta: metav1.TypeMeta{Kind: "PartialObjectMetadataList", APIVersion: "meta.k8s.io/v1"}}
	list.ResourceVersion = resourceVer
	end := count
	if limit > 0 && from+limit < count {
		end = from + limit
		list.Continue = strconv.Itoa(end)
	}
	for i := from; i < end; i++ {
		list.Items = append(list.Items, *object(i))
	}
	w.Header().Set("Content-Type", protobuf)
	defer s.sent(count, end)
	return s.protobuf.Serializer.Encode(list, w)
}

// sent counts complete lists of pods. No other kind has as many objects.
func (s *podServer) sent(count, end int) {
	if count == s.pods && end == s.pods {
		s.lists.Add(1)
	}
}

// watch sends the initial objects, if there are any, and then nothing until the watch ends.
func (s *podServer) watch(w http.ResponseWriter, r *http.Request, initial int, object func(int) *metav1.PartialObjectMetadata) error {
	w.Header().Set("Content-Type", protobuf+";stream=watch")
	encoder := streaming.NewEncoder(s.protobuf.StreamSerializer.Framer.NewFrameWriter(w), s.protobuf.StreamSerializer.Serializer)
	var buffer bytes.Buffer
	send := func(kind string, object runtime.Object) error {
		buffer.Reset()
		if err := s.protobuf.Serializer.Encode(object, &buffer); err != nil {
			return err
		}
		return encoder.Encode(&metav1.WatchEvent{Type: kind, Object: runtime.RawExtension{Raw: buffer.Bytes()}})
	}
	for i := range initial {
		if err := send("ADDED", object(i)); err != nil {
			return err
		}
	}
	if initial > 0 {
		end := metadataOf("", "", 0, 0)
		end.ResourceVersion, end.Annotations = resourceVer, map[string]string{metav1.InitialEventsAnnotationKey: "true"}
		if err := send("BOOKMARK", end); err != nil {
			return err
		}
		s.sent(initial, initial)
	}
	if err := http.NewResponseController(w).Flush(); err != nil {
		return err
	}
	var expire chan struct{}
	if r.URL.Path == podsPath {
		expire = s.expire
	}
	select {
	case <-r.Context().Done():
		return nil
	case <-expire:
		return send("ERROR", apitest.Failure(http.StatusGone, metav1.StatusReasonExpired, "too old resource version"))
	}
}

func uid(kind, n int) string { return fmt.Sprintf("%08d-0000-4000-8000-%012d", kind, n) }

func metadataOf(namespace, name string, kind, i int) *metav1.PartialObjectMetadata {
	return &metav1.PartialObjectMetadata{
		TypeMeta: metav1.TypeMeta{Kind: "PartialObjectMetadata", APIVersion: "meta.k8s.io/v1"},
		ObjectMeta: metav1.ObjectMeta{
			Namespace: namespace, Name: name, UID: types.UID(uid(kind, i)),
			ResourceVersion: strconv.Itoa(100_000 + i), CreationTimestamp: metav1.NewTime(time.Unix(1_700_000_000+int64(i), 0)),
		},
	}
}

func namespaceName(i int) string  { return fmt.Sprintf("team-%02d-production", i%podNamespaces) }
func accountName(role int) string { return fmt.Sprintf("checkout-service-%03d", role) }

func namespaceMetadata(i int) *metav1.PartialObjectMetadata {
	m := metadataOf("", namespaceName(i), 3, i)
	ns := optedIn(m.Name)
	m.Labels, m.Annotations = ns.Labels, ns.Annotations
	return m
}

func accountMetadata(i int) *metav1.PartialObjectMetadata {
	return metadataOf(namespaceName(i), accountName(i/podNamespaces), 4, i)
}

// podMetadata is the metadata of a Deployment's pod, as an API server has it, with the fields that kubectl, the
// controller manager and the kubelet manage. The whole pod would have 6 kB; its spec and status are not sent.
func podMetadata(i int) *metav1.PartialObjectMetadata {
	role := i % podRoles
	app := accountName(role)
	hash := fmt.Sprintf("%08x", role*2_654_435_761%(1<<32))
	set := app + "-" + hash
	m := metadataOf(namespaceName(role), fmt.Sprintf("%s-%05x", set, i), 1, i)
	m.GenerateName = set + "-"
	m.OwnerReferences = []metav1.OwnerReference{{
		APIVersion: "apps/v1", Kind: "ReplicaSet", Name: set, UID: types.UID(uid(5, role)), Controller: new(true), BlockOwnerDeletion: new(true),
	}}
	m.Labels = map[string]string{
		"app.kubernetes.io/name": app, "app.kubernetes.io/instance": app + "-production", "app.kubernetes.io/version": "2026.11.3",
		"app.kubernetes.io/managed-by": "Helm", "helm.sh/chart": app + "-4.12.0", "pod-template-hash": hash,
		policy.DefaultPrefix + "/injected": "true",
	}
	m.Annotations = map[string]string{
		policy.DefaultPrefix + "/role": fmt.Sprintf("bench-%03d", role), policy.DefaultPrefix + "/service-account": app,
		"prometheus.io/scrape": "true", "prometheus.io/port": "9090", "prometheus.io/path": "/metrics",
		"checksum/config": strings.Repeat(fmt.Sprintf("%08x", role), 8), "kubectl.kubernetes.io/restartedAt": "2026-11-20T10:00:00Z",
	}
	m.ManagedFields = managedFields
	return m
}

// The managed fields of a pod with one container and a sidecar, as the API server writes them.
//
//go:embed testdata/managed_fields.json
var managedFieldsJSON []byte

var managedFields = func() (fields []metav1.ManagedFieldsEntry) {
	check(json.Unmarshal(managedFieldsJSON, &fields))
	return fields
}()
