package webhook

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"time"
	"unicode/utf8"

	"github.com/credence-iam/credence/webhook/inject/podview"
	"golang.org/x/sync/semaphore"
)

// maxReview bounds the body of a review, in bytes: an object, of which the API server reads at most 3 MiB, and 1 MiB
// for the user who creates it and the options. The webhook is registered for creation alone, so that there is one object.
const maxReview = podview.MaxObject + 1<<20

// What a review allocates until its answer is sent, garbage included, in bytes. TestCost compares it with the worst
// reviews that are known.
const (
	costPerReview    = 64 << 10 // of any review: buffers of HTTP, log, metrics, the sidecar in the patch
	costPerByte      = 12       // the body and its growth, the object in it, the spec in the object, strings, parts of messages
	costPerValue     = 160      // the decoded field or element, such as an entry of the annotations
	costPerContainer = 8 << 10  // operations, patch, its base64, the answer, warnings
)

// cost is the memory that the webhook reserves for a review.
func cost(bytes, values, containers int) int64 {
	return costPerReview + costPerByte*int64(bytes) + costPerValue*int64(values) + costPerContainer*int64(containers)
}

// readingCost is the memory that the webhook reserves while a body arrives, for which there is a buffer of that size: the
// buffer before, and what the connection holds.
func readingCost(size int) int64 { return costPerReview + 2*int64(size) }

// The memory for all reviews, in bytes. Together it is half of the 256 MiB that the chart gives the webhook, which
// TestMemoryFitsTheChart checks. The other half is for the watch, connections, and what the collector has not freed.
const (
	// maxMemory is what all reviews may cost at a time.
	maxMemory = 128 << 20
	// maxCost is the cost of the largest review.
	maxCost = costPerReview + costPerByte*maxReview + costPerValue*podview.MaxValues + costPerContainer*podview.MaxContainers
	// maxLarge is how many reviews of that cost may be under way. Large reviews wait for each other, not small ones for
	// them.
	maxLarge = 1
	// maxShared is for reviews that cost at most maxSmall: usual pods have 10 kB and cost 400 kB.
	maxShared = maxMemory - maxLarge*maxCost
	maxSmall  = 4 << 20
)

// firstBytes are read of a body before it reserves memory: a client that has sent nothing takes none from others. It is
// less than what TLS has in memory for a connection anyway.
const firstBytes = 8 << 10

// silence is how long nothing of a body may arrive. Where packets are lost, TCP sends them again within that. The whole
// body has as long as the review.
const silence = 2 * time.Second

// bodies is the memory for reviews. Nobody authenticates to the webhook, so a small review reserves memory as its body
// arrives, whatever length it declares.
type bodies struct {
	shared *semaphore.Weighted // bytes
	// large has maxLarge places. A review takes one if it costs more than maxSmall, and waits for it before it has
	// reserved any of shared; or if it has reserved a part of shared and there is no more: without the second rule, bodies
	// that each wait for what others have reserved would all wait until they end.
	large *semaphore.Weighted
}

func newBodies() *bodies {
	return &bodies{shared: semaphore.NewWeighted(maxShared), large: semaphore.NewWeighted(maxLarge)}
}

// share is what one review has reserved of bodies. It must be released.
type share struct {
	of    *bodies
	held  int64 // of shared
	large bool  // one of the places for maxCost, and nothing of shared
}

// grow waits until that much is reserved, or until ctx ends.
func (s *share) grow(ctx context.Context, bytes int64) (err error) {
	more := bytes - s.held
	switch {
	case more <= 0 || s.large:
	case bytes <= maxSmall && s.of.shared.TryAcquire(more):
		s.held = bytes
	case bytes <= maxSmall && s.held == 0:
		if err = s.of.shared.Acquire(ctx, more); err == nil {
			s.held = bytes
		}
	default:
		if err = s.of.large.Acquire(ctx, 1); err == nil {
			s.release()
			s.large = true
		}
	}
	if err != nil {
		return fmt.Errorf("too many reviews at once: of the %d bytes of memory that there are for them, not enough became free in time: %w", maxMemory, err)
	}
	return nil
}

// growBy is grow by that much.
func (s *share) growBy(ctx context.Context, bytes int64) error { return s.grow(ctx, s.held+bytes) }

func (s *share) release() {
	s.of.shared.Release(s.held)
	if s.large {
		s.of.large.Release(1)
	}
	s.held, s.large = 0, false
}

// readBody returns the body of r, for which it reserves memory as it arrives. Beside an error it returns the beginning,
// and the HTTP status that refuses it.
func readBody(ctx context.Context, w http.ResponseWriter, r *http.Request, memory *share) ([]byte, int, error) {
	length, limit := int(min(r.ContentLength, maxReview+1)), maxReview
	tooLong := length > maxReview
	switch {
	case tooLong:
		length, limit = firstBytes, firstBytes // the beginning names the object
	case length < 0:
		length = maxReview // at most; the API server declares lengths
	}
	large := cost(length, 0, 0) > maxSmall
	connection := http.NewResponseController(w)
	from := http.MaxBytesReader(w, r.Body, int64(limit))
	body := make([]byte, 0, min(firstBytes, length+1)) // one more, to find the end without growing
	for {
		if len(body) == cap(body) {
			size := 2 * cap(body)
			if cap(body) <= length {
				size = min(size, length+1)
			}
			reserve := readingCost(size)
			if large {
				reserve = maxCost
			}
			if err := memory.grow(ctx, reserve); err != nil {
				return body, http.StatusServiceUnavailable, err
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
			return body, http.StatusBadRequest, fmt.Errorf("reading the review: %w", err)
		}
		n, err := from.Read(body[len(body):cap(body)])
		body = body[:len(body)+n]
		if errors.Is(err, io.EOF) {
			break
		}
		if tooLong && len(body) == firstBytes || errors.As(err, new(*http.MaxBytesError)) {
			return body, http.StatusRequestEntityTooLarge, errTooLong
		}
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return body, http.StatusRequestTimeout, fmt.Errorf("the review has not arrived: nothing of it came for %s, or not all of it within %s", silence, reviewTimeout)
		}
		if err != nil {
			return body, http.StatusBadRequest, fmt.Errorf("reading the review: %w", err)
		}
	}
	if !utf8.Valid(body) {
		// RFC 8259 section 8.1. Decoded, each such byte becomes three.
		return body, http.StatusBadRequest, errors.New("decoding the review: it is not UTF-8")
	}
	shape := podview.Measure(body)
	if err := shape.Check(); err != nil {
		return body, http.StatusRequestEntityTooLarge, err
	}
	if err := memory.grow(ctx, cost(len(body), shape.Values, 0)); err != nil {
		return body, http.StatusServiceUnavailable, err
	}
	return body, http.StatusOK, nil
}
