package process

import (
	"bytes"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
)

// starter runs functions on one operating-system thread that lasts as long as this process.
//
// Linux sends a child its parent-death signal when the parent's *thread* that started it ends, not its
// process. Go ends threads when it likes (when a goroutine locked to one returns, for instance), and a child
// started from an ordinary goroutine then dies out of the blue. So one goroutine is locked to its thread for
// good, and starts them all.
var starter = sync.OnceValue(func() chan<- func() {
	work := make(chan func())
	go func() {
		runtime.LockOSThread()
		for f := range work {
			f()
		}
	}()
	return work
})

// start starts cmd so that the kernel kills it when this process ends in whatever way. If that happens
// before the child has said so to the kernel, os/exec's child notices and kills itself.
func start(cmd *exec.Cmd) error {
	cmd.SysProcAttr.Pdeathsig = deathSignal
	result := make(chan error, 1)
	starter() <- func() { result <- cmd.Start() }
	return <-result
}

// deathSignal is a variable for a test that needs what an owner without it would leave behind.
var deathSignal = syscall.SIGKILL

// waitExited blocks until a child has exited, and leaves it unreaped. It says whether it could.
func waitExited(pid int) bool {
	const (
		idTypePID = 1          // P_PID
		wNoWait   = 0x01000000 // WNOWAIT
	)
	for {
		// No siginfo is asked for: Linux allows a null pointer there.
		_, _, errno := syscall.Syscall6(syscall.SYS_WAITID, idTypePID, uintptr(pid), 0, syscall.WEXITED|wNoWait, 0, 0)
		if errno != syscall.EINTR {
			return errno == 0
		}
	}
}

// bootID tells the boots of a machine apart: a start time counts from boot, and a record can outlast one.
var bootID = sync.OnceValue(func() string {
	id, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "unknown"
	}
	return string(bytes.TrimSpace(id))
})

// started returns when the process started. It is not alive if there is none of that number, or if it is a
// zombie: nobody can end that but its parent, which may never come to it in a container.
func started(pid int) (at string, alive bool) {
	stat, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return "", false
	}
	// proc_pid_stat(5): the command's name comes second, in parentheses, and can itself hold spaces and
	// parentheses. Behind it: the state is field 3, the start time field 22.
	fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
	if len(fields) < 20 || strings.ContainsAny(fields[0], "ZX") {
		return "", false
	}
	return bootID() + "/" + fields[19], true
}
