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

// Error codes by their consequence, from the STS API reference and the common errors of the Query API. Throttling has HTTP
// status 400, so the code decides, not the status. retry.DefaultThrottleErrorCodes has the codes for throttling.
var (
	// staleCodes: the credentials are expired or replaced, or the date is wrong. Loading the credentials again may help, and
	// the SDK corrects the date after the first response.
	staleCodes = []string{
		"ExpiredToken", "ExpiredTokenException", "InvalidClientTokenId", "UnrecognizedClientException",
		"SignatureDoesNotMatch", "InvalidSignatureException", "RequestExpired", "RequestTimeTooSkewed", "AuthFailure",
	}
	// ownCodes: the credentials are wrong, and a retry does not help.
	ownCodes = []string{"MissingAuthenticationToken", "IncompleteSignature", "OptInRequired", "InvalidAccessKeyId"}
	// identityCodes: STS refuses the web identity token for the broker's own credentials. The token may have been replaced
	// since it was read, or AWS may not know the newest key of its issuer yet.
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
	// regionCodes: STS is not active in the broker's region. Pods do not choose that region.
	regionCodes = []string{"RegionDisabledException", "RegionDisabled"}
)

// foreignKeys are MinIO's messages for a caller with wrong keys. MinIO has only the code AccessDenied for it.
var foreignKeys = []string{"Access Key Id you provided does not exist", "request signature we calculated does not match"}

// outcome classifies the result of a call by its consequence.
type outcome int

const (
	success     outcome = iota
	throttle            // slow down
	stale               // own credentials: load them again
	identity            // own credentials: read the web identity token again
	ownFault            // own credentials: a cluster admin must act
	region              // a cluster admin must choose another region
	denied              // the role's trust policy, or the broker's permissions
	rejected            // the parameters of the session
	unavailable         // everything else: a retry may help
)

// stsError has the parts of an error response of STS. Parts that it lacks are zero.
type stsError struct {
	code, message string
	status        int // 0: STS did not respond
}

func stsErrorOf(err error) stsError {
	var a stsError
	if e, ok := errors.AsType[smithy.APIError](err); ok {
		a.code, a.message = e.ErrorCode(), e.ErrorMessage()
	}
	if e, ok := errors.AsType[*smithyhttp.ResponseError](err); ok {
		a.status = e.HTTPStatusCode()
	}
	if e, ok := errors.AsType[*unreadable](err); ok {
		a.status = e.status
	}
	return a
}

// outcomeOf classifies the error of any call of STS.
func outcomeOf(err error) outcome {
	if err == nil {
		return success
	}
	if _, ok := errors.AsType[*ownError](err); ok {
		return ownFault
	}
	a := stsErrorOf(err)
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
	return unavailable
}

// reason returns the reason code of the outcome.
func (v outcome) reason() credential.Reason {
	switch v {
	case throttle:
		return credential.ReasonSTSThrottled
	case stale, identity, ownFault, region:
		return credential.ReasonBrokerCredentials
	case denied:
		return credential.ReasonSTSDenied
	case rejected:
		return credential.ReasonSTSRejected
	default:
		return credential.ReasonSTSUnavailable
	}
}

// label returns the outcome as in [Call].
func (v outcome) label() string {
	if v == success {
		return "ok"
	}
	return string(v.reason())
}

// maxWords bounds the part of STS's messages that is passed on, in bytes.
const maxWords = 500

// throttledWait is the minimum wait before a throttled call is repeated.
const throttledWait = time.Second

// classify returns the error of AssumeRole in the form for the waiting pod.
func (s *STS) classify(g policy.Grant, err error) error {
	if e, ok := errors.AsType[*credential.Error](err); ok {
		return e // It has its final form already.
	}
	v, a := outcomeOf(err), stsErrorOf(err)
	e := &credential.Error{Kind: credential.ErrUnavailable, Reason: v.reason(), Cause: cause(err)}
	switch v {
	case throttle:
		e.RetryAfter = throttledWait
		e.Message = "STS throttles this account; the broker retries by itself"
	case stale, identity, ownFault:
		e.Message = "the broker's own AWS credentials do not work; a cluster admin must check them"
		if own, ok := errors.AsType[*ownError](err); ok {
			e.RetryAfter = own.wait
			if inner := outcomeOf(own.err); inner == throttle || inner == unavailable && stsErrorOf(own.err).status != 0 {
				e.Message = "the broker cannot load its own AWS credentials now; it retries by itself; a cluster admin must check them if this lasts"
			}
		}
	case region:
		e.Message = fmt.Sprintf("STS is not active in the broker's region %s; a cluster admin must choose another region with --region, or activate this one in the account", s.region)
	case denied:
		e.Kind = credential.ErrDenied
		e.Message = fmt.Sprintf("STS refuses role %s: %s", g.Role(), denial(g, a.message))
	case rejected:
		e.Kind = credential.ErrInvalid
		e.Message = fmt.Sprintf("STS rejects the session for role %s (%s): %s", g.Role(), a.code, clip.Bytes(a.message, maxWords)) + rejection(a)
	default:
		e.Message = "STS is unavailable; the broker retries by itself"
	}
	return e
}

// denial returns the conditions to check if STS denies a role. STS's own message names the denied action. It is not passed on,
// because it would reveal the broker's identity to a pod.
func denial(g policy.Grant, words string) string {
	switch {
	case strings.Contains(words, "sts:SetSourceIdentity"):
		return "its trust policy must allow the broker's role sts:SetSourceIdentity as well, and so must the permissions of the broker's role"
	case strings.Contains(words, "sts:TagSession") && len(g.Tags()) == 0:
		// Each session of role chaining also gets the transitive tags of the broker's own session.
		return "its trust policy must allow the broker's role sts:TagSession as well: this pod requests no tags, but the broker's own session has some, as with EKS Pod Identity"
	case strings.Contains(words, "sts:TagSession"):
		return "its trust policy must allow the broker's role sts:TagSession as well, and so must the permissions of the broker's role, because the session has tags"
	}
	check := fmt.Sprintf("check that it exists, that its trust policy names the broker's role%s, and that the broker may assume it", conditions(g))
	if g.ExternalID() == "" {
		check += "; if its trust policy requires an external id (sts:ExternalId), set the annotation external-id"
	}
	return check
}

// conditions names the conditions of a trust policy, besides the broker's role, that the grant needs.
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

// rejection returns the fix if STS's message has none.
func rejection(a stsError) string {
	switch {
	case strings.Contains(a.message, "role chaining"):
		return "; AWS limits role chaining to one hour, because the broker itself is a role; set the annotation duration to 1h or less"
	case strings.Contains(a.message, "MaxSessionDuration"):
		return "; lower the annotation duration, or raise the role's maximum session duration in IAM"
	case strings.HasPrefix(a.code, "PackedPolicyTooLarge"):
		return "; shorten the session policy, or set fewer policy ARNs or session tags, because they share one limit"
	}
	return ""
}

// cause returns err in the form for our own log. An unreadable response may contain anything, even a session's keys, and the SDK
// quotes parts of it.
func cause(err error) error {
	_, final := errors.AsType[*credential.Error](err)
	_, done := errors.AsType[*unreadable](err)
	_, own := errors.AsType[*ownError](err) // The function made its cause.
	if final || done || own {
		return err
	}
	_, parsed := errors.AsType[smithy.APIError](err)
	_, broken := errors.AsType[*smithy.DeserializationError](err)
	status := stsErrorOf(err).status
	switch {
	case parsed:
		return bounded{err}
	case status == 0 && !broken:
		return err // There is no response: a connection, the context, or a source without responses failed.
	}
	u := &unreadable{status: status}
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

// unreadable is a response that is not from STS, without its content.
type unreadable struct {
	call   string
	status int
	proxy  string // of the connection; empty: none
	err    error  // why it was not read completely; nil if it was
}

func (u *unreadable) Error() string {
	text := fmt.Sprintf("%s: the response with status %d is not from STS", u.call, u.status)
	if u.proxy != "" {
		text += "; it came through the proxy " + u.proxy
	}
	if u.err != nil {
		text += ": " + u.err.Error()
	}
	return text
}

func (u *unreadable) Unwrap() error { return u.err }

// bounded bounds the message of an error.
type bounded struct{ error }

// Error returns the start of the message, which names the call, and as many bytes of STS's own message.
func (b bounded) Error() string {
	text := b.error.Error()
	return strings.ToValidUTF8(text[:min(len(text), 2*maxWords)], "")
}

func (b bounded) Unwrap() error { return b.error }
