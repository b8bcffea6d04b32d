package policy

import (
	"bytes"
	"encoding/json"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/credence-iam/credence/broker/credential"
)

// Scope determines which pods share one AWS session.
type Scope string

// The scopes.
const (
	// ScopeRole: all pods whose grants are otherwise equal. The default, with the fewest STS calls.
	ScopeRole Scope = "role"
	// ScopeServiceAccount: the pods of one service account.
	ScopeServiceAccount Scope = "service-account"
	// ScopePod: one pod alone.
	ScopePod Scope = "pod"
)

// Metadata is how the sidecar emulates the EC2 instance metadata service.
type Metadata string

// The forms of metadata emulation.
const (
	// MetadataV2 serves IMDSv2, which begins with a session token. The default.
	MetadataV2 Metadata = "v2"
	// MetadataV1 serves IMDSv1 too.
	MetadataV1 Metadata = "v1"
	// MetadataOff serves no metadata.
	MetadataOff Metadata = "off"
)

// Tag is an STS session tag.
type Tag struct {
	Key   string `json:"key"`
	Value string `json:"value"`
}

// Bounds of sessions, from the STS API reference for AssumeRole.
const (
	// minDuration and maxDuration bound the session duration.
	minDuration = 15 * time.Minute
	maxDuration = 12 * time.Hour
	// DefaultDuration is also the default of STS. With shorter sessions SDKs request credentials on nearly every call:
	// botocore and the Java SDK refresh inside the last 15 minutes.
	DefaultDuration = time.Hour
	// DefaultStartTimeout is how long an application waits for its first credentials.
	DefaultStartTimeout = 2 * time.Minute

	minSessionName = 2
	maxSessionName = 64
	minExternalID  = 2
	maxExternalID  = 1224
	maxTags        = 50
	maxTagKey      = 128
	maxTagValue    = 256
	// maxPolicy is the plain-text limit of the inline policy and the ARNs of managed policies together. Only STS knows the
	// other limit, of the packed form.
	maxPolicy = 2048
	// maxPolicyText bounds the inline policy as the user writes it, in bytes: with indentation, which the broker does not send
	// to STS.
	maxPolicyText = 8 * maxPolicy
	maxPolicyARNs = 10
	minPolicyARN  = 20
	// maxContainerNames bounds the comma lists: no pod near etcd's 1.5 MB has so many containers.
	maxContainerNames = 1000
	// maxDurationText is more than any duration within bounds needs.
	maxDurationText = 64
	// maxStartTimeout: longer than a day is a typing error. 0 waits without a limit.
	maxStartTimeout = 24 * time.Hour
)

// Characters that these may have besides ASCII letters and digits.
const (
	sessionNameMarks = "_+=,.@-"
	externalIDMarks  = "_+=,.@:/-"
)

var (
	policyARNForm = regexp.MustCompile(`^arn:aws(-[a-z]+)*:iam::([0-9]{12}|aws):policy/[\w+=,.@/-]+$`)
	regionForm    = regexp.MustCompile(`^[a-z]{2,}(-[a-z0-9]+)+-[0-9]{1,2}$`)
)

// reservedTags are the tag keys for facts about the pod, ours and those of EKS Pod Identity. A pod that could set them could
// pass for another pod.
var reservedTags = append([]string{"eks-cluster-arn", "eks-cluster-name"}, kubernetesTags...)

// Settings are the parsed annotations of one pod, with defaults filled in.
type Settings struct {
	Role           string // as written; empty requests the namespace's default role
	SessionName    string // empty: the default name
	ExternalID     string // empty: none
	SessionTags    []Tag  // sorted by key
	SessionPolicy  string // compact JSON; empty: none
	PolicyARNs     []string
	Scope          Scope
	Duration       time.Duration
	Region         string // empty: not set
	Containers     []string
	SkipContainers []string
	Metadata       Metadata
	StartTimeout   time.Duration // 0: no limit
	Sidecar        Sidecar
}

// parse reads the annotations of a pod. It refuses unknown keys under the prefix and values that do not parse, with an
// [*credential.Error] of kind credential.ErrInvalid whose message names the annotation. It ignores only what
// webhooks write.
func (k Keys) parse(annotations map[string]string) (Settings, error) {
	// One pass over the annotations: a pod mostly has fewer than there are keys, and this needs no full names.
	var values [len(podKeys)]string
	var isSet [len(podKeys)]bool
	for name, value := range annotations {
		key, ok := k.cut(name)
		if !ok || ignored(key) {
			continue
		}
		at := slices.Index(podKeys[:], key)
		if at < 0 {
			return Settings{}, k.refuseUnknown(annotations)
		}
		values[at], isSet[at] = value, true
	}
	if !isSet[0] { // Role is the first of podKeys
		return Settings{}, credential.Errorf(credential.ErrInvalid, credential.ReasonRoleMissing,
			"the pod has annotations of %s but no role; set %q (an empty value requests the namespace's %q)",
			k.prefix, k.Name(Role), k.Name(DefaultRole))
	}
	s := Settings{Scope: ScopeRole, Duration: DefaultDuration, Metadata: MetadataV2, StartTimeout: DefaultStartTimeout}
	for at, value := range values {
		if !isSet[at] {
			continue
		}
		if err := s.set(podKeys[at], strings.TrimSpace(value)); err != nil {
			return Settings{}, &credential.Error{
				Kind: credential.ErrInvalid, Reason: credential.ReasonAnnotationInvalid,
				Message: fmt.Sprintf("annotation %q: %v", k.Name(podKeys[at]), err),
			}
		}
	}
	if len(s.Containers) > 0 && len(s.SkipContainers) > 0 {
		return Settings{}, credential.Errorf(credential.ErrInvalid, credential.ReasonAnnotationInvalid,
			"annotations %q and %q exclude each other; keep one", k.Name(Containers), k.Name(SkipContainers))
	}
	if limit := s.Sidecar.CPULimit; limit != nil && *limit != 0 && *limit < s.Sidecar.CPURequest {
		return Settings{}, credential.Errorf(credential.ErrInvalid, credential.ReasonAnnotationInvalid,
			"annotation %q: %s is below %s, the %q; raise it, or remove one of the two", k.Name(SidecarCPULimit), *limit, s.Sidecar.CPURequest, k.Name(SidecarCPURequest))
	}
	n := utf8.RuneCountInString(s.SessionPolicy)
	for _, arn := range s.PolicyARNs {
		n += len(arn)
	}
	if n > maxPolicy {
		return Settings{}, credential.Errorf(credential.ErrInvalid, credential.ReasonAnnotationInvalid,
			"annotations %q and %q have %d characters together, STS allows %d", k.Name(SessionPolicy), k.Name(PolicyARNs), n, maxPolicy)
	}
	return s, nil
}

// set parses the value of one key. Its errors quote at most 100 characters of a value: Kubernetes bounds annotations only
// after admission.
func (s *Settings) set(key Key, value string) (err error) {
	switch key {
	case Role:
		s.Role = value
	case SessionName:
		s.SessionName, err = parseText(value, isSessionName, minSessionName, maxSessionName, "letters, digits and any of _+=,.@-")
	case ExternalID:
		s.ExternalID, err = parseText(value, isExternalID, minExternalID, maxExternalID, "letters, digits and any of _+=,.@:/-")
	case SessionTags:
		s.SessionTags, err = parseTags(value)
	case SessionPolicy:
		s.SessionPolicy, err = compactPolicy(value)
	case PolicyARNs:
		s.PolicyARNs, err = parsePolicyARNs(value)
	case SessionScope:
		s.Scope, err = parseChoice(value, ScopeRole, ScopeServiceAccount, ScopePod)
	case Duration:
		s.Duration, err = parseDuration(value, minDuration, maxDuration)
	case Region:
		s.Region, err = parseText(value, regionForm.MatchString, 1, 64, "a region such as eu-central-1")
	case Containers:
		s.Containers, err = parseList(value, maxContainerNames)
	case SkipContainers:
		s.SkipContainers, err = parseList(value, maxContainerNames)
	case IMDS:
		s.Metadata, err = parseChoice(value, MetadataV2, MetadataV1, MetadataOff)
	case StartTimeout:
		s.StartTimeout, err = parseDuration(value, 0, maxStartTimeout)
	case SidecarMemory, SidecarCPURequest, SidecarCPULimit, SidecarPort, SidecarLogLevel:
		err = s.Sidecar.set(key, value)
	default:
		// podKeys and this switch list the same keys; a test compares them.
		return fmt.Errorf("key %q is not parsed", key)
	}
	return err
}

func parseText(value string, form func(string) bool, shortest, longest int, want string) (string, error) {
	if n := len(value); n < shortest || n > longest {
		return "", fmt.Errorf("has %d characters, must have %d to %d", n, shortest, longest)
	}
	if !form(value) {
		return "", fmt.Errorf("%q must be %s", value, want)
	}
	return value, nil
}

func parseChoice[T ~string](value string, choices ...T) (T, error) {
	if !slices.Contains(choices, T(value)) {
		return "", fmt.Errorf("%.100q is none of %q", value, choices)
	}
	return T(value), nil
}

func parseDuration(value string, shortest, longest time.Duration) (time.Duration, error) {
	d, err := time.ParseDuration(value[:min(len(value), maxDurationText+1)])
	if err != nil || len(value) > maxDurationText {
		return 0, fmt.Errorf("%.100q is not a duration such as 90m or 2h", value)
	}
	if d < shortest || d > longest {
		return 0, fmt.Errorf("%s is out of bounds: from %s to %s", d, shortest, longest)
	}
	// STS counts in seconds, so two grants must not differ by less.
	if d%time.Second != 0 {
		return 0, fmt.Errorf("%s must be whole seconds", d)
	}
	return d, nil
}

// parseList splits a comma list of at most limit names. It drops blanks around names, and refuses empty names.
func parseList(value string, limit int) ([]string, error) {
	var list []string
	seen := make(map[string]bool)
	for name := range strings.SplitSeq(value, ",") {
		name = strings.TrimSpace(name)
		switch {
		case name == "":
			return nil, fmt.Errorf("%.100q has an empty name in its comma list", value)
		case seen[name]:
			return nil, fmt.Errorf("%.100q is named twice", name)
		case len(list) == limit:
			return nil, fmt.Errorf("has more than %d names", limit)
		}
		list = append(list, name)
		seen[name] = true
	}
	return list, nil
}

// parseTags returns the tags of a text, sorted by key.
func parseTags(value string) ([]Tag, error) {
	pairs, err := parseList(value, maxTags)
	if err != nil {
		return nil, err
	}
	var tags []Tag
	var keys []string
	for _, pair := range pairs {
		key, val, ok := strings.Cut(pair, "=")
		if !ok {
			return nil, fmt.Errorf("%.100q is not key=value", pair)
		}
		// Blanks are allowed in keys, so blanks around a key would make it another key.
		key, val = strings.TrimSpace(key), strings.TrimSpace(val)
		if err := checkTagKey(key, keys); err != nil {
			return nil, err
		}
		if slices.ContainsFunc(reservedTags, func(r string) bool { return strings.EqualFold(r, key) }) {
			return nil, fmt.Errorf("tag key %q is reserved for facts about the pod", key)
		}
		if !isTagText(val, 0, maxTagValue) {
			return nil, fmt.Errorf("the value of tag %q must have at most %d letters, digits, blanks or any of _.:/=+-@", key, maxTagValue)
		}
		keys = append(keys, key)
		tags = append(tags, Tag{Key: key, Value: val})
	}
	slices.SortFunc(tags, func(a, b Tag) int { return strings.Compare(a.Key, b.Key) })
	return tags, nil
}

// checkTagKey refuses a tag key that STS does not allow, and one that before has already.
func checkTagKey(key string, before []string) error {
	switch {
	case !isTagText(key, 1, maxTagKey):
		return fmt.Errorf("tag key %.100q must have 1 to %d letters, digits, blanks or any of _.:/=+-@", key, maxTagKey)
	case strings.HasPrefix(strings.ToLower(key), "aws:"):
		return fmt.Errorf("tag key %q: keys that begin with aws: belong to AWS", key)
	// STS compares keys without regard to case.
	case slices.ContainsFunc(before, func(b string) bool { return strings.EqualFold(b, key) }):
		return fmt.Errorf("tag key %q is set twice", key)
	}
	return nil
}

// isTagText reports whether s has between shortest and longest characters, all of them allowed by STS in tags:
// [\p{L}\p{Z}\p{N}_.:/=+\-@].
func isTagText(s string, shortest, longest int) bool {
	n := 0
	for _, r := range s {
		switch {
		case n == longest:
			return false
		case 'a' <= r && r <= 'z', 'A' <= r && r <= 'Z', '0' <= r && r <= '9', strings.ContainsRune("_.:/=+-@", r):
		case !unicode.In(r, unicode.L, unicode.Z, unicode.N):
			return false
		}
		n++
	}
	return shortest <= n && n <= longest
}

func isSessionName(s string) bool { return onlyOf(s, sessionNameMarks) }
func isExternalID(s string) bool  { return onlyOf(s, externalIDMarks) }

// onlyOf reports whether s has only ASCII letters, digits and marks.
func onlyOf(s, marks string) bool {
	for i := range len(s) {
		switch c := s[i]; {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9':
		case strings.IndexByte(marks, c) < 0:
			return false
		}
	}
	return true
}

// compactPolicy returns a policy without blanks.
func compactPolicy(value string) (string, error) {
	if len(value) > maxPolicyText {
		return "", fmt.Errorf("has %d characters with its blanks, the limit is %d", len(value), maxPolicyText)
	}
	// STS allows these characters in a policy. Invalid UTF-8 becomes a character that it does not allow.
	for _, r := range value {
		if r > 0xFF {
			return "", fmt.Errorf("has the character %q, and STS allows none above U+00FF; write it as a JSON escape", r)
		}
	}
	var object map[string]json.RawMessage
	if err := json.Unmarshal([]byte(value), &object); err != nil {
		return "", fmt.Errorf("is not a JSON object: %w", err)
	}
	if _, ok := object["Statement"]; !ok {
		return "", fmt.Errorf("is not an IAM policy: it has no Statement")
	}
	var compact bytes.Buffer
	if err := json.Compact(&compact, []byte(value)); err != nil {
		return "", err
	}
	return compact.String(), nil
}

func parsePolicyARNs(value string) ([]string, error) {
	arns, err := parseList(value, maxPolicyARNs)
	if err != nil {
		return nil, err
	}
	if n := len(strings.Join(arns, "")); len(arns) > 1 && n > maxPolicy {
		return nil, fmt.Errorf("has ARNs of %d characters together, STS allows %d", n, maxPolicy)
	}
	for _, arn := range arns {
		if len(arn) < minPolicyARN || len(arn) > maxPolicy || !policyARNForm.MatchString(arn) {
			return nil, fmt.Errorf("%.100q is not the ARN of a managed policy such as arn:aws:iam::aws:policy/ReadOnlyAccess", arn)
		}
	}
	slices.Sort(arns)
	return arns, nil
}
