// Package explain finds out why one pod has no credentials, or that it has them. It follows the credentials' way: from the
// label of the namespace through admission, sidecar, brokers and STS to the SDK in the pod's containers.
//
// [Explain] is a pure function of a [snapshot.Snapshot]. It guarantees: the first failed step is the cause, and the failures
// behind it may be its consequences; each failure has a remedy; a step that the user may not see is unknown and names the
// missing right. It shows no key or token.
package explain

import (
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/credence-iam/credence/broker/policy"
	"github.com/credence-iam/credence/operator/finding"
	"github.com/credence-iam/credence/operator/snapshot"
)

// subject is a snapshot whose pod is explained.
type subject struct{ *snapshot.Snapshot }

// Explanation is the diagnosis of one pod.
type Explanation struct {
	finding.Report
	// Conclusion is one sentence: the cause, and what to do.
	Conclusion string `json:"conclusion"`
	// Healthy: nothing is wrong, and a pod that runs has credentials.
	Healthy bool `json:"healthy"`
}

// unknown returns the finding of a step whose source could not be read, if that is so.
func (s subject) unknown(step, source string) []finding.Finding {
	if problem, ok := s.Problems[source]; ok {
		return []finding.Finding{{Step: step, State: finding.Unknown, Text: string(problem)}}
	}
	return nil
}

// key returns the full name of a label or annotation.
func (s subject) key(key policy.Key) string { return s.Keys().Name(key) }

// subject names the pod or the controller.
func (s subject) subject() string {
	if s.Pod != nil {
		return "pod " + s.NamespaceName + "/" + s.Pod.Name
	}
	if s.Workload != nil {
		return strings.ToLower(s.Workload.Kind) + " " + s.NamespaceName + "/" + s.Workload.Meta.Name
	}
	return "namespace " + s.NamespaceName
}

// running reports whether the subject is a pod of the cluster, not a template or a manifest.
func (s subject) running() bool { return s.Pod != nil && s.File == "" }

func (s subject) annotated() bool { return s.Keys().Annotated(s.Meta().Annotations) }

func (s subject) optedIn() bool {
	return s.Namespace != nil && s.Keys().OptedIn(s.Namespace.Labels)
}

// message returns the newest message that f accepts.
func (s subject) message(f func(snapshot.Message) bool) (snapshot.Message, bool) {
	if at := slices.IndexFunc(s.Messages, f); at >= 0 {
		return s.Messages[at], true
	}
	return snapshot.Message{}, false
}

// Write prints the explanation for a terminal.
func (x Explanation) Write(w io.Writer, style finding.Style) error {
	if err := x.Report.Write(w, style); err != nil {
		return err
	}
	_, err := fmt.Fprintf(w, "\n%s\n", finding.Printable(x.Conclusion))
	return err
}
