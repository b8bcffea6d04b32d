package configfile

import (
	"bytes"
	"encoding"
	"errors"
	"fmt"
	"io"
	"reflect"
	"strconv"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/credence-iam/credence/broker/typo"
)

// Decode decodes the text of a file, in YAML or JSON, into the struct to which into points. json tags name the fields. A
// field that the file lacks keeps its value. Decode is strict: an unknown or repeated field, a field without a value and a
// value of a wrong type are errors, which name the place in the file.
//
// Scalars keep their text. To YAML, an account ID without quotes is a number, and an octal one if it starts with 0. Decode
// returns the account ID. It also does not change the tag value 1.10 to 1.1.
//
// After an error, into may have a part of the file.
func Decode(text []byte, into any) error {
	decoder := yaml.NewDecoder(bytes.NewReader(text))
	var document, more yaml.Node
	switch err := decoder.Decode(&document); {
	case errors.Is(err, io.EOF):
		return errors.New("file is empty")
	case err != nil:
		return fmt.Errorf("%.500s", strings.TrimPrefix(err.Error(), "yaml: "))
	}
	if err := decoder.Decode(&more); !errors.Is(err, io.EOF) {
		return errors.New("file has more than one document")
	}
	return decode(document.Content[0], "", reflect.ValueOf(into).Elem())
}

// wrong returns an error of node, which is at path.
func wrong(node *yaml.Node, path, format string, args ...any) error {
	if path != "" {
		path += ": "
	}
	return fmt.Errorf("line %d: %.200s%w", node.Line, path, fmt.Errorf(format, args...))
}

// decode decodes node into v. Package yaml alone would report no paths and not all duplicates, and would accept numbers as
// text.
func decode(node *yaml.Node, path string, v reflect.Value) error {
	switch {
	case node.Kind == yaml.AliasNode, node.Anchor != "":
		return wrong(node, path, "anchors and aliases are not supported; write the value out")
	case node.Style&yaml.TaggedStyle != 0:
		return wrong(node, path, "tag %.50q is not supported; remove it", node.Tag)
	case node.Kind == yaml.ScalarNode && node.ShortTag() == "!!null":
		return wrong(node, path, "has no value; remove it, or write [] for an empty list")
	}
	switch v.Kind() {
	case reflect.Struct:
		fields := map[string]reflect.Value{}
		var names []string
		for i := range v.NumField() {
			name := v.Type().Field(i).Tag.Get("json")
			fields[name], names = v.Field(i), append(names, name)
		}
		return pairs(node, path, func(key string, value *yaml.Node, path string) error {
			field, ok := fields[key]
			if !ok {
				return wrong(value, path, "unknown field; known here are %s: did you mean %s?", strings.Join(names, ", "), typo.Nearest(key, names))
			}
			return decode(value, path, field)
		})
	case reflect.Map:
		v.Set(reflect.MakeMap(v.Type()))
		return pairs(node, path, func(key string, value *yaml.Node, path string) error {
			text := reflect.New(v.Type().Elem()).Elem()
			if err := decode(value, path, text); err != nil {
				return err
			}
			v.SetMapIndex(reflect.ValueOf(key), text)
			return nil
		})
	case reflect.Slice:
		if node.Kind != yaml.SequenceNode {
			return wrong(node, path, "must be a list")
		}
		v.Set(reflect.MakeSlice(v.Type(), len(node.Content), len(node.Content)))
		for i, item := range node.Content {
			if err := decode(item, fmt.Sprintf("%s[%d]", path, i), v.Index(i)); err != nil {
				return err
			}
		}
		return nil
	default:
		return decodeScalar(node, path, v)
	}
}

func decodeScalar(node *yaml.Node, path string, v reflect.Value) error {
	if node.Kind != yaml.ScalarNode {
		return wrong(node, path, "must be one value, not a list or a map")
	}
	if own, ok := reflect.TypeAssert[encoding.TextUnmarshaler](v.Addr()); ok {
		if err := own.UnmarshalText([]byte(node.Value)); err != nil {
			return wrong(node, path, "%w", err)
		}
		return nil
	}
	switch {
	case v.Type() == reflect.TypeFor[time.Duration]():
		d, err := time.ParseDuration(node.Value)
		if err != nil {
			return wrong(node, path, "%.100q is not a duration such as 90m or 2h", node.Value)
		}
		v.SetInt(int64(d))
	case v.Kind() == reflect.Bool:
		if node.ShortTag() != "!!bool" || node.Value != "true" && node.Value != "false" {
			return wrong(node, path, "%.100q is neither true nor false", node.Value)
		}
		v.SetBool(node.Value == "true")
	case v.Kind() == reflect.Int, v.Kind() == reflect.Int64:
		n, err := strconv.ParseInt(node.Value, 10, v.Type().Bits())
		if err != nil || strconv.FormatInt(n, 10) != node.Value {
			return wrong(node, path, "%.100q is not a whole number such as 9779", node.Value)
		}
		v.SetInt(n)
	case v.Kind() == reflect.String:
		v.SetString(node.Value)
	default:
		return wrong(node, path, "type %s is not supported", v.Type()) // Tests of the callers check all their types.
	}
	return nil
}

// pairs calls each with all keys and values of a map, and refuses a repeated key.
func pairs(node *yaml.Node, path string, each func(key string, value *yaml.Node, path string) error) error {
	if node.Kind != yaml.MappingNode {
		return wrong(node, path, "must be a map of fields")
	}
	lines := map[string]int{} // :: key → its line
	for i := 0; i+1 < len(node.Content); i += 2 {
		key, value := node.Content[i], node.Content[i+1]
		if key.Kind != yaml.ScalarNode || key.Anchor != "" || key.Style&yaml.TaggedStyle != 0 {
			return wrong(key, path, "has a key that is not plain text")
		}
		below := strings.TrimPrefix(path+"."+key.Value, ".")
		if line, twice := lines[key.Value]; twice {
			return wrong(key, below, "is repeated; line %d has it, too", line)
		}
		lines[key.Value] = key.Line
		if err := each(key.Value, value, below); err != nil {
			return err
		}
	}
	return nil
}
