package sidecar

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"time"
)

// probeInterval is the time between two attempts to reach a sidecar that does not listen yet. It delays the start of the
// application.
const probeInterval = 50 * time.Millisecond

// Probe waits until the sidecar at address, HOST:PORT, has its first session or its start timeout has passed, and then
// returns nil. The sidecar measures the start timeout, so it does not restart if the kubelet kills and restarts a probe.
//
// Probe waits inside the call, so that the application starts as soon as there are credentials. Only the kubelet can report
// to users that the sidecar reaches no broker, and it reports what a failed probe prints. So if authorization is that of the
// sidecar, Probe also returns an error at the times of [nextReport]: why there are no credentials yet. The kubelet then
// probes again at once.
//
// Probe also returns an error if ctx ends, or if another program responds at address.
func Probe(ctx context.Context, address, authorization string) error {
	client := &http.Client{
		// Not http.DefaultTransport, because a pod's HTTP_PROXY must not apply to its loopback.
		Transport: &http.Transport{DisableKeepAlives: true},
		Timeout:   2 * readyPoll,
	}
	pause := time.NewTicker(probeInterval)
	defer pause.Stop()
	for {
		ready, err := probeOnce(ctx, client, address, authorization)
		if ready {
			return nil
		}
		if _, reported := errors.AsType[report](err); reported || errors.Is(err, errNotSidecar) {
			return err
		}
		select {
		case <-pause.C:
		case <-ctx.Done():
			return fmt.Errorf("waiting for the sidecar at %s: %w", address, errors.Join(context.Cause(ctx), err))
		}
	}
}

var errNotSidecar = errors.New("not a sidecar; check whether another program in the pod uses its port")

// report is what the kubelet should report about a sidecar without credentials.
type report string

func (r report) Error() string { return string(r) }

func probeOnce(ctx context.Context, client *http.Client, address, authorization string) (ready bool, err error) {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+address+readyPath, nil)
	if err != nil {
		return false, fmt.Errorf("probing %s: %w: %w", address, errNotSidecar, err)
	}
	request.Header.Set("Authorization", authorization)
	response, err := client.Do(request)
	if err != nil {
		return false, err // it does not listen yet, or has just stopped
	}
	defer response.Body.Close()
	body, _ := io.ReadAll(io.LimitReader(response.Body, 16*maxReport)) // it has the report twice, in JSON, which escapes some bytes as six
	switch response.StatusCode {
	case http.StatusNoContent:
		return true, nil
	case http.StatusServiceUnavailable:
		return false, errPending
	case statusReport:
		var f failure
		if err := json.Unmarshal(body, &f); err != nil || f.Message == "" {
			return false, errPending
		}
		return false, report(f.Message)
	default:
		return false, fmt.Errorf("probing %s: status %s: %w", address, response.Status, errNotSidecar)
	}
}
