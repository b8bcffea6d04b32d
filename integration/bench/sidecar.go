//go:build unix

package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/credence-iam/credence/broker/brokerpb"
	"github.com/credence-iam/credence/integration/process"
	"github.com/credence-iam/credence/sidecar/contract"
)

// pod is the environment of a sidecar, with a broker that responds at once, and of the bare server beside it.
type pod struct {
	*world

	sidecar, bare string   // files of the programs
	env           []string // of the sidecar, without CREDENCE_LISTEN
	size          int      // bytes of the sidecar's response
	started       int      // number of started programs, for their names
	wrap          []string // a program and its first arguments, which runs the started program; empty: none
}

const authorization = "00000000-0000-4000-8000-000000000000" // has the form of a pod's UID

func (w *world) newPod() *pod {
	p := &pod{
		world:   w,
		sidecar: w.build(w.ctx, "cmd/sidecar", "credence-sidecar"), bare: w.build(w.ctx, "integration/bench/barehttp", "barehttp"),
	}
	t, c := w.newTrust(), session()
	token := filepath.Join(w.TempDir(), "token") // of the usual size; the broker does not read it
	check(os.WriteFile(token, []byte("header."+strings.Repeat("p", 900)+"."+strings.Repeat("s", 342)), 0o600))
	response := &brokerpb.GetCredentialsResponse{
		AccessKeyId: c.AccessKeyID, SecretAccessKey: c.SecretAccessKey.Reveal(), SessionToken: c.SessionToken.Reveal(),
		Expiration: timestamppb.New(c.Expiration), RefreshAfter: durationpb.New(c.Duration() / 2),
		RoleArn: "arn:aws:iam::" + account + ":role/bench", AccountId: account, Region: region,
	}
	address := bareBroker{respond: func(context.Context) (*brokerpb.GetCredentialsResponse, error) { return response, nil }}.serve(w, t)
	p.env = []string{
		"CREDENCE_BROKER=" + address, "CREDENCE_TOKEN_FILE=" + token, "CREDENCE_ROOTS_FILE=" + t.rootsFile,
		"CREDENCE_AUTHORIZATION=" + authorization, "CREDENCE_START_TIMEOUT=0s", "CREDENCE_METADATA=v2",
	}
	first := p.startSidecar() // its response determines the size of the bare server's
	first.stop()
	p.size = first.size
	return p
}

// server is an HTTP server in a process of its own, and one connection to it. It has responded once.
type server struct {
	*process.Process

	request []byte // as it is on the wire
	conn    net.Conn
	reader  *bufio.Reader
	size    int           // bytes of its last response
	took    time.Duration // from its start to its first response
}

func (p *pod) startSidecar() *server {
	return p.start(func(address string) process.Command {
		return process.Command{Path: p.sidecar, Env: append([]string{"CREDENCE_LISTEN=" + address}, p.env...)}
	})
}

func (p *pod) startBare() *server {
	return p.start(func(address string) process.Command {
		return process.Command{Path: p.bare, Args: []string{"--listen=" + address, "--size=" + strconv.Itoa(p.size)}}
	})
}

const (
	// startTimeout bounds a start and each request. Both take at most 20 ms on a quiet machine.
	startTimeout = 20 * time.Second
	// pause is the time between two attempts to connect. It is short beside what is measured, and leaves most of
	// the processor to the starting program.
	pause = 200 * time.Microsecond
)

// start starts a program and waits for its first response with status 200.
func (p *pod) start(command func(address string) process.Command) *server {
	ctx, cancel := context.WithTimeout(p.ctx, startTimeout)
	defer cancel()
	address := freeAddress(ctx)
	c := command(address)
	p.started++
	c.Name = filepath.Base(c.Path) + "-" + strconv.Itoa(p.started)
	s := &server{request: []byte("GET " + contract.CredentialsPath + " HTTP/1.1\r\nHost: " + address + "\r\nAuthorization: " + authorization + "\r\n\r\n")}
	if len(p.wrap) > 0 {
		c.Path, c.Args = p.wrap[0], slices.Concat(p.wrap[1:], []string{c.Path}, c.Args)
	}
	began := time.Now()
	s.Process = must(p.programs.Start(c))
	for ; ; time.Sleep(pause) {
		err := s.connect(ctx, address)
		if err == nil {
			err = s.get()
		}
		if err == nil {
			s.took = time.Since(began)
			return s
		}
		if s.Ended() {
			check(fmt.Errorf("waiting for a first response: %w", s.Err()))
		}
		if ctx.Err() != nil {
			log, _ := os.ReadFile(s.Log()) // best effort
			s.stop()
			check(fmt.Errorf("waiting for a first response of %s: %w (last: %w), its log:\n%s", c.Name, context.Cause(ctx), err, log))
		}
	}
}

// connect connects, unless it did so before.
func (s *server) connect(ctx context.Context, address string) error {
	if s.conn != nil {
		return nil
	}
	conn, err := new(net.Dialer).DialContext(ctx, "tcp", address)
	if err == nil {
		s.conn, s.reader = conn, bufio.NewReader(conn)
	}
	return err
}

// get sends one request and reads the whole response, which must have status 200. It has a deadline of its own.
func (s *server) get() error {
	if err := s.conn.SetDeadline(time.Now().Add(startTimeout)); err != nil {
		return err
	}
	if _, err := s.conn.Write(s.request); err != nil {
		return fmt.Errorf("sending a request: %w", err)
	}
	response, err := http.ReadResponse(s.reader, nil)
	if err != nil {
		return fmt.Errorf("reading a response: %w", err)
	}
	defer response.Body.Close()
	n, err := io.Copy(io.Discard, response.Body)
	if err == nil && response.StatusCode != http.StatusOK {
		err = errors.New(response.Status)
	}
	s.size = int(n)
	return err
}

func (s *server) stop() {
	if s.conn != nil {
		_ = s.conn.Close()
	}
	s.Stop(stopGrace)
}

// connections is how many clients send requests for the throughput.
const connections = 16

// throughput makes a side: requests per second on many connections, which are opened before the clock starts.
func (w *world) throughput(s *server) side {
	return func(length time.Duration) []float64 {
		var clients []func() error
		for range connections {
			client := &server{request: s.request}
			check(client.connect(w.ctx, s.conn.RemoteAddr().String()))
			defer client.conn.Close()
			check(client.get())
			clients = append(clients, client.get)
		}
		return rate(clients)(length)
	}
}

func (w *world) binarySize(arch string) []measurement {
	file := w.build(w.ctx, "cmd/sidecar", "credence-sidecar-linux-"+arch, "GOOS=linux", "GOARCH="+arch)
	return []measurement{{Value: float64(must(os.Stat(file)).Size())}}
}

// besideBare measures a sidecar beside a bare server, both started again for each run: where a process lies in memory
// can make it a tenth faster or slower for all its life.
func (w *world) besideBare(measure func(*server) side) []measurement {
	return w.repeat(w.runs, func(w *world, i int) measurement {
		p := w.newPod()
		ours, bare := p.startSidecar(), p.startBare()
		w.Cleanup(ours.stop)
		w.Cleanup(bare.stop)
		if ours.size != bare.size {
			check(fmt.Errorf("the sidecar responds with %d bytes and the bare server with %d", ours.size, bare.size))
		}
		return w.pair(i, measure(ours), measure(bare))
	})
}

// startTime measures starts under a CPU limit; 0: no limit.
func (w *world) startTime(milliCPUs int) []measurement {
	p := w.newPod()
	start := func(program func() *server) side {
		return repeated(func() float64 {
			p.limitCPU(milliCPUs)
			s := program()
			s.stop()
			return float64(s.took) / float64(time.Millisecond)
		})
	}
	return w.paired(start(p.startSidecar), start(p.startBare))
}

// limitCPU puts the next started program into a cgroup with a CPU limit. The cgroups are removed with all that this
// program started.
func (p *pod) limitCPU(milliCPUs int) {
	if milliCPUs == 0 {
		return
	}
	procs, err := p.programs.CPULimit(fmt.Sprintf("start-%d-%d", milliCPUs, p.started), milliCPUs)
	if err != nil {
		check(notRun(fmt.Sprintf("a CPU limit cannot be set here: %v", err)))
	}
	p.wrap = []string{"/bin/sh", "-c", `echo $$ >"$0" && exec "$@"`, procs}
}

// idleTime is how long the wake-ups of idle processes are counted. The Go runtime collects garbage every two minutes.
const idleTime = 2 * time.Minute

// settle is how long after its first response a process counts as idle: by then it has freed what it frees by itself.
const settle = 3 * time.Second

// idle starts a sidecar and a bare server for each run, and returns their process IDs when they are idle. Each has
// served one request.
func (w *world) idle() (pids [][2]int) {
	p := w.newPod()
	for range w.runs {
		var pair [2]int
		for i, start := range []func() *server{p.startSidecar, p.startBare} {
			s := start()
			w.Cleanup(s.stop)
			_ = s.conn.Close() // as an SDK does
			pair[i] = s.PID()
		}
		pids = append(pids, pair)
	}
	w.sleep(settle)
	return pids
}

func (w *world) sidecarMemory() (runs []measurement) {
	needsProc("RssAnon")
	for _, pair := range w.idle() {
		runs = append(runs, beside(procBytes(pair[0], "RssAnon"), procBytes(pair[1], "RssAnon")))
	}
	return runs
}

func (w *world) wakeups() (runs []measurement) {
	needsProc("the number of context switches")
	pids := w.idle()
	count := func() (counts [][2]float64) {
		for _, pair := range pids {
			counts = append(counts, [2]float64{switches(pair[0]), switches(pair[1])})
		}
		return counts
	}
	before := count()
	w.sleep(idleTime)
	for i, after := range count() {
		perMinute := func(n int) float64 { return (after[n] - before[i][n]) / idleTime.Minutes() }
		// The ratio is not used, but must be a number: a bare server may never wake.
		runs = append(runs, beside(perMinute(0), max(perMinute(1), 1/idleTime.Minutes())))
	}
	return runs
}

// switches returns how often the threads of a process went to sleep voluntarily.
func switches(pid int) (sum float64) {
	files := must(filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", pid)))
	if len(files) == 0 {
		check(fmt.Errorf("process %d has no threads", pid))
	}
	for _, file := range files {
		sum += procField(file, "voluntary_ctxt_switches")
	}
	return sum
}
