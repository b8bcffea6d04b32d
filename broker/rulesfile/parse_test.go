package rulesfile_test

import (
	"encoding/json"
	"fmt"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/credence-iam/credence/broker/policy"
	"github.com/credence-iam/credence/broker/rulesfile"
)

// whole sets every field.
const whole = `# The platform team's.
kubernetesTags: true
transitiveTags: [team, "cost centre"]
sourceIdentity: service-account
namespaces:
  - match: [shop, team-*]
    accounts: [012345678901, "210987654321"]
    roles:
      - /team/*
      - arn:aws:iam::210987654321:role/shared-*
    externalIDs: ["acme-*"]
    sessionNames: []
    maxDuration: 1h30m
    forcedTags:
      team: "{namespace}"
      version: 1.10
      legacy: true
  - match: ["*"]
`

var wholeFile = policy.File{
	KubernetesTags: true,
	TransitiveTags: []string{"team", "cost centre"},
	SourceIdentity: policy.SourceServiceAccount,
	Namespaces: []policy.NamespaceRules{
		{
			Match: []string{"shop", "team-*"}, Accounts: []string{"012345678901", "210987654321"},
			Roles:       []string{"/team/*", "arn:aws:iam::210987654321:role/shared-*"},
			ExternalIDs: []string{"acme-*"}, SessionNames: []string{}, MaxDuration: 90 * time.Minute,
			ForcedTags: map[string]string{"team": "{namespace}", "version": "1.10", "legacy": "true"},
		},
		{Match: []string{"*"}},
	},
}

func TestParse(t *testing.T) {
	for name, text := range map[string]string{"YAML": whole, "JSON": encode(t, wholeFile), "JSON with tabs": indent(t, encode(t, wholeFile)), "CRLF": strings.ReplaceAll(whole, "\n", "\r\n")} {
		got, err := rulesfile.Parse([]byte(text))
		if err != nil {
			t.Errorf("%s: %v\n%s", name, err, text)
		}
		if diff := cmp.Diff(wholeFile, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
	}
	// wholeFile has no zero field.
	for _, v := range []reflect.Value{reflect.ValueOf(wholeFile), reflect.ValueOf(wholeFile.Namespaces[0])} {
		for i := range v.NumField() {
			if v.Field(i).IsZero() {
				t.Errorf("%s is not set here", v.Type().Field(i).Name)
			}
		}
	}
}

// encode returns file as JSON.
func encode(t testing.TB, file policy.File) string {
	t.Helper()
	plain := map[string]any{}
	var fill func(into map[string]any, v reflect.Value)
	fill = func(into map[string]any, v reflect.Value) {
		for i := range v.NumField() {
			name, field := v.Type().Field(i).Tag.Get("json"), v.Field(i)
			switch value := field.Interface().(type) {
			case []policy.NamespaceRules:
				list := make([]map[string]any, len(value))
				for at := range value {
					list[at] = map[string]any{}
					fill(list[at], field.Index(at))
				}
				into[name] = list
			case time.Duration:
				if value != 0 {
					into[name] = value.String()
				}
			default:
				if kind := field.Kind(); (kind != reflect.Slice && kind != reflect.Map || !field.IsNil()) && field.Interface() != policy.SourceIdentity("") {
					into[name] = value
				}
			}
		}
	}
	fill(plain, reflect.ValueOf(file))
	text, err := json.Marshal(plain)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

func indent(t testing.TB, text string) string {
	t.Helper()
	var plain any
	if err := json.Unmarshal([]byte(text), &plain); err != nil {
		t.Fatal(err)
	}
	pretty, err := json.MarshalIndent(plain, "", "\t")
	if err != nil {
		t.Fatal(err)
	}
	return string(pretty)
}

var refused = []struct{ text, want string }{
	{"", "file is empty"},
	{"# nothing\n", "file is empty"},
	{"---\n", "has no value"},
	{"null", "has no value"},
	{"[]", "line 1: must be a map of fields"},
	{"text", "must be a map of fields"},
	{"{}", "namespaces: has no entry"},
	{"namespaces: []", "namespaces: has no entry"},
	{"namespaces:", "line 1: namespaces: has no value"},
	{"namespaces: {}", "line 1: namespaces: must be a list"},
	{"namespaces: [a]", "line 1: namespaces[0]: must be a map"},
	{"namespace:\n- match: [a]", "line 2: namespace: unknown field; known here are kubernetesTags, transitiveTags, sourceIdentity, namespaces"},
	{"namespaces:\n- match: [a]\n  rols: [b]", "line 3: namespaces[0].rols: unknown field; known here are match, accounts, roles,"},
	{"namespaces:\n- match: [a]\n- Match: [a]", "line 3: namespaces[1].Match: unknown field"},
	{"namespaces:\n- match: [a]\n  match: [b]", "line 3: namespaces[0].match: is repeated; line 2 has it, too"},
	{"kubernetesTags: true\nnamespaces:\n- match: [a]\nkubernetesTags: false", "line 4: kubernetesTags: is repeated; line 1 has it, too"},
	{`{"namespaces":[{"match":["a"],"match":["b"]}]}`, "namespaces[0].match: is repeated"},
	{"namespaces:\n- match: [a]\n  forcedTags: {team: a, team: b}", "namespaces[0].forcedTags.team: is repeated"},
	{"namespaces:\n- match: [a]\n  forcedTags: [team]", "namespaces[0].forcedTags: must be a map"},
	{"namespaces:\n- match: [a]\n  forcedTags: {team: }", "namespaces[0].forcedTags.team: has no value"},
	{"namespaces:\n- match: [a]\n  forcedTags: {team: [x]}", "must be one value"},
	{"namespaces:\n- match: a", "line 2: namespaces[0].match: must be a list"},
	{"namespaces:\n- match: [a]\n  accounts: 123456789012", "line 3: namespaces[0].accounts: must be a list"},
	{"namespaces:\n- match: [[a]]", "namespaces[0].match[0]: must be one value"},
	{"namespaces:\n- match: [~]", "namespaces[0].match[0]: has no value"},
	{"namespaces:\n- match: [a]\n  maxDuration: 3600", `line 3: namespaces[0].maxDuration: "3600" is not a duration`},
	{"namespaces:\n- match: [a]\n  maxDuration: 1m", "namespaces[0].maxDuration: 1m0s is out of bounds"},
	{"namespaces:\n- match: [a]\n  accounts: [1.23456789012e+11]", `namespaces[0].accounts[0]: "1.23456789012e+11" is not an AWS account`},
	{"kubernetesTags: yes\nnamespaces:\n- match: [a]", `line 1: kubernetesTags: "yes" is neither true nor false`},
	{"kubernetesTags: \"true\"\nnamespaces:\n- match: [a]", "is neither true nor false"},
	{"kubernetesTags: 1\nnamespaces:\n- match: [a]", "is neither true nor false"},
	{"sourceIdentity: pod\nnamespaces:\n- match: [a]", `sourceIdentity: "pod" is none of`},
	{"x: &x [a]\nnamespaces:\n- match: *x", "unknown field"},
	{"namespaces:\n- match: &x [a]\n- match: *x", "line 2: namespaces[0].match: anchors and aliases are not supported"},
	{"namespaces:\n- match: [a]\n  <<: {roles: [b]}", "namespaces[0].<<: unknown field"},
	{"namespaces:\n- match: [!!binary YQ==]", `tag "!!binary" is not supported`},
	{"namespaces:\n- match: [!x a]", "is not supported"},
	{"? [a]\n: b", "has a key that is not plain text"},
	{"namespaces:\n- match: [a]\n---\nnamespaces:\n- match: [b]", "more than one document"},
	{"namespaces:\n- match: [a", "line "},
	{"namespaces: *x", "unknown anchor"},
	{"\x00", "control characters"},
	{"\xff\xff", ""},
	{strings.Repeat("[", 100_000), ""},
	{"? " + strings.Repeat("a", 100_000) + "\n: b", "unknown field"},
}

func TestParseRefuses(t *testing.T) {
	for _, tt := range refused {
		file, err := rulesfile.Parse([]byte(tt.text))
		if err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%.200q: %v, want %q", tt.text, err, tt.want)
			continue
		}
		if !reflect.ValueOf(file).IsZero() {
			t.Errorf("%.200q: error %v with result %+v", tt.text, err, file)
		}
		if len(err.Error()) > 1000 {
			t.Errorf("%.200q: error has %d characters, want at most 1000", tt.text, len(err.Error()))
		}
	}
}

// FuzzParse: the rules can use each accepted file, and it stays the same after encoding. All else is an error of readable
// length, without a result.
func FuzzParse(f *testing.F) {
	f.Add(whole)
	f.Add(encode(f, wholeFile))
	for _, tt := range refused {
		f.Add(tt.text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		file, err := rulesfile.Parse([]byte(text))
		if err != nil {
			if !reflect.ValueOf(file).IsZero() || len(err.Error()) > 2000 {
				t.Errorf("error of %d characters (%.2000s) with result %+v", len(err.Error()), err, file)
			}
			return
		}
		var rules policy.Rules
		if err := rules.Use(file); err != nil {
			t.Errorf("Use refuses what Parse accepted: %v", err)
		}
		again, err := rulesfile.Parse([]byte(encode(t, file)))
		if err != nil {
			t.Fatalf("parsing the encoded file %s: %v", encode(t, file), err)
		}
		if diff := cmp.Diff(file, again); diff != "" {
			t.Errorf("parsing the encoded file (-want +got):\n%s", diff)
		}
	})
}

// TestAllTypesAreSupported: decode supports the type of each field. It would always refuse a field of another type.
func TestAllTypesAreSupported(t *testing.T) {
	known := map[string]bool{"bool": true, "string": true, "[]string": true, "map[string]string": true, "time.Duration": true,
		"policy.SourceIdentity": true, "[]policy.NamespaceRules": true}
	for _, typ := range []reflect.Type{reflect.TypeFor[policy.File](), reflect.TypeFor[policy.NamespaceRules]()} {
		for field := range typ.Fields() {
			if !known[fmt.Sprint(field.Type)] {
				t.Errorf("%s.%s has type %s, which decode may not support; add the type there and here", typ.Name(), field.Name, field.Type)
			}
		}
	}
}
