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

// apiVersion and kind of the reviews that are understood.
var (
	reviewVersion = admissionv1.SchemeGroupVersion.String()
	reviewKind    = "AdmissionReview"
)

// mutate answers one review.
func (s *Server) mutate(w http.ResponseWriter, r *http.Request) {
	began := time.Now()
	ctx, cancel := context.WithTimeout(r.Context(), reviewTimeout)
	defer cancel()
	memory := &share{of: s.bodies}
	defer memory.release()
	var request *admissionv1.AdmissionRequest
	// A failure without a status of its own is in the log.
	code, err := http.StatusInternalServerError, error(nil)
	if fault := s.safely(ctx, "", func() { request, code, err = readReview(ctx, w, r, memory) }); fault != nil {
		err = errors.New("internal error: the webhook's log has it")
	}
	if err != nil && request == nil {
		s.log.WarnContext(ctx, "Admission review not understood", "status", code, "error", err)
		answer(w, code, err.Error())
		return
	}
	var body []byte
	fault := s.safely(ctx, request.UID, func() { body, err = encode(s.respond(ctx, request, err, memory, began)) })
	if fault = errors.Join(fault, err); fault != nil {
		if body, err = encode(refusal(request, fault)); err != nil {
			// Cannot happen: it has no value that does not encode.
			answer(w, http.StatusInternalServerError, "the answer cannot be encoded")
			return
		}
	}
	w.Header().Set("Content-Type", "application/json")
	if _, err := w.Write(body); err != nil {
		s.log.WarnContext(r.Context(), "Answer to an admission review not sent", "uid", request.UID, "error", err)
	}
}

func encode(response *admissionv1.AdmissionResponse) ([]byte, error) {
	return stdjson.Marshal(admissionv1.AdmissionReview{
		TypeMeta: metav1.TypeMeta{APIVersion: reviewVersion, Kind: reviewKind},
		Response: response,
	})
}

// admissionReview has those fields of a review that decisions read. The others are not decoded: groups of the user,
// options, and an answer, which no review of the API server's has, can be as long as the object.
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

// readReview returns the request of the one review in the body, or the HTTP status that refuses it. A request beside an
// error has a uid and no more: the refusal is then an answer to it.
func readReview(ctx context.Context, w http.ResponseWriter, r *http.Request, memory *share) (*admissionv1.AdmissionRequest, int, error) {
	if mediaType, _, err := mime.ParseMediaType(r.Header.Get("Content-Type")); err != nil || mediaType != "application/json" {
		return nil, http.StatusUnsupportedMediaType, fmt.Errorf("content type %q is not application/json", r.Header.Get("Content-Type"))
	}
	body, code, err := readBody(ctx, w, r, memory)
	if _, told := errors.AsType[*credential.Error](err); told {
		return beginning(body), code, err
	}
	if err != nil {
		return nil, code, err
	}
	var review admissionReview
	if err := json.Unmarshal(body, &review); err != nil {
		// Nothing that a pod holds is in the error: its JSON is not decoded here.
		return nil, http.StatusBadRequest, fmt.Errorf("decoding the review: %w", err)
	}
	asked := review.Request
	switch {
	case review.APIVersion != reviewVersion || review.Kind != reviewKind:
		return nil, http.StatusBadRequest, fmt.Errorf("the body is %q of %q, and only %s of %s is understood: list v1 alone in the webhook's admissionReviewVersions",
			clip.Runes(review.Kind, maxName), clip.Runes(review.APIVersion, maxName), reviewKind, reviewVersion)
	case asked == nil:
		return nil, http.StatusBadRequest, errors.New("the review has no request")
	case asked.UID == "":
		return nil, http.StatusBadRequest, errors.New("the review's request has no uid")
	case len(asked.UID) > maxName || len(asked.Namespace) > maxName:
		return nil, http.StatusBadRequest, fmt.Errorf("uid or namespace of the review's request is longer than %d bytes", maxName)
	}
	return &admissionv1.AdmissionRequest{
		UID: asked.UID, Resource: asked.Resource, SubResource: asked.SubResource, Name: asked.Name, Namespace: asked.Namespace,
		Operation: asked.Operation, Object: runtime.RawExtension{Raw: asked.Object}, DryRun: asked.DryRun,
	}, http.StatusOK, nil
}

// errTooLong refuses a body that is longer than maxReview.
var errTooLong = credential.Errorf(credential.ErrInvalid, credential.ReasonPodUnsupported,
	"the review is longer than %d bytes, and an API server takes pods of at most %d: make the pod smaller", maxReview, podview.MaxObject)

// beginning returns the request of a review that is not read as a whole, with its uid alone; nil if the first bytes do
// not have it. The API server writes version and uid first.
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

// maxName is the longest text of the request's that errors and logs repeat: Kubernetes names have at
// most 253 characters.
const maxName = 253
