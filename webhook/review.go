package webhook

import (
	"context"
	stdjson "encoding/json"
	"errors"
	"fmt"
	"mime"
	"net/http"
	"time"

	admissionv1 "k8s.io/api/admission/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/json"
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
	// Of what failed by no status of its own, the log tells.
	code, err := http.StatusInternalServerError, error(nil)
	if fault := s.safely(ctx, "", func() { request, code, err = readReview(ctx, w, r, memory) }); fault != nil {
		err = errors.New("internal error: the webhook's log has it")
	}
	if err != nil {
		s.log.WarnContext(ctx, "Admission review not understood", "status", code, "error", err)
		answer(w, code, err.Error())
		return
	}
	var body []byte
	fault := s.safely(ctx, request.UID, func() { body, err = encode(s.respond(ctx, request, began)) })
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

// readReview returns the request of the one review in the body, or the HTTP status that refuses it.
func readReview(ctx context.Context, w http.ResponseWriter, r *http.Request, memory *share) (*admissionv1.AdmissionRequest, int, error) {
	if mediaType, _, err := mime.ParseMediaType(r.Header.Get("Content-Type")); err != nil || mediaType != "application/json" {
		return nil, http.StatusUnsupportedMediaType, fmt.Errorf("content type %q is not application/json", r.Header.Get("Content-Type"))
	}
	body, code, err := readBody(ctx, w, r, memory)
	if err != nil {
		return nil, code, err
	}
	var review admissionv1.AdmissionReview
	if err := json.Unmarshal(body, &review); err != nil {
		// Nothing that a pod holds is in the error: its JSON is not decoded here.
		return nil, http.StatusBadRequest, fmt.Errorf("decoding the review: %w", err)
	}
	switch {
	case review.APIVersion != reviewVersion || review.Kind != reviewKind:
		return nil, http.StatusBadRequest, fmt.Errorf("the body is %q of %q, and only %s of %s is understood: list v1 alone in the webhook's admissionReviewVersions",
			clip(review.Kind, maxName), clip(review.APIVersion, maxName), reviewKind, reviewVersion)
	case review.Request == nil:
		return nil, http.StatusBadRequest, errors.New("the review has no request")
	case review.Request.UID == "":
		return nil, http.StatusBadRequest, errors.New("the review's request has no uid")
	}
	return review.Request, http.StatusOK, nil
}

// maxName is the longest text of the request's that errors and logs repeat: Kubernetes names have at
// most 253 characters.
const maxName = 253

// clip shortens s to at most the given number of characters.
func clip(s string, most int) string {
	if len(s) <= most { // bytes, of which there are at least as many
		return s
	}
	runes := []rune(s)
	if len(runes) <= most {
		return s
	}
	return string(runes[:most-1]) + "…"
}
