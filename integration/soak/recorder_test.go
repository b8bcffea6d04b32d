//go:build linux

package soak

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// A recorder reads the logs of all containers, from the files of the kubelets, and gets the waits of new pods.
type recorder struct {
	mu      sync.Mutex
	offsets map[string]int64 // by file
	calls   map[string]int   // by application
	last    map[string]string
	failed  []event // errors of applications
	logged  []event // warnings and errors of Credence
	waits   []*wait
}

// event is a line of a log.
type event struct {
	at           time.Time
	source, text string
}

// wait is that of a new pod, from its first creation until it has succeeded.
type wait struct {
	kind         string
	began, ended time.Time // ended is zero while it waits
	problems     []string
}

func newRecorder() *recorder {
	return &recorder{offsets: map[string]int64{}, calls: map[string]int{}, last: map[string]string{}}
}

// run reads until ctx ends. A kubelet removes the log of a deleted pod after some seconds.
func (r *recorder) run(ctx context.Context) {
	for ctx.Err() == nil {
		for _, n := range d.Cluster.Nodes() {
			// As the node sees it, because a failure mounts another file system there.
			root := filepath.Join("/proc", strconv.Itoa(n.PID()), "root")
			files, _ := filepath.Glob(filepath.Join(root, d.Cluster.Logs(), n.Name()+"-pods", "*", "*", "*.log"))
			for _, file := range files {
				r.read(file)
			}
		}
		pause(ctx, 500*time.Millisecond)
	}
}

// read reads the new whole lines of a file, which is NAMESPACE_POD_UID/CONTAINER/NUMBER.log.
func (r *recorder) read(path string) {
	file, err := os.Open(path)
	if err != nil {
		return
	}
	defer func() { _ = file.Close() }()
	r.mu.Lock()
	defer r.mu.Unlock()
	if info, err := file.Stat(); err != nil || info.Size() <= r.offsets[path] {
		return
	}
	if _, err := file.Seek(r.offsets[path], io.SeekStart); err != nil {
		return
	}
	container := filepath.Base(filepath.Dir(path))
	pod := strings.Split(filepath.Base(filepath.Dir(filepath.Dir(path))), "_")
	for lines := bufio.NewReader(file); ; {
		line, err := lines.ReadString('\n')
		if err != nil {
			return
		}
		r.offsets[path] += int64(len(line))
		// TIME STREAM TAG TEXT, as every container runtime writes it
		fields := strings.SplitN(strings.TrimSuffix(line, "\n"), " ", 4)
		if at, err := time.Parse(time.RFC3339Nano, fields[0]); err == nil && len(fields) == 4 && len(pod) == 3 {
			r.take(at, pod[0], pod[1], container, fields[3])
		}
	}
}

func (r *recorder) take(at time.Time, namespace, pod, container, text string) {
	if container != "app" {
		var line struct{ Level, Msg, Reason string }
		err := json.Unmarshal([]byte(text), &line)
		switch {
		case namespace != loadNamespace && namespace != "credence": // a part of others
		case err == nil && (line.Level == "WARN" || line.Level == "ERROR"):
			text = line.Level + " " + line.Msg
			if line.Reason != "" {
				text += " (" + line.Reason + ")"
			}
			r.logged = append(r.logged, event{at, strings.TrimPrefix(container, "credence-"), text})
		case strings.HasPrefix(text, "panic:"), strings.HasPrefix(text, "fatal error:"):
			r.logged = append(r.logged, event{at, strings.TrimPrefix(container, "credence-"), text})
		}
		return
	}
	r.last[pod] = text
	if count, ok := strings.CutPrefix(text, "calls "); ok {
		r.calls[pod], _ = strconv.Atoi(count)
	}
	if problem, ok := strings.CutPrefix(text, "FAILED "); ok {
		r.failed = append(r.failed, event{at, pod, problem})
	}
}

func (r *recorder) callsOf(app string) int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.calls[app]
}

// lastLine returns the last line of a pod's application.
func (r *recorder) lastLine(pod string) string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.last[pod]
}

func (r *recorder) begin(w *wait) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.waits = append(r.waits, w)
}

func (r *recorder) add(w *wait, problem string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	w.problems = append(w.problems, problem)
}

func (r *recorder) end(w *wait) {
	r.mu.Lock()
	defer r.mu.Unlock()
	w.ended = time.Now()
}

// failures returns the errors of applications in the time between.
func (r *recorder) failures(from, to time.Time) []event {
	r.mu.Lock()
	defer r.mu.Unlock()
	return between(r.failed, from, to)
}

func between(events []event, from, to time.Time) []event {
	return slices.DeleteFunc(slices.Clone(events), func(e event) bool { return e.at.Before(from) || e.at.After(to) })
}

// newPods returns an error until a pod of each kind was created after that time and has succeeded.
func (r *recorder) newPods(after time.Time) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, kind := range []string{known, fresh} {
		if !slices.ContainsFunc(r.waits, func(w *wait) bool { return w.kind == kind && w.began.After(after) && !w.ended.IsZero() }) {
			last := r.waits[len(r.waits)-1]
			return fmt.Errorf("no new pod of a %s role has succeeded; the last one began at %v and met %q", kind, last.began, last.problems)
		}
	}
	return nil
}

// volatile are the parts of texts that differ from run to run.
var volatile = []struct {
	pattern *regexp.Regexp
	name    string
}{
	{regexp.MustCompile(`[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}`), "ID"},
	{regexp.MustCompile(`\d+\.\d+\.\d+\.\d+(:\d+)?`), "ADDRESS"},
	{regexp.MustCompile(`(known|new)-\d+`), "POD"},
	{regexp.MustCompile(`\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z`), "TIME"},
	{regexp.MustCompile(`\b\d+(\.\d+)?m?s\b`), "TIME"},
}

// fixed returns a text without its volatile parts, at most 300 characters that can stand between backquotes.
func fixed(text string) string {
	for _, v := range volatile {
		text = v.pattern.ReplaceAllString(text, v.name)
	}
	text = strings.Join(strings.Fields(strings.ReplaceAll(text, "`", "'")), " ")
	if runes := []rune(text); len(runes) > 300 {
		text = string(runes[:300]) + "…"
	}
	return text
}

// result returns what was seen in the time between, and the calls of applications that could not reach the service.
func (r *recorder) result(from, to time.Time) (got result, unreachable map[string]int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	got, unreachable = result{Errors: map[string]int{}, Logged: map[string][]string{}}, map[string]int{}
	for _, e := range between(r.failed, from, to) {
		if text, ok := strings.CutPrefix(e.text, "network "); ok && text != "" {
			got.Unreachable++
			unreachable[e.source+": "+fixed(text)]++
			continue
		}
		got.Errors[e.source+": "+fixed(e.text)]++
	}
	for _, e := range between(r.logged, from, to) {
		if !slices.Contains(got.Logged[e.source], e.text) {
			got.Logged[e.source] = append(got.Logged[e.source], e.text)
		}
	}
	for _, list := range got.Logged {
		slices.Sort(list)
	}
	for _, w := range r.waits {
		if w.ended.IsZero() || w.ended.Before(from) || w.began.After(to) {
			continue
		}
		seconds := w.ended.Sub(w.began).Round(100 * time.Millisecond).Seconds()
		if w.kind == known {
			got.Known = append(got.Known, seconds)
		} else {
			got.New = append(got.New, seconds)
		}
		for _, problem := range w.problems {
			if problem = fixed(problem); !slices.Contains(got.Problems, problem) {
				got.Problems = append(got.Problems, problem)
			}
		}
	}
	slices.Sort(got.Problems)
	return got, unreachable
}
