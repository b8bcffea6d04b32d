package process

import (
	"os/exec"
	"runtime"
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

// start starts cmd so that the kernel kills it when this process dies. If this process dies before the child has set
// that up, the child (os/exec) notices and kills itself.
func start(cmd *exec.Cmd) error {
	cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL
	result := make(chan error, 1)
	starter() <- func() { result <- cmd.Start() }
	return <-result
}

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
