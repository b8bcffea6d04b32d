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

// maxAnswer bounds what is read of one answer, which the SDK reads to its end. STS answers about
// 2 kB. It gives session tokens no bound, but the strictest client of container credentials takes
// 10,000 bytes altogether, so a session that does not fit in this could not be used. 64 answers at
// once, as many as package cache asks for, stay within 4 MiB.
const maxAnswer = 64 << 10

// maxAnswerHeader bounds the header of an answer, which is under 1 kB from STS. The default is 10 MiB.
const maxAnswerHeader = 16 << 10

var errTooLarge = errors.New("the answer is larger than 64 KiB")

// wire stands between the SDK and its HTTP client: it bounds answers, and reads AWS's clock off them.
type wire struct{ clock *clock }

// ID implements middleware.DeserializeMiddleware.
func (wire) ID() string { return "credence-wire" }

// HandleDeserialize implements middleware.DeserializeMiddleware.
func (w wire) HandleDeserialize(ctx context.Context, in middleware.DeserializeInput, next middleware.DeserializeHandler) (middleware.DeserializeOutput, middleware.Metadata, error) {
	began := time.Now()
	out, metadata, err := next.HandleDeserialize(ctx, in)
	if resp, ok := out.RawResponse.(*smithyhttp.Response); ok && resp.Body != nil {
		resp.Body = &boundedBody{ReadCloser: resp.Body, left: maxAnswer}
		// Only STS: what answers for instance metadata has its own clock. A cache's answer (Age) is old.
		if awsmiddleware.GetServiceID(ctx) == sts.ServiceID && resp.Header.Get("Age") == "" {
			if date, err := http.ParseTime(resp.Header.Get("Date")); err == nil {
				w.clock.saw(ctx, date, began, time.Now())
			}
		}
	}
	return out, metadata, err
}

// add puts w next to the HTTP client, so that it sees an answer before all others do.
func (w wire) add(stack *middleware.Stack) error {
	return stack.Deserialize.Add(w, middleware.After)
}

// boundedBody fails instead of going on for ever.
type boundedBody struct {
	io.ReadCloser
	left int
}

func (b *boundedBody) Read(p []byte) (int, error) {
	// One byte more than allowed is asked for, which tells an answer of just this size from a longer one.
	n, err := b.ReadCloser.Read(p[:min(len(p), b.left+1)])
	if n > b.left {
		n, err = b.left, errTooLarge
	}
	b.left -= n
	return n, err
}
