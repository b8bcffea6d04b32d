package settingsfile_test

import (
	"bytes"
	"encoding"
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/credence-iam/credence/broker/configfile"
	"github.com/credence-iam/credence/broker/policy"
	"github.com/credence-iam/credence/webhook/inject"
	"github.com/credence-iam/credence/webhook/settingsfile"
)

func newKeys(t testing.TB) policy.Keys {
	t.Helper()
	keys, err := policy.NewKeys(policy.DefaultPrefix)
	if err != nil {
		t.Fatal(err)
	}
	return keys
}

func newInjector(t testing.TB) *inject.Injector {
	t.Helper()
	i, err := inject.New(inject.Config{Keys: newKeys(t), Image: "registry.example/credence-sidecar:v1", Broker: "broker:9443", Settings: inject.DefaultSettings()})
	if err != nil {
		t.Fatal(err)
	}
	return i
}

// encoded returns a value in the form of a file.
func encoded(t testing.TB, v reflect.Value) string {
	t.Helper()
	if own, ok := reflect.TypeAssert[encoding.TextMarshaler](v); ok {
		text, err := own.MarshalText()
		if err != nil {
			t.Fatal(err)
		}
		return string(text)
	}
	return fmt.Sprint(v.Interface())
}

const whole = `# The platform team's.
imagePullPolicy: Always
imagePullSecrets: [registry, "mirror.example"]
memory: 64Mi
cpu:
  request: 50m
  limit: 1
  guaranteed: 100m
port: 19779
runAsUser: -1
logLevel: debug
podAnnotations:
  sidecar.example/ports: 9443
  plain: "true"
`

var wholeSettings = inject.Settings{
	ImagePullPolicy: "Always", ImagePullSecrets: []string{"registry", "mirror.example"}, Memory: 64, CPU: inject.CPU{Request: 50, Limit: 1000, Guaranteed: 100},
	Port: 19779, RunAsUser: inject.PlatformUser, LogLevel: policy.LogDebug, PodAnnotations: map[string]string{"sidecar.example/ports": "9443", "plain": "true"},
}

func asJSON(t testing.TB, s inject.Settings) string {
	t.Helper()
	text, err := json.MarshalIndent(s, "", "\t")
	if err != nil {
		t.Fatal(err)
	}
	return strings.ReplaceAll(string(text), ": null", ": []")
}

func TestParse(t *testing.T) {
	for name, text := range map[string]string{"YAML": whole, "JSON": asJSON(t, wholeSettings), "CRLF": strings.ReplaceAll(whole, "\n", "\r\n")} {
		got, err := settingsfile.Parse([]byte(text), inject.DefaultSettings(), newKeys(t))
		if err != nil {
			t.Errorf("%s: %v\n%s", name, err, text)
		}
		if diff := cmp.Diff(wholeSettings, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
	}
	names, values := fields(reflect.ValueOf(wholeSettings), "")
	for i, v := range values {
		if v.IsZero() {
			t.Errorf("wholeSettings lacks %s", names[i])
		}
	}
}

// TestBase: fields that the file lacks keep their value, also within cpu.
func TestBase(t *testing.T) {
	for text, change := range map[string]func(*inject.Settings){
		"{}":                     func(*inject.Settings) {},
		"cpu: {limit: 0}":        func(s *inject.Settings) { s.CPU.Limit = 0 },
		"cpu: {request: 1000m}":  func(s *inject.Settings) { s.CPU.Request = 1000 },
		"podAnnotations: {a: b}": func(s *inject.Settings) { s.PodAnnotations = map[string]string{"a": "b"} },
		"imagePullSecrets: []":   func(s *inject.Settings) { s.ImagePullSecrets = []string{} },
		`imagePullPolicy: ""`:    func(s *inject.Settings) { s.ImagePullPolicy = "" },
	} {
		got, err := settingsfile.Parse([]byte(text), wholeSettings, newKeys(t))
		want := wholeSettings
		change(&want)
		if diff := cmp.Diff(want, got); diff != "" || err != nil {
			t.Errorf("%s: %v (-want +got):\n%s", text, err, diff)
		}
	}
	if wholeSettings.PodAnnotations["a"] != "" || len(wholeSettings.ImagePullSecrets) != 2 {
		t.Errorf("Parse changed its base: %+v", wholeSettings)
	}
}

func list(n int, form string) string {
	var items []string
	for i := range n {
		items = append(items, fmt.Sprintf(form, i))
	}
	return strings.Join(items, ", ")
}

var refused = []struct{ text, want string }{
	{"", "file is empty"},
	{"[]", "line 1: must be a map of fields"},
	{"memory:", "line 1: memory: has no value"},
	{"memori: 16Mi", "line 1: memori: unknown field; known here are imagePullPolicy, imagePullSecrets, memory, cpu, port, runAsUser, logLevel, podAnnotations: did you mean memory?"},
	{"image: x", "image: unknown field"},
	{"cpu:\n  limits: 1", "line 2: cpu.limits: unknown field; known here are request, limit, guaranteed: did you mean limit?"},
	{"port: 9779\nport: 9780", "line 2: port: is repeated; line 1 has it, too"},
	{"memory: 64", `line 1: memory: "64" is not an amount of memory; write whole mebibytes, such as 16Mi or 64Mi`},
	{"memory: 8Mi", "line 1: memory: 8Mi is out of bounds: from 12Mi to 256Mi"},
	{"memory: 257Mi", "out of bounds"},
	{"memory: [64Mi]", "memory: must be one value"},
	{"cpu: 5m", "line 1: cpu: must be a map of fields"},
	{"cpu: {request: 0.1}", `line 1: cpu.request: "0.1" is not an amount of CPU; write thousandths of a processor, such as 50m, or 1`},
	{"cpu: {request: 0}", "cpu.request: 0 is out of bounds: from 1m to 1"},
	{"cpu: {request: 2}", "cpu.request: 2 is out of bounds"},
	{"cpu: {limit: 9m}", "cpu.limit: 9m is out of bounds: from 10m to 1, or 0 for no limit"},
	{"cpu: {request: 200m}", "cpu.limit: 100m is less than the request, 200m"},
	{"cpu: {guaranteed: 0}", "cpu.guaranteed: 0 is out of bounds: from 10m to 1"},
	{"port: 80", "port: 80 is out of bounds: from 1024 to 65535"},
	{"port: 65536", "out of bounds"},
	{"port: http", `line 1: port: "http" is not a whole number`},
	{"port: 9_779", "is not a whole number"},
	{"port: 09779", "is not a whole number"},
	{"port: +9779", "is not a whole number"},
	{"port: 0x2633", "is not a whole number"},
	{"port: 99999999999999999999", "is not a whole number"},
	{"runAsUser: 0", "runAsUser: 0 is not a user ID from 1 to 2147483647, and the sidecar never runs as root; with -1 the platform chooses"},
	{"runAsUser: -2", "is not a user ID"},
	{"runAsUser: 2147483648", "is not a user ID"},
	{"logLevel: trace", `line 1: logLevel: "trace" is none of ["debug" "info" "warn" "error"]`},
	{"imagePullPolicy: always", `imagePullPolicy: "always" is not Always, IfNotPresent or Never`},
	{"imagePullSecrets: registry", "line 1: imagePullSecrets: must be a list"},
	{"imagePullSecrets: [{name: registry}]", "imagePullSecrets[0]: must be one value"},
	{"imagePullSecrets: [A_b]", `imagePullSecrets: "A_b" is not a name of a Secret`},
	{"imagePullSecrets: [a, a]", `"a" is listed twice`},
	{"imagePullSecrets: [" + list(9, "s%d") + "]", "has 9 names, the limit is 8"},
	{"podAnnotations: {a b: c}", `podAnnotations: "a b" is not an annotation key`},
	{"podAnnotations: {a: b, a: c}", "podAnnotations.a: is repeated"},
	{"podAnnotations: {iam.amazonaws.com/role: admin}", "has the prefix of Credence's annotations"},
	{"podAnnotations: {Iam.amazonaws.com/role: admin}", "has the prefix"},
	{"podAnnotations: {container.apparmor.security.beta.kubernetes.io/app: unconfined}", "belongs to Kubernetes"},
	{"podAnnotations: {kubernetes.io/config.mirror: x}", "belongs to Kubernetes"},
	{"podAnnotations: {K8S.io/x: x}", "belongs to Kubernetes"},
	{"podAnnotations: {" + list(17, "k%d: v") + "}", "has 17 keys, the limit is 16"},
	{"podAnnotations: {k: " + strings.Repeat("v", 1025) + "}", `the value of "k" has 1025 bytes, the limit is 1024`},
	{"memory: &m 16Mi", "anchors and aliases are not supported"},
	{"port: 9779\n---\nport: 9780", "more than one document"},
}

func TestParseRefuses(t *testing.T) {
	for _, tt := range refused {
		got, err := settingsfile.Parse([]byte(tt.text), inject.DefaultSettings(), newKeys(t))
		if err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%.200q: %v, want %q", tt.text, err, tt.want)
		}
		if !reflect.ValueOf(got).IsZero() {
			t.Errorf("%.200q: error %v with result %+v", tt.text, err, got)
		}
	}
	// Parse refuses the prefix in use, not the default one.
	keys, err := policy.NewKeys("aws.example.com")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := settingsfile.Parse([]byte("podAnnotations: {aws.example.com/role: admin}"), inject.DefaultSettings(), keys); err == nil {
		t.Error("Parse accepts a key with the prefix in use")
	}
	if _, err := settingsfile.Parse([]byte("podAnnotations: {example.com/role: x, notkubernetes.io/x: x, k8s.io.example.com/x: x}"), inject.DefaultSettings(), keys); err != nil {
		t.Error(err)
	}
}

// FuzzParse: an injector can use each accepted file, and it stays the same after encoding. All else is an error of readable
// length, without a result.
func FuzzParse(f *testing.F) {
	f.Add(whole)
	f.Add(asJSON(f, wholeSettings))
	for _, tt := range refused {
		f.Add(tt.text)
	}
	keys := newKeys(f)
	f.Fuzz(func(t *testing.T, text string) {
		got, err := settingsfile.Parse([]byte(text), inject.DefaultSettings(), keys)
		if err != nil {
			if !reflect.ValueOf(got).IsZero() || len(err.Error()) > 2000 {
				t.Errorf("error of %d characters (%.2000s) with result %+v", len(err.Error()), err, got)
			}
			return
		}
		if err := newInjector(t).Use(got); err != nil {
			t.Errorf("Use refuses what Parse accepted: %v", err)
		}
		for key, value := range got.PodAnnotations { // JSON cannot encode invalid UTF-8.
			if strings.ToValidUTF8(key+value, "") != key+value {
				return
			}
		}
		again, err := settingsfile.Parse([]byte(strings.ReplaceAll(asJSON(t, got), `"podAnnotations": []`, `"podAnnotations": {}`)), inject.Settings{}, keys)
		if err != nil {
			t.Fatalf("parsing the encoded file %s: %v", asJSON(t, got), err)
		}
		if len(got.ImagePullSecrets) == 0 && len(again.ImagePullSecrets) == 0 {
			got.ImagePullSecrets, again.ImagePullSecrets = nil, nil
		}
		if len(got.PodAnnotations) == 0 && len(again.PodAnnotations) == 0 {
			got.PodAnnotations, again.PodAnnotations = nil, nil
		}
		if diff := cmp.Diff(got, again); diff != "" {
			t.Errorf("parsing the encoded file (-want +got):\n%s", diff)
		}
	})
}

// lines is a log for concurrent reads and writes.
type lines struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *lines) take() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	defer l.text.Reset()
	return l.text.String()
}

// TestFollow replaces the file as the kubelet does, by swapping a link.
func TestFollow(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "settings.yaml")
	n := 0
	write := func(text string) {
		t.Helper()
		n++
		folder := filepath.Join(dir, fmt.Sprint("..", n))
		for _, err := range []error{
			os.Mkdir(folder, 0o700), os.WriteFile(filepath.Join(folder, "settings.yaml"), []byte(text), 0o600),
			os.Symlink(folder, filepath.Join(dir, "..next")), os.Rename(filepath.Join(dir, "..next"), filepath.Join(dir, "..data")),
		} {
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := os.Symlink(filepath.Join("..data", "settings.yaml"), file); err != nil {
		t.Fatal(err)
	}
	write("memory: 32Mi")
	const loaded, invalid = "Loaded the sidecar settings file", "Could not use the sidecar settings file"
	synctest.Test(t, func(t *testing.T) {
		var log lines
		i := newInjector(t)
		if err := i.Use(inject.Settings{Memory: 20, CPU: inject.CPU{Request: 6, Limit: 60, Guaranteed: 60}, Port: 9780, RunAsUser: 1, LogLevel: "warn"}); err != nil { // as flags set them
			t.Fatal(err)
		}
		f, err := settingsfile.New(settingsfile.Config{Path: file, Injector: i, Logger: slog.New(slog.NewTextHandler(&log, nil))})
		if err != nil {
			t.Fatal(err)
		}
		if s := i.Settings(); s.Memory != 32 || s.Port != 9780 || !strings.Contains(log.take(), loaded) {
			t.Fatalf("after New: %+v", s)
		}
		go func() { _ = f.Run(t.Context()) }()
		time.Sleep(time.Second) // Reads are between the steps.
		for _, step := range []struct {
			text   string
			memory policy.Memory
			port   int
			err    string
			log    string
		}{
			{"memory: 64Mi", 64, 9780, "", loaded},
			{"port: 9781", 20, 9781, "", loaded}, // The flags set the fields that the file lacks now.
			{"port: 80", 20, 9781, "port: 80 is out of bounds", invalid},
			{"memory: 48Mi\nmemori: 48Mi", 20, 9781, "line 2: memori: unknown field", invalid},
			{"{}", 20, 9780, "", loaded},
		} {
			write(step.text)
			time.Sleep(configfile.Interval)
			synctest.Wait()
			s, status, logged := i.Settings(), f.Status(), log.take()
			if s.Memory != step.memory || s.Port != step.port {
				t.Errorf("%q: settings in force are %+v", step.text, s)
			}
			if (status.Err == nil) != (step.err == "") || status.Err != nil && !strings.Contains(status.Err.Error(), step.err) {
				t.Errorf("%q: status %+v", step.text, status)
			}
			if !strings.Contains(logged, step.log) || !strings.Contains(logged, step.err) || strings.Count(logged, "\n") != 1 {
				t.Errorf("%q: logged %s", step.text, logged)
			}
		}
	})
}

func TestNewRefuses(t *testing.T) {
	dir, log := t.TempDir(), slog.New(slog.DiscardHandler)
	for name, text := range map[string]string{"wrong": "memory: 8Mi", "large": "memory: 64Mi" + strings.Repeat(" ", 1<<20)} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for name, want := range map[string]string{"wrong": "line 1: memory: 8Mi is out of bounds", "large": "longer than 1048576 bytes", "absent": "no such file"} {
		i := newInjector(t)
		f, err := settingsfile.New(settingsfile.Config{Path: filepath.Join(dir, name), Injector: i, Logger: log})
		if err == nil || f != nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v, want %q", name, err, want)
		}
		if diff := cmp.Diff(inject.DefaultSettings(), i.Settings()); diff != "" {
			t.Errorf("%s: an error changed the settings:\n%s", name, diff)
		}
	}
	for _, cfg := range []settingsfile.Config{{Injector: newInjector(t), Logger: log}, {Path: dir, Logger: log}, {Path: dir, Injector: newInjector(t)}} {
		if _, err := settingsfile.New(cfg); err == nil {
			t.Errorf("New(%+v): no error", cfg)
		}
	}
}
