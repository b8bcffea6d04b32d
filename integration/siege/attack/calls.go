package attack

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"sync"
	"sync/atomic"
)

// RepeatCalls calls a broker for credentials until ctx ends, over n connections from each source. token returns the token of
// the next call; if it is empty, the call has none. RepeatCalls returns the number of responses, which must be refusals.
func RepeatCalls(ctx context.Context, address string, n int, token func() string, sources ...string) int64 {
	var c count
	var responses atomic.Int64
	var running sync.WaitGroup
	for _, source := range sources {
		running.Go(func() { target{address, source, anyServer("h2")}.run(ctx, n, calls(token, &responses), &c) })
	}
	running.Wait()
	return responses.Load()
}

// RepeatReviews posts the body to a webhook until ctx ends, with n clients from each source. It returns the number of
// reviews by HTTP status.
func RepeatReviews(ctx context.Context, address string, n int, body []byte, sources ...string) string {
	var running sync.WaitGroup
	var mu sync.Mutex
	reviews := make(map[string]int)
	for _, source := range sources {
		transport := &http.Transport{TLSClientConfig: anyServer("http/1.1"), DialContext: dialer(source).DialContext}
		defer transport.CloseIdleConnections()
		for range n {
			running.Go(func() {
				for ctx.Err() == nil {
					status, err := post(ctx, &http.Client{Transport: transport}, "https://"+address+"/mutate", body)
					if err != nil {
						status = "no response"
						sleep(ctx, pause)
					}
					mu.Lock()
					reviews[status]++
					mu.Unlock()
				}
			})
		}
	}
	running.Wait()
	return fmt.Sprint(reviews)
}

func post(ctx context.Context, client *http.Client, url string, body []byte) (status string, err error) {
	request, err := http.NewRequestWithContext(ctx, http.MethodPost, url, bytes.NewReader(body))
	if err != nil {
		return "", err
	}
	request.Header.Set("Content-Type", "application/json")
	response, err := client.Do(request)
	if err != nil {
		return "", err
	}
	defer response.Body.Close()
	_, err = io.Copy(io.Discard, response.Body)
	return response.Status, err
}
