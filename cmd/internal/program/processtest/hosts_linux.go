package processtest

import (
	"fmt"
	"os"
	"syscall"
)

// mountNamespace starts a process in its own mount namespace, and in its own user namespace unless root starts it, because
// only root may create the former.
func mountNamespace() *syscall.SysProcAttr {
	a := &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS}
	if uid := os.Geteuid(); uid != 0 {
		a.Cloneflags |= syscall.CLONE_NEWUSER
		a.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: uid, Size: 1}}
	}
	return a
}

// useHosts mounts file as /etc/hosts in the mount namespace of this process.
func useHosts(file string) error {
	if file == "" {
		return nil
	}
	// Otherwise the whole machine would see the file.
	if err := syscall.Mount("", "/", "", syscall.MS_REC|syscall.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("keeping mounts private: %w", err)
	}
	if err := syscall.Mount(file, "/etc/hosts", "", syscall.MS_BIND, ""); err != nil {
		return fmt.Errorf("mounting %s as /etc/hosts: %w", file, err)
	}
	return nil
}
