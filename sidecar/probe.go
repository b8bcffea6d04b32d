package sidecar

import (
	"context"
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
// returns nil. It waits inside the call: if a startup probe fails, the kubelet counts the pod as not ready even when its
// containers run. The sidecar measures the start timeout, so it does not restart if the kubelet kills and restarts a probe.
//
// Probe returns an error if ctx ends, or if another program responds at address.
func Probe(ctx context.Context, address string) error {
	client := &http.Client{
		// Not http.DefaultTransport, because a pod's HTTP_PROXY must not apply to its loopback.
		Transport: &http.Transport{DisableKeepAlives: true},
		Timeout:   2 * readyPoll,
	}
	pause := time.NewTicker(probeInterval)
	defer pause.Stop()
	for {
		ready, err := probeOnce(ctx, client, address)
		if ready {
			return nil
		}
		if errors.Is(err, errNotSidecar) {
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

func probeOnce(ctx context.Context, client *http.Client, address string) (ready bool, err error) {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+address+readyPath, nil)
	if err != nil {
		return false, fmt.Errorf("probing %s: %w: %w", address, errNotSidecar, err)
	}
	response, err := client.Do(request)
	if err != nil {
		return false, err // it does not listen yet, or has just stopped
	}
	defer response.Body.Close()
	_, _ = io.Copy(io.Discard, io.LimitReader(response.Body, 4<<10)) // an error's body is much smaller
	switch response.StatusCode {
	case http.StatusNoContent:
		return true, nil
	case http.StatusServiceUnavailable:
		return false, errPending
	default:
		return false, fmt.Errorf("probing %s: status %s: %w", address, response.Status, errNotSidecar)
	}
}
