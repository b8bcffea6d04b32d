package podview_test

import (
	"strings"
	"testing"

	"github.com/credence-iam/credence/webhook/inject/podview"
)

func TestMeasure(t *testing.T) {
	for text, want := range map[string]podview.Shape{
		``:                           {},
		`null`:                       {},
		`"[{,"`:                      {},
		`"\"[{,"`:                    {},
		`"\\",[]`:                    {Values: 2, Depth: 1},
		`"\\\"[",{`:                  {Values: 2, Depth: 1},
		`{}`:                         {Values: 1, Depth: 1},
		`[{},{}]`:                    {Values: 4, Depth: 2},
		`{"a":[1,2,3],"b":{"c":[]}}`: {Values: 7, Depth: 3},
		`[[[]],[]]`:                  {Values: 5, Depth: 3},
		`"no end`:                    {},
		`{"managedFields":[{"a":{}},{}],"b":[1]}`:           {Values: 3, Depth: 4},
		`{"a":{"managedFields":{"b":[{}]}},"c":{"d":1}}`:    {Values: 4, Depth: 5},
		`{"managedFields":null,"b":[1,2]}`:                  {Values: 4, Depth: 2},
		`["managedFields",{},{}]`:                           {Values: 5, Depth: 2},
		`{"managedFields":{"managedFields":[[]]},"b":[[]]}`: {Values: 4, Depth: 4},
		`[` + strings.Repeat(`,`, 99):                       {Values: 100, Depth: 1},
		`]]]]{`:                                             {Values: 1},
	} {
		if got := podview.Measure([]byte(text)); got != want {
			t.Errorf("%.40s: %+v, want %+v", text, got, want)
		}
	}
}
