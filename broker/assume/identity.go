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
	// Confirmed is set once STS has answered a call as one of a caller that it knows. It stays set.
	Confirmed bool
	// Unsupported is set once the service has answered that it has no GetCallerIdentity, as MinIO does. It does not say
	// whether the credentials are right: MinIO says so before it looks at the signature.
	Unsupported bool
	// Problem says why the last GetCallerIdentity failed, and how to fix it: a sentence without secrets. Empty: it did not.
	Problem string
}

// proof is an Identity that is found out while the broker runs.
type proof struct {
	mu sync.Mutex
	is Identity // guarded by mu
}

func (p *proof) confirm() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.is = Identity{Confirmed: true}
}

func (p *proof) fail(problem string, unsupported bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.is.Confirmed {
		p.is = Identity{Unsupported: p.is.Unsupported || unsupported, Problem: problem}
	}
}

// Identity returns what STS has said of the broker so far, in answer to calls of any kind.
func (s *STS) Identity() Identity {
	s.proof.mu.Lock()
	defer s.proof.mu.Unlock()
	return s.proof.is
}

// knowsCaller reports whether STS knew the caller of a call that ended with v and err. A refusal that names an action of
// its own is one of a caller whose signature was right; endpoint policies refuse even GetCallerIdentity so.
func knowsCaller(v verdict, err error) bool {
	return v == fine || v == denied && strings.Contains(answerOf(err).message, "not authorized to perform: sts:")
}

// unsupportedCodes are how services say that they do not have an action. AWS's own has all.
var unsupportedCodes = []string{
	"InvalidAction", "UnknownAction", "UnknownOperation", "UnknownOperationException", "UnsupportedOperation", "UnsupportedMethod",
	"NotImplemented", "MethodNotAllowed",
}

// unsupported reports whether err of GetCallerIdentity, which has no parameters that could be wrong, refuses the action itself.
func unsupported(err error) bool {
	a, v := answerOf(err), judge(err)
	return v == rejected || v == away && (slices.Contains(unsupportedCodes, a.code) ||
		a.status == http.StatusNotImplemented || a.status == http.StatusMethodNotAllowed)
}

// Waits between calls of GetCallerIdentity that fail, doubled each time. The longest is what an outage of STS keeps a
// restarted broker out beyond its end; a call each is nothing to STS.
const minIdentityWait, maxIdentityWait = time.Second, 10 * time.Second

// AwaitBase calls [STS.Base] until STS answers or ctx ends: without a base, roles that are written as names mean nothing.
func (s *STS) AwaitBase(ctx context.Context, log *slog.Logger) (base credential.RoleBase, err error) {
	await(ctx, log, func() error {
		base, err = s.Base(ctx)
		return err
	})
	return base, err
}

// AwaitIdentity calls GetCallerIdentity until the identity is confirmed by that or any other call, the service answers that
// it has no such action, or ctx ends. See [STS.Identity].
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
		log.WarnContext(ctx, "STS has not confirmed who this broker is, calling it again", "error", err, "retry_in", pause)
		select {
		case <-time.After(pause): //nolint:forbidigo // Few times in a process's life.
		case <-ctx.Done():
			return
		}
	}
}

// hopError is why the role of --assume-role could not be assumed.
type hopError struct {
	role credential.RoleARN
	err  error // fit for our log
}

func (e *hopError) Error() string {
	return fmt.Sprintf("assuming %s, the role of --assume-role: %v", e.role, e.err)
}

func (e *hopError) Unwrap() error { return e.err }

// problem describes the fault of the broker's identity that err shows, and its fix. The text is the same for the same
// fault. It names no role and no request id, because not every client of /readyz may know the ARNs. The log has them.
func (s *STS) problem(err error) string {
	hop, behind := errors.AsType[*hopError](err)
	if behind {
		// What failed is a call with other credentials than those of err.
		if judge(hop.err) == denied {
			return "STS does not let the broker assume the role of --assume-role (aws.assumeRole): let its trust policy name the broker's identity, and let that identity call sts:AssumeRole on it"
		}
		return "the broker cannot assume the role of --assume-role (aws.assumeRole): " + s.problem(hop.err)
	}
	if own, ok := errors.AsType[*ownError](err); ok {
		return s.noCredentials(own.err)
	}
	a := answerOf(err)
	switch judge(err) {
	case throttle:
		return "STS throttles this account; the broker keeps trying"
	case stale, ownFault:
		return "AWS refuses the broker's own credentials " + refusedKeys(a)
	case identity:
		return fmt.Sprintf("AWS refuses the broker's web identity token (%s): register this cluster's issuer as an IAM identity provider, and let the role's trust policy name the broker's service account", a.code)
	case region:
		return fmt.Sprintf("STS is not active in region %s: choose another one with --region (aws.region), or activate it in the account", s.region)
	case denied:
		return "STS denies the broker access: let the policy of its VPC endpoint, and the organization's, allow it to call sts:GetCallerIdentity and sts:AssumeRole"
	case fine, rejected, away:
	}
	switch {
	case unsupported(err):
		return "the STS-compatible service has no GetCallerIdentity: set --base-arn (aws.baseARN)"
	case a.status != 0 && a.code != "" && a.code != "UnknownError":
		return fmt.Sprintf("STS fails (%s, status %d); the broker keeps trying", clip.Bytes(a.code, maxWords), a.status)
	}
	way := "any proxy on the way"
	if p, ok := errors.AsType[*proxyError](err); ok {
		way = "the proxy " + p.host
	}
	if a.status != 0 {
		return fmt.Sprintf("STS answers with status %d, which is no answer of its; the broker keeps trying. Check --sts-endpoint and %s", a.status, way)
	}
	return fmt.Sprintf("the broker cannot reach STS: check egress, DNS, --region and %s; the broker keeps trying (%s)", way, reachError(err))
}

// noCredentials says why the broker has no credentials to sign with.
func (s *STS) noCredentials(err error) string {
	_, behind := errors.AsType[*hopError](err)
	op, called := errors.AsType[*smithy.OperationError](err)
	switch {
	case err == nil:
		return "the broker has no AWS credentials yet"
	case !behind && judge(err) == denied:
		return "STS does not give the broker's web identity its role: let the role's trust policy name this cluster's issuer and the broker's service account"
	case behind, called && op.Service() == sts.ServiceID, judge(err) != away:
		return s.problem(err)
	}
	return "the broker obtains no AWS credentials: give it keys, a web identity or EKS Pod Identity, as docs/aws.md says (" + reachError(err) + ")"
}

// refusedKeys says what a code of staleCodes or ownCodes means for the person who set the credentials.
func refusedKeys(a answer) string {
	fix := "their access key does not exist or is inactive. Correct the key in the Secret, file or variable that it comes from"
	switch {
	case strings.HasPrefix(a.code, "ExpiredToken"):
		fix = "they have expired. Replace them where they come from"
	case strings.HasPrefix(a.code, "SignatureDoesNotMatch"), strings.HasPrefix(a.code, "InvalidSignature"), strings.Contains(a.message, "signature we calculated"):
		fix = "their secret access key is not that of their access key. Correct both in the Secret, file or variable that they come from"
	case a.code == "RequestExpired", a.code == "RequestTimeTooSkewed":
		fix = "the calls are dated wrongly. Set the clock of this node"
	case a.code == "OptInRequired":
		fix = "the account is not subscribed to the service"
	}
	return fmt.Sprintf("(%s): %s", a.code, fix)
}

// noise is what the SDK says of an answer that never came.
const noise = "https response error StatusCode: 0, RequestID: , "

// localEnd is our own end of a connection, whose port differs from call to call.
var localEnd = regexp.MustCompile(`((?:read|write) (?:tcp|udp)) [^ ]+->`)

// reachError is the end of an error of the connection, which names what failed, without what differs from call to call.
func reachError(err error) string {
	text := cause(err).Error()
	if i := strings.LastIndex(text, noise); i >= 0 {
		text = text[i+len(noise):]
	}
	return clip.Bytes(localEnd.ReplaceAllString(text, "$1 "), maxWords)
}
