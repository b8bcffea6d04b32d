package inject_test

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/webhook/inject"
)

// podOf returns a pod with one container for each list of variables.
func podOf(metadata string, envs ...string) []byte {
	var containers []string
	for n, env := range envs {
		containers = append(containers, fmt.Sprintf(`{"name":"c%d","env":[%s]}`, n, env))
	}
	return []byte(`{"metadata":{` + metadata + `},"spec":{"containers":[` + strings.Join(containers, ",") + `]}}`)
}

const annotated = `"annotations":{"iam.amazonaws.com/role":"r"}`

// TestPodIdentity: Inject refuses the variables of EKS Pod Identity like web identity, but not other endpoints.
func TestPodIdentity(t *testing.T) {
	variable := func(name, value string) string { return fmt.Sprintf(`{"name":%q,"value":%q}`, name, value) }
	const (
		uri   = "AWS_CONTAINER_CREDENTIALS_FULL_URI"
		token = "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE"
	)
	for env, found := range map[string]string{
		variable(uri, "http://169.254.170.23/v1/credentials"):                                                       uri,
		variable(uri, "http://169.254.170.23:80/v1/credentials"):                                                    uri,
		variable(uri, " http://169.254.170.23/v1/credentials"):                                                      uri,
		variable(uri, "http://[fd00:ec2::23]/v1/credentials"):                                                       uri,
		variable(uri, "http://[fd00:ec2:0:0::23]:80/v1"):                                                            uri,
		variable(uri, "http://[::ffff:169.254.170.23]/v1"):                                                          uri,
		variable("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "//169.254.170.23/v1"):                                   "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
		variable(token, "/var/run/secrets/pods.eks.amazonaws.com/serviceaccount/eks-pod-identity-token"):            token,
		variable(token, "/var/run/../run/secrets/pods.eks.amazonaws.com//serviceaccount/eks-pod-identity-token"):    token,
		variable(uri, "") + `,` + variable(uri, "http://169.254.170.23/v1/credentials"):                             uri,
		variable(uri, "http://localhost:1/") + `,` + variable(token, "/var/run/secrets/pods.eks.amazonaws.com/x/y"): token,

		variable(uri, "http://169.254.170.23/v1/credentials") + `,` + variable(uri, ""): "", // The last variable applies.
		variable(uri, "http://169.254.170.2/v2/credentials"):                            "",
		variable(uri, "http://169.254.170.230/"):                                        "",
		variable(uri, "http://localhost:1234/169.254.170.23"):                           "",
		variable(uri, "://"): "",
		variable("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "/v2/credentials/1"):                                             "",
		variable(token, "/var/run/secrets/other/token"):                                                                     "",
		variable("OTHER", "http://169.254.170.23/v1/credentials"):                                                           "",
		`{"name":"AWS_CONTAINER_CREDENTIALS_FULL_URI","valueFrom":{"configMapKeyRef":{"name":"169.254.170.23","key":"x"}}}`: "",
	} {
		raw := podOf(annotated, env)
		_, err := newInjector(t).Inject(raw, namespace)
		if found == "" {
			if err != nil {
				t.Errorf("%s: %v", env, err)
			}
			continue
		}
		want := fmt.Sprintf(`container "c0" has %s of EKS Pod Identity, which SDKs prefer to the annotated role; remove it (and what sets it, such as a Pod Identity association of the service account), or list the container in "iam.amazonaws.com/skip-containers"`, found)
		if credential.ReasonOf(err) != credential.ReasonShadowed || err.Error() != want {
			t.Errorf("%s: error is %v, want %s", env, err, want)
		}
		result, err := newInjector(t, func(c *inject.Config) { c.OnShadowed = inject.WarnShadowed }).Inject(raw, namespace)
		if err != nil || len(result.Warnings) == 0 || result.Warnings[0] != fmt.Sprintf(`container "c0" sets %s of EKS Pod Identity, so SDKs use that identity, not the annotated role. Remove it at the end of the migration.`, found) {
			t.Errorf("%s with --on-shadowed=warn: warnings %q, error %v", env, result.Warnings, err)
		}
		if _, err := newInjector(t).Inject(podOf(strings.Replace(annotated, `"r"`, `"r","iam.amazonaws.com/skip-containers":"c0"`, 1), env), namespace); err != nil {
			t.Errorf("%s in a skipped container: %v", env, err)
		}
	}
}

// annotationsOf returns the annotations of the injected pod. A second injection must add nothing.
func annotationsOf(t *testing.T, raw []byte) map[string]string {
	t.Helper()
	i := newInjector(t)
	result, err := i.Inject(raw, namespace)
	if err != nil {
		t.Fatal(err)
	}
	patched := apply(t, raw, result.Patch)
	if again, err := i.Inject(patched, namespace); err != nil || again.Patch != nil {
		t.Errorf("second injection adds %v (%v)", again.Patch, err)
	}
	var pod struct {
		Metadata struct{ Annotations, Labels map[string]string }
	}
	if err := json.Unmarshal(patched, &pod); err != nil {
		t.Fatal(err)
	}
	if pod.Metadata.Labels["iam.amazonaws.com/injected"] != "true" {
		t.Errorf("labels are %v", pod.Metadata.Labels)
	}
	return pod.Metadata.Annotations
}

// TestWarningsAreKept: the pod keeps warnings about variables that SDKs prefer to the annotated role, because nobody sees
// the warnings of a pod that a controller creates.
func TestWarningsAreKept(t *testing.T) {
	const (
		key     = "iam.amazonaws.com/warnings"
		profile = `{"name":"AWS_PROFILE","value":"x"}`
		ofC0    = `container "c0" sets AWS_PROFILE: botocore and Go fail if the profile does not exist, and other SDKs take their credentials from it. Remove it, unless it is for something else.`
	)
	for name, tt := range map[string]struct {
		raw   []byte
		want  string
		there bool
	}{
		"no warning":      {podOf(annotated, ``), "", false},
		"a profile":       {podOf(annotated, profile), ofC0, true},
		"two containers":  {podOf(annotated, profile, profile), ofC0 + "\n" + strings.Replace(ofC0, "c0", "c1", 1), true},
		"a short session": {podOf(strings.Replace(annotated, `"r"`, `"r","iam.amazonaws.com/duration":"15m"`, 1), ``), "", false},
		"no longer":       {podOf(strings.Replace(annotated, `"r"`, `"r","`+key+`":"of another pod"`, 1), ``), "", true},
		"other warnings":  {podOf(strings.Replace(annotated, `"r"`, `"r","`+key+`":"of another pod"`, 1), profile), ofC0, true},
	} {
		t.Run(name, func(t *testing.T) {
			got, there := annotationsOf(t, tt.raw)[key]
			if got != tt.want || there != tt.there {
				t.Errorf("annotation is %q (%v), want %q", got, there, tt.want)
			}
		})
	}
	envs := make([]string, 900)
	for n := range envs {
		envs[n] = profile
	}
	got := annotationsOf(t, podOf(annotated, envs...))[key]
	if lines := strings.Split(got, "\n"); len(got) > 700 || lines[0] != ofC0 || lines[len(lines)-1] != fmt.Sprintf("and %d more", 900-len(lines)+1) {
		t.Errorf("annotation for 900 warnings has %d bytes: %s", len(got), got)
	}
	// A pod with only the webhook's own keys is not annotated.
	result, err := newInjector(t).Inject(podOf(`"annotations":{"`+key+`":"x","iam.amazonaws.com/service-account":"x"}`, profile), namespace)
	if err != nil || result.Annotated || result.Patch != nil {
		t.Errorf("pod with only the webhook's own keys: %+v, %v", result, err)
	}
}

// TestManyWarnings: Inject composes some warnings of a pod with many containers, and counts all.
func TestManyWarnings(t *testing.T) {
	envs := make([]string, 900)
	for n := range envs {
		envs[n] = `{"name":"AWS_PROFILE","value":"x"},{"name":"AWS_ACCESS_KEY_ID","value":"x"}`
	}
	result, err := newInjector(t).Inject(podOf(annotated, envs...), namespace)
	if err != nil || len(result.Warnings) != 64 || result.MoreWarnings != 1800-64 {
		t.Errorf("%d warnings and %d more (%v), want 64 and 1736", len(result.Warnings), result.MoreWarnings, err)
	}
}

// TestCopiedMarks: the webhook overwrites the label and the annotation by which the broker finds a pod.
func TestCopiedMarks(t *testing.T) {
	for _, injected := range []string{"false", "", "True", "true"} {
		raw := podOf(`"labels":{"iam.amazonaws.com/injected":"`+injected+`"},`+strings.Replace(annotated, `"r"`, `"r","iam.amazonaws.com/service-account":"another"`, 1), ``)
		if got := annotationsOf(t, raw)["iam.amazonaws.com/service-account"]; got != "default" {
			t.Errorf("service account is %q, want default", got)
		}
	}
}
