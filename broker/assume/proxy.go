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

// proxied names the proxy in the error of a call that went through one. Otherwise users easily take the proxy's message for
// one of STS, and a connection that the proxy refuses for an outage of STS.
type proxied struct {
	of func(*http.Request) (*url.URL, error) // the proxy for a request; nil: none
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
		return out, metadata, err // STS's own words
	}
	if request, ok := in.Request.(*smithyhttp.Request); ok {
		// Its error is of variables that are no proxy's address, and so of no proxy.
		if proxy, wrong := p.of(request.Request); wrong == nil && proxy != nil {
			err = &proxyError{host: proxy.Host, err: err}
		}
	}
	return out, metadata, err
}

// add puts p around all that reads an answer.
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

// proxyRefused has the form of http.Transport.OnProxyConnectResponse. The transport's own error for a proxy that refuses is
// the text of its status alone.
func proxyRefused(_ context.Context, proxy *url.URL, connect *http.Request, answer *http.Response) error {
	if answer.StatusCode == http.StatusOK {
		return nil
	}
	return fmt.Errorf("the proxy %s refuses a connection to %s with status %d", proxy.Host, connect.Host, answer.StatusCode)
}
