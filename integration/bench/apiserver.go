//go:build unix

package main

import (
	"context"
	"crypto/rsa"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/go-jose/go-jose/v4"
	metainternalversionscheme "k8s.io/apimachinery/pkg/apis/meta/internalversion/scheme"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer/streaming"
	"k8s.io/apimachinery/pkg/types"

	"github.com/credence-iam/credence/broker/policy"
	"github.com/credence-iam/credence/certs"
)

// apiServer serves what a broker asks of an API server, over the metadata of pods that it makes up as they are
// asked for: it holds none of them. It speaks Kubernetes' protobuf, as real ones do to client-go.
type apiServer struct {
	pods    int
	streams bool // it streams lists, as Kubernetes does since 1.34; otherwise it answers pages
	keys    []byte

	wire     runtime.SerializerInfo
	watching sync.Mutex
	expire   chan struct{} // closed to end all watches of pods with "410 Gone"; guarded by watching
	lists    atomic.Int64  // lists of pods that were answered whole, streamed or not

	brokers endpoints
}

const (
	// Pods are of so many roles, in so many namespaces.
	podRoles      = 500
	podNamespaces = 20

	protobuf       = "application/vnd.kubernetes.protobuf"
	protobufStream = protobuf + ";stream=watch"
	resourceVer    = "1000000"
)

// serveAPI serves until ctx ends, and returns the address.
func serveAPI(ctx context.Context, t trust, key *rsa.PrivateKey, pods int, streams bool) (*apiServer, string, error) {
	s := &apiServer{pods: pods, streams: streams, expire: make(chan struct{})}
	var err error
	if s.keys, err = json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: key.Public(), KeyID: keyID, Algorithm: string(jose.RS256), Use: "sig"}}}); err != nil {
		return nil, "", fmt.Errorf("encoding a key set: %w", err)
	}
	for _, info := range metainternalversionscheme.Codecs.SupportedMediaTypes() {
		if info.MediaType == protobuf {
			s.wire = info
		}
	}
	listener, address, err := listen(ctx)
	if err != nil {
		return nil, "", err
	}
	tlsConfig := certs.ServerConfig(t.pair)
	tlsConfig.NextProtos = []string{"h2", "http/1.1"}
	server := &http.Server{TLSConfig: tlsConfig, ReadHeaderTimeout: time.Minute, Handler: s}
	go func() { _ = server.ServeTLS(listener, "", "") }()
	context.AfterFunc(ctx, func() { _ = server.Close() })
	return s, address, nil
}

// ServeHTTP implements http.Handler.
func (s *apiServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	switch r.URL.Path {
	case "/openid/v1/jwks":
		_, _ = w.Write(s.keys)
	case "/.well-known/openid-configuration":
		_, _ = io.WriteString(w, `{"issuer":"`+issuer+`"}`)
	case "/api/v1/pods":
		s.serve(w, r, s.pods, madePod)
	case "/api/v1/namespaces":
		s.serve(w, r, podNamespaces, madeNamespace)
	case "/api/v1/serviceaccounts":
		s.serve(w, r, podNamespaces*(1+podRoles/podNamespaces), madeAccount)
	case slicesPath:
		s.brokers.serve(w, r)
	default:
		http.NotFound(w, r)
	}
}

// serve answers a list or a watch of the count objects that make makes.
func (s *apiServer) serve(w http.ResponseWriter, r *http.Request, count int, make func(int) *metav1.PartialObjectMetadata) {
	q := r.URL.Query()
	initial := q.Get("sendInitialEvents") == "true"
	var err error
	switch {
	case initial && !s.streams:
		s.refuse(w, http.StatusUnprocessableEntity, metav1.StatusReasonInvalid, "sendInitialEvents is forbidden for watch unless the WatchList feature gate is enabled")
	case q.Get("watch") == "true":
		err = s.watch(w, r, count, initial, make)
	default:
		limit, _ := strconv.Atoi(q.Get("limit"))
		from, _ := strconv.Atoi(q.Get("continue"))
		err = s.page(w, count, from, limit, make)
	}
	if err != nil && r.Context().Err() == nil {
		panic(err) // the client sees its connection fail
	}
}

func (s *apiServer) refuse(w http.ResponseWriter, code int, reason metav1.StatusReason, message string) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(gone(code, reason, message))
}

func gone(code int, reason metav1.StatusReason, message string) *metav1.Status {
	return &metav1.Status{
		TypeMeta: metav1.TypeMeta{Kind: "Status", APIVersion: "v1"}, Status: metav1.StatusFailure,
		Code: int32(code), Reason: reason, Message: message, //nolint:gosec // An HTTP status.
	}
}

func (s *apiServer) page(w io.Writer, count, from, limit int, make func(int) *metav1.PartialObjectMetadata) error {
	end := count
	if limit > 0 {
		end = min(count, from+limit)
	}
	list := &metav1.PartialObjectMetadataList{TypeMeta: metav1.TypeMeta{Kind: "PartialObjectMetadataList", APIVersion: "meta.k8s.io/v1"}}
	list.ResourceVersion = resourceVer
	if end < count {
		list.Continue = strconv.Itoa(end)
	} else if count == s.pods {
		s.lists.Add(1)
	}
	for i := from; i < end; i++ {
		list.Items = append(list.Items, *make(i))
	}
	w.(http.ResponseWriter).Header().Set("Content-Type", protobuf)
	return s.wire.Serializer.Encode(list, w)
}

func (s *apiServer) watch(w http.ResponseWriter, r *http.Request, count int, initial bool, make func(int) *metav1.PartialObjectMetadata) error {
	s.watching.Lock()
	expire := s.expire
	s.watching.Unlock()
	w.Header().Set("Content-Type", protobufStream)
	w.WriteHeader(http.StatusOK)
	encoder := streaming.NewEncoder(s.wire.StreamSerializer.Framer.NewFrameWriter(w), s.wire.StreamSerializer.Serializer)
	var buffer strings.Builder
	send := func(kind string, object runtime.Object) error {
		buffer.Reset()
		if err := s.wire.Serializer.Encode(object, &buffer); err != nil {
			return err
		}
		return encoder.Encode(&metav1.WatchEvent{Type: kind, Object: runtime.RawExtension{Raw: []byte(buffer.String())}})
	}
	if initial {
		for i := range count {
			if err := send("ADDED", make(i)); err != nil {
				return err
			}
		}
		end := &metav1.PartialObjectMetadata{TypeMeta: objectType}
		end.ResourceVersion, end.Annotations = resourceVer, map[string]string{metav1.InitialEventsAnnotationKey: "true"}
		if err := send("BOOKMARK", end); err != nil {
			return err
		}
		if count == s.pods {
			s.lists.Add(1)
		}
	}
	if err := http.NewResponseController(w).Flush(); err != nil {
		return err
	}
	if count != s.pods {
		expire = nil
	}
	select {
	case <-r.Context().Done():
		return nil
	case <-expire:
		return send("ERROR", gone(http.StatusGone, metav1.StatusReasonExpired, "too old resource version"))
	}
}

// relist ends every watch of pods in the way that makes clients list anew.
func (s *apiServer) relist() {
	s.watching.Lock()
	defer s.watching.Unlock()
	close(s.expire)
	s.expire = make(chan struct{})
}

var objectType = metav1.TypeMeta{Kind: "PartialObjectMetadata", APIVersion: "meta.k8s.io/v1"}

func objectMeta(namespace, name string, kind, i int) metav1.ObjectMeta {
	return metav1.ObjectMeta{
		Namespace: namespace, Name: name, UID: types.UID(fmt.Sprintf("%08d-0000-4000-8000-%012d", kind, i)),
		ResourceVersion: strconv.Itoa(100_000 + i), CreationTimestamp: metav1.NewTime(time.Unix(1_700_000_000+int64(i), 0)),
	}
}

func namespaceName(i int) string  { return fmt.Sprintf("team-%02d-production", i%podNamespaces) }
func accountName(role int) string { return fmt.Sprintf("checkout-service-%03d", role) }

func madeNamespace(i int) *metav1.PartialObjectMetadata {
	m := &metav1.PartialObjectMetadata{TypeMeta: objectType, ObjectMeta: objectMeta("", namespaceName(i), 3, i)}
	m.Labels = map[string]string{policy.DefaultPrefix + "/inject": "enabled", "kubernetes.io/metadata.name": m.Name}
	m.Annotations = map[string]string{policy.DefaultPrefix + "/permitted": "arn:aws:iam::[0-9]+:role/.*"}
	return m
}

func madeAccount(i int) *metav1.PartialObjectMetadata {
	return &metav1.PartialObjectMetadata{TypeMeta: objectType, ObjectMeta: objectMeta(namespaceName(i), accountName(i/podNamespaces), 4, i)}
}

// madePod is the metadata of a pod of a Deployment, as an API server has it: with what kubectl, the controller
// manager and the kubelet have written down of who manages which field. The pod would have some 6 kB; its spec and
// status are not sent.
func madePod(i int) *metav1.PartialObjectMetadata {
	role := i % podRoles
	app := accountName(role)
	set := fmt.Sprintf("%s-%08x", app, role*2_654_435_761%(1<<32))
	m := &metav1.PartialObjectMetadata{TypeMeta: objectType, ObjectMeta: objectMeta(namespaceName(role), fmt.Sprintf("%s-%05x", set, i), 1, i)}
	m.GenerateName = set + "-"
	yes := true
	m.OwnerReferences = []metav1.OwnerReference{{
		APIVersion: "apps/v1", Kind: "ReplicaSet", Name: set, UID: types.UID(fmt.Sprintf("%08d-0000-4000-8000-%012d", 5, role)), Controller: &yes, BlockOwnerDeletion: &yes,
	}}
	m.Labels = map[string]string{
		"app.kubernetes.io/name": app, "app.kubernetes.io/instance": app + "-production", "app.kubernetes.io/version": "2026.11.3",
		"app.kubernetes.io/managed-by": "Helm", "helm.sh/chart": app + "-4.12.0", "pod-template-hash": set[len(app)+1:],
		policy.DefaultPrefix + "/injected": "true",
	}
	m.Annotations = map[string]string{
		policy.DefaultPrefix + "/role": fmt.Sprintf("checkout-%03d", role), policy.DefaultPrefix + "/service-account": app,
		"prometheus.io/scrape": "true", "prometheus.io/port": "9090", "prometheus.io/path": "/metrics",
		"checksum/config": strings.Repeat(fmt.Sprintf("%08x", role), 8), "kubectl.kubernetes.io/restartedAt": "2026-11-20T10:00:00Z",
	}
	at := metav1.NewTime(time.Unix(1_700_000_000, 0))
	for _, manager := range []struct{ name, fields, sub string }{
		{"kube-controller-manager", managedByControllers, ""}, {"kubelet", managedByKubelet, "status"},
	} {
		m.ManagedFields = append(m.ManagedFields, metav1.ManagedFieldsEntry{
			Manager: manager.name, Operation: metav1.ManagedFieldsOperationUpdate, APIVersion: "v1", Time: &at,
			FieldsType: "FieldsV1", FieldsV1: metav1.NewFieldsV1(manager.fields), Subresource: manager.sub,
		})
	}
	return m
}

// What is managed of a pod with one container and a sidecar, in the API's words.
var (
	managedByControllers = `{"f:metadata":{"f:annotations":{".":{},"f:checksum/config":{},"f:iam.amazonaws.com/role":{},"f:prometheus.io/path":{},"f:prometheus.io/port":{},"f:prometheus.io/scrape":{}},"f:generateName":{},"f:labels":{".":{},"f:app.kubernetes.io/instance":{},"f:app.kubernetes.io/managed-by":{},"f:app.kubernetes.io/name":{},"f:helm.sh/chart":{},"f:pod-template-hash":{}},"f:ownerReferences":{".":{},"k:{\"uid\":\"00000005-0000-4000-8000-000000000000\"}":{}}},"f:spec":{"f:containers":{"k:{\"name\":\"app\"}":` +
		`{".":{},"f:env":{".":{},` + managedEnv() + `},"f:image":{},"f:imagePullPolicy":{},"f:livenessProbe":{".":{},"f:failureThreshold":{},"f:httpGet":{".":{},"f:path":{},"f:port":{},"f:scheme":{}},"f:periodSeconds":{},"f:successThreshold":{},"f:timeoutSeconds":{}},"f:name":{},"f:ports":{".":{},"k:{\"containerPort\":8080,\"protocol\":\"TCP\"}":{".":{},"f:containerPort":{},"f:name":{},"f:protocol":{}}},"f:resources":{".":{},"f:limits":{".":{},"f:memory":{}},"f:requests":{".":{},"f:cpu":{},"f:memory":{}}},"f:securityContext":{},"f:terminationMessagePath":{},"f:terminationMessagePolicy":{}}},"f:dnsPolicy":{},"f:enableServiceLinks":{},"f:restartPolicy":{},"f:schedulerName":{},"f:securityContext":{},"f:serviceAccount":{},"f:serviceAccountName":{},"f:terminationGracePeriodSeconds":{}}}`
	managedByKubelet = `{"f:status":{"f:conditions":{"k:{\"type\":\"ContainersReady\"}":{".":{},"f:lastProbeTime":{},"f:lastTransitionTime":{},"f:status":{},"f:type":{}},"k:{\"type\":\"Initialized\"}":{".":{},"f:lastProbeTime":{},"f:lastTransitionTime":{},"f:status":{},"f:type":{}},"k:{\"type\":\"PodReadyToStartContainers\"}":{".":{},"f:lastProbeTime":{},"f:lastTransitionTime":{},"f:status":{},"f:type":{}},"k:{\"type\":\"Ready\"}":{".":{},"f:lastProbeTime":{},"f:lastTransitionTime":{},"f:status":{},"f:type":{}}},"f:containerStatuses":{},"f:hostIP":{},"f:hostIPs":{},"f:initContainerStatuses":{},"f:phase":{},"f:podIP":{},"f:podIPs":{".":{},"k:{\"ip\":\"10.0.0.1\"}":{".":{},"f:ip":{}}},"f:startTime":{}}}`
)

func managedEnv() string {
	var b strings.Builder
	for i := range 12 {
		_, _ = fmt.Fprintf(&b, `"k:{\"name\":\"SETTING_NUMBER_%d\"}":{".":{},"f:name":{},"f:value":{}},`, i)
	}
	return strings.TrimSuffix(b.String(), ",")
}
