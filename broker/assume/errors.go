package assume

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws/retry"
	"github.com/aws/smithy-go"
	smithyhttp "github.com/aws/smithy-go/transport/http"

	"github.com/credence-iam/credence/broker/clip"
	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/policy"
)

// Codes by what they call for; STS API reference and the common errors of the Query API. Throttling
// arrives as HTTP 400, so the code decides and not the status; retry.DefaultThrottleErrorCodes
// lists that kind.
var (
	// staleCodes say that what signed the call is expired, replaced or dated wrongly. Credentials that
	// are read again, or a date that the SDK has learned to correct, may mend it.
	staleCodes = []string{
		"ExpiredToken", "ExpiredTokenException", "InvalidClientTokenId", "UnrecognizedClientException",
		"SignatureDoesNotMatch", "InvalidSignatureException", "RequestExpired", "RequestTimeTooSkewed", "AuthFailure",
	}
	// ownCodes blame the caller as well, and another try does not help.
	ownCodes = []string{"MissingAuthenticationToken", "IncompleteSignature", "OptInRequired", "InvalidAccessKeyId"}
	// identityCodes are about the web identity token that the broker's own credentials come from. It may
	// have been replaced since it was read, or be younger than what AWS knows of its issuer.
	identityCodes = []string{
		"InvalidIdentityToken", "InvalidIdentityTokenException", "IDPRejectedClaim", "IDPRejectedClaimException",
		"IDPCommunicationError", "IDPCommunicationErrorException",
	}
	deniedCodes   = []string{"AccessDenied", "AccessDeniedException"}
	rejectedCodes = []string{
		"ValidationError", "ValidationException", "MalformedPolicyDocument", "MalformedPolicyDocumentException",
		"PackedPolicyTooLarge", "PackedPolicyTooLargeException", "InvalidParameterValue",
		"InvalidParameterCombination", "MissingParameter",
	}
	// regionCodes are about the broker's region, which no pod chose.
	regionCodes = []string{"RegionDisabledException", "RegionDisabled"}
)

// foreignKeys are how MinIO words the refusal of a caller, for which it has no code but AccessDenied.
var foreignKeys = []string{"Access Key Id you provided does not exist", "request signature we calculated does not match"}

// verdict is what an error of STS calls for.
type verdict int

const (
	fine     verdict = iota
	throttle         // ask less
	stale            // own credentials: read them again
	identity         // own credentials: the web identity token behind them
	ownFault         // own credentials: an operator must act
	region           // an operator must choose another region
	denied           // the role's trust, or the broker's permissions
	rejected         // the session that was asked for
	away             // everything else: ask again
)

// answer is what STS said of an error, as far as it said anything.
type answer struct {
	code, message string
	status        int // 0: it did not answer
}

func answerOf(err error) answer {
	var a answer
	if e, ok := errors.AsType[smithy.APIError](err); ok {
		a.code, a.message = e.ErrorCode(), e.ErrorMessage()
	}
	if e, ok := errors.AsType[*smithyhttp.ResponseError](err); ok {
		a.status = e.HTTPStatusCode()
	}
	if e, ok := errors.AsType[*unread](err); ok {
		a.status = e.status
	}
	return a
}

// judge tells errors apart, of any call of STS.
func judge(err error) verdict {
	if err == nil {
		return fine
	}
	if _, ok := errors.AsType[*ownError](err); ok {
		return ownFault
	}
	a := answerOf(err)
	_, throttled := retry.DefaultThrottleErrorCodes[a.code]
	switch {
	case throttled || a.status == http.StatusTooManyRequests:
		return throttle
	case slices.Contains(staleCodes, a.code):
		return stale
	case slices.Contains(identityCodes, a.code):
		return identity
	case slices.Contains(ownCodes, a.code):
		return ownFault
	case slices.Contains(regionCodes, a.code):
		return region
	case slices.Contains(deniedCodes, a.code):
		if slices.ContainsFunc(foreignKeys, func(words string) bool { return strings.Contains(a.message, words) }) {
			return stale
		}
		return denied
	case slices.Contains(rejectedCodes, a.code):
		return rejected
	}
	return away
}

// reason is the verdict's name on the outside.
func (v verdict) reason() credential.Reason {
	switch v {
	case throttle:
		return credential.ReasonSTSThrottled
	case stale, identity, ownFault, region:
		return credential.ReasonBaseCredential
	case denied:
		return credential.ReasonSTSDenied
	case rejected:
		return credential.ReasonSTSRejected
	default:
		return credential.ReasonSTSUnavailable
	}
}

// outcome is the verdict in [Call].
func (v verdict) outcome() string {
	if v == fine {
		return "ok"
	}
	return string(v.reason())
}

// maxWords bounds what is passed on of STS's own words, in bytes.
const maxWords = 500

// throttledWait is the least time before a throttled call is made again.
const throttledWait = time.Second

// classify says what err of AssumeRole means for the pod that waits.
func (s *STS) classify(g policy.Grant, err error) error {
	if e, ok := errors.AsType[*credential.Error](err); ok {
		return e // said already
	}
	v, a := judge(err), answerOf(err)
	e := &credential.Error{Kind: credential.ErrUnavailable, Reason: v.reason(), Cause: cause(err)}
	switch v {
	case throttle:
		e.RetryAfter = throttledWait
		e.Message = "STS throttles this account; the broker asks again by itself"
	case stale, identity, ownFault:
		e.Message = "the broker's own AWS credentials do not work; its operator must see to it"
		if own, ok := errors.AsType[*ownError](err); ok {
			e.RetryAfter = own.wait
			if inner := judge(own.err); inner == throttle || inner == away && answerOf(own.err).status != 0 {
				e.Message = "the broker's own AWS credentials cannot be had at the moment; it asks again by itself, and its operator must see to it if this lasts"
			}
		}
	case region:
		e.Message = fmt.Sprintf("STS is not active in region %s, which is the broker's; its operator must choose another one with --region, or activate this one in the account", s.region)
	case denied:
		e.Kind = credential.ErrDenied
		e.Message = fmt.Sprintf("STS refuses role %s: %s", g.Role(), denial(g, a.message))
	case rejected:
		e.Kind = credential.ErrInvalid
		e.Message = fmt.Sprintf("STS rejects the session for role %s (%s): %s", g.Role(), a.code, clip.Bytes(a.message, maxWords)) + rejection(a)
	default:
		e.Message = "STS cannot be reached or fails; the broker asks again by itself"
	}
	return e
}

// denial says what to check when STS denies a role. Its words name the action that was not allowed,
// and are not passed on: they tell a pod who the broker is.
func denial(g policy.Grant, words string) string {
	switch {
	case strings.Contains(words, "sts:SetSourceIdentity"):
		return "its trust policy must allow the broker's role sts:SetSourceIdentity as well, and so must the permissions of the broker's role"
	case strings.Contains(words, "sts:TagSession") && len(g.Tags()) == 0:
		// Transitive tags of the broker's own session are set anew on each one behind it.
		return "its trust policy must allow the broker's role sts:TagSession as well: this pod asks for no tags, but the broker's own session carries some, as with EKS Pod Identity"
	case strings.Contains(words, "sts:TagSession"):
		return "its trust policy must allow the broker's role sts:TagSession as well, and so must the permissions of the broker's role: the session is to carry tags"
	}
	check := fmt.Sprintf("check that it exists, that its trust policy names the broker's role%s, and that the broker may assume it", conditions(g))
	if g.ExternalID() == "" {
		check += "; if its trust policy requires an external id (sts:ExternalId), set the annotation external-id"
	}
	return check
}

// conditions names what a trust policy may ask for besides the broker's role.
func conditions(g policy.Grant) string {
	var also []string
	if g.ExternalID() != "" {
		also = append(also, "this external id")
	}
	if g.Tags() != nil {
		also = append(also, "sts:TagSession")
	}
	if g.SourceIdentity() != "" {
		also = append(also, "sts:SetSourceIdentity")
	}
	switch last := len(also) - 1; last {
	case -1:
		return ""
	case 0:
		return " with " + also[0]
	default:
		return " with " + strings.Join(also[:last], ", ") + " and " + also[last]
	}
}

// rejection adds what to change, where STS's own words leave that open.
func rejection(a answer) string {
	switch {
	case strings.Contains(a.message, "role chaining"):
		return "; AWS gives one hour at most here, because the broker itself is a role: set the annotation duration to 1h or less"
	case strings.Contains(a.message, "MaxSessionDuration"):
		return "; lower the annotation duration, or raise the role's maximum session duration in IAM"
	case strings.HasPrefix(a.code, "PackedPolicyTooLarge"):
		return "; shorten the session policy, or name fewer policy ARNs or session tags: they share one space"
	}
	return ""
}

// cause returns err as it may stand in our own log. What could not be read as an answer may hold
// anything, a session's keys among it, and the SDK quotes parts of it.
func cause(err error) error {
	_, said := errors.AsType[*credential.Error](err)
	_, done := errors.AsType[*unread](err)
	_, own := errors.AsType[*ownError](err) // its own cause was made so
	if said || done || own {
		return err
	}
	_, parsed := errors.AsType[smithy.APIError](err)
	_, broken := errors.AsType[*smithy.DeserializationError](err)
	status := answerOf(err).status
	switch {
	case parsed:
		return bounded{err}
	case status == 0 && !broken:
		return err // no answer: a connection, the context, or a source that makes none
	}
	u := &unread{status: status}
	if p, ok := errors.AsType[*proxyError](err); ok {
		u.proxy = p.host
	}
	if op, ok := errors.AsType[*smithy.OperationError](err); ok {
		u.call = op.Service() + " " + op.Operation()
	}
	for _, known := range []error{errTooLarge, context.Canceled, context.DeadlineExceeded} {
		if errors.Is(err, known) {
			u.err = known
		}
	}
	return u
}

// unread is an answer that was none, without what it said.
type unread struct {
	call   string
	status int
	proxy  string // that it came through; empty: none
	err    error  // why it was not read to its end; nil: it was
}

func (u *unread) Error() string {
	text := fmt.Sprintf("%s: what came back, with status %d, is no answer of its", u.call, u.status)
	if u.proxy != "" {
		text += ", and came through the proxy " + u.proxy
	}
	if u.err != nil {
		text += ": " + u.err.Error()
	}
	return text
}

func (u *unread) Unwrap() error { return u.err }

// bounded is an error with a bound on its words.
type bounded struct{ error }

// Error keeps the beginning, which says what was called, and as much again for STS's words.
func (b bounded) Error() string {
	text := b.error.Error()
	return strings.ToValidUTF8(text[:min(len(text), 2*maxWords)], "")
}

func (b bounded) Unwrap() error { return b.error }
