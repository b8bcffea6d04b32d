package manifests_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"sigs.k8s.io/yaml"

	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/policy"
	"github.com/credence-iam/credence/operator/manifests"
	"github.com/credence-iam/credence/webhook/inject"
)

var update = flag.Bool("update", false, "update the golden files")

const namespace = "team-a"

// config returns the settings of the webhook's golden tests, which all tests use.
func config(t testing.TB) manifests.Config {
	t.Helper()
	keys, err := policy.NewKeys(policy.DefaultPrefix)
	if err != nil {
		t.Fatal(err)
	}
	injector, err := inject.New(inject.Config{
		Keys: keys, Image: "registry.example/credence-sidecar:v1", Broker: "credence-broker.credence.svc:9443", Settings: inject.DefaultSettings(),
	})
	if err != nil {
		t.Fatal(err)
	}
	base, err := credential.ParseRoleBase("arn:aws:iam::123456789012:role/")
	if err != nil {
		t.Fatal(err)
	}
	rules, err := policy.New(policy.Config{Keys: keys, Base: base})
	if err != nil {
		t.Fatal(err)
	}
	return manifests.Config{Files: []string{"-"}, Namespace: namespace, Injector: injector, Rules: rules}
}

// run injects text as standard input.
func run(t testing.TB, text string, change ...func(*manifests.Config)) (out, said string, err error) {
	t.Helper()
	cfg := config(t)
	for _, f := range change {
		f(&cfg)
	}
	var stdout, stderr bytes.Buffer
	cfg.Stdin, cfg.Stdout, cfg.Stderr = strings.NewReader(text), &stdout, &stderr
	err = manifests.Inject(t.Context(), cfg)
	if err != nil && stdout.Len() > 0 {
		t.Errorf("error %v comes with output", err)
	}
	return stdout.String(), stderr.String(), err
}

// must is run for input that is not refused. Injecting the result again must change no byte.
func must(t testing.TB, text string, change ...func(*manifests.Config)) (out, said string) {
	t.Helper()
	out, said, err := run(t, text, change...)
	if err != nil {
		t.Fatalf("%v\n%s\nof\n%s", err, said, text)
	}
	again, _, err := run(t, out, change...)
	if err != nil {
		t.Fatalf("injecting again: %v", err)
	}
	if diff := cmp.Diff(out, again); diff != "" {
		t.Errorf("injecting again changes (-first +second):\n%s", diff)
	}
	return out, said
}

func withDiff(cfg *manifests.Config) { cfg.Diff = true }

// TestGolden compares output and messages with files. git apply of the difference must have the same result.
func TestGolden(t *testing.T) {
	files, err := filepath.Glob("testdata/*.in.*")
	if err != nil || len(files) == 0 {
		t.Fatalf("testdata has no *.in.*: nothing would be tested (%v)", err)
	}
	for _, in := range files {
		name, ext, _ := strings.Cut(filepath.Base(in), ".in")
		t.Run(name, func(t *testing.T) {
			text := read(t, in)
			out, said := must(t, text)
			compare(t, "testdata/"+name+".out"+ext, out)
			compare(t, "testdata/"+name+".said.txt", said)

			diff, _, err := run(t, text, withDiff)
			if err != nil {
				t.Fatal(err)
			}
			checkPlaces(t, diff, out)
			if got := patch(t, text, diff); got != out {
				t.Errorf("the difference has another result (-written +patched):\n%s", cmp.Diff(out, got))
			}
			if again, _, err := run(t, out, withDiff); err != nil || again != "" {
				t.Errorf("the difference to itself: %q, %v", again, err)
			}
		})
	}
}

func read(t testing.TB, file string) string {
	t.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

func compare(t *testing.T, file, got string) {
	t.Helper()
	if *update {
		if err := os.WriteFile(file, []byte(got), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if diff := cmp.Diff(read(t, file), got); diff != "" {
		t.Errorf("%s (-want +got; -update writes it):\n%s", file, diff)
	}
}

var hunk = regexp.MustCompile(`^@@ -[0-9,]+ \+(\d+)`)

// checkPlaces checks the line numbers of each hunk of a difference, because git apply also looks nearby.
func checkPlaces(t *testing.T, diff, out string) {
	t.Helper()
	lines := strings.Split(out, "\n")
	at, found := 0, 0
	for line := range strings.Lines(diff) {
		switch match := hunk.FindStringSubmatch(line); {
		case match != nil:
			at, _ = strconv.Atoi(match[1])
			at--
			found++
		case found > 0 && (line[0] == '+' || line[0] == ' '):
			if at >= len(lines) || lines[at]+"\n" != line[1:] {
				t.Fatalf("line %d is not %q", at+1, line)
			}
			at++
		}
	}
	if (found > 0) != (diff != "") {
		t.Errorf("there are %d parts in %q", found, diff)
	}
}

// patch applies a difference to text by git apply.
func patch(t *testing.T, text, diff string) string {
	t.Helper()
	dir := t.TempDir()
	diff = strings.ReplaceAll(diff, "standard input", "file")
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if diff == "" {
		return text
	}
	cmd := exec.CommandContext(t.Context(), "git", "apply", "-p0", "--whitespace=nowarn", "-")
	cmd.Dir, cmd.Stdin = dir, strings.NewReader(diff)
	cmd.Env = append(os.Environ(), "GIT_CEILING_DIRECTORIES="+filepath.Dir(dir))
	if said, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("git apply: %v\n%s\n%s", err, said, diff)
	}
	return read(t, file)
}

// TestWebhooksGolden: the command has the webhook's result for the pods of the webhook's golden files.
func TestWebhooksGolden(t *testing.T) {
	files, err := filepath.Glob("../../webhook/inject/testdata/*.in.yaml")
	if err != nil || len(files) == 0 {
		t.Fatalf("the webhook has no golden files: %v", err)
	}
	for _, in := range files {
		t.Run(filepath.Base(in), func(t *testing.T) {
			out, said := must(t, read(t, in), func(cfg *manifests.Config) {
				if err := cfg.Injector.UseDNS(inject.DNS{Domain: "cluster.local"}); err != nil {
					t.Fatal(err)
				}
				if beside := strings.TrimSuffix(in, ".in.yaml") + ".settings.yaml"; exists(t, beside) {
					cfg.SettingsFile = beside
				}
			})
			want := read(t, strings.TrimSuffix(in, ".in.yaml")+".out.yaml")
			if diff := cmp.Diff(decode(t, want), decode(t, out)); diff != "" {
				t.Errorf("(-webhook +command):\n%s", diff)
			}
			for line := range strings.Lines(want) {
				if warning, ok := strings.CutPrefix(line, "# warning: "); ok && !strings.Contains(said, "warning: "+warning) {
					t.Errorf("no message %q in\n%s", warning, said)
				}
			}
		})
	}
}

func exists(t testing.TB, file string) bool {
	t.Helper()
	_, err := os.Stat(file)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	return err == nil
}

func decode(t testing.TB, text string) (v any) {
	t.Helper()
	if err := yaml.Unmarshal([]byte(text), &v); err != nil {
		t.Fatalf("%v in\n%s", err, text)
	}
	return v
}

const podSpec = `{"containers":[{"name":"app"}]}`

// template is a pod's template, or all of a pod but its kind.
const template = `{"metadata":{"annotations":{"iam.amazonaws.com/role":"r"}},"spec":` + podSpec + `}`

// TestKinds: the template of each kind gets all that the webhook adds to its pods, alone and in lists.
func TestKinds(t *testing.T) {
	for _, tt := range []struct{ apiVersion, kind, before, after string }{
		{"v1", "Pod", "", ""},
		{"v1", "PodTemplate", `"template":`, ""},
		{"v1", "ReplicationController", `"spec":{"template":`, "}"},
		{"apps/v1", "Deployment", `"spec":{"template":`, "}"},
		{"apps/v1", "DaemonSet", `"spec":{"template":`, "}"},
		{"apps/v1", "StatefulSet", `"spec":{"template":`, "}"},
		{"apps/v1", "ReplicaSet", `"spec":{"template":`, "}"},
		{"batch/v1", "Job", `"spec":{"template":`, "}"},
		{"batch/v1", "CronJob", `"spec":{"jobTemplate":{"spec":{"template":`, "}}}"},
	} {
		body := tt.before + template + tt.after
		if tt.before == "" {
			body = strings.TrimSuffix(strings.TrimPrefix(template, "{"), "}")
		}
		whole := fmt.Sprintf(`{"apiVersion":%q,"kind":%q,%s}`, tt.apiVersion, tt.kind, body)
		for form, text := range map[string]string{
			"alone":       whole,
			"list":        `{"apiVersion":"v1","kind":"List","items":[{"kind":"ConfigMap","apiVersion":"v1"},` + whole + `]}`,
			"typed list":  fmt.Sprintf(`{"apiVersion":%q,"kind":%q,"items":[{%s}]}`, tt.apiVersion, tt.kind+"List", body),
			"list twice":  `{"apiVersion":"v1","kind":"List","items":[{"apiVersion":"v1","kind":"List","items":[` + whole + `]}]}`,
			"YAML, alone": toYAML(t, whole),
			"YAML, list":  toYAML(t, `{"apiVersion":"v1","kind":"List","items":[`+whole+`,`+whole+`]}`),
		} {
			t.Run(tt.kind+" "+form, func(t *testing.T) {
				out, _ := must(t, text)
				pods := findPods(decode(t, out))
				if len(pods) == 0 {
					t.Fatalf("no pod in %s", out)
				}
				for _, pod := range pods {
					raw, err := json.Marshal(pod)
					if err != nil {
						t.Fatal(err)
					}
					result, err := config(t).Injector.Inject(raw, "elsewhere")
					if err != nil || !result.Annotated || result.Patch != nil || !strings.Contains(string(raw), "credence-sidecar") {
						t.Errorf("the webhook adds %v (%v) to %s", result.Patch, err, raw)
					}
				}
			})
		}
		// A kind of this name in another API group stays unchanged, with a note if it may have pods.
		other := strings.Replace(whole, tt.apiVersion, "example.org/v1", 1)
		if out, said := must(t, other); out != other || strings.Contains(said, "note: unchanged") != (tt.before != "") {
			t.Errorf("another group: %s\n%s", out, said)
		}
	}
}

func toYAML(t testing.TB, text string) string {
	t.Helper()
	b, err := yaml.JSONToYAML([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// findPods returns all objects with containers.
func findPods(v any) (pods []any) {
	switch v := v.(type) {
	case map[string]any:
		if spec, ok := v["spec"].(map[string]any); ok && spec["containers"] != nil {
			return []any{v}
		}
		for _, below := range v {
			pods = append(pods, findPods(below)...)
		}
	case []any:
		for _, below := range v {
			pods = append(pods, findPods(below)...)
		}
	}
	return pods
}

// untouched has documents that stay unchanged.
var untouched = []string{
	"# nothing\n",
	"\n\n",
	"a:   [1,2,  3]   # 0755\n",
	"a: 0755\nb: 1e3\nc: yes\nd: 12345678901234567890\n",
	"a: &a {b: c}\nd: *a\ne:\n  <<: *a\n",
	"kind: Deployment\n",
	"apiVersion: apps/v1\nkind: Deployment\n",
	"apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: x}\nspec: {template: {spec: {containers: [{name: a}]}}}\n",
	"apiVersion: v1\nkind: Pod\nmetadata:\n  annotations: {other: x}\nspec: null\n",
	"apiVersion: v1\nkind: Pod\nmetadata:\n  annotations: # none\nspec:\n   containers:\n   -   name:    \"a\"\n",
	"apiVersion: v1\nkind: ConfigMap\ndata:\n  pod: |\n    kind: Pod\n    ----\n    metadata:\n      annotations:\n        iam.amazonaws.com/role: x\n",
	"- a\n- list\n",
	"just text\n",
	"!Ref thing\n",
	"a: b\r\nc: d\r\n",
	"a: b\n...\n",
	`{"kind": "Service",   "apiVersion": "v1", "x": "\ud83d\ude00", "y": 1.10}` + "\n",
	`{"a":1}{"b":2}` + "\n\t{}\n",
	"apiVersion: v1\nkind: List\nitems: []\n",
	"apiVersion: v1\nkind: List\n",
	"apiVersion: example.org/v1\nkind: Pod\nmetadata: {annotations: {iam.amazonaws.com/role: x}}\n",
}

// TestUntouched: a document that is not injected stays byte-identical, alone and between injected ones.
func TestUntouched(t *testing.T) {
	pod := "apiVersion: v1\nkind: Pod\nmetadata: {annotations: {iam.amazonaws.com/role: x}}\nspec:\n  containers:\n  - name: app\n"
	for _, text := range untouched {
		for _, separator := range []string{"", "---\n", "--- # one more\n", "---\r\n"} {
			if out, _ := must(t, separator+text); out != separator+text {
				t.Errorf("%q became %q", separator+text, out)
			}
			out, _ := must(t, pod+"---\n"+text+"---\n"+pod)
			if n := strings.Count(out, "\n---\n"+text+"---\napiVersion"); n != 1 && text != untouched[0] {
				t.Errorf("%q between pods became\n%s", text, out)
			}
			if n := strings.Count(out, "- name: credence-sidecar\n"); n != 2 {
				t.Errorf("%d sidecars in\n%s", n, out)
			}
		}
	}
	if out, _ := must(t, ""); out != "" {
		t.Errorf("empty input results in %q", out)
	}
	if out, _ := must(t, strings.TrimSuffix(untouched[2], "\n")); out != strings.TrimSuffix(untouched[2], "\n") {
		t.Errorf("without a newline: output %q", out)
	}
}

const (
	optedIn = "apiVersion: v1\nkind: Namespace\nmetadata:\n  name: team-a\n  labels: {iam.amazonaws.com/inject: enabled}\n  annotations: {iam.amazonaws.com/permitted: '.*:role/r'}\n---\n"
	aPod    = "apiVersion: v1\nkind: Pod\nmetadata:\n  name: p\n  annotations: {iam.amazonaws.com/role: r}\nspec:\n  containers: [{name: app}]\n"
)

// TestDecisions has the messages, and whether the command refuses.
func TestDecisions(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) string {
		file := filepath.Join(dir, name)
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return file
	}
	list := func(labels string) string {
		return `{"apiVersion":"v1","kind":"List","items":[{"apiVersion":"v1","kind":"Namespace","metadata":{"name":"team-a","labels":{` + labels + `},"annotations":{"iam.amazonaws.com/allowed-roles":"[\"r\"]"}}}]}`
	}
	open, closed := write("open.json", list(`"iam.amazonaws.com/inject":"enabled"`)), write("closed.json", list(""))
	nobody := write("rules.yaml", "namespaces: [{match: [other]}]\n")
	noBase, err := policy.New(policy.Config{Keys: config(t).Injector.Keys()})
	if err != nil {
		t.Fatal(err)
	}
	const where = "standard input: document "
	for _, tt := range []struct {
		name, text string
		change     func(*manifests.Config)
		refused    bool
		same       bool // the output equals the input
		said       string
	}{
		{"permitted", optedIn + aPod, nil, false, false, ""},
		{"permitted by file", aPod, func(c *manifests.Config) { c.NamespacesFile = open }, false, false, ""},
		{"the input counts more", optedIn + aPod, func(c *manifests.Config) { c.NamespacesFile = closed }, false, false, ""},
		{"unknown", aPod, nil, false, false, where + `1 (line 1), Pod p: note: its role is not checked, because namespace "team-a" is not known; set --namespaces` + "\n"},
		{"no namespace", aPod, func(c *manifests.Config) { c.Namespace = "" }, false, false,
			where + "1 (line 1), Pod p: note: its role is not checked, because its namespace is not known; set --namespace\n"},
		{"no base", optedIn + aPod, func(c *manifests.Config) { c.Rules = noBase }, false, false,
			where + "2 (line 8), Pod p: note: its role is not checked, because it is not a full ARN; set --base-arn\n"},
		{"not opted in", aPod, func(c *manifests.Config) { c.NamespacesFile = closed }, false, true,
			where + `1 (line 1), Pod p: note: unchanged, because namespace "team-a" is not opted in; label it iam.amazonaws.com/inject=enabled` + "\n"},
		{"not permitted", optedIn + strings.ReplaceAll(aPod, "role: r", "role: s"), nil, true, false,
			where + `2 (line 8), Pod p: refused: namespace "team-a" does not permit role arn:aws:iam::123456789012:role/s: its annotation "iam.amazonaws.com/permitted" is ` +
				"`.*:role/r` and must match the whole ARN; change the namespace's annotation, or the pod's \"iam.amazonaws.com/role\"\n"},
		{"rules file", optedIn + aPod, func(c *manifests.Config) { c.RulesFile = nobody }, true, false,
			where + `2 (line 8), Pod p: refused: `},
		{"misspelt, of one of two", aPod + "---\n# second\n" + strings.ReplaceAll(aPod, "role", "rloe"), nil, true, false,
			where + `2 (line 10), Pod p: refused: annotation "iam.amazonaws.com/rloe" is unknown; did you mean "iam.amazonaws.com/role"?` + "\n"},
		{"on the wrong object", "apiVersion: apps/v1\nkind: Deployment\nmetadata: {namespace: x, name: d, annotations: {iam.amazonaws.com/role: r}}\nspec: {template: {spec: " + podSpec + "}}\n", nil, false, true,
			where + `1 (line 1), Deployment x/d: note: annotation "iam.amazonaws.com/role" is on the Deployment itself and has no effect there; move it to the pod template` + "\n"},
		{"an own namespace", optedIn + strings.Replace(aPod, "name: p", "generateName: p-\n  namespace: other", 1), nil, false, false,
			where + `2 (line 8), Pod other/p-*: note: its role is not checked, because namespace "other" is not known; set --namespaces` + "\n"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			out, said, err := run(t, tt.text, func(c *manifests.Config) {
				if tt.change != nil {
					tt.change(c)
				}
			})
			if (err != nil) != tt.refused || err != nil && !strings.HasSuffix(err.Error(), "documents refused; nothing is written") {
				t.Errorf("error %v", err)
			}
			if (out == tt.text) != tt.same && err == nil {
				t.Errorf("output\n%s", out)
			}
			if !strings.Contains(said, tt.said) || tt.said == "" && said != "" {
				t.Errorf("messages\n%s\nwant\n%s", said, tt.said)
			}
		})
	}
}

// TestErrors: the command reports unreadable input and writes nothing.
func TestErrors(t *testing.T) {
	dir := t.TempDir()
	none := filepath.Join(dir, "none.yaml")
	if err := os.WriteFile(none, []byte("a: b\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		text   string
		change func(*manifests.Config)
		want   string
	}{
		{"a: b\n---\na: {b\n", func(*manifests.Config) {}, "standard input: cannot read document 2, which begins in line 2: "},
		{"a: b\x85---\na: c\n", func(*manifests.Config) {}, "standard input is not UTF-8 text"},
		{"a: b\u0085---\na: c\n", func(*manifests.Config) {}, "it has several documents; separate them by lines that begin with ---"},
		{"", func(c *manifests.Config) { c.Files = []string{filepath.Join(dir, "absent")} }, "no such file"},
		{"", func(c *manifests.Config) { c.NamespacesFile = none }, "--namespaces: " + none + " has no Namespace; use the output of kubectl get namespaces -o yaml"},
		{"", func(c *manifests.Config) { c.RulesFile = none }, "--rules-file: "},
		{"apiVersion: v1\nkind: Namespace\nmetadata: {name: x, labels: {a: 1}}\n", func(*manifests.Config) {}, "standard input: document 1 (line 1): cannot read the Namespace: "},
	} {
		if _, _, err := run(t, tt.text, tt.change); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%q: error %v, want %s", tt.text, err, tt.want)
		}
	}
	cfg := config(t)
	cfg.Stdin, cfg.Stdout, cfg.Stderr = endless{}, io.Discard, io.Discard
	if err := manifests.Inject(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), "longer than 64 MiB") {
		t.Errorf("endless input: error %v", err)
	}
	cfg.Stdin, cfg.Stdout = strings.NewReader("a: b"), broken{}
	if err := manifests.Inject(t.Context(), cfg); !errors.Is(err, io.ErrClosedPipe) {
		t.Errorf("output without a reader: error %v", err)
	}
}

type endless struct{}

func (endless) Read(p []byte) (int, error) { return len(p), nil }

type broken struct{}

func (broken) Write([]byte) (int, error) { return 0, io.ErrClosedPipe }

// TestCancel: an interrupted command does not wait for its input.
func TestCancel(t *testing.T) {
	reader, writer := io.Pipe()
	defer writer.Close()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	cfg := config(t)
	cfg.Stdin, cfg.Stdout, cfg.Stderr = reader, io.Discard, io.Discard
	ended := make(chan error, 1)
	go func() { ended <- manifests.Inject(ctx, cfg) }()
	select {
	case err := <-ended:
		if !errors.Is(err, context.Canceled) {
			t.Errorf("error %v", err)
		}
	case <-time.After(time.Minute): // only if it hangs
		t.Error("it still waits")
	}
}

// TestFiles: several files become one stream of documents.
func TestFiles(t *testing.T) {
	dir := t.TempDir()
	var files []string
	for i, text := range []string{"a: 1", "", "---\nb: 2\n", `{"c":3}`} {
		files = append(files, filepath.Join(dir, fmt.Sprint(i)))
		if err := os.WriteFile(files[i], []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	out, _ := must(t, "", func(c *manifests.Config) { c.Files = files })
	if want := "a: 1\n---\nb: 2\n---\n" + `{"c":3}`; out != want {
		t.Errorf("output %q, want %q", out, want)
	}
}

// TestSettingsFile: the command uses the webhook's settings file and reports its errors.
func TestSettingsFile(t *testing.T) {
	file := filepath.Join(t.TempDir(), "settings.yaml")
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	bySettings := func(cfg *manifests.Config) { cfg.SettingsFile = file }
	const note = "imagePullSecrets"
	pod := func(spec string) string {
		return "apiVersion: v1\nkind: Pod\nmetadata:\n  name: p\n  annotations:\n    iam.amazonaws.com/role: r\nspec:\n" + spec + "  containers:\n    - name: app\n"
	}
	write("memory: 64Mi\nport: 9780\nimagePullSecrets: [registry]\npodAnnotations: {sidecar.example/ports: '9443'}\n")
	for _, tt := range []struct {
		spec string
		note bool
	}{
		{"", true},
		{"  imagePullSecrets: []\n", true},
		{"  imagePullSecrets:\n    - name: theirs\n", false},
		{"  imagePullSecrets:\n    - name: registry\n", false},
	} {
		out, said := must(t, pod(tt.spec), bySettings)
		for _, want := range []string{"memory: 64Mi", "127.0.0.1:9780", "name: registry", "sidecar.example/ports: \"9443\""} {
			if !strings.Contains(out, want) {
				t.Errorf("no %s in\n%s", want, out)
			}
		}
		if strings.Contains(said, note) != tt.note {
			t.Errorf("with %q: messages %s", tt.spec, said)
		}
	}
	write("memory: 64Mi\nport: 80\n")
	if _, _, err := run(t, pod(""), bySettings); err == nil || !strings.Contains(err.Error(), "--sidecar-settings-file: reading the sidecar settings file "+file+": port: 80 is out of bounds") {
		t.Errorf("an invalid file: error %v", err)
	}
}
