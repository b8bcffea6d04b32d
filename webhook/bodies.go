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

	"golang.org/x/sync/semaphore"

	"github.com/credence-iam/credence/webhook/inject/podview"
)

// maxReview is the maximum body of a review, in bytes: 3 MiB for the object, the maximum of the API server, and 1 MiB for
// the user and the options. The webhook is registered for creation only, so there is one object.
const maxReview = podview.MaxObject + 1<<20

// The memory that a review allocates until its response is sent, including garbage, in bytes. TestCost compares it with
// the worst known reviews.
const (
	costPerReview    = 64 << 10 // each review: HTTP buffers, log, metrics, the sidecar in the patch
	costPerByte      = 12       // the growing body, the object in it, the spec in the object, strings, parts of messages
	costPerValue     = 160      // a decoded field or element, such as an annotation
	costPerContainer = 8 << 10  // operations, patch, its base64, response, warnings
)

// cost is the memory that the webhook reserves for a review.
func cost(bytes, values, containers int) int64 {
	return costPerReview + costPerByte*int64(bytes) + costPerValue*int64(values) + costPerContainer*int64(containers)
}

// readingCost is the memory that the webhook reserves while a body arrives into a buffer of that size. It covers the
// buffer, the smaller buffer that it replaces, and the connection.
func readingCost(size int) int64 { return costPerReview + 2*int64(size) }

// The memory for all reviews, in bytes. It is half of the 256 MiB that the chart gives the webhook, as
// TestMemoryFitsTheChart checks. The other half is for the watch cache, connections and garbage.
const (
	// maxMemory is the maximum cost of all concurrent reviews.
	maxMemory = 128 << 20
	// maxCost is the cost of the largest review.
	maxCost = costPerReview + costPerByte*maxReview + costPerValue*podview.MaxValues + costPerContainer*podview.MaxContainers
	// maxLarge is the maximum number of concurrent reviews of that cost. Large reviews wait for each other. Small reviews do
	// not wait for large ones.
	maxLarge = 1
	// maxShared is the memory for reviews that cost at most maxSmall. Usual pods have 10 kB and cost 400 kB.
	maxShared = maxMemory - maxLarge*maxCost
	maxSmall  = 4 << 20
)

// firstBytes is the length of a body that needs no reservation, so a client that sends nothing takes no memory from others.
// It is less than the TLS buffers of a connection.
const firstBytes = 8 << 10

// silence is the maximum pause within a body. TCP resends lost packets in that time. The whole body may take as long as the
// review.
const silence = 2 * time.Second

// bodies is the memory for reviews. Clients do not authenticate, so a small review reserves memory as its body arrives,
// whatever length it declares.
type bodies struct {
	shared *semaphore.Weighted // bytes
	// large has maxLarge places, each with maxCost outside shared. A review that costs more than maxSmall takes a place
	// before it reserves any of shared. A review that holds part of shared and cannot get more takes one, too. Without the
	// second rule, bodies that wait for each other's memory would deadlock.
	large *semaphore.Weighted
}

func newBodies() *bodies {
	return &bodies{shared: semaphore.NewWeighted(maxShared), large: semaphore.NewWeighted(maxLarge)}
}

// reservation is the memory of one review. The caller must release it.
type reservation struct {
	from     *bodies
	reserved int64 // bytes of shared
	large    bool  // has a place of large, and nothing of shared
}

// grow waits until the reservation has that many bytes, or until ctx ends.
func (r *reservation) grow(ctx context.Context, bytes int64) (err error) {
	more := bytes - r.reserved
	switch {
	case more <= 0 || r.large:
	case bytes <= maxSmall && r.from.shared.TryAcquire(more):
		r.reserved = bytes
	case bytes <= maxSmall && r.reserved == 0:
		if err = r.from.shared.Acquire(ctx, more); err == nil {
			r.reserved = bytes
		}
	default:
		if err = r.from.large.Acquire(ctx, 1); err == nil {
			r.release()
			r.large = true
		}
	}
	if err != nil {
		return fmt.Errorf("too many reviews at once for %d bytes of memory: %w", maxMemory, err)
	}
	return nil
}

// growBy adds that many bytes to the reservation.
func (r *reservation) growBy(ctx context.Context, bytes int64) error {
	return r.grow(ctx, r.reserved+bytes)
}

func (r *reservation) release() {
	r.from.shared.Release(r.reserved)
	if r.large {
		r.from.large.Release(1)
	}
	r.reserved, r.large = 0, false
}

// readBody returns the body of r. It reserves memory as the body arrives. With an error, it returns the start of the body
// and the HTTP status.
func readBody(ctx context.Context, w http.ResponseWriter, r *http.Request, memory *reservation) ([]byte, int, error) {
	length, limit := int(min(r.ContentLength, maxReview+1)), maxReview
	tooLong := length > maxReview
	switch {
	case tooLong:
		length, limit = firstBytes, firstBytes // The start has the uid.
	case length < 0:
		length = maxReview // the maximum; the API server declares lengths
	}
	large := cost(length, 0, 0) > maxSmall
	connection := http.NewResponseController(w)
	from := http.MaxBytesReader(w, r.Body, int64(limit))
	body := make([]byte, 0, min(firstBytes, length+1)) // one more byte finds the end without growing
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
			larger := make([]byte, len(body), size) // append would allocate up to a quarter more
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
			return body, http.StatusRequestTimeout, fmt.Errorf("the review did not arrive: no part of it for %s, or not all of it within %s", silence, reviewTimeout)
		}
		if err != nil {
			return body, http.StatusBadRequest, fmt.Errorf("reading the review: %w", err)
		}
	}
	if !utf8.Valid(body) {
		// RFC 8259 section 8.1. Decoding turns each invalid byte into three.
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
