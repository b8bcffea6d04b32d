package inject

import (
	"fmt"
	"strings"
)

// Operation is one "add" of an RFC 6902 JSON Patch. This package makes no other kind: "add" cannot remove, and in an array
// it replaces nothing.
type Operation struct {
	Op    string `json:"op"` // always "add"
	Path  string `json:"path"`
	Value any    `json:"value"`
}

func add(path string, value any) Operation {
	return Operation{Op: "add", Path: path, Value: value}
}

// appendAll adds values to the end of the array at path. If array is nil, the array is absent or null, and appendAll adds
// the whole array: "add" replaces a null.
func appendAll[E, V any](ops []Operation, path string, array []E, values []V) []Operation {
	if len(values) == 0 {
		return ops
	}
	if array == nil {
		return append(ops, add(path, values))
	}
	for _, value := range values {
		ops = append(ops, add(path+"/-", value))
	}
	return ops
}

// prepend adds value to the start of the array at path. It treats nil as [appendAll] does.
func prepend[E, V any](ops []Operation, path string, array []E, value V) []Operation {
	if array == nil {
		return append(ops, add(path, []V{value}))
	}
	return append(ops, add(path+"/0", value))
}

// setKey sets one key of the object at path, unless the key already has that value. If object is nil, it adds the object.
func setKey(ops []Operation, path string, object map[string]string, key, value string) []Operation {
	if old, ok := object[key]; ok && old == value {
		return ops
	}
	if object == nil {
		return append(ops, add(path, map[string]string{key: value}))
	}
	return append(ops, add(fmt.Sprintf("%s/%s", path, escape(key)), value))
}

// escape encodes a key as a token of a JSON pointer (RFC 6901 section 3).
var escape = strings.NewReplacer("~", "~0", "/", "~1").Replace
