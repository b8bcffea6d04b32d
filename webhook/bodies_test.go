package webhook_test

import (
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/credence-iam/credence/webhook"
)

// asks gives s a review of that length, whose body comes from r, and returns where its answer will be.
func asks(t *testing.T, s *webhook.Server, length int64, r io.Reader) chan *httptest.ResponseRecorder {
	t.Helper()
	request := httptest.NewRequestWithContext(t.Context(), http.MethodPost, "/mutate", r)
	request.Header.Set("Content-Type", "application/json")
	request.ContentLength = length
	answered := make(chan *httptest.ResponseRecorder, 1)
	go func() {
		w := httptest.NewRecorder()
		s.ServeHTTP(w, request)
		answered <- w
	}()
	synctest.Wait()
	return answered
}

// Reviews that come at once wait for each other's memory: none is lost that gets some in time, and the others are told.
func TestBodiesAreBounded(t *testing.T) {
	body := review(pod(permitted, ""))
	for name, tt := range map[string]struct {
		length int64 // of each that is under way
		sent   bool  // one of them arrives
		want   int
	}{
		"memory in time":    {webhook.MaxReview, true, http.StatusOK},
		"none in time":      {webhook.MaxReview, false, http.StatusServiceUnavailable},
		"length not told":   {-1, false, http.StatusServiceUnavailable},
		"more than is read": {webhook.MaxBodies, false, http.StatusServiceUnavailable},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newServer(t)
				var writers []*io.PipeWriter
				for range webhook.MaxBodies / webhook.MaxReview {
					reader, writer := io.Pipe()
					asks(t, s, tt.length, reader)
					writers = append(writers, writer)
				}
				const length = webhook.MaxBodies%webhook.MaxReview + 1 // more than is left
				answered := asks(t, s, length, strings.NewReader(body))
				began := time.Now()
				select {
				case w := <-answered:
					t.Fatalf("a further review was answered %d while there was no memory for it", w.Code)
				default:
				}
				if tt.sent {
					writers[0].Close()
				}
				w := <-answered
				if w.Code != tt.want {
					t.Errorf("answered %d after %v: %s", w.Code, time.Since(began), w.Body)
				}
				for _, writer := range writers {
					writer.Close()
				}
			})
		})
	}
}
