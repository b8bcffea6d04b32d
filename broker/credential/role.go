package credential

import (
	"fmt"
	"strings"
)

// Bounds of a role's ARN, from IAM and STS: AssumeRole takes 20 to 2048 characters; a role's name
// is at most 64 characters of [\w+=,.@-], its path at most 512 printable ASCII characters, beginning
// and ending with a slash. The longest partition so far, aws-us-gov, has 10 characters; the bound
// on it keeps every role that a base completes within maxARN.
const (
	maxARN       = 2048
	maxPartition = 32
	accountLen   = 12
	maxRoleName  = 64
	maxRolePath  = 512
)

// The forms are written out, and not as regular expressions: each call of a sidecar resolves a role,
// and took a third of its decision for that.

// isPartition reports whether s is "aws", followed by any number of "-" and lower-case letters. Which
// partitions there are is not for us to know: AWS has opened eight so far, and goes on.
func isPartition(s string) bool {
	rest, ok := strings.CutPrefix(s, "aws")
	if !ok || len(s) > maxPartition {
		return false
	}
	for rest != "" {
		word, ok := strings.CutPrefix(rest, "-")
		if !ok {
			return false
		}
		rest = strings.TrimLeft(word, "abcdefghijklmnopqrstuvwxyz")
		if rest == word {
			return false
		}
	}
	return true
}

// IsAccount reports whether s has the form of an AWS account's id: 12 digits.
func IsAccount(s string) bool {
	for i := range len(s) {
		if s[i] < '0' || s[i] > '9' {
			return false
		}
	}
	return len(s) == accountLen
}

// inName reports whether c may stand in a role's name: [A-Za-z0-9_+=,.@-].
func inName(c byte) bool {
	switch {
	case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9':
		return true
	case c == '_', c == '+', c == '=', c == ',', c == '.', c == '@', c == '-':
		return true
	}
	return false
}

func isRoleName(s string) bool {
	for i := range len(s) {
		if !inName(s[i]) {
			return false
		}
	}
	return s != ""
}

// isRolePath reports whether s is "/", or more of them with names between. Its characters are narrower
// than IAM's "printable ASCII": quotes, colons and spaces would be legal there, and no role that needs
// them has been seen.
func isRolePath(s string) bool {
	if s == "" || s[0] != '/' || s[len(s)-1] != '/' {
		return false
	}
	for i := 1; i < len(s); i++ {
		if s[i] == '/' && s[i-1] == '/' {
			return false
		}
		if s[i] != '/' && !inName(s[i]) && strings.IndexByte("!$%&'()*~", s[i]) < 0 {
			return false
		}
	}
	return true
}

// RoleARN is the Amazon Resource Name of an IAM role. A RoleARN that is not the zero value is
// valid: only [ParseRoleARN] and [RoleBase.Resolve] make one. Values compare with ==.
type RoleARN struct {
	partition string // aws, aws-cn, aws-us-gov, aws-iso, …
	account   string // 12 digits
	path      string // "/" or "/team/"
	name      string // role name without its path
}

// ParseRoleARN parses "arn:PARTITION:iam::ACCOUNT:role/[PATH/]NAME". Its errors quote the input
// and say what is wrong with it.
func ParseRoleARN(s string) (RoleARN, error) {
	base, rest, err := cutRolePrefix(s)
	if err != nil {
		return RoleARN{}, err
	}
	return base.join(s, "/"+rest)
}

// cutRolePrefix splits s behind "arn:PARTITION:iam::ACCOUNT:role/".
func cutRolePrefix(s string) (base RoleBase, rest string, err error) {
	if len(s) > maxARN {
		return RoleBase{}, "", fmt.Errorf("role ARN is %d characters long, the limit is %d", len(s), maxARN)
	}
	parts := strings.SplitN(s, ":", 6)
	if len(parts) != 6 || parts[0] != "arn" || parts[2] != "iam" || parts[3] != "" || !strings.HasPrefix(parts[5], "role/") {
		return RoleBase{}, "", fmt.Errorf("%q is not of the form arn:aws:iam::123456789012:role/NAME", s)
	}
	if !isPartition(parts[1]) {
		return RoleBase{}, "", fmt.Errorf("%q: %q is not an AWS partition", s, parts[1])
	}
	if !IsAccount(parts[4]) {
		return RoleBase{}, "", fmt.Errorf("%q: %q is not an AWS account id of 12 digits", s, parts[4])
	}
	return RoleBase{partition: parts[1], account: parts[4], path: "/"}, strings.TrimPrefix(parts[5], "role/"), nil
}

// String returns the ARN, or "" for the zero value.
func (r RoleARN) String() string {
	if r.name == "" {
		return ""
	}
	return "arn:" + r.partition + ":iam::" + r.account + ":role" + r.path + r.name
}

// IsZero reports whether r names no role.
func (r RoleARN) IsZero() bool { return r == RoleARN{} }

// Partition returns aws, aws-cn, aws-us-gov or another partition.
func (r RoleARN) Partition() string { return r.partition }

// Account returns the 12 digits of the role's account.
func (r RoleARN) Account() string { return r.account }

// Path returns the role's path: "/", or one such as "/team/".
func (r RoleARN) Path() string { return r.path }

// Name returns the role's name without its path, as STS shows it in assumed-role ARNs.
func (r RoleARN) Name() string { return r.name }

// MarshalText implements [encoding.TextMarshaler].
func (r RoleARN) MarshalText() ([]byte, error) { return []byte(r.String()), nil }

// RoleBase completes role names that are not full ARNs: the account that most roles of a cluster
// live in. The zero RoleBase completes nothing.
type RoleBase struct {
	partition string
	account   string
	path      string
}

// ParseRoleBase parses "arn:PARTITION:iam::ACCOUNT:role/[PATH/]", as kiam and kube2iam take it in
// --role-base-arn and --base-role-arn.
func ParseRoleBase(s string) (RoleBase, error) {
	base, rest, err := cutRolePrefix(s)
	if err != nil {
		return RoleBase{}, fmt.Errorf("parsing base ARN: %w (a base ends in role/, as in arn:aws:iam::123456789012:role/)", err)
	}
	base.path = "/" + rest
	if !strings.HasSuffix(base.path, "/") || !isRolePath(base.path) || len(base.path) > maxRolePath {
		return RoleBase{}, fmt.Errorf("parsing base ARN: %q must end in role/ or in a path and a slash, as in arn:aws:iam::123456789012:role/team/", s)
	}
	return base, nil
}

// BaseOf returns the base that completes names to roles of the given partition and account, with no
// path.
func BaseOf(partition, account string) (RoleBase, error) {
	return ParseRoleBase("arn:" + partition + ":iam::" + account + ":role/")
}

// IsZero reports whether b completes nothing.
func (b RoleBase) IsZero() bool { return b == RoleBase{} }

// String returns the base's text, or "" for the zero value.
func (b RoleBase) String() string {
	if b.IsZero() {
		return ""
	}
	return "arn:" + b.partition + ":iam::" + b.account + ":role" + b.path
}

// Resolve returns the role that s names: a full ARN as it is; a NAME or PATH/NAME below the base's
// own path; a /PATH/NAME in the base's account, without the base's path.
func (b RoleBase) Resolve(s string) (RoleARN, error) {
	if strings.HasPrefix(s, "arn:") {
		return ParseRoleARN(s)
	}
	if len(s) > maxARN {
		return RoleARN{}, fmt.Errorf("role is %d characters long, the limit is %d", len(s), maxARN)
	}
	if b.IsZero() {
		return RoleARN{}, fmt.Errorf("%q is not a full ARN, and no base ARN is known to complete it", s)
	}
	if strings.HasPrefix(s, "/") {
		return b.join(s, s)
	}
	return b.join(s, b.path+s)
}

// join makes the role whose path and name are in full, which begins with a slash. said is what the
// user wrote, for errors.
func (b RoleBase) join(said, full string) (RoleARN, error) {
	cut := strings.LastIndexByte(full, '/') + 1
	path, name := full[:cut], full[cut:]
	switch {
	case name == "":
		return RoleARN{}, fmt.Errorf("%q names no role: it ends in a slash", said)
	case len(name) > maxRoleName:
		return RoleARN{}, fmt.Errorf("%q: a role's name has at most %d characters, this one has %d", said, maxRoleName, len(name))
	case !isRoleName(name):
		return RoleARN{}, fmt.Errorf("%q: a role's name has letters, digits and any of _+=,.@- only", said)
	case len(path) > maxRolePath || !isRolePath(path):
		return RoleARN{}, fmt.Errorf("%q: %q is not a role path such as /team/", said, path)
	}
	return RoleARN{partition: b.partition, account: b.account, path: path, name: name}, nil
}
