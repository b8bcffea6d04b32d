//go:build unix

// Package minio runs a real MinIO, which is an S3 and an STS, for tests and the demonstration: a child
// process on a host of a run, with root credentials that nobody has seen before.
//
// It makes no buckets and no users; that is for an S3 or STS client to do. The program is built on first
// use; see package tools.
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
	// startTimeout bounds one start, which takes half a second on an idle machine.
	startTimeout = time.Minute
	// clientTimeout bounds a call, which MinIO answers within milliseconds.
	clientTimeout = 10 * time.Second
	// startTries bounds how often Start tries again when somebody took a port first, which is rare once.
	startTries = 3
)

// A Server is a MinIO that runs. It ends with its run.
type Server struct {
	host      process.Host
	endpoint  string
	accessKey string
	secretKey string
}

// Start starts MinIO on a host of the run, with its data in the run's folder, and returns when it is ready. A
// run can have one. ctx bounds the start only. progress gets a line when the program is being built; nil means nobody
// is told.
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

// startOnce tries it with one choice of port.
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
			"--certs-dir=" + filepath.Join(run.Dir(), "minio-certs"), // none: plain HTTP
			filepath.Join(run.Dir(), "minio"),
		},
		Env: []string{
			"MINIO_ROOT_USER=" + s.accessKey,
			"MINIO_ROOT_PASSWORD=" + s.secretKey,
			"MINIO_BROWSER=off", // the console would want a port of its own
			"MINIO_UPDATE=off",  // nobody is asked for newer versions
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

// ready asks MinIO's own readiness endpoint.
func (s *Server) ready(ctx context.Context) error {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, s.endpoint+"/minio/health/ready", http.NoBody)
	if err != nil {
		return fmt.Errorf("making a request: %w", err)
	}
	answer, err := s.Client().Do(request)
	if err != nil {
		return err //nolint:wrapcheck // it names the URL; WaitReady says what for
	}
	if err := answer.Body.Close(); err != nil {
		return fmt.Errorf("closing the answer: %w", err)
	}
	if answer.StatusCode != http.StatusOK {
		return fmt.Errorf("%s answers %s", request.URL, answer.Status)
	}
	return nil
}

// Client returns a client that reaches Endpoint, for an SDK's HTTPClient.
func (s *Server) Client() *http.Client {
	return &http.Client{Transport: &http.Transport{DialContext: s.host.Dial, DisableKeepAlives: true}, Timeout: clientTimeout}
}

// Endpoint returns the URL of both S3 and STS.
func (s *Server) Endpoint() string { return s.endpoint }

// Root returns the credentials of the root user, who may do everything.
func (s *Server) Root() (accessKey, secretKey string) { return s.accessKey, s.secretKey }

// String returns the endpoint, and keeps the credentials out of logs.
func (s *Server) String() string { return "MinIO at " + s.endpoint }
