package policy_test

import (
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/policy"
)

// anything permits every role.
var anything = map[policy.Key]string{policy.Permitted: ".*"}

func TestNew(t *testing.T) {
	keys := newKeys(t)
	for _, cluster := range []string{"", "ab", "prod.eu-1", strings.Repeat("c", 32)} {
		if _, err := policy.New(policy.Config{Keys: keys, Cluster: cluster}); err != nil {
			t.Errorf("cluster %q: %v", cluster, err)
		}
	}
	for _, cluster := range []string{"a", "a b", "a/b", strings.Repeat("c", 33)} {
		if rules, err := policy.New(policy.Config{Keys: keys, Cluster: cluster}); err == nil || rules != nil || !strings.Contains(err.Error(), "cluster name") {
			t.Errorf("cluster %q: %v", cluster, err)
		}
	}
	if rules, err := policy.New(policy.Config{}); err == nil || rules != nil {
		t.Error("New returns rules without keys")
	}
	rules, err := policy.New(policy.Config{Keys: keys})
	if err != nil || rules.Keys() != keys {
		t.Errorf("Keys = %v, %v", rules.Keys(), err)
	}
}

func TestZeroRulesRefuse(t *testing.T) {
	var zero policy.Rules
	for _, pod := range []policy.Pod{
		{},
		cart(map[policy.Key]string{policy.Role: rolePrefix + "reader"}),
		{Namespace: "shop", Name: "cart", Request: (policy.Keys{}).Request(map[string]string{"/role": rolePrefix + "reader"})},
		{Namespace: "shop", Name: "cart", Request: new(policy.Request)},
	} {
		ns := policy.Namespace{
			Name:        pod.Namespace,
			Labels:      map[string]string{"/inject": "enabled", "iam.amazonaws.com/inject": "enabled", "inject": "enabled"},
			Annotations: map[string]string{"/permitted": ".*", "iam.amazonaws.com/permitted": ".*"},
		}
		if grant, err := zero.Grant(pod, ns); !errors.Is(err, credential.ErrDenied) || !grant.IsZero() {
			t.Errorf("the zero Rules grant %s, %v", grant, err)
		}
	}
}

// A pod without a Request is refused, even if its namespace has a default role.
func TestZeroRequestIsRefused(t *testing.T) {
	rules, ns := newRules(t, rolePrefix), shop(map[policy.Key]string{policy.Permitted: ".*", policy.DefaultRole: "reader"})
	for name, request := range map[string]*policy.Request{"zero": new(policy.Request), "nil": nil} {
		pod := cart(nil)
		pod.Request = request
		grant, err := rules.Grant(pod, ns)
		mustRefuse(t, name, err, credential.ErrInvalid, credential.ReasonRoleMissing, "requests no role")
		if key, err := pod.RoutingKey(); !grant.IsZero() || key != "" || err == nil {
			t.Errorf("%s: grant %s, routing key %q, %v", name, grant, key, err)
		}
		if request.Annotated() || request.Warnings() != "" || request.ServiceAccount() != "" {
			t.Errorf("%s: the request has annotations", name)
		}
	}
}

func TestZeroGrant(t *testing.T) {
	var zero policy.Grant
	if zero.TransitiveTagKeys() != nil || zero.SourceIdentity() != "" {
		t.Errorf("the zero Grant grants tags or a source identity: %s", zero)
	}
	if !zero.IsZero() || !zero.Role().IsZero() || zero.SessionName() != "" || zero.ExternalID() != "" || zero.Tags() != nil ||
		zero.SessionPolicy() != "" || zero.PolicyARNs() != nil || zero.Duration() != 0 {
		t.Errorf("the zero Grant grants something: %s", zero)
	}
}

func TestGrantRefuses(t *testing.T) {
	based, baseless := newRules(t, rolePrefix), newRules(t, "")
	reader := map[policy.Key]string{policy.Role: "reader"}
	for name, tt := range map[string]struct {
		rules     *policy.Rules
		pod       policy.Pod
		ns        policy.Namespace
		kind      error
		reason    credential.Reason
		fragments []string
	}{
		"zero pod and namespace": {
			based, policy.Pod{}, policy.Namespace{}, credential.ErrDenied, credential.ReasonNamespaceNotFound, nil,
		},
		"another namespace": {
			based, cart(reader), policy.Namespace{Name: "other", Labels: shop(nil).Labels, Annotations: annotations(anything)},
			credential.ErrDenied, credential.ReasonNamespaceNotFound, []string{`"shop" is not known`},
		},
		"not opted in": {
			based, cart(reader), policy.Namespace{Name: "shop", Annotations: annotations(anything)},
			credential.ErrDenied, credential.ReasonNamespaceNotOpted, []string{`namespace "shop" is not opted in`, "label it iam.amazonaws.com/inject=enabled"},
		},
		"opted out": {
			based, cart(reader), policy.Namespace{Name: "shop", Labels: map[string]string{"iam.amazonaws.com/inject": "false"}, Annotations: annotations(anything)},
			credential.ErrDenied, credential.ReasonNamespaceNotOpted, nil,
		},
		"opted in by an annotation": {
			based, cart(reader), policy.Namespace{Name: "shop", Annotations: annotations(map[policy.Key]string{policy.Inject: "enabled", policy.Permitted: ".*"})},
			credential.ErrDenied, credential.ReasonNamespaceNotOpted, nil,
		},
		"no annotations": {
			based, cart(nil), shop(anything), credential.ErrInvalid, credential.ReasonRoleMissing, []string{"iam.amazonaws.com/role"},
		},
		"misspelt": {
			based, cart(map[policy.Key]string{"roel": "reader"}), shop(anything),
			credential.ErrInvalid, credential.ReasonAnnotationUnknown, []string{`did you mean "iam.amazonaws.com/role"`},
		},
		"wrong value": {
			based, cart(map[policy.Key]string{policy.Role: "reader", policy.Duration: "5m"}), shop(anything),
			credential.ErrInvalid, credential.ReasonAnnotationInvalid, []string{`"iam.amazonaws.com/duration"`},
		},
		"empty role without a default": {
			based, cart(map[policy.Key]string{policy.Role: " "}), shop(anything),
			credential.ErrInvalid, credential.ReasonRoleMissing, []string{`"iam.amazonaws.com/role" is empty`, `namespace "shop" has no "iam.amazonaws.com/default-role"`},
		},
		"blank default role": {
			based, cart(map[policy.Key]string{policy.Role: ""}), shop(map[policy.Key]string{policy.Permitted: ".*", policy.DefaultRole: " "}),
			credential.ErrInvalid, credential.ReasonRoleMissing, nil,
		},
		"wrong role": {
			based, cart(map[policy.Key]string{policy.Role: "read er"}), shop(anything),
			credential.ErrInvalid, credential.ReasonRoleInvalid, []string{"annotation iam.amazonaws.com/role", `"read er"`, "letters, digits"},
		},
		"wrong ARN": {
			based, cart(map[policy.Key]string{policy.Role: "arn:aws:iam::12:role/reader"}), shop(anything),
			credential.ErrInvalid, credential.ReasonRoleInvalid, []string{"12 digits"},
		},
		"very long role": {
			based, cart(map[policy.Key]string{policy.Role: strings.Repeat("a/", 100_000)}), shop(anything),
			credential.ErrInvalid, credential.ReasonRoleInvalid, []string{"the limit is 2048"},
		},
		"wrong default role": {
			based, cart(map[policy.Key]string{policy.Role: ""}), shop(map[policy.Key]string{policy.Permitted: ".*", policy.DefaultRole: "a//b"}),
			credential.ErrInvalid, credential.ReasonRoleInvalid, []string{"namespace annotation iam.amazonaws.com/default-role", `"a//b"`},
		},
		"nothing permitted": {
			based, cart(reader), shop(nil),
			credential.ErrDenied, credential.ReasonNothingPermitted, []string{`namespace "shop" permits no roles`, `"iam.amazonaws.com/permitted"`, rolePrefix + "reader"},
		},
		"another role permitted": {
			based, cart(reader), shop(map[policy.Key]string{policy.Permitted: ".*/writer"}),
			credential.ErrDenied, credential.ReasonRoleNotPermitted, []string{rolePrefix + "reader"},
		},
		"default role is not permitted by being the default": {
			based, cart(map[policy.Key]string{policy.Role: ""}), shop(map[policy.Key]string{policy.DefaultRole: "reader"}),
			credential.ErrDenied, credential.ReasonNothingPermitted, nil,
		},
		"tags without permission": {
			based, cart(map[policy.Key]string{policy.Role: "reader", policy.SessionTags: "team=shop"}), shop(anything),
			credential.ErrDenied, credential.ReasonTagNotPermitted, []string{`session tag "team"`, `"iam.amazonaws.com/permitted-tags"`},
		},
		"another tag": {
			based, cart(map[policy.Key]string{policy.Role: "reader", policy.SessionTags: "team=shop,cost=1"}),
			shop(map[policy.Key]string{policy.Permitted: ".*", policy.PermittedTags: "team"}),
			credential.ErrDenied, credential.ReasonTagNotPermitted, []string{`session tag "cost"`},
		},
		"tag in other letters": {
			based, cart(map[policy.Key]string{policy.Role: "reader", policy.SessionTags: "Team=shop"}),
			shop(map[policy.Key]string{policy.Permitted: ".*", policy.PermittedTags: "team"}),
			credential.ErrDenied, credential.ReasonTagNotPermitted, []string{`session tag "Team"`},
		},
		"wrong permitted tags": {
			based, cart(map[policy.Key]string{policy.Role: "reader", policy.SessionTags: "team=shop"}),
			shop(map[policy.Key]string{policy.Permitted: ".*", policy.PermittedTags: "team,,cost"}),
			credential.ErrInvalid, credential.ReasonAnnotationInvalid, []string{`annotation "iam.amazonaws.com/permitted-tags" of namespace "shop"`, "empty name"},
		},
		"name without a base": {
			baseless, cart(reader), shop(anything),
			credential.ErrInvalid, credential.ReasonRoleInvalid, []string{"annotation iam.amazonaws.com/role", `"reader" is not a full ARN`, "--base-arn"},
		},
		"default name without a base": {
			baseless, cart(map[policy.Key]string{policy.Role: ""}), shop(map[policy.Key]string{policy.Permitted: ".*", policy.DefaultRole: "/reader"}),
			credential.ErrInvalid, credential.ReasonRoleInvalid, []string{"namespace annotation iam.amazonaws.com/default-role", "--base-arn"},
		},
		"allowed names without a base": {
			baseless, cart(map[policy.Key]string{policy.Role: rolePrefix + "reader"}), shop(map[policy.Key]string{policy.AllowedRoles: `["reader"]`}),
			credential.ErrInvalid, credential.ReasonRoleInvalid, []string{`annotation "iam.amazonaws.com/allowed-roles" of namespace "shop"`, "--base-arn"},
		},
	} {
		grant, err := tt.rules.Grant(tt.pod, tt.ns)
		mustRefuse(t, name, err, tt.kind, tt.reason, tt.fragments...)
		if !grant.IsZero() {
			t.Errorf("%s: a refusal comes with %s", name, grant)
		}
		if got, want := errors.Is(err, policy.ErrNoBase), strings.HasSuffix(name, "without a base"); got != want {
			t.Errorf("%s: errors.Is(err, ErrNoBase) is %v", name, got)
		}
	}
}

func TestGrant(t *testing.T) {
	rules := newRules(t, rolePrefix)
	grant, err := rules.Grant(cart(map[policy.Key]string{
		policy.Role:          "/team/reader",
		policy.SessionName:   "my-session",
		policy.ExternalID:    "ext/1",
		policy.SessionTags:   "team=shop, cost=1",
		policy.SessionPolicy: `{"Statement": []}`,
		policy.PolicyARNs:    "arn:aws:iam::aws:policy/B,arn:aws:iam::aws:policy/A",
		policy.SessionScope:  "pod",
		policy.Duration:      "2h",
	}), shop(map[policy.Key]string{policy.Permitted: ".*", policy.PermittedTags: " cost , team,more"}))
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]policy.Tag{{Key: "cost", Value: "1"}, {Key: "team", Value: "shop"}}, grant.Tags()); diff != "" {
		t.Errorf("tags (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff([]string{"arn:aws:iam::aws:policy/A", "arn:aws:iam::aws:policy/B"}, grant.PolicyARNs()); diff != "" {
		t.Errorf("policy ARNs (-want +got):\n%s", diff)
	}
	for what, pair := range map[string][2]any{
		"role":           {grant.Role().String(), rolePrefix + "team/reader"},
		"session name":   {grant.SessionName(), "my-session"},
		"external id":    {grant.ExternalID(), "ext/1"},
		"session policy": {grant.SessionPolicy(), `{"Statement":[]}`},
		"duration":       {grant.Duration(), 2 * time.Hour},
		"string":         {grant.String(), rolePrefix + "team/reader as my-session for shop/cart-1/u-1"},
		"zero":           {grant.IsZero(), false},
	} {
		if pair[0] != pair[1] {
			t.Errorf("%s is %v, want %v", what, pair[0], pair[1])
		}
	}
}

func TestDefaultRole(t *testing.T) {
	rules := newRules(t, rolePrefix)
	ns := shop(map[policy.Key]string{policy.Permitted: ".*", policy.DefaultRole: " fallback "})
	for name, want := range map[string]string{"": "fallback", " ": "fallback", "reader": "reader"} {
		grant, err := rules.Grant(cart(map[policy.Key]string{policy.Role: name}), ns)
		if err != nil || grant.Role().String() != rolePrefix+want {
			t.Errorf("role %q is granted as %s, %v", name, grant.Role(), err)
		}
	}
	// An empty role requests the default role. A pod without the annotation requests no role.
	_, err := rules.Grant(cart(map[policy.Key]string{policy.Duration: "1h"}), ns)
	mustRefuse(t, "no role annotation", err, credential.ErrInvalid, credential.ReasonRoleMissing)
}

// CloudTrail shows session names, and some services refuse to continue under another name. So a change of these names is a
// change for users.
func TestSessionNames(t *testing.T) {
	const longName = "a-name-that-is-as-long-as-the-names-of-generated-pods-become-5d4f8"
	sessionNames := map[string]string{}
	for _, tt := range []struct {
		cluster, namespace, pod, account string
		scope                            policy.Scope
		sessionName, want                string
	}{
		{"", "shop", "cart-1", "cart", policy.ScopeRole, "", "credence"},
		{"prod", "shop", "cart-1", "cart", policy.ScopeRole, "", "prod"},
		{"", "shop", "cart-1", "cart", policy.ScopeServiceAccount, "", "credence.shop.cart"},
		{"", "shop", "cart-1", "cart", policy.ScopePod, "", "credence.shop.cart-1"},
		{"prod", "shop", "cart-1", "cart", policy.ScopePod, "own", "own"},
		{"", "shop", longName, "cart", policy.ScopePod, "", "credence.shop.a-name-that-is-as-long-as-the-names-of--ca7ba571fc"},
		{"", "shop", longName + "x", "cart", policy.ScopePod, "", ""},
		{"", "shop", longName + "y", "cart", policy.ScopePod, "", ""},
		{"", "shop", "p", longName + "z", policy.ScopeServiceAccount, "", ""},
		{strings.Repeat("c", 32), strings.Repeat("n", 63), strings.Repeat("p", 253), "cart", policy.ScopePod, "", ""},
		{strings.Repeat("c", 32), strings.Repeat("n", 63), strings.Repeat("p", 252) + "q", "cart", policy.ScopePod, "", ""},
		{"", "shop", strings.Repeat("p", 64-len("credence.shop.")), "cart", policy.ScopePod, "", "credence.shop." + strings.Repeat("p", 64-len("credence.shop."))},
	} {
		rules, err := policy.New(policy.Config{Keys: newKeys(t), Cluster: tt.cluster})
		if err != nil {
			t.Fatal(err)
		}
		pairs := map[policy.Key]string{policy.Role: rolePrefix + "reader", policy.SessionScope: string(tt.scope)}
		if tt.sessionName != "" {
			pairs[policy.SessionName] = tt.sessionName
		}
		pod := policy.Pod{Namespace: tt.namespace, Name: tt.pod, UID: "u", ServiceAccount: tt.account, Request: request(pairs)}
		ns := shop(anything)
		ns.Name = tt.namespace
		grant, err := rules.Grant(pod, ns)
		if err != nil {
			t.Fatal(err)
		}
		name := grant.SessionName()
		if tt.want != "" && name != tt.want {
			t.Errorf("the session of %s/%s, scope %s, is named %q, want %q", tt.namespace, tt.pod, tt.scope, name, tt.want)
		}
		if !regexp.MustCompile(`^[\w+=,.@-]{2,64}$`).MatchString(name) {
			t.Errorf("the session name %q of %d characters is not valid for STS", name, len(name))
		}
		if other, taken := sessionNames[name]; taken && tt.want == "" {
			t.Errorf("the sessions of %s and %s are both named %q", other, tt.pod, name)
		}
		sessionNames[name] = tt.pod
	}
	if len(sessionNames) < 8 {
		t.Errorf("only %d names were compared", len(sessionNames))
	}
}

// subject is the input of one decision, one field for each part that may differ.
type subject struct {
	role, sessionName, externalID, tags, policy, policyARNs, duration, scope string
	namespace, account, pod, uid                                             string
	region, containers, imds, startTimeout, hint, otherLabel                 string
	memory, cpu, limit, port, logLevel                                       string
	forced, kubernetes, transitive, source, maxDuration                      string // of the rules file; all empty: there is none
}

// choices are the values of each field, the default first. The values of a list are different for STS, unless STS does not
// receive the field.
var choices = map[string][]string{
	"role":         {"reader", "writer", "team/reader", "arn:aws:iam::999999999999:role/reader", ""},
	"sessionName":  {"", "one", "two"},
	"externalID":   {"", "11", "12"},
	"tags":         {"", "a=1", "a=2", "b=1", "a=1,b=1", "a=1,b="},
	"policy":       {"", `{"Statement":[]}`, `{"Statement":[{}]}`, `{"Statement":"a b"}`, `{"Statement":"ab"}`},
	"policyARNs":   {"", "arn:aws:iam::aws:policy/A", "arn:aws:iam::aws:policy/B", "arn:aws:iam::aws:policy/A,arn:aws:iam::aws:policy/B"},
	"duration":     {"", "15m", "59m59s", "12h"},
	"scope":        {"", "service-account", "pod"},
	"namespace":    {"shop", "sho", "shop-cart"},
	"account":      {"default", "cart", "cart.u"},
	"pod":          {"cart-1", "cart-2", "default"},
	"uid":          {"u-1", "u-2"},
	"region":       {"", "eu-central-1"},
	"containers":   {"", "app", "app,proxy"},
	"imds":         {"", "v1", "off"},
	"startTimeout": {"", "0", "10s"},
	"memory":       {"", "16Mi", "64Mi"},
	"cpu":          {"", "10m"},
	"limit":        {"", "0", "50m"},
	"port":         {"", "9780"},
	"logLevel":     {"", "debug"},
	"hint":         {"", "cart"},
	"otherLabel":   {"", "x"},
}

// fileChoices are the same for the fields of the rules file.
var fileChoices = map[string][]string{
	"forced":      {"", "c=1", "a=9", "A=1", "owner={serviceAccount}", "owner={namespace}.{serviceAccount}", "owner={namespace}"},
	"kubernetes":  {"", "on"},
	"transitive":  {"", "a", "A", "a,b", "kubernetes-pod-uid"},
	"source":      {"", "none", "service-account", "session-name"},
	"maxDuration": {"", "15m", "12h"},
}

// file returns the rules file of s.
func (s subject) file(t *testing.T) policy.File {
	t.Helper()
	all := []string{"*"}
	entry := policy.NamespaceRules{Match: all, Accounts: all, Roles: all, ExternalIDs: all, SessionNames: all, ForcedTags: map[string]string{}}
	for pair := range strings.SplitSeq(s.forced, ",") {
		if key, value, ok := strings.Cut(pair, "="); ok {
			entry.ForcedTags[key] = value
		}
	}
	if s.maxDuration != "" {
		var err error
		if entry.MaxDuration, err = time.ParseDuration(s.maxDuration); err != nil {
			t.Fatal(err)
		}
	}
	file := policy.File{KubernetesTags: s.kubernetes != "", SourceIdentity: policy.SourceIdentity(s.source), Namespaces: []policy.NamespaceRules{entry}}
	if s.transitive != "" {
		file.TransitiveTags = strings.Split(s.transitive, ",")
	}
	return file
}

func (s subject) field(name string) string { return reflect.ValueOf(s).FieldByName(name).String() }

func (s subject) with(name, value string) subject {
	fields := map[string]*string{
		"role": &s.role, "sessionName": &s.sessionName, "externalID": &s.externalID, "tags": &s.tags, "policy": &s.policy,
		"policyARNs": &s.policyARNs, "duration": &s.duration, "scope": &s.scope, "namespace": &s.namespace, "account": &s.account,
		"pod": &s.pod, "uid": &s.uid, "region": &s.region, "containers": &s.containers, "imds": &s.imds,
		"startTimeout": &s.startTimeout, "memory": &s.memory, "cpu": &s.cpu, "limit": &s.limit, "port": &s.port, "logLevel": &s.logLevel, "hint": &s.hint, "otherLabel": &s.otherLabel, "forced": &s.forced,
		"kubernetes": &s.kubernetes, "transitive": &s.transitive, "source": &s.source, "maxDuration": &s.maxDuration,
	}
	*fields[name] = value
	return s
}

// grant decides on s, written in one of several equal ways.
func (s subject) grant(t *testing.T, rules *policy.Rules, random *rand.Rand) policy.Grant {
	t.Helper()
	pairs := map[policy.Key]string{policy.Role: s.role}
	for key, value := range map[policy.Key]string{
		policy.SessionName: s.sessionName, policy.ExternalID: s.externalID, policy.SessionTags: s.tags, policy.SessionPolicy: s.policy,
		policy.PolicyARNs: s.policyARNs, policy.Duration: s.duration, policy.SessionScope: s.scope, policy.Region: s.region,
		policy.Containers: s.containers, policy.IMDS: s.imds, policy.StartTimeout: s.startTimeout, policy.ServiceAccount: s.hint,
		policy.SidecarMemory: s.memory, policy.SidecarCPURequest: s.cpu, policy.SidecarCPULimit: s.limit, policy.SidecarPort: s.port, policy.SidecarLogLevel: s.logLevel,
	} {
		if value == "" {
			continue
		}
		if key == policy.SessionTags || key == policy.PolicyARNs {
			list := strings.Split(value, ",")
			random.Shuffle(len(list), func(i, j int) { list[i], list[j] = list[j], list[i] })
			value = strings.Join(list, blanks(random)+","+blanks(random))
		}
		if key == policy.SessionPolicy {
			value = strings.ReplaceAll(value, ":", blanks(random)+":"+blanks(random))
		}
		pairs[key] = blanks(random) + value + blanks(random)
	}
	if s.role == "reader" && random.IntN(2) == 0 {
		pairs[policy.Role] = rolePrefix + "reader"
	}
	if s.scope == "" && random.IntN(2) == 0 {
		pairs[policy.SessionScope] = "role"
	}
	if s.duration == "" && random.IntN(2) == 0 {
		pairs[policy.Duration] = "60m"
	}
	grant, err := rules.Grant(
		policy.Pod{Namespace: s.namespace, Name: s.pod, UID: s.uid, ServiceAccount: s.account, Request: request(pairs)},
		policy.Namespace{
			Name:        s.namespace,
			Labels:      map[string]string{"iam.amazonaws.com/inject": "enabled", "other": s.otherLabel},
			Annotations: annotations(map[policy.Key]string{policy.Permitted: ".*", policy.PermittedTags: "a,b", policy.DefaultRole: "fallback"}),
		})
	if err != nil {
		t.Fatalf("%+v: %v", s, err)
	}
	return grant
}

func blanks(random *rand.Rand) string { return []string{"", " ", "\n\t"}[random.IntN(3)] }

// matters reports whether a field affects the inputs of AssumeRole, or which pods share the session.
func (s subject) matters(field string) bool {
	switch field {
	case "role", "sessionName", "externalID", "tags", "policy", "policyARNs", "duration", "scope":
		return true
	case "namespace":
		return s.scope != ""
	case "account":
		return s.scope == "service-account"
	case "pod", "uid":
		return s.scope == "pod"
	}
	return false
}

// A pod never gets a session for another external id, session name, set of tags, policy, duration or scope. Pods that request
// the same share a session.
func TestGrantsDifferExactlyWhenSessionsDo(t *testing.T) {
	if n := reflect.TypeFor[subject]().NumField(); n != len(choices)+len(fileChoices) {
		t.Fatalf("subject has %d fields, and %d have choices", n, len(choices)+len(fileChoices))
	}
	rules := newRules(t, rolePrefix)
	random := rand.New(rand.NewPCG(1, 2))
	fields := slices.Sorted(maps.Keys(choices))
	for range 300 {
		var s subject
		for _, field := range fields {
			s = s.with(field, choices[field][0])
			if random.IntN(2) == 0 {
				s = s.with(field, choices[field][random.IntN(len(choices[field]))])
			}
		}
		grant := s.grant(t, rules, random)
		if again := s.grant(t, rules, random); again != grant {
			t.Fatalf("%+v\ngives two grants: %s\nand: %s\n%s", s, grant, again, describe(grant, again))
		}
		for _, field := range fields {
			for _, value := range choices[field] {
				if value == s.field(field) {
					continue
				}
				other := s.with(field, value)
				got := other.grant(t, rules, random)
				if (got != grant) != s.matters(field) {
					t.Fatalf("%+v\nwith another %s, %q: grants are equal: %v\n%s", s, field, value, got == grant, describe(grant, got))
				}
			}
		}
	}
}

// called returns all inputs of AssumeRole.
func called(g policy.Grant) string {
	return fmt.Sprintf("%s\n%q %q %q %q %q %q %q %s", g.Role(), g.SessionName(), g.ExternalID(), g.Tags(), g.TransitiveTagKeys(), g.SourceIdentity(),
		g.SessionPolicy(), g.PolicyARNs(), g.Duration())
}

func describe(a, b policy.Grant) string { return cmp.Diff(a.String()+called(a), b.String()+called(b)) }

// sharers returns which pods share the session of s.
func (s subject) sharers() string {
	switch s.scope {
	case "service-account":
		return s.namespace + "/" + s.account
	case "pod":
		return s.namespace + "/" + s.pod + "/" + s.uid
	}
	return "all"
}

// For all pods, namespaces and rules files, two grants are equal if and only if their inputs of AssumeRole are equal and the
// same pods share the sessions.
func TestGrantsAreEqualExactlyWhenCallsAre(t *testing.T) {
	rules := newRules(t, rolePrefix)
	random := rand.New(rand.NewPCG(3, 4))
	all := maps.Clone(choices)
	maps.Copy(all, fileChoices)
	fields := slices.Sorted(maps.Keys(all))
	decide := func(s subject) policy.Grant {
		if err := rules.Use(s.file(t)); err != nil {
			t.Fatalf("%+v: %v", s, err)
		}
		if s.maxDuration == "15m" {
			s.duration = "15m" // a longer one is refused
		}
		return s.grant(t, rules, random)
	}
	equal, different := 0, 0
	for range 2000 {
		var a subject
		for _, field := range fields {
			a = a.with(field, all[field][random.IntN(len(all[field]))])
		}
		b := a
		for range 1 + random.IntN(2) {
			field := fields[random.IntN(len(fields))]
			b = b.with(field, all[field][random.IntN(len(all[field]))])
		}
		ga, gb := decide(a), decide(b)
		want := called(ga) == called(gb) && a.sharers() == b.sharers()
		if (ga == gb) != want {
			t.Fatalf("%+v\n%+v\ngrants are equal: %v\n%s", a, b, ga == gb, describe(ga, gb))
		}
		if want {
			equal++
		} else {
			different++
		}
	}
	if equal < 250 || different < 250 {
		t.Errorf("%d pairs were equal and %d different: too few of one", equal, different)
	}
}

// Each field of Grant distinguishes grants: for each there are two pods, or two rules files, whose grants differ in this field
// alone. A new field needs a new mutation here.
func TestEveryFieldDistinguishesGrants(t *testing.T) {
	rules := newRules(t, rolePrefix)
	base := subject{role: "reader", tags: "a=1", namespace: "shop", account: "cart", pod: "cart-1", uid: "u-1"}
	pod := base.with("scope", "pod")
	mutations := map[string][2]subject{
		"role":           {base, base.with("role", "writer")},
		"sessionName":    {base, base.with("sessionName", "other")},
		"externalID":     {base.with("externalID", "11"), base.with("externalID", "12")},
		"tags":           {base, base.with("tags", "a=2")},
		"transitiveTags": {base, base.with("transitive", "a")},
		"sourceIdentity": {base, base.with("source", "service-account")},
		"policy":         {base, base.with("policy", statement)},
		"policyARNs":     {base, base.with("policyARNs", "arn:aws:iam::aws:policy/A")},
		"duration":       {base, base.with("duration", "2h")},
		"sharedBy":       {pod, pod.with("uid", "u-2")},
	}
	typ := reflect.TypeFor[policy.Grant]()
	for i := range typ.NumField() {
		name := typ.Field(i).Name
		pair, ok := mutations[name]
		if !ok {
			t.Errorf("no mutation makes two grants differ in %s", name)
			continue
		}
		var grants [2]policy.Grant
		for at, s := range pair {
			if err := rules.Use(s.file(t)); err != nil {
				t.Fatal(err)
			}
			grants[at] = s.grant(t, rules, rand.New(rand.NewPCG(5, 6)))
		}
		if grants[0] == grants[1] {
			t.Errorf("%s: both grants are %s", name, grants[0])
		}
		for j := range typ.NumField() {
			a, b := reflect.ValueOf(grants[0]).Field(j), reflect.ValueOf(grants[1]).Field(j)
			if differ := fmt.Sprint(a) != fmt.Sprint(b); differ != (i == j) {
				t.Errorf("%s: the grants differ in %s: %v\n%s", name, typ.Field(j).Name, differ, describe(grants[0], grants[1]))
			}
		}
	}
	if len(mutations) != typ.NumField() {
		t.Errorf("there are mutations of %d fields, and Grant has %d", len(mutations), typ.NumField())
	}
}

// With role chaining, the rules refuse sessions that are longer than the AWS maximum.
func TestRoleChaining(t *testing.T) {
	base, err := credential.ParseRoleBase(rolePrefix)
	if err != nil {
		t.Fatal(err)
	}
	for _, chained := range []bool{true, false} {
		rules, err := policy.New(policy.Config{Keys: newKeys(t), Base: base, RoleChaining: chained})
		if err != nil {
			t.Fatal(err)
		}
		for duration, refused := range map[string]bool{"": false, "15m": false, "1h": false, "1h0m1s": chained, "12h": chained} {
			pairs := map[policy.Key]string{policy.Role: "reader"}
			if duration != "" {
				pairs[policy.Duration] = duration
			}
			_, err := rules.Grant(cart(pairs), shop(map[policy.Key]string{policy.Permitted: ".*"}))
			if got := err != nil; got != refused {
				t.Errorf("chained %v, duration %q: %v", chained, duration, err)
			}
			if refused && (!errors.Is(err, credential.ErrInvalid) || credential.ReasonOf(err) != credential.ReasonAnnotationInvalid ||
				!strings.Contains(err.Error(), `exceeds 1h, the AWS maximum`)) {
				t.Errorf("duration %q: the refusal is %v", duration, err)
			}
		}
	}
}
