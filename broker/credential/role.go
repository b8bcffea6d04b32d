package credential

import (
	"fmt"
	"strings"
)

// Limits of a role's ARN, from IAM and STS. AssumeRole accepts 20 to 2048 characters. A role's name has at most 64
// characters of [\w+=,.@-]. Its path has at most 512 printable ASCII characters and begins and ends with a slash. The
// longest known partition, aws-us-gov, has 10 characters; maxPartition keeps every role that a base completes within
// maxARN.
const (
	maxARN       = 2048
	maxPartition = 32
	accountLen   = 12
	maxRoleName  = 64
	maxRolePath  = 512
)

// The checks are loops instead of regular expressions. Each request of a sidecar resolves a role, and regular
// expressions took a third of the time of its decision.

// isPartition reports whether s is "aws", followed by any number of "-" and lower-case letters. It has no list of
// partitions: AWS has opened eight so far and adds more.
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

// IsAccount reports whether s has the form of an AWS account ID, 12 digits.
func IsAccount(s string) bool {
	for i := range len(s) {
		if s[i] < '0' || s[i] > '9' {
			return false
		}
	}
	return len(s) == accountLen
}

// inName reports whether a role's name may contain c: [A-Za-z0-9_+=,.@-].
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

// isRolePath reports whether s is "/", or names with a "/" before, between and after them. It accepts fewer characters
// than IAM's "printable ASCII": IAM also permits quotes, colons and spaces, but no role that needs them is known.
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

// RoleARN is the Amazon Resource Name of an IAM role. The zero value is empty. All others are valid, because only
// [ParseRoleARN] and [RoleBase.Resolve] make them. Values can be compared with ==.
type RoleARN struct {
	partition string // aws, aws-cn, aws-us-gov, aws-iso, …
	account   string // 12 digits
	path      string // "/" or "/team/"
	name      string // role name without its path
}

// ParseRoleARN parses "arn:PARTITION:iam::ACCOUNT:role/[PATH/]NAME". Its errors quote s and name the invalid part.
func ParseRoleARN(s string) (RoleARN, error) {
	base, rest, err := cutRolePrefix(s)
	if err != nil {
		return RoleARN{}, err
	}
	return base.join(s, "/"+rest)
}

// cutRolePrefix splits s after "arn:PARTITION:iam::ACCOUNT:role/".
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

// Path returns the role's path, such as "/" or "/team/".
func (r RoleARN) Path() string { return r.path }

// Name returns the role's name without its path, as STS shows it in assumed-role ARNs.
func (r RoleARN) Name() string { return r.name }

// MarshalText implements [encoding.TextMarshaler].
func (r RoleARN) MarshalText() ([]byte, error) { return []byte(r.String()), nil }

// RoleBase completes role names that are not full ARNs. It is the partition, account and path of most roles in a cluster.
// The zero RoleBase completes nothing.
type RoleBase struct {
	partition string
	account   string
	path      string
}

// ParseRoleBase parses "arn:PARTITION:iam::ACCOUNT:role/[PATH/]", the form that kiam accepts in --role-base-arn and
// kube2iam in --base-role-arn.
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

// BaseOf returns the base that completes names to roles of that partition and account, without a path.
func BaseOf(partition, account string) (RoleBase, error) {
	return ParseRoleBase("arn:" + partition + ":iam::" + account + ":role/")
}

// IsZero reports whether b is the zero RoleBase.
func (b RoleBase) IsZero() bool { return b == RoleBase{} }

// String returns the base's ARN, or "" for the zero value.
func (b RoleBase) String() string {
	if b.IsZero() {
		return ""
	}
	return "arn:" + b.partition + ":iam::" + b.account + ":role" + b.path
}

// Resolve returns the role that s names. A full ARN stays as it is. NAME and PATH/NAME are below the base's path.
// /PATH/NAME is in the base's account, without the base's path.
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

// join returns the role with the path and name in full, which begins with a slash. Errors quote name, the user's text.
func (b RoleBase) join(name, full string) (RoleARN, error) {
	cut := strings.LastIndexByte(full, '/') + 1
	path, last := full[:cut], full[cut:]
	switch {
	case last == "":
		return RoleARN{}, fmt.Errorf("%q names no role: it ends in a slash", name)
	case len(last) > maxRoleName:
		return RoleARN{}, fmt.Errorf("%q: a role's name has at most %d characters, this one has %d", name, maxRoleName, len(last))
	case !isRoleName(last):
		return RoleARN{}, fmt.Errorf("%q: a role's name has letters, digits and any of _+=,.@- only", name)
	case len(path) > maxRolePath || !isRolePath(path):
		return RoleARN{}, fmt.Errorf("%q: %q is not a role path such as /team/", name, path)
	}
	return RoleARN{partition: b.partition, account: b.account, path: path, name: last}, nil
}
