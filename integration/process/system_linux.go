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
// Linux sends a child its parent-death signal when the parent's *thread* exits, not its process. Go can end a thread
// at any time, for example when a goroutine locked to it returns, and children that it started would die. So one
// goroutine stays locked to its thread and starts all children.
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

// start starts cmd so that the kernel kills it when this process dies. If this process dies before the child has asked
// the kernel for that, the child (os/exec) notices and kills itself.
func start(cmd *exec.Cmd) error {
	cmd.SysProcAttr.Pdeathsig = deathSignal
	result := make(chan error, 1)
	starter() <- func() { result <- cmd.Start() }
	return <-result
}

// deathSignal is a variable for a test of what an owner leaves behind without it.
var deathSignal = syscall.SIGKILL

// waitExited waits until a child has exited, without reaping it, and reports whether that worked.
func waitExited(pid int) bool {
	const (
		idTypePID = 1          // P_PID
		wNoWait   = 0x01000000 // WNOWAIT
	)
	for {
		// Linux accepts a null pointer for siginfo.
		_, _, errno := syscall.Syscall6(syscall.SYS_WAITID, idTypePID, uintptr(pid), 0, syscall.WEXITED|wNoWait, 0, 0)
		if errno != syscall.EINTR {
			return errno == 0
		}
	}
}

// bootID identifies the boot of this machine: start times count from boot, and a record can survive a reboot.
var bootID = sync.OnceValue(func() string {
	id, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "unknown"
	}
	return string(bytes.TrimSpace(id))
})

// started returns the start time of a process, and whether it is alive. A zombie is not alive: only its parent can end
// it, and in a container the parent may never do so.
func started(pid int) (at string, alive bool) {
	stat, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return "", false
	}
	// proc_pid_stat(5): field 2 is the command's name in parentheses, and may have spaces and parentheses. Field 3 is the
	// state, field 22 the start time.
	fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
	if len(fields) < 20 || strings.ContainsAny(fields[0], "ZX") {
		return "", false
	}
	return bootID() + "/" + fields[19], true
}
