package webhook

import (
	"bytes"
	"context"
	stdjson "encoding/json"
	"errors"
	"fmt"
	"mime"
	"net/http"
	"time"

	admissionv1 "k8s.io/api/admission/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/json"

	"github.com/credence-iam/credence/broker/clip"
	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/webhook/inject/podview"
)

// reviewVersion and reviewKind are the only supported apiVersion and kind.
var (
	reviewVersion = admissionv1.SchemeGroupVersion.String()
	reviewKind    = "AdmissionReview"
)

// mutate responds to one review.
func (s *Server) mutate(w http.ResponseWriter, r *http.Request) {
	began := time.Now()
	ctx, cancel := context.WithTimeout(r.Context(), reviewTimeout)
	defer cancel()
	memory := &reservation{from: s.bodies}
	defer memory.release()
	var request *admissionv1.AdmissionRequest
	// The log has the cause of a failure without a status of its own.
	code, err := http.StatusInternalServerError, error(nil)
	if fault := s.safely(ctx, "", func() { request, code, err = readReview(ctx, w, r, memory) }); fault != nil {
		err = errors.New("internal error; see the webhook's log")
	}
	if err != nil && request == nil {
		s.log.WarnContext(ctx, "Could not read an admission review", "status", code, "error", err)
		writeText(w, code, err.Error())
		return
	}
	var body []byte
	fault := s.safely(ctx, request.UID, func() { body, err = encode(s.respond(ctx, request, err, memory, began)) })
	if fault = errors.Join(fault, err); fault != nil {
		if body, err = encode(refusal(request, fault)); err != nil {
			// Impossible: a refusal has no value that cannot be encoded.
			writeText(w, http.StatusInternalServerError, "cannot encode the response")
			return
		}
	}
	w.Header().Set("Content-Type", "application/json")
	if _, err := w.Write(body); err != nil {
		s.log.WarnContext(r.Context(), "Could not send the response to an admission review", "uid", request.UID, "error", err)
	}
}

func encode(response *admissionv1.AdmissionResponse) ([]byte, error) {
	return stdjson.Marshal(admissionv1.AdmissionReview{
		TypeMeta: metav1.TypeMeta{APIVersion: reviewVersion, Kind: reviewKind},
		Response: response,
	})
}

// admissionReview has the fields of a review that decisions read. Others are not decoded, because the user's groups, the
// options and a response, which the API server never sends, can be as long as the object.
type admissionReview struct {
	metav1.TypeMeta
	Request *struct {
		UID         types.UID                   `json:"uid"`
		Resource    metav1.GroupVersionResource `json:"resource"`
		SubResource string                      `json:"subResource"`
		Name        string                      `json:"name"`
		Namespace   string                      `json:"namespace"`
		Operation   admissionv1.Operation       `json:"operation"`
		Object      stdjson.RawMessage          `json:"object"`
		DryRun      *bool                       `json:"dryRun"`
	} `json:"request"`
}

// readReview returns the request of the review in the body, or an error with its HTTP status. If it returns a request with
// an error, the request has only a uid, and the response is a refusal.
func readReview(ctx context.Context, w http.ResponseWriter, r *http.Request, memory *reservation) (*admissionv1.AdmissionRequest, int, error) {
	if mediaType, _, err := mime.ParseMediaType(r.Header.Get("Content-Type")); err != nil || mediaType != "application/json" {
		return nil, http.StatusUnsupportedMediaType, fmt.Errorf("content type %q is not application/json", r.Header.Get("Content-Type"))
	}
	body, code, err := readBody(ctx, w, r, memory)
	if _, refused := errors.AsType[*credential.Error](err); refused {
		return beginning(body), code, err
	}
	if err != nil {
		return nil, code, err
	}
	var review admissionReview
	if err := json.Unmarshal(body, &review); err != nil {
		// The error quotes nothing of the pod, whose JSON is not decoded here.
		return nil, http.StatusBadRequest, fmt.Errorf("decoding the review: %w", err)
	}
	received := review.Request
	switch {
	case review.APIVersion != reviewVersion || review.Kind != reviewKind:
		return nil, http.StatusBadRequest, fmt.Errorf("the body is %q of %q, and the webhook supports only %s of %s; list only v1 in its admissionReviewVersions",
			clip.Runes(review.Kind, maxName), clip.Runes(review.APIVersion, maxName), reviewKind, reviewVersion)
	case received == nil:
		return nil, http.StatusBadRequest, errors.New("the review has no request")
	case received.UID == "":
		return nil, http.StatusBadRequest, errors.New("the review's request has no uid")
	case len(received.UID) > maxName || len(received.Namespace) > maxName:
		return nil, http.StatusBadRequest, fmt.Errorf("uid or namespace of the review's request is longer than %d bytes", maxName)
	}
	return &admissionv1.AdmissionRequest{
		UID: received.UID, Resource: received.Resource, SubResource: received.SubResource, Name: received.Name, Namespace: received.Namespace,
		Operation: received.Operation, Object: runtime.RawExtension{Raw: received.Object}, DryRun: received.DryRun,
	}, http.StatusOK, nil
}

// errTooLong refuses a body longer than maxReview.
var errTooLong = credential.Errorf(credential.ErrInvalid, credential.ReasonPodUnsupported,
	"the review is longer than %d bytes, and an API server accepts pods of at most %d; make the pod smaller", maxReview, podview.MaxObject)

// beginning returns the request of an incomplete review, with only its uid; nil if the first bytes lack the uid. The API
// server writes version and uid first.
func beginning(body []byte) *admissionv1.AdmissionRequest {
	d := stdjson.NewDecoder(bytes.NewReader(body[:min(len(body), firstBytes)]))
	if t, err := d.Token(); err != nil || t != stdjson.Delim('{') {
		return nil
	}
	var version, kind, uid string
	for {
		key, err := d.Token()
		if err != nil {
			return nil
		}
		switch key {
		case "apiVersion":
			err = d.Decode(&version)
		case "kind":
			err = d.Decode(&kind)
		case "request":
			if t, err := d.Token(); err != nil || t != stdjson.Delim('{') {
				return nil
			}
			if key, err := d.Token(); err != nil || key != "uid" {
				return nil
			}
			err = d.Decode(&uid)
		default:
			return nil
		}
		switch {
		case err != nil:
			return nil
		case uid != "":
			if version != reviewVersion || kind != reviewKind || len(uid) > maxName {
				return nil
			}
			return &admissionv1.AdmissionRequest{UID: types.UID(uid)}
		}
	}
}

// maxName is the maximum length of the request's texts that errors and logs repeat. Kubernetes names have at most 253
// characters.
const maxName = 253
