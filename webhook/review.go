package webhook

import (
	"context"
	stdjson "encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"time"

	admissionv1 "k8s.io/api/admission/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/json"
)

// maxReview bounds the body of a review, in bytes. The API server reads at most 3 MiB of any object
// (etcd stores 1.5 MiB), a review can hold an object twice, before and after, and 1 MiB is left for
// who asks and with what options.
const maxReview = 7 << 20

// maxBodies bounds the bodies that are in memory at a time, in bytes together. Deciding takes some three times a
// body's length, so that this fits beside the watch in half of the 256 MiB that the chart gives the webhook. Reviews of
// usual pods are 10 kB: this many are 3,000 at once.
const maxBodies = 32 << 20

// apiVersion and kind of the reviews that are understood.
var (
	reviewVersion = admissionv1.SchemeGroupVersion.String()
	reviewKind    = "AdmissionReview"
)

// mutate answers one review.
func (s *Server) mutate(w http.ResponseWriter, r *http.Request) {
	began := time.Now()
	release, err := s.admit(r)
	if err != nil {
		s.log.WarnContext(r.Context(), "Admission review not read", "status", http.StatusServiceUnavailable, "error", err)
		answer(w, http.StatusServiceUnavailable, err.Error())
		return
	}
	defer release()
	request, code, err := readReview(w, r)
	if err != nil {
		s.log.WarnContext(r.Context(), "Admission review not understood", "status", code, "error", err)
		answer(w, code, err.Error())
		return
	}
	response := s.respond(r.Context(), request, began)
	body, err := stdjson.Marshal(admissionv1.AdmissionReview{
		TypeMeta: metav1.TypeMeta{APIVersion: reviewVersion, Kind: reviewKind},
		Response: response,
	})
	if err != nil {
		// Cannot happen: these types have no value that does not encode. To the API server, it is a
		// webhook that fails, and so a refusal.
		s.log.ErrorContext(r.Context(), "Answer to an admission review not encoded", "uid", request.UID, "error", err)
		answer(w, http.StatusInternalServerError, "the answer cannot be encoded")
		return
	}
	w.Header().Set("Content-Type", "application/json")
	if _, err := w.Write(body); err != nil {
		s.log.WarnContext(r.Context(), "Answer to an admission review not sent", "uid", request.UID, "error", err)
	}
}

// admit waits until there is memory for the body of r, for as long as a review may take. The caller must release it.
func (s *Server) admit(r *http.Request) (release func(), err error) {
	length := r.ContentLength
	if length < 0 || length > maxReview {
		length = maxReview // what is read of it at most
	}
	ctx, cancel := context.WithTimeout(r.Context(), reviewTimeout)
	defer cancel()
	if err := s.bodies.Acquire(ctx, length); err != nil {
		return nil, fmt.Errorf("too many reviews at once: %d bytes of them are being decided on", maxBodies)
	}
	return func() { s.bodies.Release(length) }, nil
}

// readReview returns the request of the one review in the body, or the HTTP status that refuses it.
func readReview(w http.ResponseWriter, r *http.Request) (*admissionv1.AdmissionRequest, int, error) {
	if mediaType, _, err := mime.ParseMediaType(r.Header.Get("Content-Type")); err != nil || mediaType != "application/json" {
		return nil, http.StatusUnsupportedMediaType, fmt.Errorf("content type %q is not application/json", r.Header.Get("Content-Type"))
	}
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxReview))
	if tooLarge, ok := errors.AsType[*http.MaxBytesError](err); ok {
		return nil, http.StatusRequestEntityTooLarge, fmt.Errorf("the review is longer than %d bytes", tooLarge.Limit)
	}
	if err != nil {
		return nil, http.StatusBadRequest, fmt.Errorf("reading the review: %w", err)
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
