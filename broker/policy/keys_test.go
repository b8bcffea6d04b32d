package policy_test

import (
	"errors"
	"strings"
	"testing"

	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/policy"
)

func newKeys(t testing.TB) policy.Keys {
	t.Helper()
	keys, err := policy.NewKeys(policy.DefaultPrefix)
	if err != nil {
		t.Fatal(err)
	}
	return keys
}

// request parses annotations given by short keys.
func request(pairs map[policy.Key]string) *policy.Request {
	keys, err := policy.NewKeys(policy.DefaultPrefix)
	if err != nil {
		panic(err)
	}
	return keys.Request(annotations(pairs))
}

func TestNewKeys(t *testing.T) {
	for _, prefix := range []string{"iam.amazonaws.com", "a", "x-1.example", strings.Repeat("a", 253)} {
		keys, err := policy.NewKeys(prefix)
		if err != nil || keys.Prefix() != prefix || keys.Name(policy.Role) != prefix+"/role" {
			t.Errorf("NewKeys(%q) = %v, %v", prefix, keys, err)
		}
	}
	for _, prefix := range []string{
		"", ".", "-a", "a-", "a.", ".a", "a..b", "a.-b", "a-.b", "A", "a_b", "a/b", "a b", "é", "a\n", strings.Repeat("a", 254),
	} {
		if keys, err := policy.NewKeys(prefix); err == nil || keys != (policy.Keys{}) {
			t.Errorf("NewKeys(%q) = %v, %v", prefix, keys, err)
		}
	}
}

func TestAnnotated(t *testing.T) {
	keys := newKeys(t)
	for name, want := range map[string]bool{
		"iam.amazonaws.com/role":            true,
		"iam.amazonaws.com/roel":            true,
		"iam.amazonaws.com/":                true,
		"iam.amazonaws.com/permitted":       true,
		"iam.amazonaws.com/service-account": false, // written by the webhook
		"iam.amazonaws.com/injected-hint":   true,  // the admission policies do not know it either
		"iam.amazonaws.com":                 false,
		"iam.amazonaws.com.example/role":    false,
		"x.iam.amazonaws.com/role":          false,
		"IAM.amazonaws.com/role":            false,
		"role":                              false,
	} {
		if got := keys.Annotated(map[string]string{name: "", "other/key": ""}); got != want {
			t.Errorf("Annotated with %q = %v", name, got)
		}
	}
	if keys.Annotated(nil) {
		t.Error("a pod without annotations is annotated")
	}
	if (policy.Keys{}).Annotated(map[string]string{"/role": "reader", "iam.amazonaws.com/role": "reader"}) {
		t.Error("the zero Keys recognize a key")
	}
}

func TestOptedIn(t *testing.T) {
	keys := newKeys(t)
	for _, tt := range []struct {
		name, value string
		want        bool
	}{
		{"iam.amazonaws.com/inject", "enabled", true},
		{"iam.amazonaws.com/inject", "disabled", false},
		{"iam.amazonaws.com/inject", "true", false},
		{"iam.amazonaws.com/inject", "Enabled", false},
		{"iam.amazonaws.com/inject", "", false},
		{"example.com/inject", "enabled", false},
		{"inject", "enabled", false},
	} {
		if got := keys.OptedIn(map[string]string{tt.name: tt.value}); got != tt.want {
			t.Errorf("OptedIn with %s=%s is %v", tt.name, tt.value, got)
		}
	}
	if keys.OptedIn(nil) || (policy.Keys{}).OptedIn(map[string]string{"/inject": "enabled"}) {
		t.Error("a namespace without a label is opted in, or the zero Keys opt one in")
	}
}

func TestUnknownKeys(t *testing.T) {
	keys := newKeys(t)
	for _, tt := range []struct{ key, want string }{
		{"roel", `did you mean "iam.amazonaws.com/role"?`},
		{"Role", `did you mean "iam.amazonaws.com/role"?`},
		{"roles", `did you mean "iam.amazonaws.com/role"?`},
		{"", `did you mean "iam.amazonaws.com/role"?`},
		{"sesion-name", `did you mean "iam.amazonaws.com/session-name"?`},
		{"session-nmae", `did you mean "iam.amazonaws.com/session-name"?`},
		{"session_name", `did you mean "iam.amazonaws.com/session-name"?`},
		{"externalid", `did you mean "iam.amazonaws.com/external-id"?`},
		{"external-ID", `did you mean "iam.amazonaws.com/external-id"?`},
		{"sessiontags", `did you mean "iam.amazonaws.com/session-tags"?`},
		{"policy-arn", `did you mean "iam.amazonaws.com/policy-arns"?`},
		{"session-duration", `did you mean "iam.amazonaws.com/`},
		{"durations", `did you mean "iam.amazonaws.com/duration"?`},
		{"skip-container", `did you mean "iam.amazonaws.com/skip-containers"?`},
		{"imdsv2", `did you mean "iam.amazonaws.com/imds"?`},
		{"start_timeout", `did you mean "iam.amazonaws.com/start-timeout"?`},
		{"injected", "is unknown"}, // a label, and unknown as an annotation
		{"Injected-hint", "is unknown"},
		{"permitted", "no meaning on a pod; set it on the namespace"},
		{"allowed-roles", "no meaning on a pod; set it on the namespace"},
		{"default-role", "no meaning on a pod; set it on the namespace"},
		{"permitted-tags", "no meaning on a pod; set it on the namespace"},
		{"inject", "no meaning on a pod; set it on the namespace"},
		{strings.Repeat("r", 64), "longer than any known one"},
		// Kubernetes refuses it, but only after admission.
		{strings.Repeat("r", 3<<20), "longer than any known one"},
	} {
		name := "iam.amazonaws.com/" + tt.key
		settings, err := keys.Request(map[string]string{name: "x", "iam.amazonaws.com/role": "reader"}).Settings()
		mustRefuse(t, "key "+tt.key[:min(len(tt.key), 70)], err, credential.ErrInvalid, credential.ReasonAnnotationUnknown, name[:min(len(name), 80)], tt.want)
		if settings.Role != "" {
			t.Errorf("a refusal comes with settings: %+v", settings)
		}
	}
	// The refusal of a pod is the same each time, whatever the order of a map.
	for range 100 {
		_, err := keys.Request(map[string]string{"iam.amazonaws.com/b": "", "iam.amazonaws.com/a": "", "iam.amazonaws.com/c": "", "iam.amazonaws.com/role": ""}).Settings()
		mustRefuse(t, "three keys", err, credential.ErrInvalid, credential.ReasonAnnotationUnknown, `"iam.amazonaws.com/a"`)
	}
	// Keys under other prefixes do not matter. The webhook's own annotation is known, and one of a later webhook is ignored.
	if _, err := keys.Request(map[string]string{
		"iam.amazonaws.com/role": "reader", "iam.amazonaws.com/service-account": "default", "iam.amazonaws.com/injected-hint": "x",
		"example.com/roel": "", "iam.amazonaws.com.example/roel": "", "roel": "",
	}).Settings(); err != nil {
		t.Error(err)
	}
}

// mustRefuse checks that err is a refusal of that kind and reason, and that its message has all fragments and is short enough
// to read.
func mustRefuse(t testing.TB, what string, err error, kind error, reason credential.Reason, fragments ...string) {
	t.Helper()
	e, ok := errors.AsType[*credential.Error](err)
	if !ok {
		t.Errorf("%s: the error is %v, not a *credential.Error", what, err)
		return
	}
	if !errors.Is(err, kind) || e.Reason != reason {
		t.Errorf("%s: refused as %v, %s (%s), want %v, %s", what, e.Kind, e.Reason, e.Message, kind, reason)
	}
	for _, fragment := range fragments {
		if !strings.Contains(e.Message, fragment) {
			t.Errorf("%s: the message %q lacks %q", what, e.Message, fragment)
		}
	}
	if len(e.Message) > 2048 {
		t.Errorf("%s: the message has %d bytes", what, len(e.Message))
	}
}
