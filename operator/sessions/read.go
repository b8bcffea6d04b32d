package sessions

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"

	"github.com/credence-iam/credence/broker/audit"
	"github.com/credence-iam/credence/broker/clip"
	"github.com/credence-iam/credence/operator/installation"
)

// Limits of what is read. Only lines of wanted keys stay in memory.
const (
	// maxLog is how much is read of the log of one container, in bytes. The kubelet keeps 10 MiB of it by default
	// (containerLogMaxSize), and logs of the current file only.
	maxLog = 256 << 20
	// maxAuditLine is the maximum length of a line, in bytes: four times that of an audit line, because collectors add to it.
	maxAuditLine = 16 << 10
	// maxLines and maxEvents are how many lines and events are kept.
	maxLines, maxEvents = 100_000, 100_000
	// maxTrail is the maximum size of a file of CloudTrail without compression, in bytes. CloudTrail's own have less than 50 MB.
	maxTrail = 256 << 20
	// logTime limits reading one log.
	logTime = time.Minute
)

// Search is what [Search.Gather] reads.
type Search struct {
	// Key is the access key ID. Empty: all keys of the events in Trails.
	Key string
	// AuditFiles are files with lines of the audit log, and Trails files with events of CloudTrail, each possibly
	// compressed by gzip. "-" is Stdin.
	AuditFiles, Trails []string
	Stdin              io.Reader
	// Client and Namespace are where the brokers are. Without a Client, only files are read.
	Client    *installation.Client
	Namespace string
}

// Gather reads everything. It fails if a file cannot be read or is not what it should be. What the cluster does not give is
// in [Sources.Problems].
func (s Search) Gather(ctx context.Context) (Sources, error) {
	var all Sources
	for _, name := range s.Trails {
		err := s.open(name, func(r io.Reader) error { return readTrail(r, s.Key, &all) })
		if err != nil {
			return all, fmt.Errorf("--cloudtrail=%s: %w", name, err)
		}
	}
	wanted := map[string]bool{s.Key: s.Key != ""}
	for _, e := range all.Events {
		wanted[e.key] = true
	}
	delete(wanted, "")
	c := collector{wanted: wanted, sources: &all}
	for _, name := range s.AuditFiles {
		if err := s.open(name, func(r io.Reader) error { return c.read(r, "file "+name) }); err != nil {
			return all, fmt.Errorf("--audit=%s: %w", name, err)
		}
	}
	if s.Client != nil {
		s.gatherCluster(ctx, &c)
	}
	slices.SortFunc(all.Problems, func(a, b Problem) int { return cmpProblem(a, b) })
	return all, nil
}

func cmpProblem(a, b Problem) int {
	return bytes.Compare([]byte(a.Source+a.Error), []byte(b.Source+b.Error))
}

// open calls read with the content of a file.
func (s Search) open(name string, read func(io.Reader) error) error {
	file := s.Stdin
	if name != "-" {
		f, err := os.Open(name) //nolint:gosec // The user names it.
		if err != nil {
			return err
		}
		defer f.Close()
		file = f
	}
	buffered := bufio.NewReader(file)
	if magic, _ := buffered.Peek(2); bytes.Equal(magic, []byte{0x1f, 0x8b}) {
		unzipped, err := gzip.NewReader(buffered)
		if err != nil {
			return err
		}
		return read(unzipped)
	}
	return read(buffered)
}

// gatherCluster reads the logs and the grants of all brokers.
func (s Search) gatherCluster(ctx context.Context, c *collector) {
	brokers, err := brokersOf(ctx, s.Client, s.Namespace)
	if err != nil {
		c.problem("brokers", err)
		return
	}
	var group errgroup.Group
	group.SetLimit(readersAtOnce)
	for _, b := range brokers {
		for _, previous := range []bool{false, true} {
			group.Go(func() error {
				source := "log of broker " + b.Pod.Name
				if previous {
					source = "previous " + source
				}
				if err := s.readLog(ctx, b.Pod, previous, source, c); err != nil {
					c.problem(source, err)
				}
				return nil
			})
		}
	}
	snapshot, err := Gather(ctx, s.Client, s.Namespace, Query{})
	if err != nil {
		c.problem("brokers", err)
	}
	_ = group.Wait() // Its functions record their errors.
	c.sources.Brokers = snapshot
	for _, b := range snapshot.Brokers {
		if b.Err != nil {
			c.problem("broker "+b.Name, b.Err)
		}
	}
}

// readLog reads the log of a broker's container.
func (s Search) readLog(ctx context.Context, pod *corev1.Pod, previous bool, source string, c *collector) error {
	ctx, cancel := context.WithTimeout(ctx, logTime)
	defer cancel()
	stream, err := s.Client.Kube.CoreV1().Pods(pod.Namespace).GetLogs(pod.Name, &corev1.PodLogOptions{Container: "broker", Previous: previous}).Stream(ctx)
	switch {
	case previous && apierrors.IsBadRequest(err):
		return nil // The container was never restarted.
	case apierrors.IsForbidden(err):
		return &installation.ForbiddenError{Right: "get pods/log in namespace " + pod.Namespace, Err: err}
	case err != nil:
		return err
	}
	defer stream.Close()
	limited := &io.LimitedReader{R: stream, N: maxLog}
	if err := c.read(limited, source); err != nil {
		return err
	}
	if limited.N == 0 {
		return fmt.Errorf("it is longer than %d MB; its end was not read. Use --audit with the files of your log collector", maxLog>>20)
	}
	return nil
}

// collector collects the lines of wanted keys from several sources at once.
type collector struct {
	wanted map[string]bool

	mu      sync.Mutex
	sources *Sources // guarded by mu
	full    bool     // guarded by mu
}

func (c *collector) problem(source string, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.sources.Problems = append(c.sources.Problems, Problem{source, clip.Runes(err.Error(), 2*maxWide), rightOf(err)})
}

// read reads audit lines, among other lines. A line may have a prefix, as kubectl logs --prefix and container runtimes
// write it.
func (c *collector) read(r io.Reader, source string) error {
	lines := bufio.NewReaderSize(r, maxAuditLine)
	for {
		line, err := lines.ReadSlice('\n')
		if errors.Is(err, bufio.ErrBufferFull) { // It is no audit line.
			for errors.Is(err, bufio.ErrBufferFull) {
				_, err = lines.ReadSlice('\n')
			}
			line = nil
		}
		if at := bytes.IndexByte(line, '{'); at >= 0 && bytes.Contains(line, []byte(`"access_key_id"`)) {
			var entry audit.Entry
			if json.Unmarshal(bytes.TrimSpace(line[at:]), &entry) == nil && c.wanted[entry.AccessKeyID] && !c.add(Line{entry, source}) {
				return nil
			}
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// add adds a line, and reports whether there is room for more.
func (c *collector) add(line Line) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.sources.Lines) >= maxLines {
		if !c.full {
			c.full = true
			c.sources.Problems = append(c.sources.Problems, Problem{Source: "audit lines", Error: fmt.Sprintf("more than %d lines have these keys; the others were not read", maxLines)})
		}
		return false
	}
	c.sources.Lines = append(c.sources.Lines, line)
	return true
}

// trailEvent is an event as CloudTrail writes it (CloudTrail User Guide, "CloudTrail record contents").
type trailEvent struct {
	EventTime       time.Time `json:"eventTime"`
	EventName       string    `json:"eventName"`
	EventSource     string    `json:"eventSource"`
	EventID         string    `json:"eventID"`
	AWSRegion       string    `json:"awsRegion"`
	SourceIPAddress string    `json:"sourceIPAddress"`
	UserAgent       string    `json:"userAgent"`
	ErrorCode       string    `json:"errorCode"`
	UserIdentity    struct {
		AccessKeyID string `json:"accessKeyId"`
	} `json:"userIdentity"`
	ResponseElements struct {
		Credentials struct {
			AccessKeyID string `json:"accessKeyId"`
		} `json:"credentials"`
	} `json:"responseElements"`
}

// errTrail means that a file has no events.
var errTrail = errors.New("found no events; it must be JSON with Records, as CloudTrail writes it to S3, or with Events, as from aws cloudtrail lookup-events")

// readTrail reads the events of the key from a file of CloudTrail: one or more documents with Records or Events, or plain
// events.
func readTrail(r io.Reader, key string, to *Sources) error {
	limited := &io.LimitedReader{R: r, N: maxTrail}
	decoder := json.NewDecoder(limited)
	found := 0
	for {
		var document struct {
			Records []trailEvent
			Events  []struct{ CloudTrailEvent string }
			trailEvent
		}
		err := decoder.Decode(&document)
		switch {
		case limited.N == 0:
			return fmt.Errorf("it is larger than %d MB; split it", maxTrail>>20)
		case errors.Is(err, io.EOF) && found > 0:
			return nil
		case errors.Is(err, io.EOF):
			return errTrail
		case err != nil:
			return fmt.Errorf("%w: %w", errTrail, err)
		}
		events := document.Records
		for _, e := range document.Events {
			var event trailEvent
			if err := json.Unmarshal([]byte(e.CloudTrailEvent), &event); err != nil {
				return fmt.Errorf("%w: an event of Events: %w", errTrail, err)
			}
			events = append(events, event)
		}
		if document.EventName != "" {
			events = append(events, document.trailEvent)
		}
		found += len(events)
		if document.Records != nil || document.Events != nil {
			found++ // An empty list is what it should be.
		}
		for _, e := range events {
			to.addEvent(e, key)
		}
	}
}

// addEvent adds the event if it was signed with the key or issued it. An empty key adds all events that were signed with a
// temporary key.
func (s *Sources) addEvent(e trailEvent, key string) {
	event := Event{
		Time: e.EventTime.UTC(), Name: e.EventName, Source: e.EventSource, Region: e.AWSRegion, Address: e.SourceIPAddress,
		UserAgent: e.UserAgent, ErrorCode: e.ErrorCode, ID: e.EventID, key: e.UserIdentity.AccessKeyID,
	}
	issued := e.ResponseElements.Credentials.AccessKeyID
	switch {
	case key == "" && temporary(event.key), key != "" && event.key == key:
	case key != "" && issued == key:
		event.key, event.Issued = key, true
	default:
		return
	}
	if len(s.Events) >= maxEvents {
		if len(s.Events) == maxEvents && (len(s.Problems) == 0 || s.Problems[len(s.Problems)-1].Source != "events") {
			s.Problems = append(s.Problems, Problem{Source: "events", Error: fmt.Sprintf("there are more than %d; the others were left out", maxEvents)})
		}
		return
	}
	s.Events = append(s.Events, event)
}

// temporary reports whether the key is one of a session (IAM User Guide, "IAM identifiers").
func temporary(key string) bool { return len(key) > 4 && key[:4] == "ASIA" }
