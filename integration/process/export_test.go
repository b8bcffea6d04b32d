//go:build unix

package process

import "time"

// Alive says whether a process runs (and is no zombie).
func Alive(pid int) bool {
	_, alive := started(pid)
	return alive
}

// Started returns the start time as a record holds it.
func Started(pid int) string {
	at, _ := started(pid)
	return at
}

// Grace is longer than anything takes that is waited for in tests.
const Grace = time.Minute
