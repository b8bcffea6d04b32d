package policy_test

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"

	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/policy"
	"github.com/credence-iam/credence/broker/policy/pattern"
)

var all = []string{"*"}

// open is an entry that allows everything to the namespaces that a glob matches.
func open(match string) policy.NamespaceRules {
	return policy.NamespaceRules{Match: []string{match}, Accounts: all, Roles: all, ExternalIDs: all, SessionNames: all}
}

// entries is a file with entries only.
func entries(list ...policy.NamespaceRules) policy.File { return policy.File{Namespaces: list} }

func use(t testing.TB, rules *policy.Rules, file policy.File) {
	t.Helper()
	if err := rules.Use(file); err != nil {
		t.Fatal(err)
	}
}

// edit is open, changed.
func edit(match string, change func(*policy.NamespaceRules)) policy.NamespaceRules {
	e := open(match)
	change(&e)
	return e
}

func TestUseRefuses(t *testing.T) {
	long := strings.Repeat("x", 3000)
	many := func(n int, form string) []string { return strings.Split(numbered(n, form), ",") }
	of := func(change func(*policy.NamespaceRules)) policy.File { return entries(edit("shop", change)) }
	for _, tt := range []struct {
		file policy.File
		want string
	}{
		{policy.File{}, "namespaces: has no entry, so every pod would be refused"},
		{policy.File{SourceIdentity: "pod", Namespaces: []policy.NamespaceRules{open("*")}}, `sourceIdentity: "pod" is none of ["none" "service-account" "session-name"]`},
		{policy.File{TransitiveTags: []string{"a", "b;"}, Namespaces: []policy.NamespaceRules{open("*")}}, `transitiveTags[1]: tag key "b;"`},
		{policy.File{TransitiveTags: []string{"a", "A"}, Namespaces: []policy.NamespaceRules{open("*")}}, `transitiveTags[1]: tag key "A" is set twice`},
		{policy.File{TransitiveTags: []string{"aws:a"}, Namespaces: []policy.NamespaceRules{open("*")}}, "belong to AWS"},
		{policy.File{TransitiveTags: many(51, "t%d"), Namespaces: []policy.NamespaceRules{open("*")}}, "transitiveTags: has 51 keys, STS allows 50"},
		{policy.File{Namespaces: make([]policy.NamespaceRules, 1001)}, "namespaces: has 1001 entries, the limit is 1000"},
		{entries(policy.NamespaceRules{Match: many(500, "n%d")}, policy.NamespaceRules{Match: many(501, "m%d")}), "match 1001 globs together, the limit is 1000"},
		{entries(policy.NamespaceRules{Accounts: all}), "namespaces[0].match: is required"},
		{entries(open("a"), policy.NamespaceRules{}), "namespaces[1].match: is required"},
		{entries(open("")), `namespaces[0].match[0]: "" must be the name of a namespace`},
		{entries(open("Shop")), "lower-case"},
		{entries(open("team_*")), "lower-case"},
		{entries(open("team?")), "lower-case"},
		{entries(open(long)), "must be the name of a namespace"},
		{entries(open("*"), open("shop")), `namespaces[1].match[0]: "shop" is never reached, because "*" comes before it`},
		{entries(open("shop"), open("a"), open("shop")), `namespaces[2].match[0]: "shop" is never reached, because "shop"`},
		{entries(open("team-*"), open("team-a-*")), "is never reached"},
		{entries(open("*a*"), open("*ba")), "is never reached"},
		{of(func(n *policy.NamespaceRules) { n.Accounts = []string{"*", "12345678901"} }), `namespaces[0].accounts[1]: "12345678901" is not an AWS account id of 12 digits, and not *`},
		{of(func(n *policy.NamespaceRules) { n.Accounts = []string{"1234*"} }), "not an AWS account id"},
		{of(func(n *policy.NamespaceRules) { n.Accounts = many(1001, "123456789%03d") }), "accounts: has 1001 entries, the limit is 1000"},
		{of(func(n *policy.NamespaceRules) { n.Roles = []string{"team-*"} }), `roles[0]: "team-*" must begin with arn: for a whole ARN, or with / or * for path and name: /team-* is that name without a path`},
		{of(func(n *policy.NamespaceRules) { n.Roles = []string{""} }), "must begin with"},
		{of(func(n *policy.NamespaceRules) { n.Roles = []string{"/te am"} }), "no role's ARN has"},
		{of(func(n *policy.NamespaceRules) { n.Roles = []string{"/é"} }), "no role's ARN has"},
		{of(func(n *policy.NamespaceRules) { n.Roles = []string{"/" + long} }), "at most 2048"},
		{of(func(n *policy.NamespaceRules) { n.ExternalIDs = []string{"a b"} }), "externalIDs[0]: \"a b\" must have 1 to 1224"},
		{of(func(n *policy.NamespaceRules) { n.ExternalIDs = []string{""} }), "must have 1 to 1224"},
		{of(func(n *policy.NamespaceRules) { n.SessionNames = []string{"a:*"} }), "sessionNames[0]: \"a:*\" must have 1 to 64"},
		{of(func(n *policy.NamespaceRules) { n.MaxDuration = time.Minute }), "maxDuration: 1m0s is out of bounds"},
		{of(func(n *policy.NamespaceRules) { n.MaxDuration = 13 * time.Hour }), "out of bounds"},
		{of(func(n *policy.NamespaceRules) { n.MaxDuration = -time.Hour }), "out of bounds"},
		{of(func(n *policy.NamespaceRules) { n.MaxDuration = time.Hour + 1 }), "out of bounds"},
		{of(func(n *policy.NamespaceRules) { n.ForcedTags = map[string]string{"": "v"} }), `forcedTags: tag key ""`},
		{of(func(n *policy.NamespaceRules) { n.ForcedTags = map[string]string{"a\tb": "v"} }), "forcedTags: tag key"},
		{of(func(n *policy.NamespaceRules) { n.ForcedTags = map[string]string{"aws:a": "v"} }), "belong to AWS"},
		{of(func(n *policy.NamespaceRules) { n.ForcedTags = map[string]string{"team": "v", "Team": "v"} }), "is set twice"},
		{of(func(n *policy.NamespaceRules) { n.ForcedTags = map[string]string{"Kubernetes-Namespace": "v"} }), "is reserved for kubernetesTags"},
		{of(func(n *policy.NamespaceRules) { n.ForcedTags = map[string]string{"team": "a;b"} }), `forcedTags: the value of "team"`},
		{of(func(n *policy.NamespaceRules) { n.ForcedTags = map[string]string{"team": "{pod}"} }), "{namespace} or {serviceAccount}"},
		{of(func(n *policy.NamespaceRules) { n.ForcedTags = map[string]string{"team": strings.Repeat("v", 257)} }), "at most 256"},
		{of(func(n *policy.NamespaceRules) {
			n.ForcedTags = map[string]string{}
			for _, key := range many(47, "t%d") {
				n.ForcedTags[key] = "v"
			}
		}), "forcedTags: has 47 keys, the limit is 46"},
	} {
		rules := newRules(t, rolePrefix)
		use(t, rules, entries(open("*")))
		err := rules.Use(tt.file)
		if err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%.200s: %v, want %q", fmt.Sprint(tt.file), err, tt.want)
			continue
		}
		if check := tt.file.Check(); check == nil || check.Error() != err.Error() {
			t.Errorf("Check returns %v, Use %v", check, err)
		}
		if len(err.Error()) > 600 {
			t.Errorf("the error has %d characters: %s", len(err.Error()), err)
		}
		// The previous file stays in force.
		if _, err := rules.Grant(cart(map[policy.Key]string{policy.Role: "reader"}), shop(anything)); err != nil {
			t.Errorf("after %q: %v", tt.want, err)
		}
	}
}

// The file's lists limit the pods of namespace shop, which permits everything.
func TestFileNarrows(t *testing.T) {
	const other = "arn:aws:iam::999999999999:role/"
	change := func(change func(*policy.NamespaceRules)) policy.File { return entries(edit("shop", change)) }
	roles := func(globs ...string) policy.File { return change(func(n *policy.NamespaceRules) { n.Roles = globs }) }
	accounts := func(ids ...string) policy.File {
		return change(func(n *policy.NamespaceRules) { n.Accounts = ids })
	}
	externals := func(globs ...string) policy.File {
		return change(func(n *policy.NamespaceRules) { n.ExternalIDs = globs })
	}
	names := func(globs ...string) policy.File {
		return change(func(n *policy.NamespaceRules) { n.SessionNames = globs })
	}
	longest := func(d time.Duration) policy.File {
		return change(func(n *policy.NamespaceRules) { n.MaxDuration = d })
	}
	role := func(name string) map[policy.Key]string { return map[policy.Key]string{policy.Role: name} }
	with := func(key policy.Key, value string) map[policy.Key]string {
		return map[policy.Key]string{policy.Role: "reader", key: value}
	}
	for _, tt := range []struct {
		file   policy.File
		pod    map[policy.Key]string
		reason credential.Reason // "": granted
	}{
		{entries(open("*")), role("reader"), ""},
		{entries(open("shop")), role("reader"), ""},
		{entries(open("s*p")), role("reader"), ""},
		{entries(open("other"), open("sho*")), role("reader"), ""},
		{entries(open("shops")), role("reader"), credential.ReasonRulesNamespace},
		{entries(open("sho")), role("reader"), credential.ReasonRulesNamespace},
		{entries(open("other"), open("*-shop")), role("reader"), credential.ReasonRulesNamespace},

		// Only the first entry that matches applies.
		{entries(policy.NamespaceRules{Match: []string{"shop"}}, open("*")), role("reader"), credential.ReasonRulesAccount},
		{entries(open("shop"), policy.NamespaceRules{Match: all}), role("reader"), ""},

		{accounts("123456789012"), role("reader"), ""},
		{accounts("999999999999", "123456789012"), role("reader"), ""},
		{accounts("999999999999"), role("reader"), credential.ReasonRulesAccount},
		{accounts("123456789012"), role(other + "reader"), credential.ReasonRulesAccount},
		{accounts(), role("reader"), credential.ReasonRulesAccount},

		{roles("/reader"), role("reader"), ""},
		{roles("/reader"), role(other + "reader"), ""}, // of a permitted account
		{roles("/reader"), role("team/reader"), credential.ReasonRulesRole},
		{roles("*/reader"), role("team/reader"), ""},
		{roles("/team/*"), role("team/sub/reader"), ""},
		{roles("/team/*"), role("reader"), credential.ReasonRulesRole},
		{roles("/read"), role("reader"), credential.ReasonRulesRole},
		{roles(rolePrefix + "*"), role("reader"), ""},
		{roles(rolePrefix + "*"), role(other + "reader"), credential.ReasonRulesRole},
		{roles("arn:aws-cn:*"), role("reader"), credential.ReasonRulesRole},
		{roles("/writer", "/reader"), role("reader"), ""},
		{roles(), role("reader"), credential.ReasonRulesRole},

		{externals(), role("reader"), ""}, // it sets none
		{externals(), with(policy.ExternalID, "acme-1"), credential.ReasonRulesExternalID},
		{externals("acme-*"), with(policy.ExternalID, "acme-1"), ""},
		{externals("acme-*"), with(policy.ExternalID, "an-acme-1"), credential.ReasonRulesExternalID},
		{names(), role("reader"), ""},
		{names(), with(policy.SessionName, "cart-job"), credential.ReasonRulesSessionName},
		{names("x", "cart-*"), with(policy.SessionName, "cart-job"), ""},
		{names("cart"), with(policy.SessionName, "cart-job"), credential.ReasonRulesSessionName},

		{longest(0), with(policy.Duration, "12h"), ""},
		{longest(2 * time.Hour), with(policy.Duration, "2h"), ""},
		{longest(2 * time.Hour), with(policy.Duration, "2h0m1s"), credential.ReasonRulesDuration},
		{longest(30 * time.Minute), with(policy.Duration, "1h"), credential.ReasonRulesDuration},
		{longest(30 * time.Minute), role("reader"), ""},
	} {
		rules := newRules(t, rolePrefix)
		use(t, rules, tt.file)
		grant, err := rules.Grant(cart(tt.pod), shop(anything))
		what := fmt.Sprintf("%v of %v", tt.pod, tt.file)
		if tt.reason == "" {
			if err != nil {
				t.Errorf("%s: %v", what, err)
			}
			continue
		}
		mustRefuse(t, what, err, credential.ErrDenied, tt.reason, "the rules file", "ask the file's owner", `"shop"`)
		if !grant.IsZero() {
			t.Errorf("%s: a refusal comes with %s", what, grant)
		}
	}
}

// The file permits nothing that the namespace does not permit.
func TestFileWidensNothing(t *testing.T) {
	rules := newRules(t, rolePrefix)
	use(t, rules, entries(open("*")))
	for what, tt := range map[string]struct {
		ns     policy.Namespace
		reason credential.Reason
	}{
		"nothing permitted": {shop(nil), credential.ReasonNothingPermitted},
		"another role":      {shop(map[policy.Key]string{policy.Permitted: ".*/writer"}), credential.ReasonRoleNotPermitted},
		"not opted in":      {policy.Namespace{Name: "shop", Annotations: annotations(anything)}, credential.ReasonNamespaceNotOpted},
		"tags":              {shop(anything), credential.ReasonTagNotPermitted},
	} {
		pod := cart(map[policy.Key]string{policy.Role: "reader", policy.SessionTags: "team=shop"})
		_, err := rules.Grant(pod, tt.ns)
		mustRefuse(t, what, err, credential.ErrDenied, tt.reason)
	}
	// Rules without annotation keys refuse everything with a file too.
	var zero policy.Rules
	use(t, &zero, entries(open("*")))
	if grant, err := zero.Grant(cart(map[policy.Key]string{policy.Role: "reader"}), shop(anything)); err == nil || !grant.IsZero() {
		t.Errorf("zero Rules with a file grant %s, %v", grant, err)
	}
}

func TestMaxDurationShortensTheDefault(t *testing.T) {
	rules := newRules(t, rolePrefix)
	for limit, want := range map[time.Duration]time.Duration{0: time.Hour, 30 * time.Minute: 30 * time.Minute, time.Hour: time.Hour, 12 * time.Hour: time.Hour} {
		use(t, rules, entries(edit("*", func(n *policy.NamespaceRules) { n.MaxDuration = limit })))
		grant, err := rules.Grant(cart(map[policy.Key]string{policy.Role: "reader"}), shop(anything))
		if err != nil || grant.Duration() != want {
			t.Errorf("with maxDuration %s a session lasts %s, %v", limit, grant.Duration(), err)
		}
	}
}

func TestTagsOfTheFile(t *testing.T) {
	forced := func(pairs ...string) map[string]string {
		tags := map[string]string{}
		for i := 0; i < len(pairs); i += 2 {
			tags[pairs[i]] = pairs[i+1]
		}
		return tags
	}
	for _, tt := range []struct {
		name, podTags, scope string
		forced               map[string]string
		kubernetes           bool
		want                 []policy.Tag
	}{
		{"nothing", "", "", nil, false, nil},
		{"the pod's own", "cost=1", "", nil, false, []policy.Tag{{"cost", "1"}}},
		{"forced beside the pod's", "cost=1", "", forced("team", "shop", "a", ""), false, []policy.Tag{{"a", ""}, {"cost", "1"}, {"team", "shop"}}},
		{"forced wins", "cost=1,team=x", "", forced("team", "shop"), false, []policy.Tag{{"cost", "1"}, {"team", "shop"}}},
		{"forced wins in other letters", "TEAM=x", "", forced("Team", "shop"), false, []policy.Tag{{"Team", "shop"}}},
		{"placeholders", "", "", forced("owner", "{namespace}/{serviceAccount}", "x", "{namespace}{namespace}"), false, []policy.Tag{{"owner", "shop/cart"}, {"x", "shopshop"}}},
		{"as EKS Pod Identity has them", "", "", forced("eks-cluster-name", "prod"), false, []policy.Tag{{"eks-cluster-name", "prod"}}},
		{"Kubernetes', scope role", "", "role", nil, true, nil},
		{"Kubernetes', scope service-account", "", "service-account", nil, true, []policy.Tag{{"kubernetes-namespace", "shop"}, {"kubernetes-service-account", "cart"}}},
		{"Kubernetes', scope pod", "cost=1", "pod", forced("team", "{namespace}"), true, []policy.Tag{
			{"cost", "1"}, {"kubernetes-namespace", "shop"}, {"kubernetes-pod-name", "cart-1"}, {"kubernetes-pod-uid", "u-1"},
			{"kubernetes-service-account", "cart"}, {"team", "shop"},
		}},
	} {
		rules := newRules(t, rolePrefix)
		use(t, rules, policy.File{KubernetesTags: tt.kubernetes, Namespaces: []policy.NamespaceRules{edit("*", func(n *policy.NamespaceRules) { n.ForcedTags = tt.forced })}})
		pod := map[policy.Key]string{policy.Role: "reader"}
		if tt.podTags != "" {
			pod[policy.SessionTags] = tt.podTags
		}
		if tt.scope != "" {
			pod[policy.SessionScope] = tt.scope
		}
		grant, err := rules.Grant(cart(pod), shop(map[policy.Key]string{policy.Permitted: ".*", policy.PermittedTags: "cost,team,TEAM"}))
		if err != nil {
			t.Errorf("%s: %v", tt.name, err)
			continue
		}
		if diff := cmp.Diff(tt.want, grant.Tags()); diff != "" {
			t.Errorf("%s (-want +got):\n%s", tt.name, diff)
		}
		if grant.TransitiveTagKeys() != nil || grant.SourceIdentity() != "" {
			t.Errorf("%s: transitive %q, source identity %q", tt.name, grant.TransitiveTagKeys(), grant.SourceIdentity())
		}
	}
}

// The longest names of Kubernetes fit into tags. The rules refuse longer values and too many tags, and say which.
func TestTagLimits(t *testing.T) {
	longNamespace, longName := strings.Repeat("n", 63), strings.Repeat("s.", 126)+"s"
	pod := policy.Pod{Namespace: longNamespace, Name: longName, UID: "01234567-89ab-cdef-0123-456789abcdef", ServiceAccount: longName,
		Request: request(map[policy.Key]string{policy.Role: "reader", policy.SessionScope: "pod"})}
	ns := shop(map[policy.Key]string{policy.Permitted: ".*", policy.PermittedTags: numbered(50, "t%d")})
	ns.Name = longNamespace
	rules := newRules(t, rolePrefix)
	file := policy.File{KubernetesTags: true, SourceIdentity: policy.SourceServiceAccount, Namespaces: []policy.NamespaceRules{open("*")}}
	use(t, rules, file)
	grant, err := rules.Grant(pod, ns)
	if err != nil {
		t.Fatal(err)
	}
	checkGrant(t, grant)
	want := []policy.Tag{{"kubernetes-namespace", longNamespace}, {"kubernetes-pod-name", longName}, {"kubernetes-pod-uid", pod.UID}, {"kubernetes-service-account", longName}}
	if diff := cmp.Diff(want, grant.Tags()); diff != "" {
		t.Errorf("tags (-want +got):\n%s", diff)
	}

	file.Namespaces[0].ForcedTags = map[string]string{"owner": "{namespace}/{serviceAccount}"}
	use(t, rules, file)
	_, err = rules.Grant(pod, ns)
	mustRefuse(t, "a forced value too long", err, credential.ErrDenied, credential.ReasonRulesTag, `"owner" with 317 characters`, "owner to shorten")

	file.Namespaces[0].ForcedTags = map[string]string{"owner": "{namespace}", "t0": "v"}
	use(t, rules, file)
	for n, fits := range map[int]bool{45: true, 46: false} { // with four of Kubernetes, and owner; t0 replaces one of the pod's
		pod.Request = request(map[policy.Key]string{policy.Role: "reader", policy.SessionScope: "pod", policy.SessionTags: numbered(n, "t%d=v")})
		grant, err := rules.Grant(pod, ns)
		if !fits {
			mustRefuse(t, "too many tags", err, credential.ErrDenied, credential.ReasonRulesTag, "would have 51 tags", "STS allows 50", `"iam.amazonaws.com/session-tags"`)
		} else if err != nil || len(grant.Tags()) != 50 {
			t.Errorf("%d tags of the pod's own become %d, %v", n, len(grant.Tags()), err)
		}
	}
}

func TestTransitiveTags(t *testing.T) {
	rules := newRules(t, rolePrefix)
	file := policy.File{KubernetesTags: true, TransitiveTags: []string{"kubernetes-namespace", "TEAM", "absent"},
		Namespaces: []policy.NamespaceRules{edit("*", func(n *policy.NamespaceRules) { n.ForcedTags = map[string]string{"team": "x"} })}}
	use(t, rules, file)
	for scope, want := range map[string][]string{"role": {"team"}, "pod": {"kubernetes-namespace", "team"}} {
		grant, err := rules.Grant(cart(map[policy.Key]string{policy.Role: "reader", policy.SessionScope: scope}), shop(anything))
		if err != nil || !slices.Equal(grant.TransitiveTagKeys(), want) {
			t.Errorf("scope %s: %q, %v", scope, grant.TransitiveTagKeys(), err)
		}
	}
	// Use copies the file, so that a later change does not affect the rules.
	file.TransitiveTags[1] = "absent"
	file.Namespaces[0].ForcedTags["team"] = "y"
	file.Namespaces[0].Accounts = nil
	grant, err := rules.Grant(cart(map[policy.Key]string{policy.Role: "reader"}), shop(anything))
	if err != nil || len(grant.TransitiveTagKeys()) != 1 || grant.Tags()[0].Value != "x" {
		t.Errorf("after a change of the caller's file: %v, %v", grant.Tags(), err)
	}
}

func TestSourceIdentity(t *testing.T) {
	long := strings.Repeat("a", 253)
	sum := sha256.Sum256([]byte("shop." + long))
	for _, tt := range []struct {
		source                      policy.SourceIdentity
		account, sessionName, scope string
		want                        string
	}{
		{"", "cart", "", "role", ""},
		{policy.SourceNone, "cart", "", "pod", ""},
		{policy.SourceServiceAccount, "cart", "", "role", "shop.cart"},
		{policy.SourceServiceAccount, "cart", "own", "pod", "shop.cart"},
		{policy.SourceServiceAccount, long, "", "role", "shop." + strings.Repeat("a", 38) + "-" + hex.EncodeToString(sum[:10])},
		{policy.SourceSessionName, "cart", "", "pod", "credence.shop.cart-1"},
		{policy.SourceSessionName, "cart", "", "role", "credence"},
		{policy.SourceSessionName, "cart", "aws", "role", "aws"},
	} {
		rules := newRules(t, rolePrefix)
		use(t, rules, policy.File{SourceIdentity: tt.source, Namespaces: []policy.NamespaceRules{open("*")}})
		pairs := map[policy.Key]string{policy.Role: "reader", policy.SessionScope: tt.scope}
		if tt.sessionName != "" {
			pairs[policy.SessionName] = tt.sessionName
		}
		pod := cart(pairs)
		pod.ServiceAccount = tt.account
		grant, err := rules.Grant(pod, shop(anything))
		if err != nil {
			t.Fatal(err)
		}
		checkGrant(t, grant)
		if got := grant.SourceIdentity(); got != tt.want {
			t.Errorf("source %q, scope %s: %q, want %q", tt.source, tt.scope, got, tt.want)
		}
	}
	// Every pod has a service account. Without one, there is no such source identity.
	rules := newRules(t, rolePrefix)
	use(t, rules, policy.File{SourceIdentity: policy.SourceServiceAccount, Namespaces: []policy.NamespaceRules{open("*")}})
	pod := cart(map[policy.Key]string{policy.Role: "reader"})
	pod.ServiceAccount = ""
	if grant, err := rules.Grant(pod, shop(anything)); err == nil || !grant.IsZero() {
		t.Errorf("without a service account: %s, %v", grant, err)
	}
}

// Forced tags do not add the tags of Kubernetes, with any scope.
func TestForcedTagsAlone(t *testing.T) {
	for _, scope := range []string{"role", "service-account", "pod"} {
		rules := newRules(t, rolePrefix)
		use(t, rules, entries(edit("*", func(n *policy.NamespaceRules) { n.ForcedTags = map[string]string{"team": "x"} })))
		grant, err := rules.Grant(cart(map[policy.Key]string{policy.Role: "reader", policy.SessionScope: scope}), shop(anything))
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff([]policy.Tag{{Key: "team", Value: "x"}}, grant.Tags()); diff != "" {
			t.Errorf("scope %s: tags (-want +got):\n%s", scope, diff)
		}
	}
}

// A forced tag with {serviceAccount} needs the service account.
func TestForcedTagWithoutServiceAccount(t *testing.T) {
	rules := newRules(t, rolePrefix)
	use(t, rules, entries(edit("*", func(n *policy.NamespaceRules) { n.ForcedTags = map[string]string{"owner": "x-{serviceAccount}"} })))
	pod := cart(map[policy.Key]string{policy.Role: "reader"})
	pod.ServiceAccount = ""
	if grant, err := rules.Grant(pod, shop(anything)); err == nil || !grant.IsZero() {
		t.Errorf("without a service account: %s, %v", grant, err)
	}
}

// Each decision uses one file, also while files change.
func TestUseWhileGranting(t *testing.T) {
	rules := newRules(t, rolePrefix)
	files := []policy.File{
		{SourceIdentity: policy.SourceSessionName, Namespaces: []policy.NamespaceRules{edit("*", func(n *policy.NamespaceRules) { n.ForcedTags = map[string]string{"a": "1"} })}},
		{SourceIdentity: policy.SourceServiceAccount, Namespaces: []policy.NamespaceRules{edit("*", func(n *policy.NamespaceRules) { n.ForcedTags = map[string]string{"a": "2"} })}},
	}
	use(t, rules, files[0])
	want := map[string]string{"1": "credence", "2": "shop.cart"}
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 500 {
				grant, err := rules.Grant(cart(map[policy.Key]string{policy.Role: "reader"}), shop(anything))
				if err != nil || grant.SourceIdentity() != want[grant.Tags()[0].Value] {
					t.Errorf("%q, %q, %v", grant.Tags(), grant.SourceIdentity(), err)
				}
			}
		})
	}
	for i := range 500 {
		use(t, rules, files[i%2])
	}
	wg.Wait()
}

// checkGrant compares a grant with the documented limits of AssumeRole.
func checkGrant(t *testing.T, g policy.Grant) {
	t.Helper()
	if again, err := credential.ParseRoleARN(g.Role().String()); err != nil || again != g.Role() {
		t.Errorf("role %s: %v", g.Role(), err)
	}
	only := func(s, marks string) bool {
		return strings.Trim(s, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"+marks) == "" &&
			!strings.ContainsFunc(s, func(r rune) bool { return r > 'z' || r <= ' ' })
	}
	if n := len(g.SessionName()); n < 2 || n > 64 || !only(g.SessionName(), "_=,.@+-") {
		t.Errorf("session name %q", g.SessionName())
	}
	if n := len(g.ExternalID()); n != 0 && (n < 2 || n > 1224) || !only(g.ExternalID(), "_=,.@+:/-") {
		t.Errorf("external id %q", g.ExternalID())
	}
	if n := len(g.SourceIdentity()); n != 0 && (n < 2 || n > 64) || !only(g.SourceIdentity(), "_=,.@+-") || strings.HasPrefix(g.SourceIdentity(), "aws:") {
		t.Errorf("source identity %q", g.SourceIdentity())
	}
	if g.Duration() < 15*time.Minute || g.Duration() > 12*time.Hour || g.Duration()%time.Second != 0 {
		t.Errorf("duration %s", g.Duration())
	}
	if n := utf8.RuneCountInString(g.SessionPolicy()) + len(strings.Join(g.PolicyARNs(), "")); n > 2048 || len(g.PolicyARNs()) > 10 {
		t.Errorf("policies of %d characters: %q, %q", n, g.SessionPolicy(), g.PolicyARNs())
	}
	keys := map[string]bool{} // :: key in lower case → seen
	for _, tag := range g.Tags() {
		if tag.Key == "" || utf8.RuneCountInString(tag.Key) > 128 || utf8.RuneCountInString(tag.Value) > 256 || !utf8.ValidString(tag.Key+tag.Value) ||
			strings.ContainsAny(tag.Key+tag.Value, "\t\n{};*") || strings.HasPrefix(strings.ToLower(tag.Key), "aws:") {
			t.Errorf("tag %q", tag)
		}
		if keys[strings.ToLower(tag.Key)] {
			t.Errorf("tag key %q is there twice", tag.Key)
		}
		keys[strings.ToLower(tag.Key)] = true
	}
	if len(g.Tags()) > 50 || !slices.IsSortedFunc(g.Tags(), func(a, b policy.Tag) int { return strings.Compare(a.Key, b.Key) }) {
		t.Errorf("%d tags, or not sorted", len(g.Tags()))
	}
	for _, key := range g.TransitiveTagKeys() {
		if !slices.ContainsFunc(g.Tags(), func(tag policy.Tag) bool { return tag.Key == key }) {
			t.Errorf("transitive key %q has no tag", key)
		}
	}
}

// FuzzGrant decides on any annotations, namespaces and rules files. A grant is always permitted by the namespace, allowed by
// the file and valid for STS. Any other result is an error without a grant.
func FuzzGrant(f *testing.F) {
	for key, values := range goodValues {
		for _, tt := range values {
			f.Add(string(key), tt.value, "reader", "pod", "shop", "cart", "cart-1", "*", "acme-*", "{namespace}")
		}
	}
	f.Add("external-id", "acme-1", "team/reader", "role", "shop", "cart", "cart-1", "/team/*", "acme-*", "{serviceAccount}")
	f.Add("session-tags", "team=x", "reader", "service-account", "shop", "cart", "", "*", "*", "v")
	f.Add("duration", "12h", rolePrefix+"reader", "pod", "sh op", "c\tart", "x\n", rolePrefix+"*", "*", "v")
	f.Fuzz(func(t *testing.T, key, value, role, scope, namespace, account, name, roleGlob, textGlob, forced string) {
		rules := newRules(t, rolePrefix)
		entry := policy.NamespaceRules{Match: []string{"s*", "t-*"}, Accounts: []string{"123456789012"}, Roles: []string{roleGlob},
			ExternalIDs: []string{textGlob}, MaxDuration: 2 * time.Hour, ForcedTags: map[string]string{"forced": forced}}
		if rules.Use(policy.File{KubernetesTags: true, TransitiveTags: []string{"Forced", "team"}, SourceIdentity: policy.SourceServiceAccount,
			Namespaces: []policy.NamespaceRules{entry}}) != nil {
			entry.Roles, entry.ExternalIDs, entry.ForcedTags = nil, nil, nil
			if rules.Use(policy.File{Namespaces: []policy.NamespaceRules{entry}}) != nil {
				t.Fatal("an entry that allows nothing is refused")
			}
		}
		pairs := map[policy.Key]string{policy.Role: role, policy.SessionScope: scope}
		pairs[policy.Key(key)] = value
		ns := shop(map[policy.Key]string{policy.Permitted: rolePrefix + ".*", policy.PermittedTags: "team,cost"})
		ns.Name = namespace
		grant, err := rules.Grant(policy.Pod{Namespace: namespace, Name: name, UID: "u-1", ServiceAccount: account, Request: request(pairs)}, ns)
		if (err == nil) == grant.IsZero() {
			t.Fatalf("grant %s with error %v", grant, err)
		}
		if err != nil {
			if e, ok := errors.AsType[*credential.Error](err); ok && (e.Reason == "" || e.Message == "") {
				t.Errorf("the error is %#v", e)
			}
			return
		}
		checkGrant(t, grant)
		arn := grant.Role().String()
		path := strings.TrimPrefix(arn, "arn:aws:iam::123456789012:role")
		switch {
		case path == arn:
			t.Errorf("%s is of another account", arn)
		case !pattern.NewGlob(roleGlob).Match(arn) && !pattern.NewGlob(roleGlob).Match(path):
			t.Errorf("%s is granted against glob %q", arn, roleGlob)
		case grant.ExternalID() != "" && !pattern.NewGlob(textGlob).Match(grant.ExternalID()):
			t.Errorf("external id %q is granted against glob %q", grant.ExternalID(), textGlob)
		case grant.SessionName() == value && key == string(policy.SessionName):
			t.Errorf("session name %q is granted, and none is allowed", value)
		case grant.Duration() > 2*time.Hour:
			t.Errorf("duration %s", grant.Duration())
		case !strings.HasPrefix(namespace, "s") && !strings.HasPrefix(namespace, "t-"):
			t.Errorf("namespace %q is matched by no entry", namespace)
		}
	})
}

// Each field of a file has a json tag, by which it is read, compared and documented.
func TestFieldsHaveNames(t *testing.T) {
	for _, typ := range []reflect.Type{reflect.TypeFor[policy.File](), reflect.TypeFor[policy.NamespaceRules]()} {
		seen := map[string]bool{}
		for field := range typ.Fields() {
			name := field.Tag.Get("json")
			if name == "" || strings.Contains(name, ",") || seen[name] {
				t.Errorf("%s.%s has the name %q in the file", typ.Name(), field.Name, name)
			}
			seen[name] = true
		}
		if len(seen) < 4 {
			t.Errorf("%s has the fields %q", typ.Name(), slices.Sorted(maps.Keys(seen)))
		}
	}
}
