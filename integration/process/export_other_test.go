//go:build unix && !linux

package process

// DisableDeathSignal has nothing to do here.
func DisableDeathSignal() {}
