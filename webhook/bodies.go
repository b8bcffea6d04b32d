package webhook

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"time"

	"golang.org/x/sync/semaphore"
)

// maxReview bounds the body of a review, in bytes. The API server reads at most 3 MiB of any object
// (etcd stores 1.5 MiB), a review can hold an object twice, before and after, and 1 MiB is left for
// who asks and with what options.
const maxReview = 7 << 20

// maxBodies bounds the bodies that are in memory at a time, in bytes together. Deciding takes some three times a
// body's length, so that this fits beside the watch in half of the 256 MiB that the chart gives the webhook. Reviews of
// usual pods are 10 kB: this many are 2,500 at once.
const maxBodies = 32 << 20

// firstBytes are read of a body before it needs memory of maxBodies: who has sent nothing takes none from others. It is
// less than what TLS has in memory for a connection anyway.
const firstBytes = 8 << 10

// silence is how long nothing of a body may arrive. Where packets are lost, TCP sends them again within that. The whole
// body has as long as the review.
const silence = 2 * time.Second

// bodies is the memory for the bodies of reviews. Nobody authenticates to the webhook, so a body holds about as much as
// has arrived of it, whatever length it declares.
type bodies struct {
	shared *semaphore.Weighted // bytes, for all
	// last has one place, for a body that holds some of shared and finds no more: it may then grow to maxReview, for
	// which there is memory beside shared. Without it, bodies that each wait for what the others hold would end none.
	last *semaphore.Weighted
}

func newBodies() *bodies {
	return &bodies{shared: semaphore.NewWeighted(maxBodies - maxReview), last: semaphore.NewWeighted(1)}
}

// share is what one body holds of bodies. It must be released.
type share struct {
	of   *bodies
	held int64 // of shared
	last bool
}

// grow waits until the share is for that many bytes, or until ctx ends.
func (s *share) grow(ctx context.Context, bytes int) (err error) {
	more := int64(bytes) - s.held
	switch {
	case more <= 0 || s.last:
	case s.of.shared.TryAcquire(more):
		s.held += more
	case s.held == 0:
		if err = s.of.shared.Acquire(ctx, more); err == nil {
			s.held += more
		}
	default:
		err = s.of.last.Acquire(ctx, 1)
		s.last = err == nil
	}
	if err != nil {
		return fmt.Errorf("too many reviews at once: of the %d bytes of memory that there are for them, not enough became free in time: %w", maxBodies, err)
	}
	return nil
}

func (s *share) release() {
	s.of.shared.Release(s.held)
	if s.last {
		s.of.last.Release(1)
	}
	s.held, s.last = 0, false
}

// readBody returns the body of r, for which it takes memory as it arrives, or the HTTP status that refuses it.
func readBody(ctx context.Context, w http.ResponseWriter, r *http.Request, memory *share) ([]byte, int, error) {
	length := int(min(r.ContentLength, maxReview+1))
	switch {
	case length > maxReview:
		return nil, http.StatusRequestEntityTooLarge, errTooLong
	case length < 0:
		length = maxReview // at most
	}
	connection := http.NewResponseController(w)
	from := http.MaxBytesReader(w, r.Body, maxReview)
	body := make([]byte, 0, min(firstBytes, length+1)) // one more, to find the end without growing
	for {
		if len(body) == cap(body) {
			size := 2 * cap(body)
			if cap(body) <= length {
				size = min(size, length+1)
			}
			if err := memory.grow(ctx, size); err != nil {
				return nil, http.StatusServiceUnavailable, err
			}
			larger := make([]byte, len(body), size) // append would take up to a quarter more
			copy(larger, body)
			body = larger
		}
		until := time.Now().Add(silence)
		if end, ok := ctx.Deadline(); ok && end.Before(until) {
			until = end
		}
		if err := connection.SetReadDeadline(until); err != nil && !errors.Is(err, errors.ErrUnsupported) {
			return nil, http.StatusBadRequest, fmt.Errorf("reading the review: %w", err)
		}
		n, err := from.Read(body[len(body):cap(body)])
		body = body[:len(body)+n]
		if errors.Is(err, io.EOF) {
			break
		}
		if _, tooLong := errors.AsType[*http.MaxBytesError](err); tooLong {
			return nil, http.StatusRequestEntityTooLarge, errTooLong
		}
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return nil, http.StatusRequestTimeout, fmt.Errorf("the review has not arrived: nothing of it came for %s, or not all of it within %s", silence, reviewTimeout)
		}
		if err != nil {
			return nil, http.StatusBadRequest, fmt.Errorf("reading the review: %w", err)
		}
	}
	if err := memory.grow(ctx, len(body)); err != nil {
		return nil, http.StatusServiceUnavailable, err
	}
	return body, http.StatusOK, nil
}

var errTooLong = fmt.Errorf("the review is longer than %d bytes", maxReview)
