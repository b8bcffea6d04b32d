package sidecar

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"time"
)

// probeInterval is the time between two tries to reach a sidecar that does not listen yet. It is part of
// the delay that the application's start sees.
const probeInterval = 50 * time.Millisecond

// Probe waits until the sidecar at address, HOST:PORT, holds its first credential, or listens and its
// start timeout has passed, and returns nil then. It waits inside the call, because a startup probe
// that fails makes the kubelet count the pod as not ready though its containers run. The sidecar
// keeps the time, so a probe that the kubelet cuts off and starts again does not begin anew.
//
// It returns an error when ctx ends, or when something else answers at address.
func Probe(ctx context.Context, address string) error {
	client := &http.Client{
		// Not http.DefaultTransport: a pod's HTTP_PROXY is not for its loopback.
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

var errNotSidecar = errors.New("not a sidecar: does another program of the pod use its port?")

func probeOnce(ctx context.Context, client *http.Client, address string) (ready bool, err error) {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+address+readyPath, nil)
	if err != nil {
		return false, fmt.Errorf("probing %s: %w: %w", address, errNotSidecar, err)
	}
	response, err := client.Do(request)
	if err != nil {
		return false, err // it does not listen yet, or has just gone
	}
	defer response.Body.Close()
	_, _ = io.Copy(io.Discard, io.LimitReader(response.Body, 4<<10)) // an error's body is far smaller
	switch response.StatusCode {
	case http.StatusNoContent:
		return true, nil
	case http.StatusServiceUnavailable:
		return false, errPending
	default:
		return false, fmt.Errorf("probing %s: answered %s: %w", address, response.Status, errNotSidecar)
	}
}
