package assume

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/aws/aws-sdk-go-v2/service/sts"
	"github.com/aws/smithy-go"

	"github.com/credence-iam/credence/broker/clip"
	"github.com/credence-iam/credence/broker/credential"
)

// Identity describes the broker's own identity at STS.
type Identity struct {
	// Confirmed is set after a response of STS to a caller that it knows. It stays set.
	Confirmed bool
	// Unsupported is set after a response that the service has no GetCallerIdentity, such as MinIO's. It does not mean that
	// the credentials are correct: MinIO sends it before it checks the signature.
	Unsupported bool
	// Problem is why the last GetCallerIdentity failed, with the fix and without secrets. Empty if it succeeded.
	Problem string
}

// identityState is the Identity that the broker has learned so far.
type identityState struct {
	mu sync.Mutex
	is Identity // guarded by mu
}

func (p *identityState) confirm() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.is = Identity{Confirmed: true}
}

func (p *identityState) fail(problem string, unsupported bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.is.Confirmed {
		p.is = Identity{Unsupported: p.is.Unsupported || unsupported, Problem: problem}
	}
}

// Identity returns the identity that STS has confirmed so far, in response to calls of any action.
func (s *STS) Identity() Identity {
	s.proof.mu.Lock()
	defer s.proof.mu.Unlock()
	return s.proof.is
}

// knowsCaller reports whether STS knew the caller of a call with outcome v and error err. A denial that names an STS action is for a
// caller with a valid signature. Endpoint policies deny even GetCallerIdentity this way.
func knowsCaller(v outcome, err error) bool {
	return v == success || v == denied && strings.Contains(stsErrorOf(err).message, "not authorized to perform: sts:")
}

// unsupportedCodes are the codes of services without the action. AWS has all actions.
var unsupportedCodes = []string{
	"InvalidAction", "UnknownAction", "UnknownOperation", "UnknownOperationException", "UnsupportedOperation", "UnsupportedMethod",
	"NotImplemented", "MethodNotAllowed",
}

// unsupported reports whether err, of a GetCallerIdentity, refuses the action itself. It has no parameters that could be wrong.
func unsupported(err error) bool {
	a, v := stsErrorOf(err), outcomeOf(err)
	return v == rejected || v == unavailable && (slices.Contains(unsupportedCodes, a.code) ||
		a.status == http.StatusNotImplemented || a.status == http.StatusMethodNotAllowed)
}

// minIdentityWait and maxIdentityWait bound the wait between failed calls of GetCallerIdentity. The wait doubles each time. After an
// outage of STS, a restarted broker becomes ready at most maxIdentityWait later. STS does not notice the calls.
const minIdentityWait, maxIdentityWait = time.Second, 10 * time.Second

// AwaitBase calls [STS.Base] until it succeeds or ctx ends, because a role name has no meaning without a base.
func (s *STS) AwaitBase(ctx context.Context, log *slog.Logger) (base credential.RoleBase, err error) {
	await(ctx, log, func() error {
		base, err = s.Base(ctx)
		return err
	})
	return base, err
}

// AwaitIdentity calls GetCallerIdentity until this or another call confirms the identity, the service responds that it has no
// such action, or ctx ends. See [STS.Identity].
func (s *STS) AwaitIdentity(ctx context.Context, log *slog.Logger) {
	await(ctx, log, func() error {
		_, err := s.Base(ctx)
		if is := s.Identity(); is.Confirmed || is.Unsupported {
			return nil
		}
		return err
	})
}

// await calls try until it succeeds or ctx ends.
func await(ctx context.Context, log *slog.Logger, try func() error) {
	for wait := minIdentityWait; ; wait = min(2*wait, maxIdentityWait) {
		err := try()
		if err == nil || ctx.Err() != nil {
			return
		}
		pause := wait/2 + rand.N(wait/2) //nolint:gosec // Spreads the calls of brokers that start together.
		log.WarnContext(ctx, "STS did not confirm this broker's identity, retrying", "error", err, "retry_in", pause)
		select {
		case <-time.After(pause): //nolint:forbidigo // Few times in a process's life.
		case <-ctx.Done():
			return
		}
	}
}

// assumeFirstError is a failure to assume the role of --assume-role.
type assumeFirstError struct {
	role credential.RoleARN
	err  error // in the form for our log
}

func (e *assumeFirstError) Error() string {
	return fmt.Sprintf("assuming %s, the role of --assume-role: %v", e.role, e.err)
}

func (e *assumeFirstError) Unwrap() error { return e.err }

// Explain returns the cause of an error of [STS.Credential] that is not about its role, with the fix, for a cluster admin. The text
// has no secret, and is the same for the same cause.
func (s *STS) Explain(err *credential.Error) string {
	if err.Cause == nil {
		return err.Message
	}
	return s.problem(err.Cause)
}

// problem describes a failure of the broker's identity, with its fix. It returns the same text for the same cause. The text has
// no role and no request ID, because not every client of /readyz may know the ARNs. The log has them.
func (s *STS) problem(err error) string {
	first, ok := errors.AsType[*assumeFirstError](err)
	if ok {
		// The failed call was signed with other credentials.
		if outcomeOf(first.err) == denied {
			return "STS does not let the broker assume the role of --assume-role (aws.assumeRole); name the broker's identity in its trust policy, and allow that identity to call sts:AssumeRole on it"
		}
		return "the broker cannot assume the role of --assume-role (aws.assumeRole): " + s.problem(first.err)
	}
	if own, ok := errors.AsType[*ownError](err); ok {
		return s.noCredentials(own.err)
	}
	a := stsErrorOf(err)
	switch outcomeOf(err) {
	case throttle:
		return "STS throttles this account; the broker keeps trying"
	case stale, ownFault:
		return "AWS refuses the broker's own credentials " + refusedKeys(a)
	case identity:
		return fmt.Sprintf("AWS refuses the broker's web identity token (%s); register this cluster's issuer as an IAM identity provider, and name the broker's service account in the role's trust policy", a.code)
	case region:
		return fmt.Sprintf("STS is not active in region %s; choose another region with --region (aws.region), or activate it in the account", s.region)
	case denied:
		return "STS denies the broker access; allow sts:GetCallerIdentity and sts:AssumeRole in the policies of its VPC endpoint and of the organization"
	case success, rejected, unavailable:
	}
	switch {
	case unsupported(err):
		return "the STS-compatible service has no GetCallerIdentity; set --base-arn (aws.baseARN)"
	case a.status != 0 && a.code != "" && a.code != "UnknownError":
		return fmt.Sprintf("STS fails (%s, status %d); the broker keeps trying", clip.Bytes(a.code, maxWords), a.status)
	}
	way := "proxies"
	if p, ok := errors.AsType[*proxyError](err); ok {
		way = "the proxy " + p.host
	}
	if a.status != 0 {
		return fmt.Sprintf("the response with status %d is not from STS; the broker keeps trying; check --sts-endpoint and %s", a.status, way)
	}
	return fmt.Sprintf("the broker cannot reach STS; it keeps trying; check egress, DNS, --region and %s (%s)", way, reachError(err))
}

// noCredentials describes why the broker has no credentials to sign with.
func (s *STS) noCredentials(err error) string {
	_, behind := errors.AsType[*assumeFirstError](err)
	op, called := errors.AsType[*smithy.OperationError](err)
	switch {
	case err == nil:
		return "the broker has no AWS credentials yet"
	case !behind && outcomeOf(err) == denied:
		return "STS does not give the broker's web identity its role; name this cluster's issuer and the broker's service account in the role's trust policy"
	case behind, called && op.Service() == sts.ServiceID, outcomeOf(err) != unavailable:
		return s.problem(err)
	}
	return "the broker has no AWS credentials; give it keys, a web identity or EKS Pod Identity, see docs/aws.md (" + reachError(err) + ")"
}

// refusedKeys explains a code of staleCodes or ownCodes to the person who configured the credentials.
func refusedKeys(a stsError) string {
	fix := "their access key does not exist or is inactive; correct the key in its Secret, file or variable"
	switch {
	case strings.HasPrefix(a.code, "ExpiredToken"):
		fix = "they have expired; replace them at their source"
	case strings.HasPrefix(a.code, "SignatureDoesNotMatch"), strings.HasPrefix(a.code, "InvalidSignature"), strings.Contains(a.message, "signature we calculated"):
		fix = "their secret access key does not belong to their access key; correct both in their Secret, file or variable"
	case a.code == "RequestExpired", a.code == "RequestTimeTooSkewed":
		fix = "the date of the calls is wrong; set the clock of this node"
	case a.code == "OptInRequired":
		fix = "the account is not subscribed to the service"
	}
	return fmt.Sprintf("(%s): %s", a.code, fix)
}

// noise is the SDK's text about a missing response.
const noise = "https response error StatusCode: 0, RequestID: , "

// localEnd is our own end of a connection. Its port differs between calls.
var localEnd = regexp.MustCompile(`((?:read|write) (?:tcp|udp)) [^ ]+->`)

// reachError returns the end of a connection error, which names the failure, without the parts that differ between calls.
func reachError(err error) string {
	text := cause(err).Error()
	if i := strings.LastIndex(text, noise); i >= 0 {
		text = text[i+len(noise):]
	}
	return clip.Bytes(localEnd.ReplaceAllString(text, "$1 "), maxWords)
}
