package finding_test

import (
	"encoding/json"
	"io/fs"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/credence-iam/credence/operator/finding"
)

// hostile are words that a user of the cluster may choose, hoping that an admin pastes them.
var hostile = []string{"", " ", "a b", "x; touch pwned", "$(touch pwned)", "`touch pwned`", "it's", "'; touch pwned; '", `"`, `\`, `\'`, "a\nb", "#", "~", "*", "!!", "é", "--all", "a=b", "&", "|", "<x", "{a,b}"}

// TestShell: a real shell finds exactly the words.
func TestShell(t *testing.T) {
	const mark = "\x01"
	script := finding.Shell(append([]string{"printf", "%s" + mark}, hostile...)...)
	c := exec.CommandContext(t.Context(), "sh", "-c", script)
	c.Dir = t.TempDir()
	out, err := c.Output()
	if got := strings.Split(strings.TrimSuffix(string(out), mark), mark); err != nil || !slices.Equal(got, hostile) {
		t.Errorf("%v: sh makes of %s\n%q", err, script, got)
	}
}

// TestCluster: commands are about the cluster of the diagnosis, whatever its context is called.
func TestCluster(t *testing.T) {
	for want, got := range map[string]string{
		"kubectl get pods":                        finding.Cluster{}.Kubectl("get", "pods"),
		"kubectl '--context=a b' -n x get pods":   finding.Cluster{Context: "a b"}.Kubectl("-n", "x", "get", "pods"),
		"helm --kube-context=a --kubeconfig=/k l": finding.Cluster{Context: "a", Kubeconfig: "/k"}.Helm("l"),
	} {
		if got != want {
			t.Errorf("command is %s, want %s", got, want)
		}
	}
}

// TestAdd: no finding is endless, and no command is shown in part or changed.
func TestAdd(t *testing.T) {
	endless := strings.Repeat("x", 1<<20)
	commands := []string{"kubectl get pods", "kubectl " + endless, "kubectl label 'a\nb'", "kubectl \x1b[2J", "kubectl \u202e"}
	var r finding.Report
	r.Add(finding.Finding{Step: "a\x1b[2J", Subject: endless, Text: endless + "\n", State: finding.Failed, Remedy: &finding.Remedy{What: endless, Commands: commands}})
	var text, document strings.Builder
	if err := r.Write(&text, finding.Style{}); err != nil {
		t.Fatal(err)
	}
	if err := finding.WriteJSON(&document, &r); err != nil {
		t.Fatal(err)
	}
	for _, out := range []string{text.String(), document.String()} {
		if len(out) > 8<<10 || strings.ContainsAny(out, "\x1b\u202e") || !strings.Contains(out, "kubectl get pods") || strings.Count(out, "kubectl") != 1 {
			t.Errorf("output has %d bytes: %.2000q", len(out), out)
		}
	}
	if len(commands) != 5 || commands[4] != "kubectl \u202e" {
		t.Errorf("Add changed the caller's commands: %.300q", commands)
	}
}

// TestWriteJSON: characters that move the cursor are escaped, and a reader gets them back.
func TestWriteJSON(t *testing.T) {
	const value = "\u009b2J\u202e\U000e0001é\x7f<\n"
	var out strings.Builder
	var got string
	if err := finding.WriteJSON(&out, value); err != nil || json.Unmarshal([]byte(out.String()), &got) != nil || got != value || !strings.Contains(out.String(), "é") || strings.ContainsAny(out.String(), "\u009b\u202e\U000e0001\x7f") {
		t.Errorf("%v: %q is %q", err, got, out.String())
	}
}

// TestCommand: each argument is one word, in the format and behind a pipe.
func TestCommand(t *testing.T) {
	c := finding.Cluster{Context: "prod"}
	for want, got := range map[string]string{
		"kubectl --context=prod -n x logs 'a; b' | grep -i sts": c.Command("kubectl -n %s logs %s | grep -i sts", "x", "a; b"),
		"kubectl --context=prod label ns x k='$v'":              c.Command("kubectl label ns x %s=%s", "k", "$v"),
		"helm --kube-context=prod -n x list":                    c.Command("helm -n %s list", "x"),
	} {
		if got != want {
			t.Errorf("command is %s, want %s", got, want)
		}
	}
}

// TestAllCommandsAreQuoted: no package writes a command in another way.
func TestAllCommandsAreQuoted(t *testing.T) {
	literal, files := regexp.MustCompile("(Command\\()?[\"`](kubectl|helm) [^\"`]*[\"`]"), 0
	operator := os.DirFS("..")
	if err := fs.WalkDir(operator, ".", func(path string, _ fs.DirEntry, err error) error {
		if err != nil || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
			return err
		}
		text, err := fs.ReadFile(operator, path)
		files++
		for _, match := range literal.FindAllString(string(text), -1) {
			if !strings.HasPrefix(match, "Command(") && !strings.Contains(path, "misread.go") {
				t.Errorf("operator/%s has %s; use finding.Cluster", path, match)
			}
		}
		return err
	}); err != nil || files < 30 {
		t.Fatalf("read %d files: %v", files, err)
	}
}
