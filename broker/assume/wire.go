package assume

import (
	"context"
	"errors"
	"io"
	"net/http"
	"time"

	awsmiddleware "github.com/aws/aws-sdk-go-v2/aws/middleware"
	"github.com/aws/aws-sdk-go-v2/service/sts"
	"github.com/aws/smithy-go/middleware"
	smithyhttp "github.com/aws/smithy-go/transport/http"
)

// maxAnswer bounds one response body, which the SDK reads to its end. STS sends about 2 kB. It does not limit session tokens, but
// the strictest SDK accepts 10,000 bytes of container credentials, so no SDK could use a session beyond this bound. 64 responses
// at once, the concurrency of package cache, use at most 4 MiB.
const maxAnswer = 64 << 10

// maxAnswerHeader bounds the header of a response, which is under 1 kB from STS. The default of net/http is 10 MiB.
const maxAnswerHeader = 16 << 10

var errTooLarge = errors.New("the response is larger than 64 KiB")

// wire sits between the SDK and its HTTP client. It bounds responses, and reads AWS's clock from them.
type wire struct{ clock *clock }

// ID implements middleware.DeserializeMiddleware.
func (wire) ID() string { return "credence-wire" }

// HandleDeserialize implements middleware.DeserializeMiddleware.
func (w wire) HandleDeserialize(ctx context.Context, in middleware.DeserializeInput, next middleware.DeserializeHandler) (middleware.DeserializeOutput, middleware.Metadata, error) {
	began := time.Now()
	out, metadata, err := next.HandleDeserialize(ctx, in)
	if resp, ok := out.RawResponse.(*smithyhttp.Response); ok && resp.Body != nil {
		resp.Body = &boundedBody{ReadCloser: resp.Body, remaining: maxAnswer}
		// Use only dates of STS, because instance metadata has another clock. A response from an HTTP cache (Age) is old.
		if awsmiddleware.GetServiceID(ctx) == sts.ServiceID && resp.Header.Get("Age") == "" {
			if date, err := http.ParseTime(resp.Header.Get("Date")); err == nil {
				w.clock.update(ctx, date, began, time.Now())
			}
		}
	}
	return out, metadata, err
}

// add puts w next to the HTTP client, so that it is the first to see a response.
func (w wire) add(stack *middleware.Stack) error {
	return stack.Deserialize.Add(w, middleware.After)
}

// boundedBody returns errTooLarge after remaining bytes.
type boundedBody struct {
	io.ReadCloser
	remaining int
}

func (b *boundedBody) Read(p []byte) (int, error) {
	// Reading one byte more distinguishes a response of exactly this size from a longer one.
	n, err := b.ReadCloser.Read(p[:min(len(p), b.remaining+1)])
	if n > b.remaining {
		n, err = b.remaining, errTooLarge
	}
	b.remaining -= n
	return n, err
}
