package attack

import (
	"bytes"
	"context"
	"crypto/tls"
	"io"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/credence-iam/credence/broker/brokerpb"
)

// callsPerConnection is how many calls a caller makes before it connects again.
const callsPerConnection = 100

// RepeatCalls calls a broker for credentials, from each of the sources with that many callers at a time and each call with a
// token of its own, until ctx ends. It returns how many calls ended with which code.
func RepeatCalls(ctx context.Context, address string, config *tls.Config, callers int, token func() string, sources ...string) map[codes.Code]int {
	var (
		all   sync.WaitGroup
		mu    sync.Mutex
		ended = make(map[codes.Code]int)
	)
	for _, source := range sources {
		for range callers {
			all.Go(func() {
				for ctx.Err() == nil {
					connection, err := grpc.NewClient("passthrough:///"+address, grpc.WithTransportCredentials(credentials.NewTLS(config)),
						grpc.WithNoProxy(), grpc.WithContextDialer(dialer(source)))
					if err != nil {
						return
					}
					for range callsPerConnection {
						code := call(ctx, connection, token())
						if ctx.Err() != nil {
							break
						}
						mu.Lock()
						ended[code]++
						mu.Unlock()
						if code == codes.Unavailable {
							break // Connecting again at once is worse for the server than gRPC's own pauses.
						}
					}
					_ = connection.Close()
				}
			})
		}
	}
	all.Wait()
	return ended
}

// call makes one call, with a token if there is one, and returns how it ended.
func call(ctx context.Context, connection *grpc.ClientConn, token string) codes.Code {
	if token != "" {
		ctx = metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+token)
	}
	_, err := brokerpb.NewBrokerClient(connection).GetCredentials(ctx, &brokerpb.GetCredentialsRequest{})
	return status.Code(err)
}

// RepeatReviews posts the body to a webhook, from each of the sources with that many clients at a time, until ctx ends. It
// returns how many were answered with which HTTP status, 0 for those that had no answer, and the largest answer in bytes.
func RepeatReviews(ctx context.Context, address string, config *tls.Config, clients int, body []byte, sources ...string) (map[int]int, int64) {
	var (
		all     sync.WaitGroup
		mu      sync.Mutex
		ended   = make(map[int]int)
		largest atomic.Int64
	)
	for _, source := range sources {
		dial := dialer(source)
		transport := &http.Transport{TLSClientConfig: config, DialContext: func(ctx context.Context, _, address string) (net.Conn, error) { return dial(ctx, address) }}
		defer transport.CloseIdleConnections()
		client := &http.Client{Transport: transport}
		for range clients {
			all.Go(func() {
				for ctx.Err() == nil {
					code, size := post(ctx, client, address, body)
					if ctx.Err() != nil {
						return
					}
					if code == 0 {
						time.Sleep(pause)
					}
					mu.Lock()
					ended[code]++
					mu.Unlock()
					largest.Store(max(size, largest.Load()))
				}
			})
		}
	}
	all.Wait()
	return ended, largest.Load()
}

// dialer dials from that address.
func dialer(source string) func(ctx context.Context, address string) (net.Conn, error) {
	d := &net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(source)}}
	return func(ctx context.Context, address string) (net.Conn, error) { return d.DialContext(ctx, "tcp", address) }
}

func post(ctx context.Context, client *http.Client, address string, body []byte) (code int, size int64) {
	request, err := http.NewRequestWithContext(ctx, http.MethodPost, "https://"+address+"/mutate", bytes.NewReader(body))
	if err != nil {
		return 0, 0
	}
	request.Header.Set("Content-Type", "application/json")
	response, err := client.Do(request)
	if err != nil {
		return 0, 0
	}
	defer response.Body.Close()
	size, _ = io.Copy(io.Discard, response.Body)
	return response.StatusCode, size
}
