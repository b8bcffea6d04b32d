package policy

import (
	"fmt"
	"strconv"
	"strings"
)

// Sidecar is what a pod says of its own sidecar, where what the platform's team has set for all does not suit
// it. It is nothing to AWS: neither grants nor routing keys have any of it.
type Sidecar struct {
	Memory     Memory // 0: not said
	CPURequest CPU    // 0: not said
	CPULimit   *CPU   // nil: not said; 0: no limit
	Port       int    // 0: not said
	LogLevel   LogLevel
}

// Bounds of what a sidecar may be given, by a pod and by the webhook's settings.
const (
	// DefaultMemory is several times what the sidecar touches at rest, 4 MB, and enough for all connections that it
	// takes: the kernel counts their buffers and its own pages on top, and must never kill it.
	DefaultMemory Memory = 16
	// MinMemory is enough for 16 connections at a time, and not for all that the sidecar takes.
	MinMemory Memory = 12
	// MaxMemory is for LimitRanges with a minimum. The sidecar cannot use it, because it bounds its own heap.
	MaxMemory Memory = 256
	// MinCPU is the least that Kubernetes knows.
	MinCPU CPU = 1
	// MinCPULimit: with this, first credentials take two seconds, in which the pod waits.
	MinCPULimit CPU = 10
	// MaxCPU is far more than a pod's SDKs make it use: a millisecond of it answers 40 of them.
	MaxCPU CPU = 1000
	// MinPort: the sidecar has no capability to bind a lower one.
	MinPort = 1024
	MaxPort = 65535
)

// Memory is an amount of memory in mebibytes, written 16Mi.
type Memory int

// String writes m as Kubernetes does.
func (m Memory) String() string { return strconv.Itoa(int(m)) + "Mi" }

// MarshalText implements [encoding.TextMarshaler].
func (m Memory) MarshalText() ([]byte, error) { return []byte(m.String()), nil }

// UnmarshalText implements [encoding.TextUnmarshaler]. It takes one form of those that Kubernetes has, and
// within bounds.
func (m *Memory) UnmarshalText(text []byte) error {
	digits, ok := strings.CutSuffix(string(text), "Mi")
	n, ok := number(digits, ok)
	if !ok {
		return fmt.Errorf("%.100q is no amount of memory: write whole mebibytes, such as %s or 64Mi", text, DefaultMemory)
	}
	if err := Memory(n).Check(); err != nil {
		return err
	}
	*m = Memory(n)
	return nil
}

// Check refuses what is out of bounds.
func (m Memory) Check() error {
	if m < MinMemory || m > MaxMemory {
		return fmt.Errorf("%s is out of bounds: from %s to %s", m, MinMemory, MaxMemory)
	}
	return nil
}

// CPU is processor time in thousandths of a processor, written 50m. Whether 0 means something is said where it
// is used.
type CPU int

// String writes c as Kubernetes does.
func (c CPU) String() string {
	if c%1000 == 0 {
		return strconv.Itoa(int(c / 1000))
	}
	return strconv.Itoa(int(c)) + "m"
}

// MarshalText implements [encoding.TextMarshaler].
func (c CPU) MarshalText() ([]byte, error) { return []byte(c.String()), nil }

// UnmarshalText implements [encoding.TextUnmarshaler]: thousandths such as 50m, or whole processors. Its bounds
// are those of the use.
func (c *CPU) UnmarshalText(text []byte) error {
	digits, thousandths := strings.CutSuffix(string(text), "m")
	n, ok := number(digits, true)
	if !ok {
		return fmt.Errorf("%.100q is no amount of CPU: write thousandths of a processor, such as 50m, or 1", text)
	}
	if !thousandths {
		n *= 1000
	}
	*c = CPU(n)
	return nil
}

// CheckRequest refuses what is out of the bounds of a request.
func (c CPU) CheckRequest() error {
	if c < MinCPU || c > MaxCPU {
		return fmt.Errorf("%s is out of bounds: from %s to %s", c, MinCPU, MaxCPU)
	}
	return nil
}

// CheckLimit refuses what is out of the bounds of a limit. 0 is none.
func (c CPU) CheckLimit() error {
	if c != 0 && (c < MinCPULimit || c > MaxCPU) {
		return fmt.Errorf("%s is out of bounds: from %s to %s, or 0 for no limit", c, MinCPULimit, MaxCPU)
	}
	return nil
}

// number reads a decimal number of at most six digits, without a sign and without zeros in front; ok is false for
// all else, and where it was before.
func number(digits string, ok bool) (int, bool) {
	n, err := strconv.ParseUint(digits, 10, 32)
	return int(n), ok && err == nil && len(digits) <= 6 && strconv.FormatUint(n, 10) == digits
}

// CheckPort refuses a port on which the sidecar cannot listen.
func CheckPort(port int) error {
	if port < MinPort || port > MaxPort {
		return fmt.Errorf("%d is out of bounds: from %d to %d", port, MinPort, MaxPort)
	}
	return nil
}

// LogLevel is the least level that the sidecar logs.
type LogLevel string

// The levels.
const (
	LogDebug LogLevel = "debug"
	LogInfo  LogLevel = "info" // the default
	LogWarn  LogLevel = "warn"
	LogError LogLevel = "error"
)

// Check refuses what is no level.
func (l LogLevel) Check() error {
	_, err := parseChoice(string(l), LogDebug, LogInfo, LogWarn, LogError)
	return err
}

// MarshalText implements [encoding.TextMarshaler].
func (l LogLevel) MarshalText() ([]byte, error) { return []byte(l), nil }

// UnmarshalText implements [encoding.TextUnmarshaler].
func (l *LogLevel) UnmarshalText(text []byte) error {
	if err := LogLevel(text).Check(); err != nil {
		return err
	}
	*l = LogLevel(text)
	return nil
}

// set parses the value of a key of the sidecar.
func (s *Sidecar) set(key Key, value string) error {
	switch text := []byte(value); key {
	case SidecarMemory:
		return s.Memory.UnmarshalText(text)
	case SidecarCPURequest:
		if err := s.CPURequest.UnmarshalText(text); err != nil {
			return err
		}
		return s.CPURequest.CheckRequest()
	case SidecarCPULimit:
		s.CPULimit = new(CPU)
		if err := s.CPULimit.UnmarshalText(text); err != nil {
			return err
		}
		return s.CPULimit.CheckLimit()
	case SidecarPort:
		n, ok := number(value, true)
		if !ok {
			return fmt.Errorf("%.100q is no port: write a number from %d to %d", value, MinPort, MaxPort)
		}
		s.Port = n
		return CheckPort(n)
	case SidecarLogLevel:
		return s.LogLevel.UnmarshalText(text)
	default:
		return fmt.Errorf("key %q is not parsed", key)
	}
}
