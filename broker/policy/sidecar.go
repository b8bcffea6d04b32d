package policy

import (
	"fmt"
	"strconv"
	"strings"
)

// Sidecar is the part of a pod's settings for its own sidecar, which replaces the sidecar settings of the webhook. It does not
// concern AWS: neither grants nor routing keys depend on it.
type Sidecar struct {
	Memory     Memory // 0: not set
	CPURequest CPU    // 0: not set
	CPULimit   *CPU   // nil: not set; 0: no limit
	Port       int    // 0: not set
	LogLevel   LogLevel
}

// Bounds of the settings of a sidecar, by a pod and by the webhook's sidecar settings.
const (
	// DefaultMemory is several times the memory that an idle sidecar uses, 4 MB, and is enough for all connections that it
	// accepts. The kernel counts their buffers and its own pages too, and must never kill the sidecar.
	DefaultMemory Memory = 16
	// MinMemory is enough for 16 connections at a time, but not for all that the sidecar accepts.
	MinMemory Memory = 12
	// MaxMemory is for LimitRanges with a minimum. The sidecar cannot use it, because it bounds its own heap.
	MaxMemory Memory = 256
	// MinCPU is the minimum of Kubernetes.
	MinCPU CPU = 1
	// MinCPULimit: with this limit, first credentials take two seconds, during which the pod waits.
	MinCPULimit CPU = 10
	// MaxCPU is far more than the SDKs of a pod can use: the sidecar serves 40 of their requests in a millisecond of CPU.
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

// UnmarshalText implements [encoding.TextUnmarshaler]. It accepts only one of the forms of Kubernetes, such as 16Mi, and
// checks the bounds.
func (m *Memory) UnmarshalText(text []byte) error {
	digits, ok := strings.CutSuffix(string(text), "Mi")
	n, ok := number(digits, ok)
	if !ok {
		return fmt.Errorf("%.100q is not an amount of memory; write whole mebibytes, such as %s or 64Mi", text, DefaultMemory)
	}
	if err := Memory(n).Check(); err != nil {
		return err
	}
	*m = Memory(n)
	return nil
}

// Check refuses an amount out of bounds.
func (m Memory) Check() error {
	if m < MinMemory || m > MaxMemory {
		return fmt.Errorf("%s is out of bounds: from %s to %s", m, MinMemory, MaxMemory)
	}
	return nil
}

// CPU is processor time in thousandths of a processor, written 50m. The meaning of 0 depends on the field.
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

// UnmarshalText implements [encoding.TextUnmarshaler]. It accepts thousandths such as 50m, or whole processors. The caller
// checks the bounds.
func (c *CPU) UnmarshalText(text []byte) error {
	digits, thousandths := strings.CutSuffix(string(text), "m")
	n, ok := number(digits, true)
	if !ok {
		return fmt.Errorf("%.100q is not an amount of CPU; write thousandths of a processor, such as 50m, or 1", text)
	}
	if !thousandths {
		n *= 1000
	}
	*c = CPU(n)
	return nil
}

// CheckRequest refuses a CPU request out of bounds.
func (c CPU) CheckRequest() error {
	if c < MinCPU || c > MaxCPU {
		return fmt.Errorf("%s is out of bounds: from %s to %s", c, MinCPU, MaxCPU)
	}
	return nil
}

// CheckLimit refuses a CPU limit out of bounds. 0 means no limit.
func (c CPU) CheckLimit() error {
	if c != 0 && (c < MinCPULimit || c > MaxCPU) {
		return fmt.Errorf("%s is out of bounds: from %s to %s, or 0 for no limit", c, MinCPULimit, MaxCPU)
	}
	return nil
}

// number reads a decimal number of at most six digits, without a sign or leading zeros. Its result is false for any other
// text, and if ok is false.
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

// LogLevel is the lowest level that the sidecar logs.
type LogLevel string

// The levels.
const (
	LogDebug LogLevel = "debug"
	LogInfo  LogLevel = "info" // the default
	LogWarn  LogLevel = "warn"
	LogError LogLevel = "error"
)

// Check refuses an unknown level.
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

// set parses the value of one of the sidecar's keys.
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
			return fmt.Errorf("%.100q is not a port; write a number from %d to %d", value, MinPort, MaxPort)
		}
		s.Port = n
		return CheckPort(n)
	case SidecarLogLevel:
		return s.LogLevel.UnmarshalText(text)
	default:
		return fmt.Errorf("key %q is not parsed", key)
	}
}
