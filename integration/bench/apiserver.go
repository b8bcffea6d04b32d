//go:build unix

package main

import (
	"crypto/rand"
	"crypto/rsa"
	"encoding/json"
	"fmt"
	"net/http"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	discoveryv1 "k8s.io/api/discovery/v1"
	metainternalversionscheme "k8s.io/apimachinery/pkg/apis/meta/internalversion/scheme"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer/streaming"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"

	"github.com/credence-iam/credence/broker/policy"
)

// apiServer is a double with what a broker needs from an API server. It has the metadata of pods, the keys of the
// tokens that it signs, and the brokers' EndpointSlice. It generates the metadata for each response and does not store
// it. It speaks Kubernetes' protobuf, as real API servers do with client-go.
type apiServer struct {
	pods     int
	streams  bool // it streams lists, as Kubernetes does since 1.34; otherwise it serves pages
	key      *rsa.PrivateKey
	lists    atomic.Int64 // complete lists of pods that it sent, streamed or not
	protobuf runtime.SerializerInfo

	mu      sync.Mutex
	expire  chan struct{} // closed to end all watches of pods with "410 Gone"; guarded by mu
	brokers []string      // addresses of ready brokers; guarded by mu
	version int           // of brokers; guarded by mu
	changed chan struct{} // closed when brokers change; guarded by mu
}

const (
	// The pods have this many roles, in this many namespaces.
	podRoles      = 500
	podNamespaces = 20

	protobuf       = "application/vnd.kubernetes.protobuf"
	protobufStream = protobuf + ";stream=watch"
	resourceVer    = "1000000"
	keyID          = "bench"

	brokerNamespace, brokerService = "credence", "credence-broker"
)

// serveAPI serves until the world ends, and returns the address.
func (w *world) serveAPI(t trust, pods int, streams bool) (*apiServer, string) {
	s := &apiServer{
		pods: pods, streams: streams, expire: make(chan struct{}), changed: make(chan struct{}),
		// As API servers create them: signatures of 2,048 bits are cheap to verify.
		key: must(rsa.GenerateKey(rand.Reader, 2048)),
	}
	for _, info := range metainternalversionscheme.Codecs.SupportedMediaTypes() {
		if info.MediaType == protobuf {
			s.protobuf = info
		}
	}
	return s, w.serveHTTP(t, s, "h2", "http/1.1")
}

// kubeconfig writes a kubeconfig file for an API server at address.
func (w *world) kubeconfig(t trust, address string) string {
	file := filepath.Join(w.folder(), "kubeconfig")
	check(clientcmd.WriteToFile(clientcmdapi.Config{
		Clusters:       map[string]*clientcmdapi.Cluster{"c": {Server: "https://" + address, CertificateAuthorityData: t.ca.PEM}},
		AuthInfos:      map[string]*clientcmdapi.AuthInfo{"u": {Token: "x"}},
		Contexts:       map[string]*clientcmdapi.Context{"x": {Cluster: "c", AuthInfo: "u"}},
		CurrentContext: "x",
	}, file))
	return file
}

// token makes a token with the claims of projected tokens.
func (s *apiServer) token(pod policy.Pod, accountUID string) string {
	type object struct {
		Name string `json:"name"`
		UID  string `json:"uid"`
	}
	signer := must(jose.NewSigner(jose.SigningKey{Algorithm: jose.RS256, Key: jose.JSONWebKey{Key: s.key, KeyID: keyID}}, nil))
	now := time.Now()
	return must(jwt.Signed(signer).Claims(jwt.Claims{
		Issuer: issuer, Subject: "system:serviceaccount:" + pod.Namespace + ":" + pod.ServiceAccount, Audience: jwt.Audience{audience},
		Expiry: jwt.NewNumericDate(now.Add(2 * time.Hour)), IssuedAt: jwt.NewNumericDate(now), NotBefore: jwt.NewNumericDate(now),
		ID: "jti-" + pod.UID,
	}).Claims(map[string]any{"kubernetes.io": map[string]any{
		"namespace": pod.Namespace, "node": object{"node-1", uid(3, 0)}, "pod": object{pod.Name, pod.UID},
		"serviceaccount": object{pod.ServiceAccount, accountUID}, "warnafter": now.Add(time.Hour).Unix(),
	}}).Serialize())
}

// ServeHTTP implements http.Handler.
func (s *apiServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	switch r.URL.Path {
	case "/openid/v1/jwks":
		writeJSON(w, jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: s.key.Public(), KeyID: keyID, Algorithm: string(jose.RS256), Use: "sig"}}})
	case "/.well-known/openid-configuration":
		writeJSON(w, map[string]string{"issuer": issuer})
	case "/api/v1/pods":
		s.serve(w, r, s.pods, podMetadata)
	case "/api/v1/namespaces":
		s.serve(w, r, podNamespaces, namespaceMetadata)
	case "/api/v1/serviceaccounts":
		s.serve(w, r, podNamespaces*(1+podRoles/podNamespaces), accountMetadata)
	case "/apis/discovery.k8s.io/v1/namespaces/" + brokerNamespace + "/endpointslices":
		s.serveSlices(w, r)
	default:
		http.NotFound(w, r)
	}
}

func writeJSON(w http.ResponseWriter, value any) {
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(value)
}

// serve responds to a list or a watch of count objects.
func (s *apiServer) serve(w http.ResponseWriter, r *http.Request, count int, object func(int) *metav1.PartialObjectMetadata) {
	q := r.URL.Query()
	initial := q.Get("sendInitialEvents") == "true"
	var err error
	switch {
	case initial && !s.streams:
		refuseStreaming(w)
	case q.Get("watch") == "true":
		err = s.watch(w, r, count, initial, object)
	default:
		limit, _ := strconv.Atoi(q.Get("limit"))
		from, _ := strconv.Atoi(q.Get("continue"))
		err = s.page(w, count, from, limit, object)
	}
	if err != nil && r.Context().Err() == nil {
		panic(err) // the client's connection fails
	}
}

func refuseStreaming(w http.ResponseWriter) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(http.StatusUnprocessableEntity)
	const message = "sendInitialEvents is forbidden for watch unless the WatchList feature gate is enabled"
	_ = json.NewEncoder(w).Encode(failedStatus(http.StatusUnprocessableEntity, metav1.StatusReasonInvalid, message))
}

func failedStatus(code int, reason metav1.StatusReason, message string) *metav1.Status {
	return &metav1.Status{
		TypeMeta: metav1.TypeMeta{Kind: "Status", APIVersion: "v1"}, Status: metav1.StatusFailure,
		Code: int32(code), Reason: reason, Message: message, //nolint:gosec // An HTTP status.
	}
}

func (s *apiServer) page(w http.ResponseWriter, count, from, limit int, object func(int) *metav1.PartialObjectMetadata) error {
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
		list.Items = append(list.Items, *object(i))
	}
	w.Header().Set("Content-Type", protobuf)
	return s.protobuf.Serializer.Encode(list, w)
}

func (s *apiServer) watch(w http.ResponseWriter, r *http.Request, count int, initial bool, object func(int) *metav1.PartialObjectMetadata) error {
	s.mu.Lock()
	expire := s.expire
	s.mu.Unlock()
	w.Header().Set("Content-Type", protobufStream)
	w.WriteHeader(http.StatusOK)
	encoder := streaming.NewEncoder(s.protobuf.StreamSerializer.Framer.NewFrameWriter(w), s.protobuf.StreamSerializer.Serializer)
	var buffer strings.Builder
	send := func(kind string, object runtime.Object) error {
		buffer.Reset()
		if err := s.protobuf.Serializer.Encode(object, &buffer); err != nil {
			return err
		}
		return encoder.Encode(&metav1.WatchEvent{Type: kind, Object: runtime.RawExtension{Raw: []byte(buffer.String())}})
	}
	if initial {
		for i := range count {
			if err := send("ADDED", object(i)); err != nil {
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
		return send("ERROR", failedStatus(http.StatusGone, metav1.StatusReasonExpired, "too old resource version"))
	}
}

// relist ends every watch of pods in a way that makes clients list again.
func (s *apiServer) relist() {
	s.mu.Lock()
	defer s.mu.Unlock()
	close(s.expire)
	s.expire = make(chan struct{})
}

// setBrokers sets the addresses of ready brokers. A real API server accepts no loopback addresses, which brokers have here.
func (s *apiServer) setBrokers(addresses ...string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.brokers = addresses
	s.version++
	close(s.changed)
	s.changed = make(chan struct{})
}

// slice returns the brokers' EndpointSlice, and a channel that is closed when there is a newer one.
func (s *apiServer) slice() (*discoveryv1.EndpointSlice, <-chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	slice := &discoveryv1.EndpointSlice{
		TypeMeta: metav1.TypeMeta{APIVersion: "discovery.k8s.io/v1", Kind: "EndpointSlice"},
		ObjectMeta: metav1.ObjectMeta{
			Namespace: brokerNamespace, Name: brokerService, ResourceVersion: strconv.Itoa(s.version),
			Labels: map[string]string{discoveryv1.LabelServiceName: brokerService},
		},
		AddressType: discoveryv1.AddressTypeIPv4,
	}
	for _, address := range s.brokers {
		slice.Endpoints = append(slice.Endpoints, discoveryv1.Endpoint{Addresses: []string{address}})
	}
	return slice, s.changed
}

// serveSlices responds to a list or a watch of EndpointSlices, in JSON.
func (s *apiServer) serveSlices(w http.ResponseWriter, r *http.Request) {
	slice, changed := s.slice()
	switch {
	case r.URL.Query().Get("sendInitialEvents") == "true":
		refuseStreaming(w)
		return
	case r.URL.Query().Get("watch") != "true":
		list := &discoveryv1.EndpointSliceList{
			TypeMeta: metav1.TypeMeta{APIVersion: "discovery.k8s.io/v1", Kind: "EndpointSliceList"}, Items: []discoveryv1.EndpointSlice{*slice},
		}
		list.ResourceVersion = slice.ResourceVersion
		writeJSON(w, list)
		return
	}
	for since := r.URL.Query().Get("resourceVersion"); ; slice, changed = s.slice() {
		if slice.ResourceVersion != since {
			since = slice.ResourceVersion
			writeJSON(w, metav1.WatchEvent{Type: "MODIFIED", Object: runtime.RawExtension{Object: slice}})
		}
		if http.NewResponseController(w).Flush() != nil {
			return
		}
		select {
		case <-changed:
		case <-r.Context().Done():
			return
		}
	}
}

var objectType = metav1.TypeMeta{Kind: "PartialObjectMetadata", APIVersion: "meta.k8s.io/v1"}

func uid(kind, n int) string { return fmt.Sprintf("%08d-0000-4000-8000-%012d", kind, n) }

func metadataOf(namespace, name string, kind, i int) *metav1.PartialObjectMetadata {
	return &metav1.PartialObjectMetadata{TypeMeta: objectType, ObjectMeta: metav1.ObjectMeta{
		Namespace: namespace, Name: name, UID: types.UID(uid(kind, i)),
		ResourceVersion: strconv.Itoa(100_000 + i), CreationTimestamp: metav1.NewTime(time.Unix(1_700_000_000+int64(i), 0)),
	}}
}

func namespaceName(i int) string  { return fmt.Sprintf("team-%02d-production", i%podNamespaces) }
func accountName(role int) string { return fmt.Sprintf("checkout-service-%03d", role) }

func namespaceMetadata(i int) *metav1.PartialObjectMetadata {
	m := metadataOf("", namespaceName(i), 3, i)
	m.Labels = map[string]string{policy.DefaultPrefix + "/inject": "enabled", "kubernetes.io/metadata.name": m.Name}
	m.Annotations = map[string]string{policy.DefaultPrefix + "/permitted": "arn:aws:iam::[0-9]+:role/.*"}
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
	set := fmt.Sprintf("%s-%08x", app, role*2_654_435_761%(1<<32))
	m := metadataOf(namespaceName(role), fmt.Sprintf("%s-%05x", set, i), 1, i)
	m.GenerateName = set + "-"
	yes := true
	m.OwnerReferences = []metav1.OwnerReference{{
		APIVersion: "apps/v1", Kind: "ReplicaSet", Name: set, UID: types.UID(uid(5, role)), Controller: &yes, BlockOwnerDeletion: &yes,
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

// The managed fields of a pod with one container and a sidecar, as the API server writes them.
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
