package inject

import (
	"bytes"
	"fmt"

	"k8s.io/apimachinery/pkg/api/validation"
	"k8s.io/apimachinery/pkg/util/json"
)

// Bounds of a pod. All but that of containers are above what an API server can store: etcd takes 1.5 MiB, in a form that
// is shorter than JSON.
const (
	// MaxObject is the maximum length of an object's JSON, in bytes. An API server reads requests of at most 3 MiB.
	MaxObject = 3 << 20
	// MaxContainers is the maximum number of containers and init containers together. Injection adds some 500 bytes
	// for each, so that its patch stays below 1 MiB.
	MaxContainers = 1000
	// MaxValues is the maximum [Shape.Values]. What etcd can store has less: an API server was seen to store 34,000
	// variables of 40 bytes, and each is 3.
	MaxValues = 200_000
	// MaxDepth is the maximum [Shape.Depth]. Pods have less than 20.
	MaxDepth = 100
	// maxAnnotations is the maximum length of all annotations together, in bytes: that of Kubernetes, which checks it
	// after admission.
	maxAnnotations = validation.TotalAnnotationSizeLimitB
	// maxName is the maximum length of the names that messages and the patch repeat. No name in Kubernetes is longer;
	// it checks its own limits after admission.
	maxName = 253
	// maxWarnings is the maximum number of warnings that are composed for one pod; others are counted. The API server
	// passes on 4,096 characters.
	maxWarnings = 64
)

// Shape is what decoding a JSON text costs beside the length of the text.
type Shape struct {
	// Values is the number of objects, arrays and elements of either, but for those in managedFields, which the API
	// server adds and nothing here decodes.
	Values int
	// Depth is the number of objects and arrays around the innermost value.
	Depth int
}

// Measure returns the shape of a JSON text. It reads the text once and allocates nothing. A text that is not JSON gets
// the shape that a decoder meets until it finds that out, or a larger one.
func Measure(raw []byte) (s Shape) {
	depth, counted := 0, 1
	managed := -1 // the depth of the object whose managedFields are read
	for at := 0; at < len(raw); at++ {
		if raw[at] == '}' || raw[at] == ']' {
			depth--
		}
		if depth <= managed && (raw[at] == ',' || raw[at] == '}') {
			managed, counted = -1, 1
		}
		switch raw[at] {
		case '{', '[':
			s.Values += counted
			depth++
			s.Depth = max(s.Depth, depth)
		case ',':
			s.Values += counted
		case '"':
			n := quoted(raw[at+1:])
			if counted == 1 && bytes.HasPrefix(raw[at:], managedFields) {
				managed, counted = depth, 0
			}
			at += n
		}
	}
	return s
}

// managedFields is the beginning of a member of that name, as the API server writes it. Nothing that is decoded has it.
var managedFields = []byte(`"managedFields":`)

// quoted returns the length of a JSON string behind its opening quote, with the closing one.
func quoted(raw []byte) int {
	for at := 0; ; at++ {
		next := bytes.IndexByte(raw[at:], '"')
		if next < 0 {
			return len(raw)
		}
		at += next
		escapes := 0
		for at > escapes && raw[at-1-escapes] == '\\' {
			escapes++
		}
		if escapes%2 == 0 {
			return at + 1
		}
	}
}

// check refuses an object that is larger than what an API server can store, before anything is decoded.
func check(raw []byte) error {
	if len(raw) > MaxObject {
		return unsupported("the pod has %d bytes of JSON, and an API server takes at most %d: make it smaller", len(raw), MaxObject)
	}
	return Measure(raw).Check()
}

// Check refuses a shape that exceeds [MaxValues] or [MaxDepth].
func (s Shape) Check() error {
	switch {
	case s.Values > MaxValues:
		return unsupported("the pod has %d fields and elements of lists, and at most %d are read: make it smaller, or remove its annotations of Credence", s.Values, MaxValues)
	case s.Depth > MaxDepth:
		return unsupported("the pod is nested %d levels deep, and at most %d are read: make it simpler, or remove its annotations of Credence", s.Depth, MaxDepth)
	}
	return nil
}

// list is a slice that is decoded into memory of the right size. The decoder alone would grow it, and leave several
// times its size behind.
type list[E any] []E

// UnmarshalJSON implements the interface of encoding/json.
func (l *list[E]) UnmarshalJSON(raw []byte) error {
	*l = nil
	if raw[0] != '[' { // null, or an error
		return json.Unmarshal(raw, (*[]E)(l))
	}
	*l = make([]E, 0, elements(raw))
	return json.Unmarshal(raw, (*[]E)(l))
}

// containers is a list of bounded length.
type containers list[container]

// UnmarshalJSON implements the interface of encoding/json.
func (c *containers) UnmarshalJSON(raw []byte) error {
	if n := elements(raw); n > MaxContainers {
		return tooManyContainers(n)
	}
	return (*list[container])(c).UnmarshalJSON(raw)
}

func tooManyContainers(n int) error {
	return fmt.Errorf("%d containers, and at most %d are injected: split the pod", n, MaxContainers)
}

// elements returns the number of elements of a JSON array.
func elements(raw []byte) (n int) {
	depth := 0
	for at := 0; at < len(raw); at++ {
		switch raw[at] {
		case '{', '[':
			depth++
		case '}', ']':
			depth--
		case ',':
			if depth == 1 {
				n++
			}
		case '"':
			at += quoted(raw[at+1:])
		}
	}
	if n > 0 {
		return n + 1
	}
	if len(bytes.Trim(raw, "[] \t\r\n")) > 0 {
		return 1
	}
	return 0
}
