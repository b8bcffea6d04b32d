//go:build unix

package process_test

import (
	"bufio"
	"context"
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

// The test binary is also every program of the tests. These variables choose one.
const (
	roleVariable   = "PROCESS_TEST_ROLE"
	parentVariable = "PROCESS_TEST_PARENT"
)

func TestMain(m *testing.M) {
	role := os.Getenv(roleVariable)
	play, ok := map[string]func(){
		"sleeper":  func() { select {} },
		"stubborn": stubborn,
		"failure":  failure,
		"family":   func() { fmt.Println(spawn("stubborn")); select {} },
		"orphaner": func() { fmt.Println(spawn("stubborn")) },
		"owner":    owner,
	}[role]
	switch {
	case ok:
		// If all goroutines are blocked, Go reports a deadlock.
		go func() { time.Sleep(time.Hour); os.Exit(9) }()
		play()
	case role == "":
		os.Exit(m.Run())
	default:
		panic("unknown role " + role)
	}
}

// grace is longer than any wait takes.
const grace = time.Minute

// alive reports whether a process runs and is no zombie. In a container, orphans may stay zombies.
func alive(pid int) bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid)) // proc_pid_stat(5): PID (NAME) STATE …
	_, state, _ := strings.Cut(string(stat), ") ")
	if runtime.GOOS != "linux" {
		return syscall.Kill(pid, 0) == nil
	}
	return err == nil && !strings.HasPrefix(state, "Z") && !strings.HasPrefix(state, "X")
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

// spawn starts a program in this process group and returns its number.
func spawn(role string) int {
	cmd := exec.Command(os.Args[0]) //nolint:noctx // a test kills it
	cmd.Env = []string{roleVariable + "=" + role}
	out, err := cmd.StdoutPipe()
	must(err)
	must(cmd.Start())
	_, err = bufio.NewReader(out).ReadString('\n') // from now on it ignores SIGTERM
	must(err)
	return cmd.Process.Pid
}

// owner opens a run with one program, and prints its number and the run's folder.
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

// eventually polls. Its limit only ends a failed test.
func eventually(t *testing.T, what string, condition func() bool) {
	t.Helper()
	for deadline := time.Now().Add(grace); !condition(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waiting until %s", what)
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

// killOwner runs an owner as a process, kills it with SIGKILL, and returns its program and its folder.
func killOwner(t *testing.T, parent string) (pid int, dir string) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), os.Args[0])
	cmd.Env = append(os.Environ(), roleVariable+"=owner", parentVariable+"="+parent)
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
	if !alive(pid) {
		t.Fatal("the owner's program is not alive")
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err == nil {
		t.Fatal("the owner exited by itself")
	}
	return pid, dir
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return !errors.Is(err, fs.ErrNotExist)
}

func TestStopTerminatesThenKills(t *testing.T) {
	r := open(t, process.Config{Report: func(err error) { t.Errorf("reported: %v", err) }})
	polite := start(t, r, "sleeper")
	polite.Stop(grace)

	stubborn := start(t, r, "stubborn")
	firstLine(t, stubborn)
	stubborn.Stop(10 * time.Millisecond)

	killed := start(t, r, "sleeper")
	killed.Stop(0)
	killed.Stop(0)

	for _, p := range []*process.Process{polite, stubborn, killed} {
		if err := p.Err(); err != nil {
			t.Errorf("a stopped program has the error %v", err)
		}
		if code := p.ExitCode(); code != -1 {
			t.Errorf("a program that a signal ended has the exit code %d", code)
		}
		if alive(p.PID()) {
			t.Errorf("%s is alive after Stop", p.Log())
		}
	}
}

func TestUnexpectedExitIsReportedWithTheLog(t *testing.T) {
	reported := make(chan error, 1)
	r := open(t, process.Config{Report: func(err error) { reported <- err }})
	p := start(t, r, "failure")
	err := <-reported
	for _, want := range []string{"failure exited unexpectedly", "exit status 3", p.Log(), "line 80\n", "line 99"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("the report lacks %q: %v", want, err)
		}
	}
	if strings.Contains(err.Error(), "line 79") {
		t.Errorf("the report has more than the end of the log: %v", err)
	}
	if got := p.Err(); !errors.Is(got, err) || p.ExitCode() != 3 {
		t.Errorf("Err is %v, the report %v, the exit code %d", got, err, p.ExitCode())
	}
	if err := p.WaitReady(t.Context(), func(context.Context) error { return nil }); !errors.Is(err, p.Err()) {
		t.Errorf("WaitReady after the exit: got %v, want Err", err)
	}
}

func TestGroupIsKilledWithItsProgram(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("only Linux can wait without reaping")
	}
	for _, role := range []string{"family", "orphaner"} {
		t.Run(role, func(t *testing.T) {
			r := open(t, process.Config{})
			p := start(t, r, role)
			grandchild := number(t, firstLine(t, p))
			if role == "family" { // it exits at SIGTERM, its child does not
				p.Stop(grace)
			}
			<-p.Done()
			eventually(t, "the grandchild has exited", func() bool { return !alive(grandchild) })
		})
	}
}

func TestNothingIsLeftOfADeadOwner(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("only Linux has a parent-death signal")
	}
	parent := t.TempDir()
	pid, dir := killOwner(t, parent)
	open(t, process.Config{Parent: parent})
	if exists(dir) {
		t.Error("the folder still exists")
	}
	eventually(t, "the program has exited", func() bool { return !alive(pid) })
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
	if !alive(p.PID()) || !exists(r.Dir()) || !exists(beside.Dir()) {
		t.Error("a run of a live owner was swept")
	}
}

func TestSweepIgnoresForeignFolders(t *testing.T) {
	parent := t.TempDir()
	foreign := filepath.Join(parent, "foreign", "file")
	empty := filepath.Join(parent, "empty") // as of an owner that died before it had its lock
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
		t.Error("a foreign folder was removed")
	}
	if removed, err := process.Sweep(t.Context(), filepath.Join(parent, "none"), 0); err != nil || len(removed) > 0 {
		t.Errorf("Sweep of nothing: got %v, %v", removed, err)
	}
}

func TestCloseRemovesEverythingExceptKeptLogs(t *testing.T) {
	parent := t.TempDir()
	r := open(t, process.Config{Parent: parent})
	p := start(t, r, "stubborn")
	firstLine(t, p)
	scratch := filepath.Join(r.Dir(), "scratch")
	if err := os.WriteFile(scratch, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	r.KeepLogs()
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	if alive(p.PID()) {
		t.Error("a program is alive after Close")
	}
	if !exists(p.Log()) || exists(scratch) {
		t.Error("want only the logs")
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

// TestMemoryLimit guards the siege: a limit that limits nothing would let it pass.
func TestMemoryLimit(t *testing.T) {
	if err := process.CgroupsPossible(); err != nil {
		t.Skip("cgroups are not possible: ", err)
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
		t.Errorf("a small program: %v", err)
	}
	// tail keeps its input in memory until it reads a newline.
	if err := under("large", "exec tail -n 1 < /dev/zero").Err(); err == nil || !strings.Contains(err.Error(), "killed") {
		t.Errorf("a program that exceeds the limit: %v", err)
	}
}

func TestKill(t *testing.T) {
	r := open(t, process.Config{Report: func(err error) { t.Errorf("reported: %v", err) }})
	p := start(t, r, "sleeper")
	again, err := r.Kill("sleeper")
	if err != nil || alive(p.PID()) {
		t.Fatalf("after Kill: %v, alive: %t", err, alive(p.PID()))
	}
	if _, err := r.Kill("sleeper"); err == nil {
		t.Error("a program that does not run was killed")
	}
	p, err = r.Start(again)
	if err != nil || !alive(p.PID()) {
		t.Errorf("starting the command again: %v", err)
	}
}
