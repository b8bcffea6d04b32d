package main

import (
	"bytes"
	"cmp"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/credence-iam/credence/broker/kube/apitest"
	"github.com/credence-iam/credence/operator/manifests"
)

// parse parses the flags of inject. The flag of the namespace is that of all commands.
func parse(t *testing.T, args []string) (cfg manifests.Config, err error) {
	t.Helper()
	t.Setenv("KUBECONFIG", filepath.Join(t.TempDir(), "none"))
	root := &cobra.Command{Use: "credence", SilenceErrors: true, SilenceUsage: true}
	command := &cobra.Command{Use: "inject", Args: noArguments}
	in := injectFlags(newCluster(root), command)
	command.RunE = func(command *cobra.Command, _ []string) (err error) {
		cfg, err = in.config(command.Context())
		return err
	}
	root.AddCommand(command)
	root.SetArgs(append([]string{"inject"}, args...))
	root.SetErr(io.Discard)
	root.SetOut(io.Discard)
	return cfg, root.ExecuteContext(t.Context())
}

func TestFlags(t *testing.T) {
	good := []string{"--broker=broker:9443", "--sidecar-image=registry.example/credence-sidecar:v1"}
	cfg, err := parse(t, append(slices.Clone(good), "-f", "a", "-f=-", "--namespace=shop", "--namespaces=n", "--rules-file=r", "--diff"))
	if err != nil || !slices.Equal(cfg.Files, []string{"a", "-"}) || cfg.Namespace != "shop" || cfg.NamespacesFile != "n" || cfg.RulesFile != "r" || !cfg.Diff || cfg.Injector == nil || cfg.Rules == nil {
		t.Errorf("%+v, %v", cfg, err)
	}
	if cfg, err := parse(t, good); err != nil || !slices.Equal(cfg.Files, []string{"-"}) || cfg.LookUp != nil {
		t.Errorf("without files: %+v, %v", cfg, err)
	}
	for _, tt := range []struct {
		args []string
		want string
	}{
		{good[:1], "reading the webhook's settings: no kubeconfig names a cluster; set --kubeconfig or the variable KUBECONFIG; or set --broker and --sidecar-image"},
		{append(slices.Clone(good), "a.yaml"), `unexpected argument "a.yaml"; use flags only`},
		{append(slices.Clone(good), "--namespace=A"), `--namespace: "A" is not a valid namespace name`},
		{append(slices.Clone(good), "-f", ""), `invalid argument "" for "-f, --filename" flag: the file name is empty`},
		{append(slices.Clone(good), "-f=-", "-f=-"), "standard input can be read only once"},
		{append(slices.Clone(good), "--namespaces=-"), "standard input can be read only once"},
		{append(slices.Clone(good), "--sidecar-port=80"), "--sidecar-port: 80 is out of bounds: from 1024 to 65535"},
	} {
		if _, err := parse(t, tt.args); err == nil || !strings.HasPrefix(err.Error(), tt.want) {
			t.Errorf("%q: error is %v, want %s", tt.args, err, tt.want)
		}
	}
}

// docs/inject.md has every flag, and no other.
func TestSettingsAreDocumented(t *testing.T) {
	page, err := os.ReadFile("../../docs/inject.md")
	if err != nil {
		t.Fatal(err)
	}
	var documented, want []string
	for _, row := range regexp.MustCompile("(?m)^\\| `--?([a-z-]+)` \\|").FindAllSubmatch(page, -1) {
		documented = append(documented, string(row[1]))
	}
	command := &cobra.Command{Use: "inject"}
	injectFlags(nil, command)
	command.Flags().VisitAll(func(f *pflag.Flag) { want = append(want, f.Name) })
	if !slices.Equal(documented, want) {
		t.Errorf("documented are\n%q, there are\n%q", documented, want)
	}
}

// webhookArgs are those of the chart, with values other than the defaults.
var webhookArgs = []string{
	"--annotation-prefix=iam.example.org", "--audience=brokers", "--cluster-name=blue", "--log-level=warn", "--base-arn=arn:aws:iam::123456789012:role/",
	"--role-chaining=true", "--rules-file=/etc/credence/rules/rules.yaml", "--broker=credence-broker.security.svc:9443", "--trust-config-map=roots",
	"--sidecar-image=registry.example/credence-sidecar:1.2.3", "--sidecar-image-pull-policy=Always",
	"--sidecar-settings-file=/etc/credence/sidecar/settings.yaml", "--on-shadowed=warn", "--listen=:9444",
}

const (
	settings = "memory: 32Mi\ncpu:\n  request: 7m\nlogLevel: debug\n"
	rules    = "namespaces: [{match: [shop], accounts: ['123456789012', '210987654321'], roles: [/cart]}]\n"
	podYAML  = "apiVersion: v1\nkind: Pod\nmetadata: {name: p, namespace: shop, annotations: {iam.example.org/role: cart}}\nspec: {containers: [{name: app}]}\n"
)

// installed returns an API server with a webhook in namespace security, and an opted-in namespace shop.
func installed(t *testing.T, args ...string) *apitest.Server {
	t.Helper()
	server := apitest.Start(t)
	labels := map[string]string{"app.kubernetes.io/name": "credence", "app.kubernetes.io/component": "webhook"}
	template := corev1.PodTemplateSpec{
		ObjectMeta: metav1.ObjectMeta{Labels: labels},
		Spec:       corev1.PodSpec{Containers: []corev1.Container{{Name: "webhook", Image: "registry.example/credence-webhook:1.2.3", Args: args}}},
	}
	server.Put(
		&appsv1.Deployment{
			ObjectMeta: metav1.ObjectMeta{Namespace: "security", Name: "credence-webhook", Labels: labels},
			Spec:       appsv1.DeploymentSpec{Template: template, Selector: &metav1.LabelSelector{MatchLabels: labels}},
		},
		&corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{Namespace: "security", Name: "credence-webhook-1", Labels: labels},
			Spec:       template.Spec, Status: corev1.PodStatus{Phase: corev1.PodRunning},
		},
		&corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: "security", Name: "credence-sidecar-settings"}, Data: map[string]string{"settings.yaml": settings}},
		&corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: "security", Name: "credence-rules"}, Data: map[string]string{"rules.yaml": rules}},
		&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{
			Name: "shop", Labels: map[string]string{"iam.example.org/inject": "enabled"}, Annotations: map[string]string{"iam.example.org/permitted": ".*"},
		}},
	)
	server.SetLog("security", "credence-webhook-1", `{"level":"INFO","msg":"Configured the cluster domain","domain":"corp.example","name_servers":["10.96.0.10"]}`+"\n")
	return server
}

// call runs the command as kubectl's plugin or by its own name, and returns all that it writes.
func call(t *testing.T, stdin string, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, messages bytes.Buffer
	code = run(t.Context(), args, strings.NewReader(stdin), &out, &messages)
	return code, out.String(), messages.String()
}

// TestInjectLikeTheWebhook: without flags, the result is that of a call with all settings of the webhook as flags and files.
func TestInjectLikeTheWebhook(t *testing.T) {
	kubeconfig := "--kubeconfig=" + installed(t, webhookArgs...).Kubeconfig(t)
	code, out, messages := call(t, podYAML, "credence", "inject", kubeconfig)
	if want := "credence inject: using the settings of webhook security/credence-webhook of context \"test\"\n"; code != 0 || messages != want {
		t.Errorf("exit code %d, messages:\n%swant:\n%s", code, messages, want)
	}
	folder := t.TempDir()
	write := func(name, text string) string {
		file := filepath.Join(folder, name)
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return file
	}
	args := []string{"credence", "inject", "--cluster-domain=corp.example", "--namespaces=" + write("namespaces", "{apiVersion: v1, kind: Namespace, metadata: {name: shop, labels: {iam.example.org/inject: enabled}, annotations: {iam.example.org/permitted: .*}}}")}
	for _, arg := range webhookArgs {
		switch name, _, _ := strings.Cut(arg, "="); name {
		case "--log-level", "--listen":
		case "--rules-file":
			args = append(args, name+"="+write("rules", rules))
		case "--sidecar-settings-file":
			args = append(args, name+"="+write("settings", settings))
		default:
			args = append(args, arg)
		}
	}
	code, want, messages := call(t, podYAML, args...)
	if code != 0 || messages != "" || want == podYAML {
		t.Fatalf("with flags: exit code %d: %s\n%s", code, messages, want)
	}
	if out != want {
		t.Errorf("the cluster's settings give\n%s\nthe same flags give\n%s", out, want)
	}
}

// TestFlagsTakePrecedence over the webhook's arguments, settings and rules.
func TestFlagsTakePrecedence(t *testing.T) {
	empty := filepath.Join(t.TempDir(), "rules")
	if err := os.WriteFile(empty, []byte("namespaces: [{match: [other]}]"), 0o600); err != nil {
		t.Fatal(err)
	}
	kubeconfig := "--kubeconfig=" + installed(t, webhookArgs...).Kubeconfig(t)
	for _, tt := range []struct {
		flag, has, lacks string // in the output or in the messages
	}{
		{"--sidecar-memory=64Mi", `"memory": "64Mi"`, "32Mi"},
		{"--sidecar-cpu-request=9m", `"cpu": "9m"`, "7m"},
		{"--sidecar-log-level=error", `"error"`, `"debug"`},
		{"--sidecar-image=registry.example/credence-sidecar:v9", "credence-sidecar:v9", "credence-sidecar:1.2.3"},
		{"--broker=b.other.svc:1", "b.other.svc:1", "credence-broker.security"},
		{"--cluster-domain=cluster.local", "credence-broker.security.svc.cluster.local.", "corp.example"},
		{"--audience=aud", `"audience": "aud"`, "brokers"},
		{"--rules-file=" + empty, `no entry in the rules file matches namespace "shop"`, "credence-sidecar"},
		{"--base-arn=arn:aws:iam::210987654321:role/", "credence-sidecar", "refused"},
	} {
		_, out, messages := call(t, podYAML, "credence", "inject", kubeconfig, tt.flag)
		_, text, _ := strings.Cut(messages, "\n") // after the line about the webhook
		if text = out + text; !strings.Contains(text, tt.has) || strings.Contains(text, tt.lacks) {
			t.Errorf("%s: want %s, not %s:\n%s", tt.flag, tt.has, tt.lacks, text)
		}
	}
}

// TestNamespacesOfTheCluster: a role is checked against the namespace in the cluster, which is read once. Documents take
// precedence.
func TestNamespacesOfTheCluster(t *testing.T) {
	server := installed(t, webhookArgs...)
	server.Put(&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "closed"}})
	kubeconfig := "--kubeconfig=" + server.Kubeconfig(t)
	server.Intercept(func(r apitest.Request) *metav1.Status {
		if r.Resource == "namespaces" && r.Name == "secret" {
			return apitest.Failure(http.StatusForbidden, metav1.StatusReasonForbidden, "no")
		}
		return nil
	})
	pod := func(namespace string) string { return strings.Replace(podYAML, "shop", namespace, 1) }
	own := "apiVersion: v1\nkind: Namespace\nmetadata: {name: closed, labels: {iam.example.org/inject: enabled}, annotations: {iam.example.org/permitted: x}}\n---\n"
	for _, tt := range []struct {
		input string
		code  int
		want  string
	}{
		{podYAML + "---\n" + podYAML, 0, ""},
		{strings.Replace(podYAML, "role: cart", "role: other", 1), 1, `refused: the rules file (namespaces[0], "shop") does not allow namespace "shop" to have role`},
		{pod("closed"), 0, `note: unchanged, because namespace "closed" is not opted in`},
		{own + pod("closed"), 1, `refused: `},
		{pod("absent"), 0, `note: its role is not checked, because context "test" has no namespace "absent"; add it to the input, or set --namespaces`},
		{pod("secret"), 0, `note: its role is not checked, because you may not read namespace "secret"; it needs the right to get namespaces, or --namespaces`},
		// The namespace of the context, as for kubectl apply.
		{strings.Replace(podYAML, "namespace: shop, ", "", 1), 0, `because context "test" has no namespace "default"`},
	} {
		code, _, messages := call(t, tt.input, "credence", "inject", kubeconfig)
		if _, text, _ := strings.Cut(messages, "\n"); code != tt.code || !strings.Contains(text, tt.want) || tt.want == "" && text != "" {
			t.Errorf("exit code %d, want %d, and messages:\n%swant %s", code, tt.code, text, cmp.Or(tt.want, "none"))
		}
	}
	before := server.Requests(http.MethodGet, "namespaces", "")
	call(t, podYAML+"---\n"+podYAML, "credence", "inject", kubeconfig)
	if n := server.Requests(http.MethodGet, "namespaces", "") - before; n != 1 {
		t.Errorf("one namespace takes %d requests", n)
	}
}

// TestClusterCannotBeUsed: each failure names its cause and what to do, and nothing is written.
func TestClusterCannotBeUsed(t *testing.T) {
	forbid := func(resource string) func(t *testing.T, s *apitest.Server) {
		return func(_ *testing.T, s *apitest.Server) {
			s.Intercept(func(r apitest.Request) *metav1.Status {
				if r.Resource == resource {
					return apitest.Failure(http.StatusForbidden, metav1.StatusReasonForbidden, `User "u" cannot get resource "`+resource+`" in the namespace "credence"`)
				}
				return nil
			})
		}
	}
	none := func(*testing.T, *apitest.Server) {}
	const flagsHelp = "set --broker and --sidecar-image to inject without a cluster"
	for name, tt := range map[string]struct {
		args  []string
		flags []string
		set   func(t *testing.T, s *apitest.Server)
		want  []string
	}{
		"no right to see the webhook": {webhookArgs, nil, forbid("deployments"), []string{`cannot get resource "deployments"`, flagsHelp}},
		"no right to see settings":    {webhookArgs, nil, forbid("configmaps"), []string{`cannot get resource "configmaps"`, "set --sidecar-settings-file"}},
		"no webhook": {nil, nil, func(_ *testing.T, s *apitest.Server) {
			s.Delete(&appsv1.Deployment{ObjectMeta: metav1.ObjectMeta{Namespace: "security", Name: "credence-webhook"}})
		}, []string{"found no Credence in this cluster", flagsHelp}},
		"unknown argument":  {append([]string{"--shield=strong"}, webhookArgs...), nil, none, []string{"does not understand its argument \"--shield=strong\"", "registry.example/credence-webhook:1.2.3", "use the credence command of the webhook's version", flagsHelp}},
		"a variable":        {append([]string{"--sidecar-memory=$(MEMORY)"}, webhookArgs...), nil, none, []string{"--sidecar-memory=$(MEMORY) has a variable", "set --sidecar-memory"}},
		"invalid argument":  {append([]string{"--sidecar-memory=1Mi"}, webhookArgs...), nil, none, []string{"--sidecar-memory=1Mi is not valid: 1Mi is out of bounds", "set --sidecar-memory"}},
		"invalid together":  {append([]string{"--sidecar-cpu-request=900m"}, webhookArgs...), nil, none, []string{"--sidecar-cpu-limit: 100m is less than the request", "of the webhook of context"}},
		"no arguments":      {nil, nil, none, []string{"has no arguments", flagsHelp}},
		"a missing context": {webhookArgs, []string{"--context=mars"}, none, []string{`context "mars" does not exist`, flagsHelp}},
		"a foreign file": {webhookArgs, nil, func(_ *testing.T, s *apitest.Server) {
			s.Put(&corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: "security", Name: "credence-sidecar-settings"}, Data: map[string]string{"settings.yaml": "memori: 1"}})
		}, []string{"memori: unknown field", "set --sidecar-settings-file"}},
		"an unreachable server": {webhookArgs, []string{"--server=http://127.0.0.1:1"}, none, []string{"connection refused", flagsHelp}},
		"a failing server": {webhookArgs, nil, func(_ *testing.T, s *apitest.Server) {
			s.Intercept(func(r apitest.Request) *metav1.Status {
				if r.Resource == "namespaces" {
					return apitest.Failure(http.StatusInternalServerError, metav1.StatusReasonInternalError, "etcd is ill")
				}
				return nil
			})
		}, []string{`reading namespace "shop": etcd is ill`}},
	} {
		t.Run(name, func(t *testing.T) {
			server := installed(t, tt.args...)
			kubeconfig := server.Kubeconfig(t)
			tt.set(t, server)
			code, out, messages := call(t, podYAML, append([]string{"credence", "inject", "--kubeconfig=" + kubeconfig}, tt.flags...)...)
			if code == 0 || out != "" {
				t.Errorf("exit code %d and output %s", code, out)
			}
			for _, want := range tt.want {
				if !strings.Contains(messages, want) {
					t.Errorf("messages lack %q:\n%s", want, messages)
				}
			}
		})
	}
}

func TestVersionsDiffer(t *testing.T) {
	for _, tt := range [][3]string{
		{"v1.2.0", "v1.2.9", ""}, {"(devel)", "v1.2.0", ""}, {"v1.2.0", "", ""},
		{"v1.2.0", "v1.3.0", "the webhook has version v1.3.0, this command v1.2.0, so results can differ; use credence v1.3.0"},
	} {
		if got := differ(tt[0], tt[1]); got != tt[2] {
			t.Errorf("command %s and webhook %s: %q, want %q", tt[0], tt[1], got, tt[2])
		}
	}
}

// TestNameServers: the name servers in the webhook's log are those of the cluster.
func TestNameServers(t *testing.T) {
	kubeconfig := "--kubeconfig=" + installed(t, webhookArgs...).Kubeconfig(t)
	for server, warned := range map[string]bool{"10.96.0.10": false, "192.0.2.53": true} {
		pod := strings.Replace(podYAML, "spec: {", "spec: {dnsPolicy: None, dnsConfig: {nameservers: ["+server+"]}, ", 1)
		if code, _, messages := call(t, pod, "credence", "inject", kubeconfig); code != 0 || strings.Contains(messages, "may not know") != warned {
			t.Errorf("name server %s: exit code %d, messages:\n%s", server, code, messages)
		}
	}
}

// TestClusterDomain: the domain comes from the webhook's log, or from injected pods, or stays unknown, with a note.
func TestClusterDomain(t *testing.T) {
	server := installed(t, webhookArgs...)
	kubeconfig := "--kubeconfig=" + server.Kubeconfig(t)
	server.SetLog("security", "credence-webhook-1", `{"msg":"Decided on an admission"}`+"\n")
	_, out, messages := call(t, podYAML, "credence", "inject", kubeconfig)
	if strings.Contains(out, "CREDENCE_BROKER_DNS_NAME") || !strings.Contains(out, "credence-sidecar") {
		t.Errorf("the domain is not known, and the output is\n%s", out)
	}
	if want := "note: the webhook's cluster domain is not known, so sidecars find the brokers by their pod's search domains; set --cluster-domain"; !strings.Contains(messages, want) {
		t.Errorf("messages lack %q:\n%s", want, messages)
	}
	witness := func(name, broker, domain string) *corev1.Pod {
		return &corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: name, Labels: map[string]string{"iam.example.org/injected": "true"}},
			Spec: corev1.PodSpec{InitContainers: []corev1.Container{{Name: "credence-sidecar", Env: []corev1.EnvVar{
				{Name: "CREDENCE_BROKER", Value: broker},
				{Name: "CREDENCE_BROKER_DNS_NAME", Value: "credence-broker.security.svc." + domain + "."},
			}}}},
		}
	}
	const broker = "credence-broker.security.svc:9443"
	server.Put(
		witness("a", broker, "corp.example"), witness("b", broker, "corp.example"), witness("c", broker, "mistaken.example"),
		witness("d", "other:1", "other.example"), witness("e", "other:1", "other.example"), witness("f", "other:1", "other.example"),
	)
	_, out, messages = call(t, podYAML, "credence", "inject", kubeconfig)
	if !strings.Contains(out, "credence-broker.security.svc.corp.example.") || strings.Contains(messages, "note") {
		t.Errorf("an injected pod has the domain, and the output is\n%s\n%s", out, messages)
	}
}
