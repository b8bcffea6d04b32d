package manifests_test

import (
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// FuzzInject: the command refuses any input, or injecting its output again changes no byte. Input without a key of ours
// stays unchanged.
func FuzzInject(f *testing.F) {
	for _, pattern := range []string{"testdata/*.in.*", "../../webhook/inject/testdata/*.in.yaml"} {
		files, err := filepath.Glob(pattern)
		if err != nil || len(files) == 0 {
			f.Fatalf("%s: no seeds: %v", pattern, err)
		}
		for _, file := range files {
			text, err := os.ReadFile(file)
			if err != nil {
				f.Fatal(err)
			}
			f.Add(string(text))
		}
	}
	for _, text := range untouched {
		f.Add(text)
	}
	for _, text := range unterminated() {
		f.Add(text)
	}
	for _, tt := range unreadable {
		f.Add(tt.text)
	}
	f.Add("a: &a [*a]\nkind: Pod\napiVersion: v1\n")
	f.Add("&a kind: Pod\napiVersion: v1\nmetadata: {annotations: {iam.amazonaws.com/role: x}}\nspec: {containers: [{name: a}, *b]}\n")
	f.Fuzz(func(t *testing.T, text string) {
		out, _, err := run(t, text)
		if err != nil {
			return
		}
		again, said, err := run(t, out)
		if err != nil || again != out {
			t.Fatalf("injecting again: %v\n%s\n%q became\n%q, and then\n%q", err, said, text, out, again)
		}
		if !strings.Contains(text, "amazonaws") && !strings.ContainsAny(text, `\*`) && out != text && !strings.Contains(text, "iam") {
			t.Fatalf("%q became %q", text, out)
		}
	})
}

// FuzzStyles writes one pod in all styles of YAML and JSON, by chance. The command injects each in place and keeps all of its
// lines, except those in brackets.
func FuzzStyles(f *testing.F) {
	for seed := range uint64(150) {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, seed uint64) {
		w := writer{rand.New(rand.NewPCG(seed, 1))}
		text := w.document()
		out, said := must(t, text)
		if strings.Contains(said, "rewritten") {
			t.Errorf("seed %d was rewritten:\n%s", seed, text)
		}
		if strings.Contains(text, "\r\n") && strings.Count(out, "\n") != strings.Count(out, "\r\n") {
			t.Errorf("seed %d: line breaks differ:\n%q", seed, out)
		}
		if n := strings.Count(out, "/credence-sidecar:v1"); n != 1 {
			t.Errorf("seed %d: %d sidecars in\n%s\nof\n%s", seed, n, out, text)
		}
		// Each old line is there, in order, except lines with an addition.
		rest := strings.Split(strings.ReplaceAll(out, "\r", ""), "\n")
		for line := range strings.Lines(text) {
			line = strings.TrimRight(line, "\r\n")
			if strings.ContainsAny(line, "[]{}~") || strings.Contains(line, "null") {
				continue
			}
			at := 0
			for at < len(rest) && rest[at] != line {
				at++
			}
			if at == len(rest) {
				t.Errorf("seed %d: line %q is lost in\n%s\nof\n%s", seed, line, out, text)
				break
			}
			rest = rest[at+1:]
		}
		if t.Failed() {
			return
		}
		diff, _, err := run(t, text, withDiff)
		if err != nil {
			t.Fatal(err)
		}
		if seed%10 != 0 {
			return // Each call of patch starts a process.
		}
		if got := patch(t, text, diff); got != out {
			t.Errorf("seed %d: the difference results in\n%s\nwant\n%s", seed, got, out)
		}
	})
}

// writer writes YAML by chance.
type writer struct{ *rand.Rand }

func (w writer) one(choices ...string) string { return choices[w.IntN(len(choices))] }

// field is a key and its value: a YAML string, []field, or []any of either.
type field struct {
	key   string
	value any
}

func (w writer) document() string {
	container := func(name string) []field {
		fields := []field{{"name", name}, {"image", w.one("a", `"b"`, "'c'")}}
		switch w.IntN(5) {
		case 0:
			fields = append(fields, field{"env", []any{[]field{{"name", "A"}, {"value", w.one(`"yes"`, "'it''s'", "a b", `"a\"b"`)}}}})
		case 1:
			fields = append(fields, field{"env", w.one("[]", "null", "~")})
		case 2:
			fields = append(fields, field{"tomorrow", []any{w.one("-x", "'#'", "a#b", `"a]b"`, "\"{\"", "x y"), "0755"}})
		}
		w.Shuffle(len(fields), func(i, j int) { fields[i], fields[j] = fields[j], fields[i] })
		return fields
	}
	spec := []field{{"containers", []any{container("app"), container("two")}}}
	if w.IntN(2) == 0 {
		spec = append(spec, field{"initContainers", []any{container("init")}})
	}
	if w.IntN(2) == 0 {
		spec = append(spec, field{"volumes", []any{[]field{{"name", "v"}, {"emptyDir", "{}"}}}})
	}
	metadata := []field{{"name", "p"}, {"annotations", []field{{"iam.amazonaws.com/role", "r"}, {"other", w.one("|\v  text\v  # more", ">-\v  a\v\v  b", `"1e3"`, "plain words")}}}}
	switch w.IntN(4) {
	case 0:
		metadata = append(metadata, field{"labels", []field{{"app", "x"}}})
	case 1:
		metadata = append(metadata, field{"labels", w.one("{}", "null")})
	}
	all := []field{{"apiVersion", "v1"}, {"kind", "Pod"}, {"metadata", metadata}, {"spec", spec}}
	for _, fields := range [][]field{spec, metadata, all} {
		w.Shuffle(len(fields), func(i, j int) { fields[i], fields[j] = fields[j], fields[i] })
	}
	indent := 2 + 2*w.IntN(2)
	lists := w.IntN(3)
	var lines []string
	w.block(&lines, "", all, indent, lists)
	newline := w.one("\n", "\n", "\r\n")
	end := w.one(newline, "", newline+newline, newline+"..."+newline, newline+"# last")
	return w.one("", "---"+newline, "# first"+newline) + strings.Join(lines, newline) + end
}

func (w writer) block(lines *[]string, white string, fields []field, indent, lists int) {
	deeper := white + strings.Repeat(" ", indent)
	comment := func() string { return w.one("", "", "", "  # said of it") }
	for _, f := range fields {
		switch w.IntN(12) {
		case 0:
			*lines = append(*lines, white+"# about "+f.key)
		case 1:
			*lines = append(*lines, "")
		}
		key := white + w.one(f.key, f.key, `"`+f.key+`"`) + ":"
		switch v := f.value.(type) {
		case string:
			header, rest, isBlock := strings.Cut(v, "\v")
			*lines = append(*lines, key+w.one(" ", "   ")+header+comment())
			if isBlock {
				for line := range strings.SplitSeq(rest, "\v") {
					*lines = append(*lines, strings.TrimRight(white+line, " "))
				}
			}
		case []field:
			if w.IntN(4) == 0 && !strings.Contains(flow(v), "\v") {
				*lines = append(*lines, key+" "+flow(v)+comment())
				continue
			}
			*lines = append(*lines, key+comment())
			w.block(lines, deeper, v, indent, lists)
		case []any:
			if w.IntN(4) == 0 {
				*lines = append(*lines, key+" "+flow(v)+comment())
				continue
			}
			*lines = append(*lines, key+comment())
			at := white + strings.Repeat(" ", lists)
			for _, element := range v {
				if fields, ok := element.([]field); ok {
					var item []string
					w.block(&item, at+"  ", fields, indent, lists)
					for i, line := range item { // Comments stand before the dash.
						if rest := strings.TrimSpace(line); rest != "" && rest[0] != '#' {
							item[i] = at + "- " + line[len(at)+2:]
							break
						}
					}
					*lines = append(*lines, item...)
					continue
				}
				*lines = append(*lines, at+"- "+flow(element)+comment())
			}
		}
	}
}

// flow writes a value in brackets.
func flow(v any) string {
	var parts []string
	switch v := v.(type) {
	case []field:
		for _, f := range v {
			parts = append(parts, f.key+": "+flow(f.value))
		}
		return "{" + strings.Join(parts, ", ") + "}"
	case []any:
		for _, element := range v {
			parts = append(parts, flow(element))
		}
		return "[ " + strings.Join(parts, " , ") + " ]"
	default:
		return v.(string) //nolint:forcetypeassert // There is no other type.
	}
}
