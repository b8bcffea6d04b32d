package snapshot

import (
	"encoding/json"
	"strings"
	"time"

	"github.com/credence-iam/credence/broker/credential"
)

// LogLine is a line of the sidecar's log. It has the fields that package sidecar writes.
type LogLine struct {
	Time        time.Time         `json:"time"`
	Level       string            `json:"level"`
	Text        string            `json:"msg"`
	Reason      credential.Reason `json:"reason"`
	Error       string            `json:"error"`
	Role        string            `json:"role"`
	AccessKeyID string            `json:"access_key_id"`
	Expiration  time.Time         `json:"expiration"`
}

// ParseLog returns the lines of a sidecar's log. It leaves out what is not JSON, such as a first line that was cut.
func ParseLog(text string) []LogLine {
	var lines []LogLine
	for line := range strings.Lines(text) {
		var l LogLine
		if json.Unmarshal([]byte(line), &l) == nil && l.Text != "" {
			lines = append(lines, l)
		}
	}
	return lines
}
