//go:build unix && !linux

package process

// DisableDeathSignal does nothing: there is no death signal.
func DisableDeathSignal() {}
