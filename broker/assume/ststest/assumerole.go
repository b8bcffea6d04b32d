package ststest

import (
	"cmp"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base32"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"regexp"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"
)

// The limits of AssumeRole, from the STS API reference. Lengths are in
// characters.
const (
	minDuration     = 15 * time.Minute
	maxDuration     = 12 * time.Hour
	defaultDuration = time.Hour
	maxChained      = time.Hour // for a caller that is an assumed role

	maxTags       = 50
	maxPolicyARNs = 10
	maxPolicy     = 2048 // the session policies together, as plain text
)

var (
	roleARNPattern    = regexp.MustCompile(`^arn:(aws(?:-[a-z]+)*):iam::([0-9]{12}):role/(?:[!-~]*/)?([\w+=,.@-]{1,64})$`)
	namePattern       = regexp.MustCompile(`^[\w+=,.@-]*$`)
	externalIDPattern = regexp.MustCompile(`^[\w+=,.@:/-]*$`)
	tagPattern        = regexp.MustCompile(`^[\p{L}\p{Z}\p{N}_.:/=+\-@]*$`)
)

// roleARN has the parts of a role's ARN that a session's identity consists of.
type roleARN struct{ partition, account, name string }

func parseRoleARN(arn string) (roleARN, error) {
	m := roleARNPattern.FindStringSubmatch(arn)
	if m == nil {
		return roleARN{}, fmt.Errorf("%q is not a role ARN; want arn:aws:iam::ACCOUNT:role/NAME", arn)
	}
	return roleARN{partition: m[1], account: m[2], name: m[3]}, nil
}

// assumeRole handles a call of an authenticated caller: it checks the parameters and the role's trust, and makes a session.
func (s *Server) assumeRole(form url.Values, caller principal, b Behavior) (*assumeRoleResult, error) {
	q, err := parseAssumeRole(form)
	if err != nil {
		return nil, err
	}
	switch {
	case caller.chains && q.duration > maxChained:
		return nil, validation("The requested DurationSeconds exceeds the 1 hour session limit for roles assumed by role chaining")
	case q.duration > cmp.Or(b.MaxDuration, maxDuration):
		return nil, validation("The requested DurationSeconds exceeds the MaxSessionDuration set for this role.")
	case b.Deny, b.ExternalID != "" && b.ExternalID != form.Get("ExternalId"):
		return nil, notAuthorized(caller, "sts:AssumeRole", q.arn)
	}
	if err := q.inherit(caller); err != nil {
		return nil, err
	}
	switch {
	case b.NoTagSession && (q.tagged || len(q.transitive) > 0):
		return nil, notAuthorized(caller, "sts:TagSession", q.arn)
	case b.NoSourceIdentity && q.sourceIdentity != "":
		return nil, notAuthorized(caller, "sts:SetSourceIdentity", q.arn)
	}
	return s.mint(q), nil
}

func notAuthorized(caller principal, action, resource string) error {
	return fail(http.StatusForbidden, "AccessDenied", "User: %s is not authorized to perform: %s on resource: %s", caller.arn, action, resource)
}

// inherit applies role chaining: the new session gets the transitive tags and the source identity of the caller. It must not
// set these tags itself or change the source identity.
func (q *assumeRoleInput) inherit(caller principal) error {
	for key := range caller.transitive {
		if q.keys[key] {
			return fail(http.StatusBadRequest, "InvalidParameterValue", "One of the specified transitive tag keys can't be set because it conflicts with a transitive tag key from the calling session.")
		}
		q.transitive[key] = true
	}
	switch {
	case caller.sourceIdentity == "":
	case q.sourceIdentity != "" && q.sourceIdentity != caller.sourceIdentity:
		return notAuthorized(caller, "sts:SetSourceIdentity", q.arn)
	default:
		q.sourceIdentity = caller.sourceIdentity
	}
	return nil
}

// mint makes a session and registers its keys.
func (s *Server) mint(q assumeRoleInput) *assumeRoleResult {
	session := principal{
		secret:         newSecret(),
		token:          newToken(),
		arn:            "arn:" + q.role.partition + ":sts::" + q.role.account + ":assumed-role/" + q.role.name + "/" + q.sessionName,
		userID:         stableID("AROA", q.arn) + ":" + q.sessionName,
		account:        q.role.account,
		chains:         true,
		transitive:     q.transitive,
		sourceIdentity: q.sourceIdentity,
	}
	life := q.duration
	if s.sessionLife != nil {
		life = s.sessionLife(q.duration)
	}
	session.expires = s.now().Add(life).UTC().Truncate(time.Second)
	id := "ASIA" + rand.Text()[:16]
	s.remember(id, session)
	return &assumeRoleResult{
		AssumedRoleUser: assumedRoleUser{AssumedRoleID: session.userID, Arn: session.arn},
		Credentials: credentialsXML{
			AccessKeyID: id, SecretAccessKey: session.secret.Reveal(), SessionToken: session.token.Reveal(),
			Expiration: session.expires.Format("2006-01-02T15:04:05Z"),
		},
		PackedPolicySize: q.packed,
		SourceIdentity:   q.sourceIdentity,
	}
}

// assumeRoleWithWebIdentity handles a call with an issuer's token. It compares the token and does not verify it.
func (s *Server) assumeRoleWithWebIdentity(form url.Values, b Behavior) (*assumeRoleResult, error) {
	q, err := parseAssumeRole(form)
	if err != nil {
		return nil, err
	}
	token := form.Get("WebIdentityToken")
	switch n := len(token); {
	case n < 4 || n > 20000:
		return nil, validation("1 validation error detected: Value at 'webIdentityToken' failed to satisfy constraint: Member must have length between 4 and 20000")
	case b.WebIdentityToken != "" && token != b.WebIdentityToken:
		return nil, fail(http.StatusBadRequest, "InvalidIdentityToken", "The ID Token provided is not a valid JWT. (You may see this error if you sent an Access Token)")
	case q.duration > cmp.Or(b.MaxDuration, maxDuration):
		return nil, validation("The requested DurationSeconds exceeds the MaxSessionDuration set for this role.")
	case b.Deny:
		return nil, fail(http.StatusForbidden, "AccessDenied", "Not authorized to perform sts:AssumeRoleWithWebIdentity")
	}
	result := s.mint(q)
	result.Provider, result.Audience, result.Subject = "oidc.example.com", "sts.amazonaws.com", "system:serviceaccount:credence:broker"
	return result, nil
}

// assumeRoleInput has the parts of a checked request that determine the session.
type assumeRoleInput struct {
	arn         string
	role        roleARN
	sessionName string
	duration    time.Duration
	policy      string
	packed      int // percent

	tagged         bool
	keys           map[string]bool // of tags, in lower case, because AWS ignores case
	transitive     map[string]bool // the transitive ones of them, and the caller's
	sourceIdentity string
}

// parseAssumeRole checks the parameters. Like STS, it names all broken constraints at once.
func parseAssumeRole(form url.Values) (assumeRoleInput, error) {
	q := assumeRoleInput{
		arn: form.Get("RoleArn"), sessionName: form.Get("RoleSessionName"),
		duration: defaultDuration, policy: form.Get("Policy"), sourceIdentity: form.Get("SourceIdentity"),
		keys: make(map[string]bool), transitive: make(map[string]bool),
	}
	var c constraints
	c.required(form, "RoleArn", "roleArn")
	c.required(form, "RoleSessionName", "roleSessionName")
	c.text(form, "RoleArn", "roleArn", 20, 2048, nil)
	c.text(form, "RoleSessionName", "roleSessionName", 2, 64, namePattern)
	c.text(form, "ExternalId", "externalId", 2, 1224, externalIDPattern)
	c.text(form, "SourceIdentity", "sourceIdentity", 2, 64, namePattern)
	if form.Has("DurationSeconds") {
		// A number above 32 bits exceeds the maximum, too.
		seconds, err := strconv.ParseInt(form.Get("DurationSeconds"), 10, 32)
		q.duration = time.Duration(seconds) * time.Second
		switch {
		case err != nil:
			return q, fail(http.StatusBadRequest, "MalformedInput", "DurationSeconds is not an integer")
		case q.duration < minDuration:
			c.add(form.Get("DurationSeconds"), "durationSeconds", "Member must have value greater than or equal to 900")
		case q.duration > maxDuration:
			c.add(form.Get("DurationSeconds"), "durationSeconds", "Member must have value less than or equal to 43200")
		}
	}

	keys := members(form, "Tags", ".Key")
	c.atMost(len(keys), maxTags, "tags")
	transitive := members(form, "TransitiveTagKeys", "")
	c.atMost(len(transitive), maxTags, "transitiveTagKeys")
	for i, key := range transitive {
		c.value(key, fmt.Sprintf("transitiveTagKeys.%d.member", i+1), 1, 128, tagPattern)
		q.transitive[strings.ToLower(key)] = true
	}
	policyARNs := members(form, "PolicyArns", ".arn")
	c.atMost(len(policyARNs), maxPolicyARNs, "policyArns")
	for i, arn := range policyARNs {
		c.value(arn, fmt.Sprintf("policyArns.%d.member.arn", i+1), 20, 2048, nil)
	}
	size := utf8.RuneCountInString(q.policy + strings.Join(policyARNs, ""))
	if size > maxPolicy {
		c.add("", "policy", "Member must have length less than or equal to 2048")
	}
	for i, key := range keys {
		value := form.Get(fmt.Sprintf("Tags.member.%d.Value", i+1))
		c.value(key, fmt.Sprintf("tags.%d.member.key", i+1), 1, 128, tagPattern)
		c.value(value, fmt.Sprintf("tags.%d.member.value", i+1), 0, 256, tagPattern)
		folded := strings.ToLower(key)
		if strings.HasPrefix(folded, "aws:") {
			return q, validation("Tag keys that begin with aws: are reserved for system use")
		}
		if q.keys[folded] {
			return q, validation("Duplicate tag keys found. Please note that Tag keys are case insensitive.")
		}
		q.keys[folded] = true
		size += utf8.RuneCountInString(key + value)
	}
	q.tagged = len(keys) > 0
	if err := c.err(); err != nil {
		return q, err
	}

	var err error
	if q.role, err = parseRoleARN(q.arn); err != nil {
		return q, validation("%s is invalid", q.arn)
	}
	if strings.HasPrefix(form.Get("SourceIdentity"), "aws:") {
		return q, validation("SourceIdentity must not begin with aws:")
	}
	if q.policy != "" && json.Unmarshal([]byte(q.policy), &map[string]any{}) != nil {
		return q, fail(http.StatusBadRequest, "MalformedPolicyDocument", "This policy contains invalid Json")
	}
	// AWS's packed form is not public. This double counts one byte of the limit for each character of policies and tags. AWS
	// reaches its limit earlier.
	q.packed = (100*size + maxPolicy - 1) / maxPolicy
	if q.packed > 100 {
		return q, fail(http.StatusBadRequest, "PackedPolicyTooLarge", "Packed policy consumes %d%% of allotted space, please use smaller policy.", q.packed)
	}
	return q, nil
}

// members returns a list of the Query protocol: name.member.1, name.member.2 and
// so on, up to the first gap. It stops one beyond the longest list that is
// allowed, which is enough to refuse a longer one.
func members(form url.Values, name, suffix string) []string {
	var list []string
	for i := range maxTags + 1 {
		key := name + ".member." + strconv.Itoa(i+1) + suffix
		if !form.Has(key) {
			break
		}
		list = append(list, form.Get(key))
	}
	return list
}

func validation(format string, args ...any) error {
	return fail(http.StatusBadRequest, "ValidationError", format, args...)
}

// constraints collects the faults of a request in AWS's words, so that tests can check how a caller uses the text.
type constraints []string

func (c *constraints) add(value, name, rule string) {
	*c = append(*c, fmt.Sprintf("Value '%s' at '%s' failed to satisfy constraint: %s", value, name, rule))
}

func (c *constraints) required(form url.Values, param, name string) {
	if form.Get(param) == "" {
		*c = append(*c, fmt.Sprintf("Value null at '%s' failed to satisfy constraint: Member must not be null", name))
	}
}

// text checks a parameter if it is not empty. required reports empty ones.
func (c *constraints) text(form url.Values, param, name string, minimum, maximum int, pattern *regexp.Regexp) {
	if v := form.Get(param); v != "" {
		c.value(v, name, minimum, maximum, pattern)
	}
}

func (c *constraints) value(v, name string, minimum, maximum int, pattern *regexp.Regexp) {
	n := utf8.RuneCountInString(v)
	if n < minimum {
		c.add(v, name, fmt.Sprintf("Member must have length greater than or equal to %d", minimum))
	}
	if n > maximum {
		c.add(v, name, fmt.Sprintf("Member must have length less than or equal to %d", maximum))
	}
	if pattern != nil && !pattern.MatchString(v) {
		c.add(v, name, "Member must satisfy regular expression pattern: "+strings.Trim(pattern.String(), "^$"))
	}
}

func (c *constraints) atMost(n, maximum int, name string) {
	if n > maximum {
		c.add("["+strconv.Itoa(n)+" members]", name, fmt.Sprintf("Member must have length less than or equal to %d", maximum))
	}
}

func (c constraints) err() error {
	switch len(c) {
	case 0:
		return nil
	case 1:
		return validation("1 validation error detected: %s", c[0])
	}
	return validation("%d validation errors detected: %s", len(c), strings.Join(c, "; "))
}

// stableID returns a unique ID in IAM's form: a prefix for the kind, then 17 characters. It is a function of the name, so a role
// has the same ID in each server and run.
func stableID(prefix, name string) string {
	sum := sha256.Sum256([]byte(name))
	return prefix + base32.StdEncoding.EncodeToString(sum[:])[:17]
}
