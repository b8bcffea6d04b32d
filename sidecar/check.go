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

const (
	// checkPause is the time between two requests of [Check].
	checkPause = time.Second
	// checkTime is how long Check repeats a request. The application starts when there are credentials or the start timeout
	// has passed, so this is only for a short failure.
	checkTime = 30 * time.Second
	// maxResponse is the maximum length of a response, in bytes. Credentials have about 2 kB.
	maxResponse = 64 << 10
)

// Check requests credentials from a sidecar as an SDK does, with the values of AWS_CONTAINER_CREDENTIALS_FULL_URI and
// AWS_CONTAINER_AUTHORIZATION_TOKEN. It returns one line with the role, the end of the access key ID and the expiration.
// The line and errors contain no secret. Check repeats a request that failed for 30 seconds, but not after a refusal.
func Check(ctx context.Context, uri, authorization string) (string, error) {
	if uri == "" {
		return "", errors.New("AWS_CONTAINER_CREDENTIALS_FULL_URI is not set, so the pod is not injected; " +
			"opt its namespace in, and annotate the pod with a role")
	}
	end, stop := context.WithTimeout(ctx, checkTime)
	defer stop()
	pause := time.NewTicker(checkPause)
	defer pause.Stop()
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: 2 * readyPoll}
	for {
		line, again, err := checkOnce(end, client, uri, authorization)
		if err == nil || !again {
			return line, err
		}
		select {
		case <-pause.C:
		case <-end.Done():
			return "", err
		}
	}
}

// checkOnce sends one request. again reports whether a retry may help.
func checkOnce(ctx context.Context, client *http.Client, uri, authorization string) (line string, again bool, err error) {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, uri, nil)
	if err != nil {
		return "", false, fmt.Errorf("AWS_CONTAINER_CREDENTIALS_FULL_URI: %w", err)
	}
	request.Header.Set("Authorization", authorization)
	response, err := client.Do(request)
	if err != nil {
		return "", true, fmt.Errorf("requesting credentials: %w; check the log of container credence-sidecar", err)
	}
	defer response.Body.Close()
	body, err := io.ReadAll(io.LimitReader(response.Body, maxResponse))
	if err != nil {
		return "", true, fmt.Errorf("reading the response: %w", err)
	}
	if response.StatusCode != http.StatusOK {
		var f failure
		if json.Unmarshal(body, &f) != nil || f.Code == "" {
			return "", false, fmt.Errorf("%s responded with status %s; check whether another program uses the sidecar's port", uri, response.Status)
		}
		return "", response.StatusCode == http.StatusServiceUnavailable, fmt.Errorf("%s: %s (status %d)", f.Code, f.Message, response.StatusCode)
	}
	var c containerCredentials
	// The error of a decoder may quote the body.
	if json.Unmarshal(body, &c) != nil || len(c.AccessKeyID) < 4 || c.SecretAccessKey == "" || c.Token == "" || c.Expiration == "" {
		return "", false, fmt.Errorf("%s responded without credentials; check whether another program uses the sidecar's port", uri)
	}
	return fmt.Sprintf("The pod has credentials of %s, access key ID ...%s, expiration %s",
		c.RoleArn, c.AccessKeyID[len(c.AccessKeyID)-4:], c.Expiration), false, nil
}
