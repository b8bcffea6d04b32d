package policy_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"strings"
	"sync"
	"testing"

	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/policy"
)

const rolePrefix = "arn:aws:iam::123456789012:role/"

func newRules(t testing.TB, base string) *policy.Rules {
	t.Helper()
	cfg := policy.Config{Keys: newKeys(t)}
	if base != "" {
		var err error
		if cfg.Base, err = credential.ParseRoleBase(base); err != nil {
			t.Fatal(err)
		}
	}
	rules, err := policy.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return rules
}

// shop is an opted-in namespace with these annotations.
func shop(pairs map[policy.Key]string) policy.Namespace {
	return policy.Namespace{
		Name:        "shop",
		Labels:      map[string]string{"iam.amazonaws.com/inject": "enabled"},
		Annotations: annotations(pairs),
	}
}

// cart is a pod of that namespace with these annotations.
func cart(pairs map[policy.Key]string) policy.Pod {
	return policy.Pod{Namespace: "shop", Name: "cart-1", UID: "u-1", ServiceAccount: "cart", Request: request(pairs)}
}

// permits reports whether the namespace's annotations permit the role.
func permits(t *testing.T, rules *policy.Rules, role string, pairs map[policy.Key]string) bool {
	t.Helper()
	grant, err := rules.Grant(cart(map[policy.Key]string{policy.Role: role}), shop(pairs))
	if err == nil {
		if want := rolePrefix + role; !strings.HasPrefix(role, "arn:") && !strings.HasPrefix(role, "/") && grant.Role().String() != want {
			t.Errorf("role %q was granted as %s", role, grant.Role())
		}
		return true
	}
	if !grant.IsZero() {
		t.Errorf("a refusal (%v) comes with %s", err, grant)
	}
	want := []string{`namespace "shop" does not permit role arn:`, `"iam.amazonaws.com/role"`}
	for key, text := range map[policy.Key]string{policy.Permitted: "must match the whole ARN", policy.AllowedRoles: "none of its globs matches the whole ARN"} {
		if _, ok := pairs[key]; ok {
			want = append(want, `annotation "iam.amazonaws.com/`+string(key)+`" is `, text)
		} else if strings.Contains(err.Error(), string(key)) {
			t.Errorf("role %s: the message names an annotation that the namespace does not have: %v", role, err)
		}
	}
	mustRefuse(t, "role "+role, err, credential.ErrDenied, credential.ReasonRoleNotPermitted, want...)
	return false
}

func TestPermitted(t *testing.T) {
	rules := newRules(t, rolePrefix)
	for _, tt := range []struct {
		expression, role string
		want             bool
	}{
		{".*", "reader", true},
		{".*", "arn:aws:iam::999999999999:role/other", true},
		{rolePrefix + "reader", "reader", true},
		{".*/reader", "reader", true},
		{".*/reader", "team/reader", true},
		{".*:role/reader", "team/reader", false},
		{`arn:aws:iam::123456789012:role/team/.*`, "team/reader", true},
		{`arn:aws:iam::123456789012:role/team/.*`, "reader", false},
		{`arn:aws:iam::123456789012:role/team/.*`, "arn:aws:iam::999999999999:role/team/reader", false},

		// The whole ARN must match. In kiam a part was enough, which surprised its users.
		{"reader", "reader", false},
		{"role/reader", "reader", false},
		{rolePrefix + "read", "reader", false},
		{"eader", "reader", false},
		{"", "reader", false},
		{"^" + rolePrefix + "reader$", "reader", true},
		{`\A` + rolePrefix + `reader\z`, "reader", true},

		// kiam anchored expressions as ^a|b$, which matches all that begins with a or ends with b.
		{rolePrefix + "a|" + rolePrefix + "b", "a", true},
		{rolePrefix + "a|" + rolePrefix + "b", "b", true},
		{rolePrefix + "a|" + rolePrefix + "b", "admin", false},
		{rolePrefix + "a|" + rolePrefix + "b", "arn:aws:iam::999999999999:role/b", false},
		{"arn:aws:iam::123456789012:role/a|b", "admin", false},
		{"arn:aws:iam::123456789012:role/a|b", "web", false},
		{"a|b", "a", false},
		{".*/a|.*/b", "team/b", true},
		{"|.*/b", "a", false},

		// Flags apply within the expression only.
		{"(?i)" + rolePrefix + "reader", "READER", true},
		{rolePrefix + "reader", "READER", false},
		{"(?i:" + rolePrefix + "r)eader", "READER", false},
		{"(?m)^" + rolePrefix + "a$", "a", true},
		{"(?m)^" + rolePrefix + "a$", "ab", false},
		{"(?U)" + rolePrefix + ".*", "reader", true},
		{"(?s)" + rolePrefix + ".", "ab", false},
		{rolePrefix + "a{2}", "aa", true},
		{rolePrefix + `\Qa+b\E`, "a+b", true},
	} {
		if got := permits(t, rules, tt.role, map[policy.Key]string{policy.Permitted: tt.expression}); got != tt.want {
			t.Errorf("permitted %q: role %q is granted: %v", tt.expression, tt.role, got)
		}
	}
}

// An expression that is invalid by itself permits nothing, even if it is valid inside of a group.
func TestPermittedCannotBeInjected(t *testing.T) {
	rules := newRules(t, rolePrefix)
	for _, expression := range []string{
		rolePrefix + "a)|(?:.*",
		"a)|(?:.*",
		"a)|(.*",
		".*)(?:",
		")|.*|(?:",
		"(",
		")",
		"[",
		"*",
		`.*\`,
		`.*\Q`, // valid by itself, but \Q would quote the closing anchor
		"(?P<x",
		"a{1001}",
		"((((a{100}){100}){100}){100}){100}",
		"(?!admin).*", // RE2 has no lookahead
	} {
		for _, role := range []string{"a", "admin", "team/admin"} {
			grant, err := rules.Grant(cart(map[policy.Key]string{policy.Role: role}), shop(map[policy.Key]string{policy.Permitted: expression}))
			if err == nil {
				t.Errorf("permitted %q: role %q is granted", expression, role)
				continue
			}
			if !grant.IsZero() {
				t.Errorf("permitted %q: a refusal comes with %s", expression, grant)
			}
			mustRefuse(t, "permitted "+expression, err, credential.ErrInvalid, credential.ReasonAnnotationInvalid,
				`annotation "iam.amazonaws.com/permitted" of namespace "shop"`, "is not a regular expression")
		}
	}
	for _, repeat := range []string{".{0,1000}", "(?:.?){1000}", "(?:(?:.?.?){30}){33}", "(?:.{30}){33}"} {
		_, err := rules.Grant(cart(map[policy.Key]string{policy.Role: "reader"}), shop(map[policy.Key]string{policy.Permitted: strings.Repeat(repeat, 4096/len(repeat))}))
		mustRefuse(t, repeat, err, credential.ErrInvalid, credential.ReasonAnnotationInvalid, `"iam.amazonaws.com/permitted"`,
			"repeats too much: it would compile to", "instructions, the limit is 8192")
	}
	// A part repeated any number of times has at least its own steps, and a class with many ranges has more than one.
	for _, large := range []string{"(?:" + strings.Repeat(".{0,1000}", 440) + "){0,}", strings.Repeat("[acegikmoqsuwyACEGIKMOQSUWY]{1000}", 3)} {
		_, err := rules.Grant(cart(map[policy.Key]string{policy.Role: "reader"}), shop(map[policy.Key]string{policy.Permitted: large}))
		mustRefuse(t, large[:20], err, credential.ErrInvalid, credential.ReasonAnnotationInvalid, `"iam.amazonaws.com/permitted"`, "repeats too much")
	}
	if !permits(t, rules, "reader", map[policy.Key]string{policy.Permitted: `arn:aws:iam::\d{12}:role/[\w/]{0,}` + "reader"}) {
		t.Error("an ordinary expression is refused")
	}
	if !permits(t, rules, "reader", map[policy.Key]string{policy.Permitted: rolePrefix + "[a-z]{1,64}(/[a-z]{1,64}){0,8}"}) {
		t.Error("an ordinary repetition is refused")
	}
	long := strings.Repeat("a", 4096)
	if permits(t, rules, "reader", map[policy.Key]string{policy.Permitted: long}) {
		t.Error("4096 times a permits reader")
	}
	_, err := rules.Grant(cart(map[policy.Key]string{policy.Role: "reader"}), shop(map[policy.Key]string{policy.Permitted: long + "a"}))
	mustRefuse(t, "a long expression", err, credential.ErrInvalid, credential.ReasonAnnotationInvalid, "has 4097 characters, the limit is 4096")
}

func TestAllowedRoles(t *testing.T) {
	for _, tt := range []struct {
		base  string
		globs []string
		role  string
		want  bool
	}{
		{rolePrefix, []string{"reader"}, "reader", true},
		{rolePrefix, []string{"reader"}, "readers", false},
		{rolePrefix, []string{"read"}, "reader", false},
		{rolePrefix, []string{"eader"}, "reader", false},
		{rolePrefix, []string{"read*"}, "reader", true},
		{rolePrefix, []string{"*er"}, "reader", true},
		{rolePrefix, []string{"r*d*r"}, "reader", true},
		{rolePrefix, []string{"r*x*r"}, "reader", false},
		{rolePrefix, []string{"*"}, "reader", true},
		{rolePrefix, []string{"*"}, "team/reader", true},
		{rolePrefix, []string{"**"}, "reader", true},
		{rolePrefix, []string{"team/*"}, "team/sub/reader", true}, // * spans slashes, as in kube2iam
		{rolePrefix, []string{"team/*"}, "reader", false},
		{rolePrefix, []string{"/team/*"}, "team/reader", true},
		{rolePrefix, []string{"*"}, "arn:aws:iam::999999999999:role/reader", false}, // names stay in the base's account
		{rolePrefix, []string{rolePrefix + "reader"}, "reader", true},
		{rolePrefix, []string{"arn:aws:iam::*:role/reader"}, "arn:aws:iam::999999999999:role/reader", true},
		{rolePrefix, []string{"arn:*"}, "arn:aws-cn:iam::999999999999:role/x", true},
		{rolePrefix, []string{"reader", "writer"}, "writer", true},
		{rolePrefix, []string{"Reader"}, "reader", false},
		{rolePrefix, []string{"r?ader", "r.ader", "[r]eader", "reader|x"}, "reader", false}, // only * is special
		{rolePrefix, []string{}, "reader", false},
		{rolePrefix, []string{""}, "reader", false},

		// Globs are completed as roles are: below the base's path, or from the account's root.
		{rolePrefix + "base/", []string{"reader"}, rolePrefix + "base/reader", true},
		{rolePrefix + "base/", []string{"*"}, rolePrefix + "reader", false},
		{rolePrefix + "base/", []string{"/team/*"}, rolePrefix + "team/reader", true},
		{rolePrefix + "base/", []string{"/team/*"}, "/team/reader", true},
		{rolePrefix + "base/", []string{"/team/*"}, rolePrefix + "base/team/reader", false},

		// Without a base, full ARNs still work.
		{"", []string{"other", rolePrefix + "read*"}, rolePrefix + "reader", true},
	} {
		list, err := json.Marshal(tt.globs)
		if err != nil {
			t.Fatal(err)
		}
		if got := permits(t, newRules(t, tt.base), tt.role, map[policy.Key]string{policy.AllowedRoles: string(list)}); got != tt.want {
			t.Errorf("allowed-roles %s below %q: role %q is granted: %v", list, tt.base, tt.role, got)
		}
	}
}

func TestAllowedRolesRefuses(t *testing.T) {
	rules := newRules(t, rolePrefix)
	for _, tt := range []struct{ list, want string }{
		{"", "is not a JSON list"},
		{"reader", "is not a JSON list"},
		{`"reader"`, "is not a JSON list"},
		{`["reader"`, "is not a JSON list"},
		{`["reader"] ["x"]`, "is not a JSON list"},
		{`[1]`, "is not a JSON list"},
		{`{"reader":true}`, "is not a JSON list"},
		{"[" + strings.TrimSuffix(strings.Repeat(`"a",`, 1001), ",") + "]", "has 1001 entries, the limit is 1000"},
	} {
		_, err := rules.Grant(cart(map[policy.Key]string{policy.Role: "reader"}), shop(map[policy.Key]string{policy.AllowedRoles: tt.list}))
		mustRefuse(t, fmt.Sprintf("allowed-roles %.40s", tt.list), err, credential.ErrInvalid, credential.ReasonAnnotationInvalid,
			`annotation "iam.amazonaws.com/allowed-roles" of namespace "shop"`, tt.want)
	}
	if permits(t, rules, "reader", map[policy.Key]string{policy.AllowedRoles: "null"}) {
		t.Error("allowed-roles null permits something")
	}
	if !permits(t, rules, "a", map[policy.Key]string{policy.AllowedRoles: "[" + strings.TrimSuffix(strings.Repeat(`"a",`, 1000), ",") + "]"}) {
		t.Error("1000 entries are refused")
	}
}

// With both annotations, either permits.
func TestBothAnnotations(t *testing.T) {
	rules := newRules(t, rolePrefix)
	both := map[policy.Key]string{policy.Permitted: ".*/reader", policy.AllowedRoles: `["writer"]`}
	for role, want := range map[string]bool{"reader": true, "writer": true, "admin": false} {
		if got := permits(t, rules, role, both); got != want {
			t.Errorf("role %q is granted: %v", role, got)
		}
	}
	// An invalid annotation permits nothing, and the other annotation does not replace it.
	for _, broken := range []map[policy.Key]string{
		{policy.Permitted: "(", policy.AllowedRoles: `["reader"]`},
		{policy.Permitted: "nothing", policy.AllowedRoles: `reader`},
	} {
		if _, err := rules.Grant(cart(map[policy.Key]string{policy.Role: "reader"}), shop(broken)); !errors.Is(err, credential.ErrInvalid) {
			t.Errorf("with %q: %v", broken, err)
		}
	}
}

// Concurrent decisions use the same expressions.
func TestPermittedConcurrently(t *testing.T) {
	rules := newRules(t, rolePrefix)
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			for j := range 200 {
				expression := fmt.Sprintf(".*/reader-%d", (i+j)%20)
				role := fmt.Sprintf("reader-%d", j%20)
				_, err := rules.Grant(cart(map[policy.Key]string{policy.Role: role}), shop(map[policy.Key]string{policy.Permitted: expression}))
				if (err == nil) != ((i+j)%20 == j%20) {
					t.Errorf("permitted %q, role %q: %v", expression, role, err)
				}
			}
		})
	}
	wg.Wait()
}

// A user who may write the annotation may write a new expression every second. The cache of a namespace is bounded by its
// size, and the decisions stay correct.
func TestCachedExpressionsAreBounded(t *testing.T) {
	rules := newRules(t, rolePrefix)
	largest := 0
	for i := range 100 {
		expression := fmt.Sprintf(".*/reader-%d|%s", i, strings.Repeat("x", 3900))
		if !permits(t, rules, fmt.Sprintf("reader-%d", i), map[policy.Key]string{policy.Permitted: expression}) {
			t.Errorf("expression %d does not permit its role", i)
		}
		n, _, cost := rules.Cached("shop")
		if cost > policy.MaxCachedEach || rules.CachedCost() != cost {
			t.Fatalf("%d expressions take %d bytes of %d, the limit is %d", n, cost, rules.CachedCost(), policy.MaxCachedEach)
		}
		largest = max(largest, n)
	}
	if largest < 3 || largest == 100 {
		t.Errorf("at most %d of 100 large expressions were cached at a time", largest)
	}
}

// FuzzPermitted compares the decision with another way to find out whether the whole ARN matches, which adds no anchors to the
// expression.
func FuzzPermitted(f *testing.F) {
	for _, expression := range []string{
		".*", rolePrefix + "a)|(?:.*", "a|b", rolePrefix + "a|b", "(?i)ARN:.*", `\Q`, `.*\Q`, "", "(?m)^.*$", "(?U).*?", "(", ".*/a|.*/b",
	} {
		f.Add(expression, "reader")
	}
	rules := newRules(f, rolePrefix)
	f.Fuzz(func(t *testing.T, expression, name string) {
		role, err := credential.ParseRoleARN(rolePrefix + name)
		if err != nil {
			t.Skip("not a role name: ", err)
		}
		grant, err := rules.Grant(cart(map[policy.Key]string{policy.Role: name}), shop(map[policy.Key]string{policy.Permitted: expression}))
		if (err == nil) == grant.IsZero() {
			t.Fatalf("grant %s with error %v", grant, err)
		}
		for _, slow := range []string{"repeats too much", "marks of ASCII only"} {
			if err != nil && strings.Contains(err.Error(), slow) {
				t.Skip("the rules refuse it because it takes long to compile")
			}
		}
		alone, compileErr := regexp.Compile(expression)
		if compileErr != nil || len(expression) > 4096 {
			if err == nil {
				t.Errorf("%q is not an expression, and permits %s", expression, role)
			}
			return
		}
		alone.Longest()
		at := alone.FindStringIndex(role.String())
		whole := at != nil && at[0] == 0 && at[1] == len(role.String())
		// The naive form matches too much, but the rules must not permit a role that it does not match.
		if naive, naiveErr := regexp.Compile("^(?:" + expression + ")$"); err == nil && (naiveErr != nil || !naive.MatchString(role.String())) {
			t.Errorf("%q between anchors does not match %s, and permits it", expression, role)
		}
		// The rules refuse an expression that ends within \Q….
		if err == nil && !whole {
			t.Errorf("%q does not match the whole of %s, and permits it", expression, role)
		}
		if err != nil && whole && !errors.Is(err, credential.ErrInvalid) {
			t.Errorf("%q matches %s, and does not permit it: %v", expression, role, err)
		}
	})
}

// A refusal shows the namespace's annotations, shortened to a length that users read.
func TestRefusalShowsWhatIsPermitted(t *testing.T) {
	rules := newRules(t, rolePrefix)
	const begins, ends = `namespace "shop" does not permit role arn:aws:iam::123456789012:role/reader: its annotation `, `; change the namespace's annotation, or the pod's "iam.amazonaws.com/role"`
	for _, tt := range []struct {
		pairs map[policy.Key]string
		want  string
	}{
		{map[policy.Key]string{policy.Permitted: `role/\d+`}, "\"iam.amazonaws.com/permitted\" is `role/\\d+` and must match the whole ARN"},
		{map[policy.Key]string{policy.AllowedRoles: `["writer"]`}, "\"iam.amazonaws.com/allowed-roles\" is `[\"writer\"]` and none of its globs matches the whole ARN"},
		{map[policy.Key]string{policy.Permitted: "a`\nb", policy.AllowedRoles: `[]`},
			"\"iam.amazonaws.com/permitted\" is \"a`\\nb\" and must match the whole ARN, and its annotation \"iam.amazonaws.com/allowed-roles\" is `[]` and none of its globs matches the whole ARN"},
		{map[policy.Key]string{policy.Permitted: strings.Repeat("x", 201)}, "\"iam.amazonaws.com/permitted\" is `" + strings.Repeat("x", 200) + "`… and must match the whole ARN"},
		{map[policy.Key]string{policy.Permitted: strings.Repeat("x", 200)}, "\"iam.amazonaws.com/permitted\" is `" + strings.Repeat("x", 200) + "` and must match the whole ARN"},
		{map[policy.Key]string{policy.AllowedRoles: `["` + strings.Repeat("é", 200) + `"]`}, "\"iam.amazonaws.com/allowed-roles\" is \"[\\\"" + strings.Repeat("é", 99) + "\"… and none of its globs matches the whole ARN"},
		{map[policy.Key]string{policy.AllowedRoles: "[\"a\u202e\"]"}, "\"iam.amazonaws.com/allowed-roles\" is \"[\\\"a\\u202e\\\"]\" and none of its globs matches the whole ARN"},
		{map[policy.Key]string{policy.AllowedRoles: "[\"a\x7f\"]"}, "\"iam.amazonaws.com/allowed-roles\" is \"[\\\"a\\x7f\\\"]\" and none of its globs matches the whole ARN"},
	} {
		_, err := rules.Grant(cart(map[policy.Key]string{policy.Role: "reader"}), shop(tt.pairs))
		if want := begins + tt.want + ends; err == nil || err.Error() != want {
			t.Errorf("the refusal is\n%v, want\n%s", err, want)
		}
	}
}
