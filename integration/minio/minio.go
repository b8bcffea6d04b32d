//go:build unix

// Package minio runs MinIO, which serves S3 and STS, for tests and the demonstration: a process of a run, with new
// root credentials.
//
// It creates no buckets and no users; an S3 or STS client does. Package tools builds the program on first use.
package minio

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"github.com/credence-iam/credence/integration/process"
	"github.com/credence-iam/credence/integration/tools"
)

const (
	// startTimeout limits one start, which takes half a second on an idle machine.
	startTimeout = time.Minute
	// clientTimeout limits a call, which takes milliseconds.
	clientTimeout = 10 * time.Second
	// startTries limits how often Start tries: another process may take the port first, which is rare.
	startTries = 3
)

// Server is a running MinIO. It stops with its run.
type Server struct {
	host      process.Host
	endpoint  string
	accessKey string
	secretKey string
}

// Start starts MinIO on a host of the run, with its data in the run's folder, and returns when it is ready. A run can
// have one. ctx limits only the start. progress gets lines while the program is built; it may be nil.
func Start(ctx context.Context, run *process.Run, host process.Host, progress io.Writer) (*Server, error) {
	path, err := tools.Path(ctx, tools.MinIO, progress)
	if err != nil {
		return nil, err
	}
	for range startTries {
		var s *Server
		if s, err = startOnce(ctx, run, host, path); err == nil {
			return s, nil
		}
		if !errors.Is(err, syscall.EADDRINUSE) {
			break
		}
	}
	return nil, fmt.Errorf("starting MinIO: %w", err)
}

// startOnce tries one port.
func startOnce(ctx context.Context, run *process.Run, host process.Host, path string) (*Server, error) {
	port, err := process.FreePortOf(ctx, host)
	if err != nil {
		return nil, err
	}
	address := net.JoinHostPort(host.Address(), strconv.Itoa(port))
	s := &Server{host: host, endpoint: "http://" + address, accessKey: rand.Text(), secretKey: rand.Text()}
	p, err := host.Start(process.Command{
		Name: "minio",
		Path: path,
		Args: []string{
			"server",
			"--address=" + address,
			"--certs-dir=" + filepath.Join(run.Dir(), "minio-certs"), // no certificates: plain HTTP
			filepath.Join(run.Dir(), "minio"),
		},
		Env: []string{
			"MINIO_ROOT_USER=" + s.accessKey,
			"MINIO_ROOT_PASSWORD=" + s.secretKey,
			"MINIO_BROWSER=off", // the console needs another port
			"MINIO_UPDATE=off",  // no look-up of newer versions
		},
	})
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	if err := p.WaitReady(ctx, s.ready); err != nil {
		p.Stop(0)
		return nil, err
	}
	return s, nil
}

// ready calls MinIO's readiness endpoint.
func (s *Server) ready(ctx context.Context) error {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, s.endpoint+"/minio/health/ready", http.NoBody)
	if err != nil {
		return fmt.Errorf("making a request: %w", err)
	}
	response, err := s.Client().Do(request)
	if err != nil {
		return err //nolint:wrapcheck // it names the URL
	}
	if err := response.Body.Close(); err != nil {
		return fmt.Errorf("closing the response: %w", err)
	}
	if response.StatusCode != http.StatusOK {
		return fmt.Errorf("%s responds %s", request.URL, response.Status)
	}
	return nil
}

// Client returns an HTTP client that can connect to Endpoint, for an SDK.
func (s *Server) Client() *http.Client {
	return &http.Client{Transport: &http.Transport{DialContext: s.host.Dial, DisableKeepAlives: true}, Timeout: clientTimeout}
}

// Endpoint returns the URL of both S3 and STS.
func (s *Server) Endpoint() string { return s.endpoint }

// Root returns the credentials of the root user.
func (s *Server) Root() (accessKey, secretKey string) { return s.accessKey, s.secretKey }

// String returns the endpoint, without credentials.
func (s *Server) String() string { return "MinIO at " + s.endpoint }
