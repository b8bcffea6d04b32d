package policy_test

import (
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"

	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/policy"
)

// annotations makes full keys of short ones.
func annotations(pairs map[policy.Key]string) map[string]string {
	full := make(map[string]string, len(pairs))
	for key, value := range pairs {
		full[policy.DefaultPrefix+"/"+string(key)] = value
	}
	return full
}

func defaults() policy.Settings {
	return policy.Settings{
		Scope: policy.ScopeRole, Duration: time.Hour, Metadata: policy.MetadataV2, StartTimeout: 2 * time.Minute,
	}
}

// numbered makes a comma list of n names of a form such as "tag%d=v".
func numbered(n int, form string) string {
	var names []string
	for i := range n {
		names = append(names, fmt.Sprintf(form, i))
	}
	return strings.Join(names, ",")
}

const statement = `{"Statement":[]}`

// goodValues has, for each key, valid values and the resulting settings.
var goodValues = map[policy.Key][]struct {
	value string
	want  func(*policy.Settings)
}{
	policy.Role: {
		{"reader", func(s *policy.Settings) { s.Role = "reader" }},
		{" /team/reader\n", func(s *policy.Settings) { s.Role = "/team/reader" }},
		{"", func(*policy.Settings) {}},
	},
	policy.SessionName: {
		{"ab", func(s *policy.Settings) { s.SessionName = "ab" }},
		{"A_z0+=,.@-", func(s *policy.Settings) { s.SessionName = "A_z0+=,.@-" }},
		{strings.Repeat("n", 64), func(s *policy.Settings) { s.SessionName = strings.Repeat("n", 64) }},
	},
	policy.ExternalID: {
		{"12", func(s *policy.Settings) { s.ExternalID = "12" }},
		{"A_z0+=,.@:/-", func(s *policy.Settings) { s.ExternalID = "A_z0+=,.@:/-" }},
		{strings.Repeat("e", 1224), func(s *policy.Settings) { s.ExternalID = strings.Repeat("e", 1224) }},
	},
	policy.SessionTags: {
		{"team=shop", func(s *policy.Settings) { s.SessionTags = []policy.Tag{{Key: "team", Value: "shop"}} }},
		{"b=2, a=1 ,c=", func(s *policy.Settings) { s.SessionTags = []policy.Tag{{"a", "1"}, {"b", "2"}, {"c", ""}} }},
		{"expr=a=b", func(s *policy.Settings) { s.SessionTags = []policy.Tag{{"expr", "a=b"}} }},
		{"cost centre = north 1", func(s *policy.Settings) { s.SessionTags = []policy.Tag{{"cost centre", "north 1"}} }},
		{"größe=ü_.:/+-@", func(s *policy.Settings) { s.SessionTags = []policy.Tag{{"größe", "ü_.:/+-@"}} }},
		{"kubernetes=1", func(s *policy.Settings) { s.SessionTags = []policy.Tag{{"kubernetes", "1"}} }},
		{strings.Repeat("ü", 128) + "=" + strings.Repeat("v", 256), func(s *policy.Settings) {
			s.SessionTags = []policy.Tag{{strings.Repeat("ü", 128), strings.Repeat("v", 256)}}
		}},
		{numbered(50, "t%02d=v"), func(s *policy.Settings) {
			for i := range 50 {
				s.SessionTags = append(s.SessionTags, policy.Tag{Key: fmt.Sprintf("t%02d", i), Value: "v"})
			}
		}},
	},
	policy.SessionPolicy: {
		{statement, func(s *policy.Settings) { s.SessionPolicy = statement }},
		{" {\n \"Version\" : \"2012-10-17\", \"Statement\": [ {\"Sid\": \"a b\"} ] } ", func(s *policy.Settings) {
			s.SessionPolicy = `{"Version":"2012-10-17","Statement":[{"Sid":"a b"}]}`
		}},
		{statement + strings.Repeat(" ", 16<<10-len(statement)), func(s *policy.Settings) { s.SessionPolicy = statement }},
		{`{"Statement":"é\u2192"}`, func(s *policy.Settings) { s.SessionPolicy = `{"Statement":"é\u2192"}` }},
		{`{"Statement":"` + strings.Repeat("é", 2048-len(statement)) + `"}`, func(s *policy.Settings) {
			s.SessionPolicy = `{"Statement":"` + strings.Repeat("é", 2048-len(statement)) + `"}` // STS counts characters
		}},
		{`{"Statement":"` + strings.Repeat("x", 2048-len(statement)) + `"}`, func(s *policy.Settings) {
			s.SessionPolicy = `{"Statement":"` + strings.Repeat("x", 2048-len(statement)) + `"}`
		}},
	},
	policy.PolicyARNs: {
		{"arn:aws:iam::aws:policy/ReadOnlyAccess", func(s *policy.Settings) {
			s.PolicyARNs = []string{"arn:aws:iam::aws:policy/ReadOnlyAccess"}
		}},
		{"arn:aws-cn:iam::123456789012:policy/team/b, arn:aws-cn:iam::123456789012:policy/a", func(s *policy.Settings) {
			s.PolicyARNs = []string{"arn:aws-cn:iam::123456789012:policy/a", "arn:aws-cn:iam::123456789012:policy/team/b"}
		}},
		{numbered(10, "arn:aws:iam::aws:policy/p%d"), func(s *policy.Settings) {
			s.PolicyARNs = strings.Split(numbered(10, "arn:aws:iam::aws:policy/p%d"), ",")
		}},
	},
	policy.SessionScope: {
		{"role", func(*policy.Settings) {}},
		{"service-account", func(s *policy.Settings) { s.Scope = policy.ScopeServiceAccount }},
		{"pod", func(s *policy.Settings) { s.Scope = policy.ScopePod }},
	},
	policy.Duration: {
		{"15m", func(s *policy.Settings) { s.Duration = 15 * time.Minute }},
		{"12h", func(s *policy.Settings) { s.Duration = 12 * time.Hour }},
		{"1h30m", func(s *policy.Settings) { s.Duration = 90 * time.Minute }},
		{"3601s", func(s *policy.Settings) { s.Duration = 3601 * time.Second }},
	},
	policy.Region: {
		{"eu-central-1", func(s *policy.Settings) { s.Region = "eu-central-1" }},
		{"us-gov-west-1", func(s *policy.Settings) { s.Region = "us-gov-west-1" }},
		{"eusc-de-east-1", func(s *policy.Settings) { s.Region = "eusc-de-east-1" }},
		{"us-isob-east-1", func(s *policy.Settings) { s.Region = "us-isob-east-1" }},
	},
	policy.Containers: {
		{"app", func(s *policy.Settings) { s.Containers = []string{"app"} }},
		{"b, a", func(s *policy.Settings) { s.Containers = []string{"b", "a"} }},
		{numbered(1000, "c%d"), func(s *policy.Settings) { s.Containers = strings.Split(numbered(1000, "c%d"), ",") }},
	},
	policy.SkipContainers: {
		{"app, proxy", func(s *policy.Settings) { s.SkipContainers = []string{"app", "proxy"} }},
	},
	policy.IMDS: {
		{"v2", func(*policy.Settings) {}},
		{"v1", func(s *policy.Settings) { s.Metadata = policy.MetadataV1 }},
		{"off", func(s *policy.Settings) { s.Metadata = policy.MetadataOff }},
	},
	policy.StartTimeout: {
		{"0", func(s *policy.Settings) { s.StartTimeout = 0 }},
		{"30s", func(s *policy.Settings) { s.StartTimeout = 30 * time.Second }},
		{"24h", func(s *policy.Settings) { s.StartTimeout = 24 * time.Hour }},
	},
	policy.SidecarMemory: {
		{"12Mi", func(s *policy.Settings) { s.Sidecar.Memory = 12 }},
		{"16Mi", func(s *policy.Settings) { s.Sidecar.Memory = 16 }},
		{" 256Mi\n", func(s *policy.Settings) { s.Sidecar.Memory = 256 }},
	},
	policy.SidecarCPURequest: {
		{"1m", func(s *policy.Settings) { s.Sidecar.CPURequest = 1 }},
		{"1000m", func(s *policy.Settings) { s.Sidecar.CPURequest = 1000 }},
		{"1", func(s *policy.Settings) { s.Sidecar.CPURequest = 1000 }},
	},
	policy.SidecarCPULimit: {
		{"10m", func(s *policy.Settings) { s.Sidecar.CPULimit = new(policy.CPU(10)) }},
		{"1", func(s *policy.Settings) { s.Sidecar.CPULimit = new(policy.CPU(1000)) }},
		{"0", func(s *policy.Settings) { s.Sidecar.CPULimit = new(policy.CPU(0)) }},
	},
	policy.SidecarPort: {
		{"1024", func(s *policy.Settings) { s.Sidecar.Port = 1024 }},
		{"65535", func(s *policy.Settings) { s.Sidecar.Port = 65535 }},
	},
	policy.SidecarLogLevel: {
		{"debug", func(s *policy.Settings) { s.Sidecar.LogLevel = policy.LogDebug }},
		{"info", func(s *policy.Settings) { s.Sidecar.LogLevel = policy.LogInfo }},
		{"warn", func(s *policy.Settings) { s.Sidecar.LogLevel = policy.LogWarn }},
		{"error", func(s *policy.Settings) { s.Sidecar.LogLevel = policy.LogError }},
	},
}

// badValues has, for each key, invalid values and a part of the message.
var badValues = map[policy.Key][]struct{ value, want string }{
	// Rules.Grant checks the form of a role, because it needs the base.
	policy.Role: nil,
	policy.SessionName: {
		{"", "has 0 characters, must have 2 to 64"},
		{"a", "has 1 characters"},
		{strings.Repeat("n", 65), "has 65 characters"},
		{"two words", "must be letters, digits and any of _+=,.@-"},
		{"a/b", "must be letters"},
		{"a:b", "must be letters"},
		{"naïve", "must be letters"},
		{"a\nb", "must be letters"},
	},
	policy.ExternalID: {
		{"", "has 0 characters, must have 2 to 1224"},
		{"1", "has 1 characters"},
		{strings.Repeat("e", 1225), "has 1225 characters"},
		{"a b", "must be letters"},
		{"a;b", "must be letters"},
	},
	policy.SessionTags: {
		{"", "empty name"},
		{"a=1,", "empty name"},
		{"a", `"a" is not key=value`},
		{"=v", `tag key ""`},
		{" =v", `tag key ""`},
		{"a=1,a=2", `tag key "a" is set twice`},
		{"a=1,A=2", `tag key "A" is set twice`},
		{"a =1, a=2", `tag key "a" is set twice`},
		{"a=1,a=1", "named twice"},
		{"a=b;c", "the value of tag"},
		{"a;b=c", `tag key "a;b"`},
		{"a=\x00", "the value of tag"},
		{"a=\xff", "the value of tag"},
		{"aws:team=shop", "belong to AWS"},
		{"AWS:team=shop", "belong to AWS"},
		{"kubernetes-namespace=prod", `"kubernetes-namespace" is reserved`},
		{"Kubernetes-Namespace=prod", "is reserved"},
		{"kubernetes-namespace =prod", "is reserved"},
		{"kubernetes-service-account=x", "is reserved"},
		{"kubernetes-pod-name=x", "is reserved"},
		{"kubernetes-pod-uid=x", "is reserved"},
		{"eks-cluster-arn=x", "is reserved"},
		{"eks-cluster-name=x", "is reserved"},
		{"\u212Aubernetes-namespace=x", "is reserved"}, // KELVIN SIGN, whose lower case is k
		{strings.Repeat("k", 129) + "=v", "must have 1 to 128"},
		{"k=" + strings.Repeat("v", 257), "at most 256"},
		{numbered(51, "t%d=v"), "more than 50 names"},
		{strings.Repeat("k", 100_000), "is not key=value"},
	},
	policy.SessionPolicy: {
		{"", "is not a JSON object"},
		{"[]", "is not a JSON object"},
		{"null", "has no Statement"},
		{"{}", "has no Statement"},
		{`{"statement":[]}`, "has no Statement"},
		{statement + statement, "is not a JSON object"},
		{`{"Statement":[]`, "is not a JSON object"},
		{`{"Statement":"→"}`, "STS allows none above U+00FF"},
		{"{\"Statement\":\"\xff\"}", "STS allows none above U+00FF"},
		{strings.Repeat("[", 16<<10), "is not a JSON object"},
		{statement + strings.Repeat(" ", 16<<10) + "x", "characters with its blanks, the limit is 16384"},
		{`{"Statement":1` + strings.Repeat(`,"a":1`, 3000) + `}`, "has 18015 characters with its blanks, the limit is 16384"},
		{`{"Statement":"` + strings.Repeat("x", 2049-len(statement)) + `"}`, "have 2049 characters together, STS allows 2048"},
	},
	policy.PolicyARNs: {
		{"", "empty name"},
		{"ReadOnlyAccess", "is not the ARN of a managed policy"},
		{"arn:aws:iam::aws:role/ReadOnlyAccess", "is not the ARN"},
		{"arn:aws:iam::12:policy/p", "is not the ARN"},
		{"arn:aws:iam::aws:policy/", "is not the ARN"},
		{"arn:aws:iam::aws:policy/a b", "is not the ARN"},
		{"arn:aws:iam::aws:policy/a,arn:aws:iam::aws:policy/a", "named twice"},
		{"arn:aws:iam::aws:policy/" + strings.Repeat("p", 2048), "is not the ARN"},
		{numbered(11, "arn:aws:iam::aws:policy/p%d"), "more than 10 names"},
		{numbered(2, "arn:aws:iam::aws:policy/"+strings.Repeat("p", 1100)+"%d"), "has ARNs of 2250 characters together, STS allows 2048"},
	},
	policy.SessionScope: {
		{"", `"" is none of ["role" "service-account" "pod"]`},
		{"Pod", `"Pod" is none of`},
		{"namespace", "is none of"},
		{strings.Repeat("p", 100_000), "is none of"},
	},
	policy.Duration: {
		{"", "is not a duration such as 90m or 2h"},
		{"3600", "is not a duration"},
		{"1 h", "is not a duration"},
		{"14m59s", "out of bounds: from 15m0s to 12h0m0s"},
		{"12h1s", "out of bounds"},
		{"-1h", "out of bounds"},
		{"0", "out of bounds"},
		{"1h0.5s", "must be whole seconds"},
		{"1e9h", "is not a duration"},
		{strings.Repeat("1", 100_000), "is not a duration"},
		{strings.Repeat("0", 64) + "h", "is not a duration"},
	},
	policy.Region: {
		{"", "must have 1 to 64"},
		{"Frankfurt", "must be a region such as eu-central-1"},
		{"eu-central", "must be a region"},
		{"eu-central-1a", "must be a region"},
		{"EU-central-1", "must be a region"},
		{"eu-central-1.example.com", "must be a region"},
		{"eu-central-1/x", "must be a region"},
		{strings.Repeat("a-", 32) + "1", "must have 1 to 64"},
	},
	policy.Containers: {
		{"", "empty name"},
		{"a,,b", "empty name"},
		{"a,b,a", `"a" is named twice`},
		{numbered(1001, "c%d"), "more than 1000 names"},
	},
	policy.SkipContainers: {
		{" ", "empty name"},
		{numbered(1001, "c%d"), "more than 1000 names"},
	},
	policy.IMDS: {
		{"", "is none of"},
		{"V2", "is none of"},
		{"on", "is none of"},
	},
	policy.StartTimeout: {
		{"", "is not a duration"},
		{"120", "is not a duration"},
		{"-1s", "out of bounds: from 0s to 24h0m0s"},
		{"24h1s", "out of bounds"},
		{"0.5s", "must be whole seconds"},
	},
	policy.SidecarMemory: {
		{"", `"" is not an amount of memory; write whole mebibytes, such as 16Mi or 64Mi`},
		{"64", "write whole mebibytes"},
		{"64M", "write whole mebibytes"},
		{"1Gi", "write whole mebibytes"},
		{"64.5Mi", "write whole mebibytes"},
		{"+64Mi", "write whole mebibytes"},
		{"064Mi", "write whole mebibytes"},
		{"64 Mi", "write whole mebibytes"},
		{"11Mi", "11Mi is out of bounds: from 12Mi to 256Mi"},
		{"257Mi", "out of bounds"},
		{"0Mi", "out of bounds"},
		{"-16Mi", "write whole mebibytes"},
		{"4294967312Mi", "write whole mebibytes"},
		{strings.Repeat("1", 100_000) + "Mi", "write whole mebibytes"},
	},
	policy.SidecarCPURequest: {
		{"", `"" is not an amount of CPU; write thousandths of a processor, such as 50m, or 1`},
		{"0.05", "write thousandths of a processor, such as 50m"},
		{"50M", "write thousandths"},
		{"-5m", "write thousandths"},
		{"m", "write thousandths"},
		{"0", "0 is out of bounds: from 1m to 1"},
		{"1001m", "out of bounds"},
		{"2", "2 is out of bounds"},
		{"4294968", "write thousandths"},
	},
	policy.SidecarCPULimit: {
		{"none", "write thousandths"},
		{"9m", "9m is out of bounds: from 10m to 1, or 0 for no limit"},
		{"1001m", "out of bounds"},
	},
	policy.SidecarPort: {
		{"", `"" is not a port; write a number from 1024 to 65535`},
		{"http", "is not a port"},
		{"127.0.0.1:9779", "is not a port"},
		{"09779", "is not a port"},
		{"1023", "1023 is out of bounds: from 1024 to 65535"},
		{"0", "out of bounds"},
		{"65536", "out of bounds"},
		{"-1", "is not a port"},
		{"4294977075", "is not a port"},
	},
	policy.SidecarLogLevel: {
		{"", `"" is none of ["debug" "info" "warn" "error"]`},
		{"INFO", "is none of"},
		{"trace", "is none of"},
	},
}

func TestParse(t *testing.T) {
	keys := newKeys(t)
	for key, values := range goodValues {
		for _, tt := range values {
			pairs := map[policy.Key]string{policy.Role: "", key: tt.value}
			want := defaults()
			tt.want(&want)
			got, err := keys.Request(annotations(pairs)).Settings()
			if err != nil {
				t.Errorf("%s=%.80q: %v", key, tt.value, err)
				continue
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("%s=%.80q (-want +got):\n%s", key, tt.value, diff)
			}
		}
	}
}

func TestParseRefuses(t *testing.T) {
	keys := newKeys(t)
	for key, values := range badValues {
		for _, tt := range values {
			got, err := keys.Request(annotations(map[policy.Key]string{policy.Role: "reader", key: tt.value})).Settings()
			what := fmt.Sprintf("%s=%.80q", key, tt.value)
			mustRefuse(t, what, err, credential.ErrInvalid, credential.ReasonAnnotationInvalid, `"`+keys.Name(key)+`"`, tt.want)
			if !reflect.ValueOf(got).IsZero() {
				t.Errorf("%s: a refusal comes with %+v", what, got)
			}
		}
	}
	_, err := keys.Request(nil).Settings()
	mustRefuse(t, "no annotations", err, credential.ErrInvalid, credential.ReasonRoleMissing, `set "iam.amazonaws.com/role"`, `"iam.amazonaws.com/default-role"`)
	_, err = keys.Request(annotations(map[policy.Key]string{policy.Region: "eu-central-1"})).Settings()
	mustRefuse(t, "a region alone", err, credential.ErrInvalid, credential.ReasonRoleMissing, "no role")
	_, err = keys.Request(annotations(map[policy.Key]string{policy.Role: "r", policy.Containers: "a", policy.SkipContainers: "b"})).Settings()
	mustRefuse(t, "both lists", err, credential.ErrInvalid, credential.ReasonAnnotationInvalid, `"iam.amazonaws.com/containers"`, `"iam.amazonaws.com/skip-containers"`, "exclude each other")
	_, err = keys.Request(annotations(map[policy.Key]string{policy.Role: "r", policy.SidecarCPURequest: "50m", policy.SidecarCPULimit: "49m"})).Settings()
	mustRefuse(t, "limit below request", err, credential.ErrInvalid, credential.ReasonAnnotationInvalid, `"iam.amazonaws.com/sidecar-cpu-limit"`, `"iam.amazonaws.com/sidecar-cpu-request"`, "49m is below 50m", "raise it")
	for _, limit := range []string{"50m", "0"} {
		if _, err := keys.Request(annotations(map[policy.Key]string{policy.Role: "r", policy.SidecarCPURequest: "50m", policy.SidecarCPULimit: limit})).Settings(); err != nil {
			t.Errorf("limit %s: %v", limit, err)
		}
	}
	_, err = keys.Request(annotations(map[policy.Key]string{
		policy.Role: "r", policy.SessionPolicy: `{"Statement":"` + strings.Repeat("x", 2000) + `"}`, policy.PolicyARNs: "arn:aws:iam::aws:policy/ReadOnlyAccess",
	})).Settings()
	mustRefuse(t, "policies too long together", err, credential.ErrInvalid, credential.ReasonAnnotationInvalid, `"iam.amazonaws.com/session-policy"`, `"iam.amazonaws.com/policy-arns"`, "STS allows 2048")
}

// Another prefix changes every key, also in messages.
func TestParseWithAnotherPrefix(t *testing.T) {
	keys, err := policy.NewKeys("aws.example.com")
	if err != nil {
		t.Fatal(err)
	}
	got, err := keys.Request(map[string]string{"aws.example.com/role": "reader", "iam.amazonaws.com/duration": "nonsense"}).Settings()
	if err != nil || got.Role != "reader" {
		t.Errorf("Settings = %+v, %v", got, err)
	}
	_, err = keys.Request(map[string]string{"aws.example.com/role": "reader", "aws.example.com/duration": "nonsense"}).Settings()
	mustRefuse(t, "duration", err, credential.ErrInvalid, credential.ReasonAnnotationInvalid, `"aws.example.com/duration"`)
}

func FuzzParse(f *testing.F) {
	for key, values := range goodValues {
		for _, tt := range values {
			f.Add(string(key), tt.value, "reader")
		}
	}
	for key, values := range badValues {
		for _, tt := range values {
			f.Add(string(key), tt.value, "reader")
		}
	}
	keys := newKeys(f)
	f.Fuzz(func(t *testing.T, key, value, role string) {
		got, err := keys.Request(map[string]string{keys.Name(policy.Role): role, keys.Name(policy.Key(key)): value}).Settings()
		if err != nil {
			if !reflect.ValueOf(got).IsZero() {
				t.Errorf("an error (%v) comes with %+v", err, got)
			}
			e, ok := errors.AsType[*credential.Error](err)
			if !ok || !errors.Is(err, credential.ErrInvalid) || e.Reason == "" {
				t.Fatalf("the error is %#v", err)
			}
			if !strings.Contains(e.Message, keys.Prefix()) || len(e.Message) > 2048 {
				t.Errorf("the message names no annotation, or is too long: %.3000s", e.Message)
			}
			return
		}
		checkSettings(t, got)
	})
}

// checkSettings compares parsed settings with the limits of STS.
func checkSettings(t *testing.T, s policy.Settings) {
	t.Helper()
	if s.Duration < 15*time.Minute || s.Duration > 12*time.Hour || s.Duration%time.Second != 0 {
		t.Errorf("duration %s", s.Duration)
	}
	if s.StartTimeout < 0 || s.StartTimeout > 24*time.Hour {
		t.Errorf("start timeout %s", s.StartTimeout)
	}
	c := s.Sidecar
	if c.Memory != 0 && (c.Memory < 12 || c.Memory > 256) || c.CPURequest < 0 || c.CPURequest > 1000 || c.Port != 0 && (c.Port < 1024 || c.Port > 65535) ||
		c.CPULimit != nil && *c.CPULimit != 0 && (*c.CPULimit < 10 || *c.CPULimit > 1000) {
		t.Errorf("sidecar %+v", c)
	}
	if n := len(s.SessionName); n == 1 || n > 64 {
		t.Errorf("session name of %d characters", n)
	}
	if n := len(s.ExternalID); n == 1 || n > 1224 {
		t.Errorf("external id of %d characters", n)
	}
	if len(s.SessionTags) > 50 || !slices.IsSortedFunc(s.SessionTags, func(a, b policy.Tag) int { return strings.Compare(a.Key, b.Key) }) {
		t.Errorf("tags %q", s.SessionTags)
	}
	for _, tag := range s.SessionTags {
		if tag.Key == "" || utf8.RuneCountInString(tag.Key) > 128 || utf8.RuneCountInString(tag.Value) > 256 ||
			!utf8.ValidString(tag.Key+tag.Value) || strings.TrimSpace(tag.Key) != tag.Key {
			t.Errorf("tag %q", tag)
		}
	}
	if n := utf8.RuneCountInString(s.SessionPolicy) + len(strings.Join(s.PolicyARNs, "")); n > 2048 || len(s.PolicyARNs) > 10 || !slices.IsSorted(s.PolicyARNs) {
		t.Errorf("policies of %d characters: %q, %q", n, s.SessionPolicy, s.PolicyARNs)
	}
	if !slices.Contains([]policy.Scope{policy.ScopeRole, policy.ScopeServiceAccount, policy.ScopePod}, s.Scope) ||
		!slices.Contains([]policy.Metadata{policy.MetadataV2, policy.MetadataV1, policy.MetadataOff}, s.Metadata) {
		t.Errorf("scope %q, metadata %q", s.Scope, s.Metadata)
	}
	if slices.Contains(s.Containers, "") || slices.Contains(s.SkipContainers, "") || len(s.Containers) > 1000 || len(s.SkipContainers) > 1000 {
		t.Errorf("containers %q, skipped %q", s.Containers, s.SkipContainers)
	}
}
