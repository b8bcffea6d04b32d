//go:build unix

package chart_test

import (
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"

	"github.com/credence-iam/credence/integration/chart"
)

const (
	readme     = "../../charts/credence/README.md"
	valuesFile = "../../charts/credence/values.yaml"
	schemaFile = "../../charts/credence/values.schema.json"
)

// TestSchemaRefuses shows that Helm refuses an unknown key or an invalid value before it installs anything. The message
// has the place and the fault.
func TestSchemaRefuses(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct{ set, where, what string }{
		{"replicas=3", "", "additional properties 'replicas' not allowed"},
		{"aws.regoin=x", "/aws", "additional properties 'regoin' not allowed"},
		{"images.broker.pullPolicy=Always", "/images/broker", "additional properties 'pullPolicy' not allowed"},
		{"broker.extraEnv=x", "/broker", "additional properties 'extraEnv' not allowed"},
		{"broker.resources.request.cpu=1", "/broker/resources", "additional properties 'request' not allowed"},
		{"broker.serviceAccount.namespace=x", "/broker/serviceAccount", "additional properties 'namespace' not allowed"},
		{"broker.env[0].name=A,broker.env[0].vaule=x", "/broker/env/0", "additional properties 'vaule' not allowed"},
		{"images.pullSecrets[0]=registry", "/images/pullSecrets/0", "want object"},
		{"webhook.failurePolicy=Ignore", "/webhook", "additional properties 'failurePolicy' not allowed"},
		{"sidecar.image=x", "/sidecar", "additional properties 'image' not allowed"},
		{"certificates.issuer=x", "/certificates", "additional properties 'issuer' not allowed"},
		{"certificates.issuerRef.namespace=x", "/certificates/issuerRef", "additional properties 'namespace' not allowed"},
		{"metrics.serviceMonitor.namespace=x", "/metrics/serviceMonitor", "additional properties 'namespace' not allowed"},
		{"metrics.enabled=true", "/metrics", "additional properties 'enabled' not allowed"},
		{"tracing.sampler=x", "/tracing", "additional properties 'sampler' not allowed"},
		{"rbac.viewer.craete=true", "/rbac/viewer", "additional properties 'craete' not allowed"},
		{"networkPolicy.enable=true", "/networkPolicy", "additional properties 'enable' not allowed"},

		{"global.imageRegistry=https://mirror.example", "/global/imageRegistry", "does not match pattern"},
		{"global.imagePullSecrets[0].names=x", "/global/imagePullSecrets/0", "'anyOf' failed"},
		{"namespaceOverride=A", "/namespaceOverride", "does not match pattern"},
		{"commonLabels.app\\.kubernetes\\.io/instance=x", "/commonLabels/app.kubernetes.io~1instance", "false schema"},
		{"commonLabels.a=b c", "/commonLabels/a", "does not match pattern"},
		{"commonLabels.a=1", "/commonLabels/a", "want string"},
		{"commonLabels.a b=c", "/commonLabels", "additional properties 'a b' not allowed"},
		{"extraObjects[0]=1", "/extraObjects/0", "want string or object"},
		{"revisionHistoryLimit=-1", "/revisionHistoryLimit", "minimum"},
		{"broker.extraArgs[0]=--region", "/broker/extraArgs/0", "does not match pattern"},
		{"broker.hostNetwork=true", "/broker", "additional properties 'hostNetwork' not allowed"},
		{"broker.podSecurityContext.runAsNonRoot=false", "/broker/podSecurityContext", "additional properties 'runAsNonRoot' not allowed"},
		{"broker.podSecurityContext.seccompProfile.type=Unconfined", "/broker/podSecurityContext/seccompProfile/type", "value must be one of 'RuntimeDefault', 'Localhost'"},
		{"broker.podSecurityContext.fsGroup=0", "/broker/podSecurityContext/fsGroup", "minimum"},
		{"broker.podDisruptionBudget.maxUnavailable=half", "/broker/podDisruptionBudget/maxUnavailable", "does not match pattern"},
		{"broker.podDisruptionBudget.minAvailable=101%", "/broker/podDisruptionBudget/minAvailable", "does not match pattern"},
		{"webhook.serviceAccount.create=false", "/webhook/serviceAccount/name", "minLength"},
		{"webhook.timeoutSeconds=31", "/webhook/timeoutSeconds", "maximum: got 31, want 30"},
		{"webhook.timeoutSeconds=0", "/webhook/timeoutSeconds", "minimum"},
		{"webhook.port=443", "/webhook/port", "minimum"},
		{"webhook.hostNetwork=yes", "/webhook/hostNetwork", "want boolean"},
		{"webhook.namespaceSelector.matchLabels.a=b", "/webhook/namespaceSelector", "additional properties 'matchLabels' not allowed"},
		{"webhook.namespaceSelector.matchExpressions[0].key=a,webhook.namespaceSelector.matchExpressions[0].operator=In", "/webhook/namespaceSelector/matchExpressions/0", "missing property 'values'"},
		{"webhook.namespaceSelector.matchExpressions[0].key=a,webhook.namespaceSelector.matchExpressions[0].operator=Is", "/webhook/namespaceSelector/matchExpressions/0/operator", "value must be one of"},
		{"webhook.volumes[0].name=sidecar", "/webhook/volumes/0/name", "'not' failed"},
		{"webhook.dnsConfig.option=x", "/webhook/dnsConfig", "additional properties 'option' not allowed"},
		{"metrics.podMonitor.scrapeTimeout=10", "/metrics/podMonitor/scrapeTimeout", "want string"},
		{"check.timeout=3", "/check/timeout", "want string"},
		{"check.timeout=0s", "/check/timeout", "does not match pattern"},
		{"check.timeout=1000s", "/check/timeout", "does not match pattern"},
		{"check.enable=false", "/check", "additional properties 'enable' not allowed"},
		{"test.enabled=true", "/test", "additional properties 'enabled' not allowed"},

		{"clusterName=x", "/clusterName", "does not match pattern"},
		{"clusterDomain=cluster.local.", "/clusterDomain", "does not match pattern"},
		{"annotationPrefix=iam.amazonaws.com/", "/annotationPrefix", "does not match pattern"},
		{"annotationPrefix=pods.kubernetes.io", "/annotationPrefix", "'not' failed"},
		{"logLevel=verbose", "/logLevel", "value must be one of 'debug', 'info', 'warn', 'error'"},
		{"aws.region=eu central", "/aws/region", "does not match pattern"},
		{"rules.namespace[0].match[0]=*", "/rules", "additional properties 'namespace' not allowed"},
		{"rules.kubernetesTags=true", "/rules", "missing property 'namespaces'"},
		{"rules.namespaces[0].rols[0]=*", "/rules/namespaces/0", "additional properties 'rols' not allowed"},
		{"rules.namespaces[0].match[0]=*,rules.namespaces[0].accounts[0]=123456789012", "/rules/namespaces/0/accounts/0", "want string"},
		{"aws.baseARN=arn:aws:iam::123456789012:role", "/aws/baseARN", "does not match pattern"},
		{"aws.assumeRole=hop", "/aws/assumeRole", "does not match pattern"},
		{"aws.stsEndpoint=sts.example.com", "/aws/stsEndpoint", "does not match pattern"},
		{"proxy.https=proxy.example.com:3128", "/proxy/https", "does not match pattern"},
		{"proxy.https=http://user:password@proxy.example.com:3128", "/proxy/https", "does not match pattern"},
		{"proxy.http=http://proxy.example.com", "/proxy/http", "does not match pattern"},
		{"proxy.except[0]=a\\,b", "/proxy/except/0", "does not match pattern"},
		{"proxy.all=x", "/proxy", "additional properties 'all' not allowed"},
		{"images.broker.repository=broker:v1", "/images/broker/repository", "does not match pattern"},
		{"images.broker.digest=0123", "/images/broker/digest", "does not match pattern"},
		{"images.sidecar.pullPolicy=always", "/images/sidecar/pullPolicy", "value must be one of"},
		{"runAsUser=0", "/runAsUser", "minimum: got 0, want 1"},
		{"sidecar.runAsUser=-2", "/sidecar/runAsUser", "value must be -1"},
		{"sidecar.port=80", "/sidecar/port", "minimum"},
		{"sidecar.memory=8Mi", "/sidecar/memory", "does not match pattern"},
		{"sidecar.memory=257Mi", "/sidecar/memory", "does not match pattern"},
		{"sidecar.cpu.requests=50m", "/sidecar/cpu", "additional properties 'requests' not allowed"},
		{"sidecar.cpu.request=0", "/sidecar/cpu/request", "minimum"},
		{"sidecar.cpu.limit=9m", "/sidecar/cpu/limit", "does not match pattern"},
		{"sidecar.cpu.limit=1001m", "/sidecar/cpu/limit", "does not match pattern"},
		{"sidecar.cpu.guaranteed=0", "/sidecar/cpu/guaranteed", "minimum"},
		{"sidecar.logLevel=trace", "/sidecar/logLevel", "value must be one of"},
		{"sidecar.imagePullSecrets[0].name=registry", "/sidecar/imagePullSecrets/0", "want string"},
		{"sidecar.podAnnotations.container\\.apparmor\\.security\\.beta\\.kubernetes\\.io/app=unconfined", "/sidecar/podAnnotations/container.apparmor.security.beta.kubernetes.io~1app", "false schema"},
		{"sidecar.onShadowed=allow", "/sidecar/onShadowed", "value must be one of 'refuse', 'warn'"},
		{"broker.replicas=0", "/broker/replicas", "minimum"},
		{"webhook.replicas=0", "/webhook/replicas", "minimum"},
		{"broker.audit=none", "/broker/audit", "value must be one of 'best-effort', 'required'"},
		{"broker.tokenVerification=none", "/broker/tokenVerification", "value must be one of 'jwks', 'tokenreview'"},
		{"broker.maxTokenLife=1d", "/broker/maxTokenLife", "does not match pattern"},
		{"broker.podLabels.app\\.kubernetes\\.io/component=x", "/broker/podLabels/app.kubernetes.io~1component", "false schema"},
		{"broker.podLabels.a=b c", "/broker/podLabels/a", "does not match pattern"},
		{"broker.env[0].name=POD_NAMESPACE", "/broker/env/0/name", "'not' failed"},
		{"broker.volumes[0].name=tls", "/broker/volumes/0/name", "'not' failed"},
		{"webhook.allowKubeSystem=maybe", "/webhook/allowKubeSystem", "want boolean"},
		{"metrics.serviceMonitor.interval=30", "/metrics/serviceMonitor/interval", "want string"},
		{"tracing.endpoint=collector:4317", "/tracing/endpoint", "does not match pattern"},
		{"tracing.endpoint=http://collector", "/tracing/endpoint", "does not match pattern"},
		{"tracing.ratio=2", "/tracing/ratio", "maximum"},
		{"certificates.source=helm", "/certificates/source", "value must be one of 'self-signed', 'issuer', 'secrets'"},
		{"certificates.source=issuer", "/certificates/issuerRef/name", "minLength"},
		{"certificates.source=secrets", "/certificates/roots", "minLength"},
		{"certificates.roots=ca.crt", "/certificates/roots", "does not match pattern"},
		{"certificates.duration=90d", "/certificates/duration", "does not match pattern"},
		{"certificates.renewBeforePercentage=100", "/certificates/renewBeforePercentage", "maximum"},
	} {
		t.Run(tc.set, func(t *testing.T) {
			t.Parallel()
			_, err := chart.Render(t.Context(), chart.Config{Helm: helm, Set: []string{tc.set}})
			if err == nil {
				t.Fatal("Helm accepts it")
			}
			if text := err.Error(); !strings.Contains(text, "at '"+tc.where+"'") || !strings.Contains(text, tc.what) {
				t.Errorf("the message is %q, want the place %q and the fault %q", text, tc.where, tc.what)
			}
		})
	}
}

// TestSchemaIsClosed shows that the schema accepts no unknown keys in objects that the chart defines, and that it has all
// values.
func TestSchemaIsClosed(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile(schemaFile)
	if err != nil {
		t.Fatal(err)
	}
	var schema map[string]any
	if err := json.Unmarshal(text, &schema); err != nil {
		t.Fatal(err)
	}
	closed := 0
	var walk func(where string, node any)
	walk = func(where string, node any) {
		m, ok := node.(map[string]any)
		if !ok {
			return
		}
		_, properties := m["properties"].(map[string]any)
		// The schema has only the required fields of array items of Kubernetes' types.
		theirs := strings.HasSuffix(where, "/items") || where == "/properties/global"
		if more, isSet := m["additionalProperties"]; properties && m["type"] == "object" {
			if !theirs && !free(where[strings.LastIndexByte(where, '/')+1:]) && (!isSet || more != false) {
				t.Errorf("%s accepts unknown keys", where)
			}
			closed++
		}
		for key, child := range m {
			walk(where+"/"+key, child)
		}
	}
	walk("", schema)
	if closed < 10 {
		t.Errorf("only %d objects were found in the schema", closed)
	}
	for key := range leaves(t, valuesFile) {
		if err := described(schema, schema, strings.Split(key, ".")); err != nil {
			t.Errorf("%s: %v", key, err)
		}
	}
}

// described follows a key through the schema.
func described(root, node map[string]any, key []string) error {
	if ref, ok := node["$ref"].(string); ok {
		definitions, _ := root["definitions"].(map[string]any)
		node, ok = definitions[strings.TrimPrefix(ref, "#/definitions/")].(map[string]any)
		if !ok {
			return fmt.Errorf("the schema has no definition %s", ref)
		}
	}
	if len(key) == 0 {
		return nil
	}
	properties, _ := node["properties"].(map[string]any)
	next, ok := properties[key[0]].(map[string]any)
	if !ok {
		return fmt.Errorf("the schema has no property %s", key[0])
	}
	return described(root, next, key[1:])
}

// TestReadme compares the table of values in the chart's README with values.yaml.
func TestReadme(t *testing.T) {
	t.Parallel()
	const begin, end = "<!-- values: made from values.yaml by go test ./integration/chart -update -->\n", "<!-- end of values -->\n"
	page, err := os.ReadFile(readme)
	if err != nil {
		t.Fatal(err)
	}
	before, rest, ok := strings.Cut(string(page), begin)
	_, after, ok2 := strings.Cut(rest, end)
	if !ok || !ok2 {
		t.Fatalf("%s lacks %q or %q", readme, begin, end)
	}
	table := valuesTable(t)
	if n, want := strings.Count(table, "\n"), len(leaves(t, valuesFile)); n < want {
		t.Fatalf("the table has %d lines for %d values", n, want)
	}
	want := before + begin + "\n" + table + "\n" + end + after
	if *update {
		if err := os.WriteFile(readme, []byte(want), 0o600); err != nil {
			t.Fatal(err)
		}
		return
	}
	if want != string(page) {
		t.Errorf("the values in %s are not those of values.yaml; run go test ./integration/chart -update", readme)
	}
}

// valuesTable returns a Markdown table of values.yaml. A value without a comment fails the test.
func valuesTable(t *testing.T) string {
	t.Helper()
	text, err := os.ReadFile(valuesFile)
	if err != nil {
		t.Fatal(err)
	}
	var document yaml.Node
	if err := yaml.Unmarshal(text, &document); err != nil {
		t.Fatal(err)
	}
	var table strings.Builder
	table.WriteString("| value | default | meaning |\n|---|---|---|\n")
	var walk func(prefix string, node *yaml.Node)
	walk = func(prefix string, node *yaml.Node) {
		for at := 0; at < len(node.Content); at += 2 {
			name, value := node.Content[at], node.Content[at+1]
			key := strings.TrimPrefix(prefix+"."+name.Value, ".")
			if value.Kind == yaml.MappingNode && len(value.Content) > 0 && !free(key) {
				walk(key, value)
				continue
			}
			comment := name.HeadComment
			if i := strings.LastIndex(comment, "\n\n"); i >= 0 {
				comment = comment[i+2:] // a separate paragraph is about something else
			}
			comment = strings.Join(strings.Fields(strings.ReplaceAll("\n"+comment, "\n# ", " ")), " ")
			if !strings.HasSuffix(comment, ".") {
				t.Errorf("%s needs a comment of whole sentences, has %q", key, comment)
			}
			_, _ = fmt.Fprintf(&table, "| `%s` | `%s` | %s |\n", key, flow(t, value), strings.ReplaceAll(comment, "|", `\|`))
		}
	}
	walk("", document.Content[0])
	return table.String()
}

// flow returns a value on one line.
func flow(t *testing.T, value *yaml.Node) string {
	t.Helper()
	if value.Kind == yaml.ScalarNode && value.Value != "" {
		return value.Value
	}
	var plain any
	if err := value.Decode(&plain); err != nil {
		t.Fatal(err)
	}
	text, err := json.Marshal(plain)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}
