package assume

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"

	"github.com/aws/smithy-go"
	"github.com/aws/smithy-go/middleware"
	smithyhttp "github.com/aws/smithy-go/transport/http"
)

// proxied adds the proxy to the error of a call that went through one. Otherwise users may think that the proxy's message comes
// from STS. Or they may think that STS is unavailable when the proxy refuses a connection.
type proxied struct {
	of func(*http.Request) (*url.URL, error) // the proxy of a request; nil: none
}

// ID implements middleware.DeserializeMiddleware.
func (proxied) ID() string { return "credence-proxy" }

// HandleDeserialize implements middleware.DeserializeMiddleware.
func (p proxied) HandleDeserialize(ctx context.Context, in middleware.DeserializeInput, next middleware.DeserializeHandler) (middleware.DeserializeOutput, middleware.Metadata, error) {
	out, metadata, err := next.HandleDeserialize(ctx, in)
	if err == nil {
		return out, metadata, nil
	}
	if e, parsed := errors.AsType[smithy.APIError](err); parsed && e.ErrorCode() != "UnknownError" {
		return out, metadata, err // The message comes from STS.
	}
	if request, ok := in.Request.(*smithyhttp.Request); ok {
		// It returns an error if the variables have no valid address. Then no proxy was used.
		if proxy, wrong := p.of(request.Request); wrong == nil && proxy != nil {
			err = &proxyError{host: proxy.Host, err: err}
		}
	}
	return out, metadata, err
}

// add puts p around everything that reads a response.
func (p proxied) add(stack *middleware.Stack) error {
	return stack.Deserialize.Add(p, middleware.Before)
}

// proxyError is the error of a call that went through a proxy.
type proxyError struct {
	host string // without user and password
	err  error
}

func (e *proxyError) Error() string { return fmt.Sprintf("through the proxy %s: %v", e.host, e.err) }

func (e *proxyError) Unwrap() error { return e.err }

// proxyRefused implements http.Transport.OnProxyConnectResponse. The transport's own error has only the text of the status.
func proxyRefused(_ context.Context, proxy *url.URL, connect *http.Request, answer *http.Response) error {
	if answer.StatusCode == http.StatusOK {
		return nil
	}
	return fmt.Errorf("the proxy %s refuses a connection to %s with status %d", proxy.Host, connect.Host, answer.StatusCode)
}
