package processtest

import (
	"bufio"
	"bytes"
	"encoding/json"
	"strings"
	"sync"
)

// Output is the output of a program. It is safe for concurrent use.
type Output struct {
	mu   sync.Mutex
	text bytes.Buffer // guarded by mu
}

// Write implements io.Writer.
func (o *Output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.text.Write(p)
}

// String returns the output so far.
func (o *Output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.text.String()
}

// end returns the last part of the output, for the log of a test.
func (o *Output) end() string {
	text := o.String()
	return text[max(0, len(text)-8<<10):]
}

// Lines returns the JSON lines so far whose field key has that value.
func (o *Output) Lines(key, value string) (lines []map[string]any) {
	all := bufio.NewScanner(strings.NewReader(o.String()))
	all.Buffer(nil, 1<<20)
	for all.Scan() {
		var line map[string]any
		if json.Unmarshal(all.Bytes(), &line) == nil && line[key] == value {
			lines = append(lines, line)
		}
	}
	return lines
}
