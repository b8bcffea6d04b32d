//go:build unix

package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/credence-iam/credence/broker/brokerpb"
	"github.com/credence-iam/credence/integration/process"
	"github.com/credence-iam/credence/sidecar/contract"
)

// pod is what a sidecar finds around it, and the bare server beside it.
type pod struct {
	programs      *process.Run
	sidecar, bare string   // files of the programs
	env           []string // of the sidecar, but for CREDENCE_LISTEN
	size          int      // bytes of the sidecar's answer
	started       int      // how many programs were; names them
	wrap          []string // a program and its first arguments that run what is started; empty for none

	mu      sync.Mutex
	reached [moments]time.Time // of the last call of the broker; guarded by mu
}

const authorization = "00000000-0000-4000-8000-000000000000" // has the form of a pod's UID

// newPod makes a pod, and a broker for it that answers at once until ctx ends.
func (b *bench) newPod(ctx context.Context) (p *pod, err error) {
	p = &pod{programs: b.programs}
	if p.sidecar, err = b.build(ctx, "cmd/sidecar", "credence-sidecar"); err != nil {
		return nil, err
	}
	if p.bare, err = b.build(ctx, "integration/bench/barehttp", "barehttp"); err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp(b.programs.Dir(), "pod-")
	if err != nil {
		return nil, fmt.Errorf("making a folder: %w", err)
	}
	t, err := newTrust(dir)
	if err != nil {
		return nil, err
	}
	token := filepath.Join(dir, "token") // of the usual size; nobody looks into it
	if err := os.WriteFile(token, []byte("header."+strings.Repeat("p", 900)+"."+strings.Repeat("s", 342)), 0o600); err != nil {
		return nil, fmt.Errorf("writing a token: %w", err)
	}
	c := session()
	answer := &brokerpb.GetCredentialsResponse{
		AccessKeyId: c.AccessKeyID, SecretAccessKey: c.SecretAccessKey.Reveal(), SessionToken: c.SessionToken.Reveal(),
		Expiration: timestamppb.New(c.Expiration), RefreshAfter: durationpb.New(c.Life() / 2),
		RoleArn: "arn:aws:iam::" + account + ":role/bench", AccountId: account, Region: region,
	}
	address, err := bareBroker{
		answer:  func(context.Context) (*brokerpb.GetCredentialsResponse, error) { return answer, nil },
		reached: p.note,
	}.serve(ctx, t)
	if err != nil {
		return nil, err
	}
	p.env = []string{
		"CREDENCE_BROKER=" + address, "CREDENCE_TOKEN_FILE=" + token, "CREDENCE_ROOTS_FILE=" + t.rootsFile,
		"CREDENCE_AUTHORIZATION=" + authorization, "CREDENCE_START_TIMEOUT=0s", "CREDENCE_METADATA=v2",
	}
	// The first answer says how long the bare server's must be.
	first, err := p.startSidecar(ctx)
	if err != nil {
		return nil, err
	}
	first.stop()
	p.size = first.size
	return p, nil
}

func (p *pod) note(m moment) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.reached[m] = time.Now()
}

// server is an HTTP server in a process of its own, and the one connection to it. It has answered
// once.
type server struct {
	*process.Process

	request []byte // as it is on the wire
	conn    net.Conn
	reader  *bufio.Reader
	size    int           // bytes of its last answer
	began   time.Time     // just before its start
	took    time.Duration // from then to its first answer
}

func (p *pod) startSidecar(ctx context.Context) (*server, error) {
	return p.start(ctx, func(address string) process.Command {
		return process.Command{Path: p.sidecar, Env: append([]string{"CREDENCE_LISTEN=" + address}, p.env...)}
	})
}

func (p *pod) startBare(ctx context.Context) (*server, error) {
	return p.start(ctx, func(address string) process.Command {
		return process.Command{Path: p.bare, Args: []string{"--listen=" + address, "--size=" + strconv.Itoa(p.size)}}
	})
}

const (
	// startTimeout bounds a start, and each request: they take 20 ms and less on a quiet machine.
	startTimeout = 20 * time.Second
	// pause between two tries to connect: short beside what is measured, and yet the program that
	// starts gets most of the processor.
	pause = 200 * time.Microsecond
	// stopGrace lets a program end by itself.
	stopGrace = 5 * time.Second
)

// start starts a program and waits for its first answer with status 200.
func (p *pod) start(ctx context.Context, command func(address string) process.Command) (_ *server, err error) {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	port, err := process.FreePort(ctx)
	if err != nil {
		return nil, err
	}
	address := net.JoinHostPort(loopback, strconv.Itoa(port))
	c := command(address)
	p.started++
	c.Name = filepath.Base(c.Path) + "-" + strconv.Itoa(p.started)
	s := &server{request: []byte("GET " + contract.CredentialsPath + " HTTP/1.1\r\nHost: " + address + "\r\nAuthorization: " + authorization + "\r\n\r\n")}
	if len(p.wrap) > 0 {
		c.Path, c.Args = p.wrap[0], slices.Concat(p.wrap[1:], []string{c.Path}, c.Args)
	}
	s.began = time.Now()
	if s.Process, err = p.programs.Start(c); err != nil {
		return nil, err
	}
	for ; ; time.Sleep(pause) {
		if err = s.first(ctx, address); err == nil {
			s.took = time.Since(s.began)
			return s, nil
		}
		select {
		case <-s.Done():
			return nil, fmt.Errorf("waiting for a first answer: %w", s.Err())
		case <-ctx.Done():
			log, _ := os.ReadFile(s.Log()) // says more, if it can be had
			s.stop()
			return nil, fmt.Errorf("waiting for a first answer of %s: %w (last: %w), its log:\n%s", c.Name, context.Cause(ctx), err, log)
		default:
		}
	}
}

// first connects, unless that was done before, and asks once.
func (s *server) first(ctx context.Context, address string) (err error) {
	if s.conn == nil {
		if s.conn, err = new(net.Dialer).DialContext(ctx, "tcp", address); err != nil {
			s.conn = nil
			return err
		}
		s.reader = bufio.NewReader(s.conn)
	}
	_, err = s.get(ctx)
	return err
}

// get asks once, reads the whole answer, which must have status 200, and returns how long that took.
// It has a deadline of its own, and does not look at the context: answers come within a second.
func (s *server) get(context.Context) (time.Duration, error) {
	began := time.Now()
	if err := s.conn.SetDeadline(began.Add(startTimeout)); err != nil {
		return 0, fmt.Errorf("bounding a request: %w", err)
	}
	if _, err := s.conn.Write(s.request); err != nil {
		return 0, fmt.Errorf("asking: %w", err)
	}
	response, err := http.ReadResponse(s.reader, nil)
	if err != nil {
		return 0, fmt.Errorf("reading an answer: %w", err)
	}
	defer response.Body.Close()
	n, err := io.Copy(io.Discard, response.Body)
	if err != nil {
		return 0, fmt.Errorf("reading an answer: %w", err)
	}
	if response.StatusCode != http.StatusOK {
		return 0, fmt.Errorf("it answers %s", response.Status)
	}
	s.size = int(n)
	return time.Since(began), nil
}

func (s *server) stop() {
	if s.conn != nil {
		_ = s.conn.Close()
	}
	s.Stop(stopGrace)
}
