package attack

import (
	"bytes"
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/credence-iam/credence/broker/brokerpb"
)

// repeat runs n callers from each source until ctx ends, each with one session after the other. A session reports how
// each of its calls ended. repeat returns the number of calls by how they ended.
func repeat(ctx context.Context, sources []string, n int, session func(source string, ended func(string))) string {
	var (
		all   sync.WaitGroup
		mu    sync.Mutex
		calls = make(map[string]int)
	)
	for _, source := range sources {
		for range n {
			all.Go(func() {
				for ctx.Err() == nil {
					session(source, func(result string) {
						if ctx.Err() == nil {
							mu.Lock()
							defer mu.Unlock()
							calls[result]++
						}
					})
				}
			})
		}
	}
	all.Wait()
	return fmt.Sprint(calls)
}

// callsPerConnection is how many calls a caller makes before it connects again.
const callsPerConnection = 100

// RepeatCalls calls a broker for credentials until ctx ends, with n callers from each source. token returns the token of
// the next call; if it is empty, the call has none. RepeatCalls returns the number of calls by code.
func RepeatCalls(ctx context.Context, address string, config *tls.Config, n int, token func() string, sources ...string) string {
	return repeat(ctx, sources, n, func(source string, ended func(string)) {
		dial := func(ctx context.Context, address string) (net.Conn, error) {
			return dialer(source).DialContext(ctx, "tcp", address)
		}
		conn, err := grpc.NewClient("passthrough:///"+address, grpc.WithTransportCredentials(credentials.NewTLS(config)),
			grpc.WithNoProxy(), grpc.WithContextDialer(dial))
		if err != nil {
			ended(err.Error())
			return
		}
		defer conn.Close()
		for range callsPerConnection {
			callCtx := ctx
			if text := token(); text != "" {
				callCtx = metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+text)
			}
			_, err := brokerpb.NewBrokerClient(conn).GetCredentials(callCtx, &brokerpb.GetCredentialsRequest{})
			ended(status.Code(err).String())
			if ctx.Err() != nil || status.Code(err) == codes.Unavailable {
				return // Connecting again at once is worse for the server than gRPC's own pauses.
			}
		}
	})
}

// RepeatReviews posts the body to a webhook until ctx ends, with n clients from each source. It returns the number of
// reviews by HTTP status.
func RepeatReviews(ctx context.Context, address string, config *tls.Config, n int, body []byte, sources ...string) string {
	clients := make(map[string]*http.Client)
	for _, source := range sources {
		transport := &http.Transport{TLSClientConfig: config, DialContext: dialer(source).DialContext}
		defer transport.CloseIdleConnections()
		clients[source] = &http.Client{Transport: transport}
	}
	return repeat(ctx, sources, n, func(source string, ended func(string)) {
		request, err := http.NewRequestWithContext(ctx, http.MethodPost, "https://"+address+"/mutate", bytes.NewReader(body))
		if err != nil {
			ended(err.Error())
			return
		}
		request.Header.Set("Content-Type", "application/json")
		response, err := clients[source].Do(request)
		if err != nil {
			ended("no response")
			time.Sleep(pause)
			return
		}
		_, _ = io.Copy(io.Discard, response.Body)
		_ = response.Body.Close()
		ended(response.Status)
	})
}
