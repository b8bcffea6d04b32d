package manifests_test

import (
	"strings"
	"testing"
)

const (
	podHead = "a: b\n---\napiVersion: v1\nkind: Pod\nmetadata:\n  name: p\n"
	podTail = "spec:\n  containers:\n    - name: app\n"
	roleR   = "  annotations:\n    iam.amazonaws.com/role: r\n"
	inPod   = "standard input: document 2 (line 3), Pod p: refused: "
)

// unreadable has inputs that cannot be read, with their messages.
var unreadable = []struct{ name, text, said string }{
	{"a numeric role", podHead + "  annotations:\n    iam.amazonaws.com/role: 123\n" + podTail,
		inPod + `line 8: metadata.annotations["iam.amazonaws.com/role"] must be a string, but 123 is a number; write "123"`},
	{"an octal role", podHead + "  annotations:\n    iam.amazonaws.com/role: 0755\n" + podTail,
		inPod + `line 8: metadata.annotations["iam.amazonaws.com/role"] must be a string, but 0755 is a number; write "0755"`},
	{"imds is off", podHead + roleR + "    iam.amazonaws.com/imds: off\n" + podTail,
		inPod + `line 9: metadata.annotations["iam.amazonaws.com/imds"] must be a string, but off is the boolean false in YAML 1.1, which kubectl reads; write "off"`},
	{"namespace n", podHead + "  namespace: n\n" + roleR + podTail,
		`line 7: metadata.namespace must be a string, but n is the boolean false in YAML 1.1, which kubectl reads; write "n"`},
	{"namespace true", podHead + "  namespace: true\n" + roleR + podTail, `line 7: metadata.namespace must be a string, but true is the boolean true; write "true"`},
	{"label 1", podHead + roleR + "  labels: {app: 1}\n" + podTail, inPod + `line 9: metadata.labels.app must be a string, but 1 is a number; write "1"`},
	{"annotations in a list", podHead + "  annotations:\n  - iam.amazonaws.com/role: r\n" + podTail, `line 8: metadata.annotations must be a mapping, but it is a list`},
	{"a quoted boolean", podHead + roleR + "spec:\n  hostNetwork: \"true\"\n  containers: [{name: app}]\n",
		inPod + `line 10: spec.hostNetwork must be true or false, but "true" is a string; remove the quotes`},
	{"a quoted number", podHead + roleR + "spec:\n  terminationGracePeriodSeconds: \"30\"\n  containers: [{name: app}]\n",
		inPod + `line 10: spec.terminationGracePeriodSeconds must be a whole number, but "30" is a string; remove the quotes`},
	{"a numeric value", podHead + roleR + podTail + "      env:\n      - name: PORT\n        value: 80\n",
		inPod + `line 14: spec.containers[0].env[0].value must be a string, but 80 is a number; write "80"`},
	{"containers are a mapping", podHead + roleR + "spec:\n  containers:\n    name: app\n",
		inPod + `line 11: spec.containers must be a list, but it is a mapping`},
	{"by an alias", "x: &n 123\n" + strings.TrimPrefix(podHead, "a: b\n---\n") + "  annotations:\n    iam.amazonaws.com/role: *n\n" + podTail,
		`line 7: metadata.annotations["iam.amazonaws.com/role"] must be a string, but 123 is a number; write "123"`},
	{"JSON", "\n{\"apiVersion\":\"v1\",\"kind\":\"Pod\",\"metadata\":{\n\"annotations\":{\"iam.amazonaws.com/role\":false}},\"spec\":" + podSpec + "}",
		`line 3: metadata.annotations["iam.amazonaws.com/role"] must be a string, but false is the boolean false; write "false"`},
	{"a template", "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: d}\nspec:\n  template:\n    metadata:\n      annotations: {iam.amazonaws.com/role: 1}\n",
		`line 7: spec.template.metadata.annotations["iam.amazonaws.com/role"] must be a string, but 1 is a number; write "1"`},
	{"no template", "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: d}\nspec: {template: x}\n",
		`line 4: spec.template must be a mapping, but "x" is a string`},
	{"a namespace's label", "apiVersion: v1\nkind: Namespace\nmetadata:\n  name: x\n  labels:\n    iam.amazonaws.com/inject: yes\n",
		`standard input: document 1 (line 1): cannot read the Namespace: line 6: metadata.labels["iam.amazonaws.com/inject"] must be a string, but yes is the boolean true in YAML 1.1, which kubectl reads; write "yes"`},
	{"an empty namespace", "apiVersion: v1\nkind: NamespaceList\nitems:\n- metadata: {name: x}\n- # nothing\n",
		"standard input: document 1 (line 1): cannot read the Namespace: line 5: items[1] is empty; write the object, or remove it"},
	{"an empty pod", "apiVersion: v1\nkind: PodList\nitems:\n-\n", "line 4: items[0] is empty; write the object, or remove it"},
	{"no spec", podHead + roleR, inPod + "the pod has no spec"},
	{"a tab", "a: b\n---\na:\n\tb: c\n", "standard input: cannot read document 2, which begins in line 2: near line 4: found "},
	{"in the first line", "a: b: c\n", "standard input: cannot read document 1, which begins in line 1: near line 1: mapping values are not allowed in this context"},
	{"an anchor of another document", "x: &n r\n---\n" + strings.TrimPrefix(podHead, "a: b\n---\n") + "  annotations:\n    iam.amazonaws.com/role: *n\n" + podTail,
		"standard input: cannot read document 2, which begins in line 2: line 8: there is no anchor &n before the alias *n in this document"},
	{"half of JSON", "a: b\n---\n{\"kind\":\"Pod\",", "standard input: cannot read document 2, which begins in line 2: near line 3: did not find expected node content"},
	{"a Helm condition", "a: b\n---\n{{- if .Values.x }}\na: b\n{{- end }}\n",
		`did not find expected node content; line 3 has a Helm template, "{{- if .Values.x }}"; run "helm template" and give its output to credence inject`},
	{"a Helm value", podHead + "  # not {{ here }}\n  namespace: {{ .Values.ns }}\n" + roleR + podTail,
		`line 8: a mapping cannot be a key; line 8 has a Helm template, "{{ .Values.ns }}"; run "helm template" and give its output to credence inject`},
	{"a Helm role", podHead + "  annotations:\n    iam.amazonaws.com/role: '{{ .Values.role }}'\n" + podTail,
		inPod + `line 8: annotation "iam.amazonaws.com/role" is a Helm template, "{{ .Values.role }}"; run "helm template" and give its output to credence inject`},
}

// TestUnreadable: the message about unreadable input names the file, the line, the key and the fix.
func TestUnreadable(t *testing.T) {
	for _, tt := range unreadable {
		_, said, err := run(t, tt.text)
		if err == nil {
			t.Errorf("%s: accepted: %s", tt.name, said)
			continue
		}
		if said += err.Error(); !strings.Contains(said, tt.said) || !strings.Contains(said, "standard input: ") || !strings.Contains(said, "document ") {
			t.Errorf("%s: messages\n%s\nwant\n%s", tt.name, said, tt.said)
		}
		if strings.Contains(said, "unexpected end of JSON") || strings.Contains(said, "Go struct") || strings.Contains(said, "yaml: ") {
			t.Errorf("%s: the message shows our code: %s", tt.name, said)
		}
	}
}
