package apitest

import (
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"strings"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/client-go/kubernetes/scheme"
)

// maxBody bounds a request, as API servers do.
const maxBody = 3 << 20

// query is a parsed request.
type query struct {
	kind
	location // a collection if the name is empty

	labels       labels.Selector
	fields       fields.Selector
	metadataOnly bool
}

// matches reports whether the query selects the object o at a location.
func (q query) matches(at location, o object) bool {
	if o == nil || at.resource != q.location.resource || q.namespace != "" && at.namespace != q.namespace {
		return false
	}
	set := labels.Set{}
	if all, ok := o.meta()["labels"].(map[string]any); ok {
		for name, value := range all {
			set[name] = fmt.Sprint(value)
		}
	}
	if !q.labels.Matches(set) {
		return false
	}
	for _, r := range q.fields.Requirements() {
		if (o.text(r.Field) == r.Value) != (r.Operator != "!=") {
			return false
		}
	}
	return true
}

// shape returns o in the form that the client requested.
func (q query) shape(o object) object {
	shaped := maps.Clone(o)
	shaped["kind"], shaped["apiVersion"] = q.kind.name, q.version
	if q.metadataOnly {
		shaped = object{"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": o.meta()}
	}
	return shaped
}

func (s *Server) serve(w http.ResponseWriter, r *http.Request) {
	switch r.URL.Path {
	case "/version":
		respond(w, http.StatusOK, map[string]string{"gitVersion": Version})
		return
	case "/openid/v1/jwks":
		respond(w, http.StatusOK, s.keySet())
		return
	case "/.well-known/openid-configuration":
		respond(w, http.StatusOK, map[string]string{"issuer": Issuer, "jwks_uri": "http://" + r.Host + "/openid/v1/jwks"})
		return
	}
	q, err := parse(r)
	if err != nil {
		refuse(w, http.StatusNotFound, metav1.StatusReasonNotFound, err.Error())
		return
	}
	request := Request{Method: r.Method, Resource: q.location.resource, Namespace: q.namespace}
	s.mu.Lock()
	s.requests[request]++
	intercept := s.intercept
	s.mu.Unlock()
	if intercept != nil {
		request.Name, request.Query = q.location.name, r.URL.RawQuery
		if status := intercept(request); status != nil {
			respond(w, int(status.Code), status)
			return
		}
	}
	var sent object
	if r.Method != http.MethodGet && r.Method != http.MethodDelete {
		if sent, err = read(r); err != nil {
			refuse(w, http.StatusBadRequest, metav1.StatusReasonBadRequest, err.Error())
			return
		}
	}
	switch {
	case q.location.resource == podLog:
		s.mu.Lock()
		defer s.mu.Unlock()
		_, _ = io.WriteString(w, s.logs[q.location])
	case q.location.resource == "tokenreviews":
		respond(w, http.StatusCreated, q.shape(s.review(sent)))
	case r.Method == http.MethodGet && r.URL.Query().Get("sendInitialEvents") == "true":
		// A server without WatchList responds like this, and clients list instead.
		refuse(w, http.StatusUnprocessableEntity, metav1.StatusReasonInvalid, "sendInitialEvents is forbidden for watch unless the WatchList feature gate is enabled")
	case r.Method == http.MethodGet && r.URL.Query().Get("watch") == "true":
		s.watch(w, r, q)
	case r.Method == http.MethodGet && q.location.name == "":
		respond(w, http.StatusOK, s.list(q))
	default:
		s.one(w, r, q, sent)
	}
}

// parse reads /api/v1/[namespaces/NAMESPACE/]RESOURCE[/NAME], or the same below /apis/GROUP/VERSION.
func parse(r *http.Request) (q query, err error) {
	path := strings.Split(strings.Trim(r.URL.Path, "/"), "/")
	version := 2
	if path[0] == "apis" {
		version = 3
	}
	if len(path) <= version {
		return query{}, fmt.Errorf("%s is not served", r.URL.Path)
	}
	groupVersion, rest := strings.Join(path[1:version], "/"), path[version:]
	if rest[0] == "namespaces" && len(rest) > 2 {
		q.namespace, rest = rest[1], rest[2:]
	}
	k, ok := kindOf(func(k kind) bool { return k.resource == rest[0] && k.version == groupVersion })
	if isLog := len(rest) == 3 && rest[0]+"/"+rest[2] == podLog; ok && isLog {
		return query{kind: k, location: location{podLog, q.namespace, rest[1]}}, nil
	}
	if !ok || len(rest) > 2 {
		return query{}, fmt.Errorf("%s is not served", r.URL.Path)
	}
	q.kind, q.location.resource = k, k.resource
	if len(rest) == 2 {
		q.location.name = rest[1]
	}
	q.metadataOnly = strings.Contains(r.Header.Get("Accept"), "as=PartialObjectMetadata")
	if q.labels, err = labels.Parse(r.URL.Query().Get("labelSelector")); err != nil {
		return query{}, err
	}
	q.fields, err = fields.ParseSelector(r.URL.Query().Get("fieldSelector"))
	return q, err
}

// read reads an object in JSON or in Kubernetes' protobuf.
func read(r *http.Request) (object, error) {
	body, err := io.ReadAll(io.LimitReader(r.Body, maxBody))
	if err != nil {
		return nil, err
	}
	var sent object
	if json.Unmarshal(body, &sent) == nil {
		return sent, nil
	}
	decoded, _, err := scheme.Codecs.UniversalDeserializer().Decode(body, nil, nil)
	if err != nil {
		return nil, err
	}
	return encode(decoded), nil
}

// one serves a request for one object.
func (s *Server) one(w http.ResponseWriter, r *http.Request, q query, sent object) {
	s.mu.Lock()
	defer s.mu.Unlock()
	at := q.location
	if r.Method == http.MethodPost {
		at.name = sent.text("metadata.name")
	}
	old := s.objects[at]
	switch {
	case r.Method == http.MethodPost && old != nil:
		refuse(w, http.StatusConflict, metav1.StatusReasonAlreadyExists, at.name+" exists already")
	case r.Method == http.MethodPost:
		respond(w, http.StatusCreated, q.shape(s.store(at, sent)))
	case r.Method == http.MethodPatch: // server-side apply
		respond(w, http.StatusOK, q.shape(s.store(at, merge(old, sent))))
	case old == nil:
		refuse(w, http.StatusNotFound, metav1.StatusReasonNotFound, at.name+" does not exist")
	case r.Method == http.MethodPut && sent.text("metadata.resourceVersion") != old.text("metadata.resourceVersion"):
		refuse(w, http.StatusConflict, metav1.StatusReasonConflict, at.name+" has changed")
	case r.Method == http.MethodPut:
		respond(w, http.StatusOK, q.shape(s.store(at, sent)))
	case r.Method == http.MethodDelete:
		s.store(at, nil)
		respond(w, http.StatusOK, q.shape(old))
	default:
		respond(w, http.StatusOK, q.shape(old))
	}
}

// merge returns old with the fields of sent, maps field by field.
func merge(old, sent map[string]any) object {
	merged := maps.Clone(old)
	if merged == nil {
		merged = make(map[string]any)
	}
	for field, value := range sent {
		inner, isMap := value.(map[string]any)
		before, wasMap := merged[field].(map[string]any)
		if isMap && wasMap {
			merged[field] = map[string]any(merge(before, inner))
		} else {
			merged[field] = value
		}
	}
	return merged
}

func (s *Server) list(q query) object {
	s.mu.Lock()
	defer s.mu.Unlock()
	items := []object{}
	for at, o := range s.objects {
		if q.matches(at, o) {
			items = append(items, q.shape(o))
		}
	}
	slices.SortFunc(items, func(a, b object) int {
		return cmp.Or(cmp.Compare(a.text("metadata.namespace"), b.text("metadata.namespace")), cmp.Compare(a.text("metadata.name"), b.text("metadata.name")))
	})
	list := object{"kind": q.kind.name + "List", "apiVersion": q.version, "metadata": object{"resourceVersion": strconv.Itoa(len(s.changes))}, "items": items}
	if q.metadataOnly {
		list["kind"], list["apiVersion"] = "PartialObjectMetadataList", "meta.k8s.io/v1"
	}
	return list
}

// watcher is an open watch.
type watcher struct {
	query
	events chan event
}

type event struct {
	Type   string `json:"type"`
	Object object `json:"object"`
}

// maxEvents bounds the events that wait for a client. No test changes as many objects at once.
const maxEvents = 10_000

// inform queues the change of an object from old to o; nil means that it does not exist.
func (w *watcher) inform(at location, old, o object) {
	was, is := w.matches(at, old), w.matches(at, o)
	switch {
	case is && was:
		w.events <- event{"MODIFIED", w.shape(o)}
	case is:
		w.events <- event{"ADDED", w.shape(o)}
	case was:
		w.events <- event{"DELETED", w.shape(old)}
	}
}

func (s *Server) watch(w http.ResponseWriter, r *http.Request, q query) {
	watch := &watcher{q, make(chan event, maxEvents)}
	since, err := strconv.Atoi(r.URL.Query().Get("resourceVersion"))
	if err != nil {
		refuse(w, http.StatusBadRequest, metav1.StatusReasonBadRequest, "a watch needs the version of a list")
		return
	}
	s.mu.Lock()
	for _, c := range s.changes[min(since, len(s.changes)):] {
		watch.inform(c.at, c.old, c.now)
	}
	s.watchers[watch] = true
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.watchers, watch)
	}()
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(http.StatusOK)
	encoder, flusher := json.NewEncoder(w), http.NewResponseController(w)
	for {
		if flusher.Flush() != nil {
			return
		}
		select {
		case e := <-watch.events:
			if encoder.Encode(e) != nil {
				return
			}
		case <-r.Context().Done():
			return
		case <-s.done:
			return
		}
	}
}

func respond(w http.ResponseWriter, code int, body any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(body) // fails if the client has disconnected
}

func refuse(w http.ResponseWriter, code int32, reason metav1.StatusReason, message string) {
	respond(w, int(code), Failure(code, reason, message))
}
