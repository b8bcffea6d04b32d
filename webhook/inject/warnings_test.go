package inject_test

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/credence-iam/credence/webhook/inject"
)

// maxWarningLength is the maximum length of a warning with ordinary values, in characters. The webhook adds "credence: ",
// and the API server cuts warnings to 256.
const maxWarningLength = 240

// TestWarningLength: each warning with ordinary values has two sentences, and reaches users as a whole. Ordinary
// values are an image name of 100 characters and other names of 63.
func TestWarningLength(t *testing.T) {
	name := strings.Repeat("n", 63)
	image := "registry.example/" + strings.Repeat("p", 100-len("registry.example//credence-sidecar:v1.22")) + "/credence-sidecar:v1.22"
	broker := strings.Repeat("b", 40) + "." + strings.Repeat("s", 20) + ".svc:9443"
	container := func(env ...string) string {
		return `{"name":"` + name + `","env":[` + strings.Join(env, ",") + `]}`
	}
	set := func(variable, value string) string { return fmt.Sprintf(`{"name":%q,"value":%q}`, variable, value) }
	const podIdentity = "http://169.254.170.23/v1/credentials"
	i := newInjector(t, func(c *inject.Config) {
		c.Broker, c.OnShadowed = broker, inject.WarnShadowed
		c.Settings.PodAnnotations = map[string]string{"example.com/" + name: strings.Repeat("v", 50)}
	})
	if err := i.UseDNS(inject.DNS{Domain: "cluster.local", Servers: []netip.Addr{netip.MustParseAddr("10.96.0.10")}}); err != nil {
		t.Fatal(err)
	}
	pod := func(annotations, spec string, containers ...string) []byte {
		return []byte(`{"metadata":{"annotations":{"iam.amazonaws.com/role":"reader"` + annotations + `}},"spec":{` + spec + `"containers":[` + strings.Join(containers, ",") + `]}}`)
	}
	present := func() []byte {
		raw := pod("", "", container())
		result, err := i.Inject(raw, namespace)
		if err != nil {
			t.Fatal(err)
		}
		text := string(apply(t, raw, result.Patch))
		return []byte(strings.NewReplacer("registry.example/credence-sidecar:v1", image,
			`"iam.amazonaws.com/role":"reader"`, `"iam.amazonaws.com/role":"reader","iam.amazonaws.com/imds":"v1","iam.amazonaws.com/start-timeout":"59m59s","iam.amazonaws.com/sidecar-port":"65535"`,
			`"initContainers":[`, `"initContainers":[{"name":"`+name+`"},`).Replace(text))
	}
	seen := map[string]string{}
	for _, raw := range [][]byte{
		pod(`,"iam.amazonaws.com/duration":"15m","iam.amazonaws.com/skip-containers":"`+name+`x"`, "", container()),
		pod(`,"iam.amazonaws.com/duration":"12h","example.com/`+name+`":"`+strings.Repeat("w", 50)+`"`, "", container()),
		pod("", `"dnsPolicy":"None","dnsConfig":{"nameservers":["2001:db8:1111:2222:3333:4444:5555:6666"]},`, `{"name":"`+name+`","envFrom":[{}]}`),
		pod("", "", container(set("AWS_ACCESS_KEY_ID", "x")), container(set("AWS_PROFILE", "x")), container(set("AWS_DEFAULT_PROFILE", "x")),
			container(set("AWS_SHARED_CREDENTIALS_FILE", "x")), container(set("AWS_CONFIG_FILE", "x")), container(set("AWS_EC2_METADATA_SERVICE_ENDPOINT", ""))),
		pod("", "", container(set("AWS_WEB_IDENTITY_TOKEN_FILE", "x")), container(set("AWS_CONTAINER_CREDENTIALS_FULL_URI", podIdentity)),
			container(set("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "/x")), container(set("AWS_CONTAINER_CREDENTIALS_FULL_URI", "http://127.0.0.1:9779/v1/credentials")),
			container(`{"name":"AWS_CONTAINER_AUTHORIZATION_TOKEN","valueFrom":{"fieldRef":{"fieldPath":"metadata.uid"}}}`)),
		present(),
	} {
		if !json.Valid(raw) {
			t.Fatalf("not JSON: %s", raw)
		}
		result, err := i.Inject(raw, namespace)
		if err != nil {
			t.Fatal(err)
		}
		for _, warning := range result.Warnings {
			key := strings.Join(slices.DeleteFunc(strings.Fields(warning), func(word string) bool { return strings.ContainsAny(word, `"0123456789`) }), " ")
			seen[key] = warning
		}
	}
	if len(seen) < 19 {
		t.Errorf("the pods cause %d different warnings, want at least 19", len(seen))
	}
	for _, warning := range seen {
		if n := len([]rune(warning)); n > maxWarningLength {
			t.Errorf("warning has %d characters, want at most %d: %s", n, maxWarningLength, warning)
		}
		if !strings.HasSuffix(warning, ".") || strings.Count(warning+" ", ". ") != 2 {
			t.Errorf("warning does not have two sentences: %s", warning)
		}
	}
}
