package podview

import (
	"bytes"
	"fmt"

	"k8s.io/apimachinery/pkg/util/json"
)

// Limits of a pod. All except MaxContainers are above what an API server can store: etcd accepts 1.5 MiB, in an encoding
// that is shorter than JSON.
const (
	// MaxObject is the maximum length of an object's JSON, in bytes. An API server reads requests of at most 3 MiB.
	MaxObject = 3 << 20
	// MaxContainers is the maximum number of containers and init containers together. Injection adds some 500 bytes
	// for each, so its patch stays below 1 MiB.
	MaxContainers = 1000
	// MaxValues is the maximum [Shape.Values]. What etcd can store has fewer: an API server was seen to store 34,000
	// variables of 40 bytes, and each is 3 values.
	MaxValues = 200_000
	// MaxDepth is the maximum [Shape.Depth]. Pods have less than 20.
	MaxDepth = 100
	// maxName is the maximum length of the names that messages and the patch repeat. No name in Kubernetes is longer.
	// Kubernetes checks its own limits after admission.
	maxName = 253
)

// Shape measures what decoding a JSON text costs in addition to the length of the text.
type Shape struct {
	// Values is the number of objects, arrays and their elements. Those in managedFields do not count: the API server
	// adds them, and this package does not decode them.
	Values int
	// Depth is the number of objects and arrays around the innermost value.
	Depth int
}

// Measure returns the shape of a JSON text. It reads the text once and allocates nothing. If the text is invalid, the
// shape is at least what a decoder meets before it finds the error.
func Measure(raw []byte) (s Shape) {
	depth, counted := 0, 1
	managed := -1 // the depth of the object whose managedFields the loop is in
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

// managedFields starts a member of that name, as the API server writes it. No type of this package has such a field.
var managedFields = []byte(`"managedFields":`)

// quoted returns the length of a JSON string after its opening quote, including the closing one.
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

// Check refuses an object that is larger than an API server can store. It decodes nothing.
func Check(raw []byte) error {
	if len(raw) > MaxObject {
		return unsupported("the pod has %d bytes of JSON, and an API server accepts at most %d; make it smaller", len(raw), MaxObject)
	}
	return Measure(raw).Check()
}

// Check refuses a shape that exceeds [MaxValues] or [MaxDepth].
func (s Shape) Check() error {
	switch {
	case s.Values > MaxValues:
		return unsupported("the pod has %d fields and list elements, and the maximum is %d; make it smaller, or remove its annotations of Credence", s.Values, MaxValues)
	case s.Depth > MaxDepth:
		return unsupported("the pod is nested %d levels deep, and the maximum is %d; make it simpler, or remove its annotations of Credence", s.Depth, MaxDepth)
	}
	return nil
}

// List is a slice that is decoded into memory of exactly its size. The decoder alone would grow the slice, and leave
// several times its size as garbage.
type List[E any] []E

// UnmarshalJSON implements the interface of encoding/json.
func (l *List[E]) UnmarshalJSON(raw []byte) error {
	*l = nil
	if raw[0] != '[' { // null, or an error
		return json.Unmarshal(raw, (*[]E)(l))
	}
	*l = make([]E, 0, elements(raw))
	return json.Unmarshal(raw, (*[]E)(l))
}

// Containers is a list of at most [MaxContainers] containers.
type Containers List[Container]

// UnmarshalJSON implements the interface of encoding/json.
func (c *Containers) UnmarshalJSON(raw []byte) error {
	if n := elements(raw); n > MaxContainers {
		return tooManyContainers(n)
	}
	return (*List[Container])(c).UnmarshalJSON(raw)
}

func tooManyContainers(n int) error {
	return fmt.Errorf("%d containers, and the maximum is %d; split the pod", n, MaxContainers)
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
