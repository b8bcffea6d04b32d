//go:build unix

package process

import "time"

// Alive reports whether a process runs and is no zombie.
func Alive(pid int) bool {
	_, alive := started(pid)
	return alive
}

// Started returns the start time in the form of a record.
func Started(pid int) string {
	at, _ := started(pid)
	return at
}

// Grace is longer than any wait in tests takes.
const Grace = time.Minute
