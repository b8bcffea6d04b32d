//go:build unix

package process_test

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/credence-iam/credence/integration/process"
)

// The test binary is also every program that the tests run. These variables say which.
const (
	roleVariable   = "PROCESS_TEST_ROLE"
	parentVariable = "PROCESS_TEST_PARENT"
)

// The main thread never ends before the process does. It is kept for the main goroutine, so that a test which
// needs a thread to end can't get it.
func init() { runtime.LockOSThread() }

func TestMain(m *testing.M) {
	role := os.Getenv(roleVariable)
	play, ok := map[string]func(){
		"sleeper":  func() { select {} },
		"stubborn": stubborn,
		"failure":  failure,
		"taken":    func() { fmt.Fprintln(os.Stderr, "listen: "+syscall.EADDRINUSE.Error()) },
		"minio":    func() { fmt.Fprintln(os.Stderr, "FATAL Specified port is already in use") },
		"family":   func() { fmt.Println(spawn("stubborn")); select {} },
		"orphaner": func() { fmt.Println(spawn("stubborn")) },
		"owner":    owner,
		"careless": func() { process.DisableDeathSignal(); owner() },
	}[role]
	switch {
	case ok:
		// A program with no other goroutine than a blocked one is a deadlock to Go.
		go func() { time.Sleep(time.Hour); os.Exit(9) }()
		play()
	case role == "":
		os.Exit(m.Run())
	default:
		panic("unknown role " + role)
	}
}

func stubborn() {
	signal.Ignore(syscall.SIGTERM)
	fmt.Println("ready")
	select {}
}

func failure() {
	for i := range 100 {
		fmt.Fprintf(os.Stderr, "line %d\n", i)
	}
	os.Exit(3)
}

// spawn starts a program in our own process group and returns its number.
func spawn(role string) int {
	cmd := exec.Command(os.Args[0]) //nolint:noctx // a test kills it, one way or another
	cmd.Env = []string{roleVariable + "=" + role}
	out, err := cmd.StdoutPipe()
	must(err)
	must(cmd.Start())
	_, err = bufio.NewReader(out).ReadString('\n') // it ignores SIGTERM from here on
	must(err)
	return cmd.Process.Pid
}

// owner opens a run with one program, tells its number and the run's folder, and waits to be killed.
func owner() {
	r, err := process.Open(context.Background(), process.Config{Parent: os.Getenv(parentVariable), Name: "owned"})
	must(err)
	p, err := r.Start(command("sleeper"))
	must(err)
	fmt.Println(p.PID(), r.Dir())
	select {}
}

func must(err error) {
	if err != nil {
		panic(err)
	}
}

func command(role string) process.Command {
	return process.Command{Name: role, Path: os.Args[0], Env: []string{roleVariable + "=" + role}}
}

func open(t *testing.T, c process.Config) *process.Run {
	t.Helper()
	if c.Parent == "" {
		c.Parent = t.TempDir()
	}
	c.Name = "test"
	r, err := process.Open(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Errorf("closing the run: %v", err)
		}
	})
	return r
}

func start(t *testing.T, r *process.Run, role string) *process.Process {
	t.Helper()
	p, err := r.Start(command(role))
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// eventually polls. Its bound only keeps a failed test from hanging.
func eventually(t *testing.T, what string, condition func() bool) {
	t.Helper()
	for deadline := time.Now().Add(process.Grace); !condition(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("still not so: %s", what)
		}
	}
}

// firstLine waits for the first line of a program's log.
func firstLine(t *testing.T, p *process.Process) (line string) {
	t.Helper()
	eventually(t, "a line in "+p.Log(), func() bool {
		content, err := os.ReadFile(p.Log())
		if err != nil {
			t.Fatal(err)
		}
		var whole bool
		line, _, whole = strings.Cut(string(content), "\n")
		return whole
	})
	return line
}

func number(t *testing.T, text string) int {
	t.Helper()
	n, err := strconv.Atoi(text)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// killOwner runs an owner in a process of its own, kills it with SIGKILL, and returns what it left.
func killOwner(t *testing.T, role, parent string) (pid int, dir string) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), os.Args[0])
	cmd.Env = append(os.Environ(), roleVariable+"="+role, parentVariable+"="+parent)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	text, dir, _ := strings.Cut(strings.TrimSpace(line), " ")
	pid = number(t, text)
	if !process.Alive(pid) {
		t.Fatal("the owner's program does not run")
	}
	// Nothing may be left of a failed test either.
	identity := process.Started(pid)
	t.Cleanup(func() {
		if process.Started(pid) == identity {
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
	})
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err == nil {
		t.Fatal("the owner ended by itself")
	}
	return pid, dir
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return !errors.Is(err, fs.ErrNotExist)
}

func TestStopAsksThenKills(t *testing.T) {
	r := open(t, process.Config{Report: func(err error) { t.Errorf("reported: %v", err) }})
	polite := start(t, r, "sleeper")
	polite.Stop(process.Grace)

	stubborn := start(t, r, "stubborn")
	firstLine(t, stubborn)
	stubborn.Stop(10 * time.Millisecond)

	killed := start(t, r, "sleeper")
	killed.Stop(0)
	killed.Stop(0)

	for _, p := range []*process.Process{polite, stubborn, killed} {
		if err := p.Err(); err != nil {
			t.Errorf("stopping is no error, got: %v", err)
		}
		if process.Alive(p.PID()) {
			t.Errorf("%s lives on after Stop", p.Log())
		}
	}
}

func TestUnexpectedEndIsReportedWithTheLog(t *testing.T) {
	reported := make(chan error, 1)
	r := open(t, process.Config{Report: func(err error) { reported <- err }})
	p := start(t, r, "failure")
	err := <-reported
	for _, want := range []string{"failure ended unexpectedly", "exit status 3", p.Log(), "line 80\n", "line 99"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("the report lacks %q: %v", want, err)
		}
	}
	if strings.Contains(err.Error(), "line 79") {
		t.Errorf("the report holds more than the end of the log: %v", err)
	}
	if got := p.Err(); !errors.Is(got, err) {
		t.Errorf("Err is %v, reported was %v", got, err)
	}
	if err := p.WaitReady(t.Context(), func(context.Context) error { return nil }); !errors.Is(err, p.Err()) {
		t.Errorf("WaitReady of an ended program: got %v, want its end", err)
	}
}

func TestWaitReadyTellsATakenPort(t *testing.T) {
	r := open(t, process.Config{})
	never := func(context.Context) error { return errors.New("not yet") }
	for _, role := range []string{"taken", "minio"} {
		if err := start(t, r, role).WaitReady(t.Context(), never); !errors.Is(err, syscall.EADDRINUSE) {
			t.Errorf("%s: got %v, want EADDRINUSE", role, err)
		}
	}
	if err := start(t, r, "failure").WaitReady(t.Context(), never); errors.Is(err, syscall.EADDRINUSE) {
		t.Errorf("another failure was taken for EADDRINUSE: %v", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	err := start(t, r, "sleeper").WaitReady(ctx, never)
	if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "not yet") {
		t.Errorf("got %v, want the deadline and the last error", err)
	}
}

func TestNameIsUniqueAndItsLogContinues(t *testing.T) {
	r := open(t, process.Config{})
	first := start(t, r, "stubborn")
	firstLine(t, first)
	if _, err := r.Start(command("stubborn")); err == nil {
		t.Fatal("two programs of one name were started")
	}
	first.Stop(0)
	again := command("failure")
	again.Name = "stubborn"
	second, err := r.Start(again)
	if err != nil {
		t.Fatal(err)
	}
	<-second.Done()
	content, err := os.ReadFile(second.Log())
	if err != nil {
		t.Fatal(err)
	}
	if !strings.HasPrefix(string(content), "ready\nline 0\n") {
		t.Errorf("the log does not continue: %.40q", content)
	}
}

func TestGroupEndsWithItsProgram(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("waiting without reaping is for Linux only")
	}
	for _, role := range []string{"family", "orphaner"} {
		t.Run(role, func(t *testing.T) {
			r := open(t, process.Config{})
			p := start(t, r, role)
			grandchild := number(t, firstLine(t, p))
			if role == "family" { // which ends at SIGTERM, and its child does not
				p.Stop(process.Grace)
			}
			<-p.Done()
			eventually(t, "the grandchild has ended", func() bool { return !process.Alive(grandchild) })
		})
	}
}

func TestProgramsEndWithTheirOwner(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("only Linux has a parent-death signal")
	}
	pid, _ := killOwner(t, "owner", t.TempDir())
	eventually(t, "the program has ended", func() bool { return !process.Alive(pid) })
}

func TestProgramOutlivesTheThreadThatStartedIt(t *testing.T) {
	r := open(t, process.Config{Report: func(err error) { t.Errorf("reported: %v", err) }})
	started, ended := make(chan *process.Process), make(chan struct{})
	go func() {
		defer close(ended)
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		p, err := r.Start(command("stubborn"))
		if err != nil {
			t.Error(err)
		}
		started <- p
	}()
	p := <-started
	<-ended
	firstLine(t, p)
	// A wait for something not to happen. Too short a wait lets a broken version pass, never a good one fail.
	select {
	case <-p.Done():
		t.Error("the program ended with the thread that started it")
	case <-time.After(200 * time.Millisecond):
	}
}

func TestOpenEndsWhatADeadOwnerLeft(t *testing.T) {
	parent := t.TempDir()
	pid, dir := killOwner(t, "careless", parent)
	if !process.Alive(pid) {
		t.Fatal("the program ended with its owner: there is nothing to show")
	}
	open(t, process.Config{Parent: parent})
	if process.Alive(pid) {
		t.Error("the program lives on")
	}
	if exists(dir) {
		t.Error("the folder is still there")
	}
}

func TestSweepSparesARecycledNumber(t *testing.T) {
	parent := t.TempDir()
	pid, dir := killOwner(t, "careless", parent)
	records, err := filepath.Glob(filepath.Join(dir, "processes", "*"))
	if err != nil || len(records) != 1 {
		t.Fatalf("records: %v, %v", records, err)
	}
	// As if the recorded process had ended, and the number were now that of a younger one.
	other, err := json.Marshal(map[string]any{"pid": pid, "started": process.Started(os.Getpid())})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(records[0], other, 0o600); err != nil {
		t.Fatal(err)
	}
	removed, err := process.Sweep(t.Context(), parent, process.KeepFor)
	if err != nil || !slices.Equal(removed, []string{dir}) {
		t.Errorf("Sweep: got %v, %v, want %s removed", removed, err, dir)
	}
	if !process.Alive(pid) {
		t.Error("a process was killed that nobody had recorded")
	}
}

func TestSweepSparesTheLiving(t *testing.T) {
	parent := t.TempDir()
	r := open(t, process.Config{Parent: parent})
	p := start(t, r, "sleeper")
	beside := open(t, process.Config{Parent: parent})
	removed, err := process.Sweep(t.Context(), parent, 0)
	if err != nil || len(removed) > 0 {
		t.Errorf("Sweep: got %v, %v, want nothing removed", removed, err)
	}
	if !process.Alive(p.PID()) || !exists(r.Dir()) || !exists(beside.Dir()) {
		t.Error("a run was swept whose owner lives")
	}
}

func TestSweepIgnoresWhatIsNoRun(t *testing.T) {
	parent := t.TempDir()
	foreign := filepath.Join(parent, "foreign", "file")
	empty := filepath.Join(parent, "empty") // as an owner leaves that died before it had its lock
	for _, dir := range []string{filepath.Dir(foreign), empty} {
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(foreign, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	removed, err := process.Sweep(t.Context(), parent, 0)
	if err != nil || !slices.Equal(removed, []string{empty}) {
		t.Errorf("Sweep: got %v, %v, want the empty folder removed", removed, err)
	}
	if !exists(foreign) {
		t.Error("a folder was removed that is no run")
	}
	if removed, err := process.Sweep(t.Context(), filepath.Join(parent, "none"), 0); err != nil || len(removed) > 0 {
		t.Errorf("Sweep of nothing: got %v, %v", removed, err)
	}
}

func TestCloseRemovesAllButKeptLogs(t *testing.T) {
	parent := t.TempDir()
	r := open(t, process.Config{Parent: parent})
	p := start(t, r, "stubborn")
	firstLine(t, p)
	r.KeepLogs()
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	if process.Alive(p.PID()) {
		t.Error("Close left a program")
	}
	if !exists(p.Log()) || exists(filepath.Join(r.Dir(), "processes")) {
		t.Error("want the logs kept and all else removed")
	}
	if _, err := r.Start(command("sleeper")); err == nil {
		t.Error("a closed run started a program")
	}

	next := open(t, process.Config{Parent: parent})
	if !exists(p.Log()) {
		t.Error("the next run removed fresh logs")
	}
	if err := next.Close(); err != nil || exists(next.Dir()) {
		t.Errorf("Close without KeepLogs: %v, folder there: %v", err, exists(next.Dir()))
	}
	if _, err := process.Sweep(t.Context(), parent, 0); err != nil || exists(r.Dir()) {
		t.Errorf("Sweep of everything: %v, folder there: %v", err, exists(r.Dir()))
	}
}

// A zombie can't be ended by anybody but its parent: waiting for one to go could last for ever.
func TestZombieIsNotAlive(t *testing.T) {
	cmd := exec.CommandContext(t.Context(), os.Args[0])
	cmd.Env = []string{roleVariable + "=taken"}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "an ended, unreaped process is not alive", func() bool { return !process.Alive(cmd.Process.Pid) })
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
}

func TestFreePortIsFree(t *testing.T) {
	port, err := process.FreePort(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if port < 20000 || port > 29999 {
		t.Errorf("port %d can be given to an outgoing connection", port)
	}
}

// A program that needs more memory than its cgroup may have is killed, and the peak is at the limit.
func TestMemoryLimit(t *testing.T) {
	if err := process.CgroupsPossible(); err != nil {
		t.Skip("not run: ", err)
	}
	r := open(t, process.Config{})
	const limit = 16 << 20
	under := func(name, command string) *process.Process {
		t.Helper()
		m, err := r.MemoryLimit(name, limit)
		if err != nil {
			t.Fatal(err)
		}
		p, err := r.Start(process.Command{Name: name, Path: "/bin/sh", Args: []string{"-c", `echo $$ >"$0" && exec sh -c "$1"`, m.Procs(), command}})
		if err != nil {
			t.Fatal(err)
		}
		<-p.Done()
		peak, err := m.Peak()
		if err != nil || peak <= 0 || peak > limit {
			t.Errorf("%s: the peak is %d, %v", name, peak, err)
		}
		return p
	}
	if err := under("small", "true").Err(); err == nil || !strings.Contains(err.Error(), "exit status 0") {
		t.Errorf("a small program ended: %v", err)
	}
	// tail keeps its input until it has read a newline.
	if err := under("large", "exec tail -n 1 < /dev/zero").Err(); err == nil || !strings.Contains(err.Error(), "killed") {
		t.Errorf("a program that needs more than the limit ended: %v", err)
	}
}
