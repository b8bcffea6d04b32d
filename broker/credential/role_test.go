package credential_test

import (
	"encoding/json"
	"regexp"
	"strings"
	"testing"

	"github.com/credence-iam/credence/broker/credential"
)

const account = "123456789012"

// longName and longPath have the maximum lengths that IAM permits.
var (
	longName = strings.Repeat("n", 64)
	longPath = "/" + strings.Repeat("p", 510) + "/"
)

// partitions are the partitions that AWS has announced so far.
var partitions = []string{"aws", "aws-cn", "aws-us-gov", "aws-iso", "aws-iso-b", "aws-iso-e", "aws-iso-f", "aws-eusc"}

func TestParseRoleARN(t *testing.T) {
	for _, partition := range partitions {
		arn := "arn:" + partition + ":iam::" + account + ":role/reader"
		role, err := credential.ParseRoleARN(arn)
		if err != nil {
			t.Errorf("%s: %v", arn, err)
			continue
		}
		if role.String() != arn || role.Partition() != partition || role.Account() != account || role.Path() != "/" || role.Name() != "reader" || role.IsZero() {
			t.Errorf("%s parses as %q, %q, %q, %q, %q", arn, role, role.Partition(), role.Account(), role.Path(), role.Name())
		}
		// A broker that has its account from STS completes names in its own partition.
		base, err := credential.BaseOf(partition, account)
		if err != nil {
			t.Errorf("%s: %v", partition, err)
			continue
		}
		for name, path := range map[string]string{"reader": "/", "team/reader": "/team/", "/team/reader": "/team/"} {
			role, err := base.Resolve(name)
			if want := "arn:" + partition + ":iam::" + account + ":role" + path + "reader"; err != nil || role.String() != want || role.Path() != path {
				t.Errorf("%q in partition %s is %q (%v), want %q", name, partition, role, err, want)
			}
		}
	}
	for _, resource := range []string{
		"/a",
		"/team/reader",
		"/team/project-1/reader",
		"/aws-service-role/ecs.amazonaws.com/AWSServiceRoleForECS",
		"/aws-reserved/sso.amazonaws.com/eu-central-1/AWSReservedSSO_Admin_0123456789abcdef",
		"/All.of=these+are,legal@in-a_name",
		"/~!$%&'()*=@,.+_-/reader",
		"/" + longName,
		longPath + longName,
	} {
		arn := "arn:aws:iam::" + account + ":role" + resource
		role, err := credential.ParseRoleARN(arn)
		if err != nil {
			t.Errorf("%s: %v", arn, err)
			continue
		}
		if role.String() != arn {
			t.Errorf("%s parses as %s", arn, role)
		}
		if _, name, _ := strings.Cut(resource[strings.LastIndex(resource, "/"):], "/"); role.Name() != name {
			t.Errorf("the name of %s is %q", arn, role.Name())
		}
	}
}

func TestParseRoleARNRefuses(t *testing.T) {
	const prefix = "arn:aws:iam::" + account + ":role/"
	for _, tt := range []struct{ arn, want string }{
		{"", "not of the form"},
		{"reader", "not of the form"},
		{"/team/reader", "not of the form"},
		{"arn:aws:iam::" + account + ":role", "not of the form"},
		{"arn:aws:iam::" + account + ":user/reader", "not of the form"},
		{"arn:aws:iam::" + account + ":roles/reader", "not of the form"},
		{"arn:aws:iam::" + account + ":instance-profile/reader", "not of the form"},
		{"arn:aws:sts::" + account + ":assumed-role/reader/session", "not of the form"},
		{"arn:aws:s3:::bucket/role/reader", "not of the form"},
		{"arn:aws:iam:eu-west-1:" + account + ":role/reader", "not of the form"},
		{"ARN:aws:iam::" + account + ":role/reader", "not of the form"},
		{" " + prefix + "reader", "not of the form"},
		{"arn::iam::" + account + ":role/reader", `"" is not an AWS partition`},
		{"arn:AWS:iam::" + account + ":role/reader", "not an AWS partition"},
		{"arn:gcp:iam::" + account + ":role/reader", "not an AWS partition"},
		{"arn:aws-:iam::" + account + ":role/reader", "not an AWS partition"},
		{"arn:aws\n:iam::" + account + ":role/reader", "not an AWS partition"},
		{"arn:aws" + strings.Repeat("-x", 16) + ":iam::" + account + ":role/reader", "not an AWS partition"},
		{"arn:aws:iam::12345678901:role/reader", "account id of 12 digits"},
		{"arn:aws:iam::1234567890123:role/reader", "account id of 12 digits"},
		{"arn:aws:iam::aws:role/reader", "account id of 12 digits"},
		{"arn:aws:iam::１２３４５６７８９０１２:role/reader", "account id of 12 digits"},
		{prefix, "ends in a slash"},
		{prefix + "team/", "ends in a slash"},
		{prefix + longName + "n", "at most 64 characters, this one has 65"},
		{prefix + "read er", "letters, digits and any of"},
		{prefix + "reader\n", "letters, digits and any of"},
		{prefix + "reader*", "letters, digits and any of"},
		{prefix + "lecteur-é", "letters, digits and any of"},
		{prefix + "a:b", "letters, digits and any of"},
		{prefix + "/reader", "not a role path"},
		{prefix + "team//reader", "not a role path"},
		{prefix + "te am/reader", "not a role path"},
		{prefix + "te:am/reader", "not a role path"},
		{prefix + strings.TrimPrefix(longPath, "/") + "p/reader", "not a role path"},
		{prefix + strings.Repeat("p", 3000), "the limit is 2048"},
	} {
		role, err := credential.ParseRoleARN(tt.arn)
		switch {
		case err == nil:
			t.Errorf("%q parses as %s", tt.arn, role)
		case !strings.Contains(err.Error(), tt.want):
			t.Errorf("%q: error %q does not contain %q", tt.arn, err, tt.want)
		case !role.IsZero():
			t.Errorf("%q: an error comes with the role %q", tt.arn, role)
		case len(tt.arn) <= 2048 && tt.arn != "" && !strings.Contains(err.Error(), account[:11]) && strings.Contains(tt.arn, account):
			t.Errorf("the error for %q does not quote it: %v", tt.arn, err)
		case len(err.Error()) > 3*2048:
			t.Errorf("the error for an input of %d bytes has %d", len(tt.arn), len(err.Error()))
		}
	}
}

func TestZeroRoleARN(t *testing.T) {
	var zero credential.RoleARN
	if zero.String() != "" || !zero.IsZero() || zero.Name() != "" {
		t.Errorf("the zero RoleARN is %q", zero)
	}
	role, err := credential.ParseRoleARN("arn:aws:iam::" + account + ":role/team/reader")
	if err != nil {
		t.Fatal(err)
	}
	encoded, err := json.Marshal(map[string]credential.RoleARN{"none": zero, "some": role})
	if err != nil {
		t.Fatal(err)
	}
	if want := `{"none":"","some":"arn:aws:iam::123456789012:role/team/reader"}`; string(encoded) != want {
		t.Errorf("JSON is %s, want %s", encoded, want)
	}
}

// The base ARNs have the forms that kiam accepts in --role-base-arn and kube2iam in --base-role-arn. The names have the
// forms that users write in annotations.
func TestResolve(t *testing.T) {
	for _, tt := range []struct{ base, name, want string }{
		{"/", "reader", "/reader"},
		{"/", "team/reader", "/team/reader"},
		{"/", "/reader", "/reader"},
		{"/", "/team/reader", "/team/reader"},
		{"/team/", "reader", "/team/reader"},
		{"/team/", "project/reader", "/team/project/reader"},
		{"/team/", "/reader", "/reader"},
		{"/team/", "/other/reader", "/other/reader"},
		{"/a/b/", "c/reader", "/a/b/c/reader"},
		{longPath, longName, longPath + longName},
	} {
		base, err := credential.ParseRoleBase("arn:aws-cn:iam::" + account + ":role" + tt.base)
		if err != nil {
			t.Errorf("base %s: %v", tt.base, err)
			continue
		}
		role, err := base.Resolve(tt.name)
		if want := "arn:aws-cn:iam::" + account + ":role" + tt.want; err != nil || role.String() != want {
			t.Errorf("%q under %s is %q (%v), want %q", tt.name, base, role, err, want)
		}
		// The base does not change a full ARN, even of another account and partition.
		full := "arn:aws:iam::999999999999:role/x/y"
		if role, err := base.Resolve(full); err != nil || role.String() != full {
			t.Errorf("%q under %s is %q (%v)", full, base, role, err)
		}
	}
}

func TestResolveRefuses(t *testing.T) {
	base, err := credential.BaseOf("aws", account)
	if err != nil {
		t.Fatal(err)
	}
	long, err := credential.ParseRoleBase("arn:aws:iam::" + account + ":role" + longPath)
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		base       credential.RoleBase
		name, want string
	}{
		{base, "", "ends in a slash"},
		{base, "/", "ends in a slash"},
		{base, "team/", "ends in a slash"},
		{base, "//reader", "not a role path"},
		{base, "team//reader", "not a role path"},
		{base, "reader ", "letters, digits"},
		{base, longName + "n", "at most 64"},
		{base, "arn:aws:iam::1:role/reader", "12 digits"},
		{base, "Arn:aws:iam::" + account + ":role/reader", "not a role path"},
		{base, strings.Repeat("team/", 10_000) + "reader", "the limit is 2048"},
		{long, "team/reader", "not a role path"},
		{credential.RoleBase{}, "reader", "no base ARN is known"},
		{credential.RoleBase{}, "/team/reader", "no base ARN is known"},
		{credential.RoleBase{}, "", "no base ARN is known"},
		{credential.RoleBase{}, strings.Repeat("r", 10_000), "the limit is 2048"},
	} {
		role, err := tt.base.Resolve(tt.name)
		switch {
		case err == nil:
			t.Errorf("%.80q under %s is %s", tt.name, tt.base, role)
		case !strings.Contains(err.Error(), tt.want):
			t.Errorf("%.80q: error %q does not contain %q", tt.name, err, tt.want)
		case !role.IsZero():
			t.Errorf("%.80q: an error comes with the role %s", tt.name, role)
		case len(tt.name) > 2048 && len(err.Error()) > 200:
			t.Errorf("the error for an input of %d bytes has %d bytes", len(tt.name), len(err.Error()))
		}
	}
	if role, err := (credential.RoleBase{}).Resolve("arn:aws:iam::" + account + ":role/reader"); err != nil || role.Name() != "reader" {
		t.Errorf("a full ARN needs no base, but gives %q, %v", role, err)
	}
}

func TestParseRoleBase(t *testing.T) {
	for _, good := range []string{"arn:aws:iam::" + account + ":role/", "arn:aws-us-gov:iam::" + account + ":role/team/"} {
		base, err := credential.ParseRoleBase(good)
		if err != nil || base.String() != good || base.IsZero() {
			t.Errorf("%s parses as %q, %v", good, base, err)
		}
	}
	for _, bad := range []string{
		"", account, "arn:aws:iam::" + account + ":role", "arn:aws:iam::" + account + ":role/reader",
		"arn:aws:iam::" + account + ":role//", "arn:aws:iam::" + account + ":role/a//", "arn:aws:iam::" + account + ":user/",
		"arn:aws:iam::" + account + ":role" + longPath + "p/", "arn:aws:iam::1:role/",
		"arn:aws:iam::" + account + ":role/" + strings.Repeat("a/", 2000),
	} {
		base, err := credential.ParseRoleBase(bad)
		if err == nil || !base.IsZero() || base.String() != "" {
			t.Errorf("%.80q parses as %q, %v", bad, base, err)
		} else if !strings.Contains(err.Error(), "base") {
			t.Errorf("the error for %.80q does not mention a base: %v", bad, err)
		}
	}
	if base, err := credential.BaseOf("aws", "12"); err == nil {
		t.Errorf("BaseOf accepts an account of 2 digits: %s", base)
	}
}

// checkRole checks what is true for every result of every function.
func checkRole(t *testing.T, role credential.RoleARN, err error) {
	t.Helper()
	if err != nil {
		if !role.IsZero() || role.String() != "" {
			t.Errorf("an error (%v) comes with the role %q", err, role)
		}
		return
	}
	if role.IsZero() {
		t.Fatal("neither a role nor an error")
	}
	text := role.String()
	if len(text) < 20 || len(text) > 2048 {
		t.Errorf("%q has %d characters, AssumeRole takes 20 to 2048", text, len(text))
	}
	again, err := credential.ParseRoleARN(text)
	if err != nil || again != role {
		t.Errorf("%q parses again as %q, %v", text, again, err)
	}
	if role.Name() == "" || len(role.Name()) > 64 || strings.Contains(role.Name(), "/") || !strings.HasSuffix(text, "/"+role.Name()) {
		t.Errorf("the name of %q is %q", text, role.Name())
	}
}

// roleForm is the form that ParseRoleARN accepts, as a regular expression. The fuzz test checks lengths separately.
var roleForm = regexp.MustCompile(`^arn:(aws(?:-[a-z]+)*):iam::[0-9]{12}:role(/(?:[A-Za-z0-9_+=,.@!$%&'()*~-]+/)*)([A-Za-z0-9_+=,.@-]+)$`)

func FuzzParseRoleARN(f *testing.F) {
	for _, partition := range partitions {
		f.Add("arn:" + partition + ":iam::" + account + ":role/team/reader")
	}
	f.Add("arn:aws-:iam::" + account + ":role/a")
	f.Add("arn:aws--b:iam::" + account + ":role/a")
	f.Add("arn:aws:iam::" + account + ":role/reader")
	f.Add("arn:aws-us-gov:iam::" + account + ":role/team/project/reader")
	f.Add("arn:aws:iam::" + account + ":role//")
	f.Add("arn:aws:iam::" + account + ":role/a:b")
	f.Add("reader")
	f.Fuzz(func(t *testing.T, s string) {
		role, err := credential.ParseRoleARN(s)
		checkRole(t, role, err)
		if err == nil && role.String() != s {
			t.Errorf("%q parses as %q", s, role)
		}
		parts := roleForm.FindStringSubmatch(s)
		valid := parts != nil && len(s) <= 2048 && len(parts[1]) <= 32 && len(parts[2]) <= 512 && len(parts[3]) <= 64
		if valid != (err == nil) {
			t.Errorf("%q parses with error %v, but matches the form of a role: %v", s, err, valid)
		}
		if err == nil && (role.Partition() != parts[1] || role.Path() != parts[2] || role.Name() != parts[3]) {
			t.Errorf("%q parses as %q, %q, %q", s, role.Partition(), role.Path(), role.Name())
		}
	})
}

func FuzzResolve(f *testing.F) {
	f.Add("arn:aws:iam::"+account+":role/", "reader")
	f.Add("arn:aws:iam::"+account+":role/team/", "/other/reader")
	f.Add("arn:aws"+strings.Repeat("-x", 990)+":iam::"+account+":role/", longName)
	f.Add("", "arn:aws:iam::"+account+":role/reader")
	f.Fuzz(func(t *testing.T, baseText, name string) {
		base, err := credential.ParseRoleBase(baseText)
		if err != nil && !base.IsZero() {
			t.Errorf("an error (%v) comes with the base %q", err, base)
		}
		if err == nil && base.String() != baseText {
			t.Errorf("base %q parses as %q", baseText, base)
		}
		role, err := base.Resolve(name)
		checkRole(t, role, err)
		if err == nil && base.IsZero() && role.String() != name {
			t.Errorf("without a base, %q resolves to %q", name, role)
		}
	})
}
