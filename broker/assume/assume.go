// Package assume turns grants into AWS sessions by calling STS AssumeRole. It is the only package
// that imports the AWS SDK.
//
// Its promise: exactly what the grant says is sent, nothing else, and what STS answers is told apart
// into refusals (a person must change something), throttling and outages (ask again), and failures
// of the broker's own credentials (an operator must act). It caches nothing but those credentials.
package assume

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/aws/arn"
	"github.com/aws/aws-sdk-go-v2/aws/retry"
	awshttp "github.com/aws/aws-sdk-go-v2/aws/transport/http"
	"github.com/aws/aws-sdk-go-v2/config"
	"github.com/aws/aws-sdk-go-v2/credentials/stscreds"
	"github.com/aws/aws-sdk-go-v2/service/sts"
	"github.com/aws/aws-sdk-go-v2/service/sts/types"
	"github.com/aws/smithy-go"
	smithyhttp "github.com/aws/smithy-go/transport/http"

	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/policy"
)

// Config configures [New].
type Config struct {
	// Region is the region whose STS endpoint is used. Default: the SDK's (AWS_REGION, profile). One
	// of the two is required.
	Region string
	// Endpoint replaces the regional STS endpoint, for STS-compatible services. Default: AWS's own.
	Endpoint string
	// FirstHop is a role to assume before any other, with the broker's own credentials. Default:
	// none. AWS limits sessions to one hour whenever the caller is itself an assumed role, as it is
	// behind this hop (role chaining).
	FirstHop credential.RoleARN
	// Dial opens connections to STS instead of the network. Default: TCP.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
}

// STS assumes roles. It implements credential.Source for grants.
type STS struct {
	client *sts.Client
	region string
}

var _ credential.Source[policy.Grant] = (*STS)(nil)

// callTimeout bounds one HTTP exchange with STS. It answers in 50 to 300 ms; one that takes 10 s is
// better given up, and its slot used for another role.
const callTimeout = 10 * time.Second

// maxIdleConns is how many connections to STS are kept for the next calls: as many as package cache
// makes at once by default, so that a wave of renewals does not begin with handshakes.
const maxIdleConns = 64

// New loads the broker's own AWS configuration from the SDK's default chain. It calls nobody.
func New(ctx context.Context, cfg Config) (*STS, error) {
	options := []func(*config.LoadOptions) error{
		// One attempt: package cache decides when to try again, with the whole picture.
		config.WithRetryer(func() aws.Retryer { return aws.NopRetryer{} }),
		// The SDK's own kind of client: with another one it refuses AWS_CA_BUNDLE.
		config.WithHTTPClient(awshttp.NewBuildableClient().WithTimeout(callTimeout).WithTransportOptions(func(t *http.Transport) {
			t.MaxIdleConnsPerHost = maxIdleConns
			if cfg.Dial != nil {
				t.DialContext = cfg.Dial
			}
		})),
	}
	if cfg.Region != "" {
		options = append(options, config.WithRegion(cfg.Region))
	}
	loaded, err := config.LoadDefaultConfig(ctx, options...)
	if err != nil {
		return nil, fmt.Errorf("loading the AWS configuration: %w", err)
	}
	if loaded.Region == "" {
		return nil, errors.New("no AWS region is known: set --region, or AWS_REGION")
	}
	endpoint := func(o *sts.Options) {
		if cfg.Endpoint != "" {
			o.BaseEndpoint = aws.String(cfg.Endpoint)
		}
	}
	if !cfg.FirstHop.IsZero() {
		hop := stscreds.NewAssumeRoleProvider(sts.NewFromConfig(loaded, endpoint), cfg.FirstHop.String(), func(o *stscreds.AssumeRoleOptions) {
			o.RoleSessionName = "credence-broker"
		})
		loaded.Credentials = aws.NewCredentialsCache(hop, func(o *aws.CredentialsCacheOptions) {
			o.ExpiryWindow = 5 * time.Minute
		})
	}
	loaded.Credentials = ownCredentials{loaded.Credentials}
	return &STS{client: sts.NewFromConfig(loaded, endpoint), region: loaded.Region}, nil
}

// Region returns the region whose STS is used.
func (s *STS) Region() string { return s.region }

// Base asks STS who the broker is, and returns the base that completes role names to roles of the
// broker's own account.
func (s *STS) Base(ctx context.Context) (credential.RoleBase, error) {
	out, err := s.client.GetCallerIdentity(ctx, &sts.GetCallerIdentityInput{})
	if err != nil {
		return credential.RoleBase{}, fmt.Errorf("asking STS for the broker's own account: %w", err)
	}
	caller, err := arn.Parse(aws.ToString(out.Arn))
	if err != nil {
		return credential.RoleBase{}, fmt.Errorf("reading the broker's own ARN %q: %w", aws.ToString(out.Arn), err)
	}
	return credential.BaseOf(caller.Partition, aws.ToString(out.Account))
}

// AwaitBase is Base, asked again until STS answers or ctx ends: without a base, roles that are written
// as names mean nothing.
func (s *STS) AwaitBase(ctx context.Context, log *slog.Logger) (credential.RoleBase, error) {
	for wait := minBaseWait; ; wait = min(2*wait, maxBaseWait) {
		base, err := s.Base(ctx)
		if err == nil || ctx.Err() != nil {
			return base, err
		}
		log.WarnContext(ctx, "STS does not say which account this is; asking again", "error", err, "retry_in", wait)
		select {
		case <-time.After(wait): //nolint:forbidigo // Few times in a process's life.
		case <-ctx.Done():
		}
	}
}

// Waits between questions for the broker's own account, doubled each time.
const minBaseWait, maxBaseWait = time.Second, 30 * time.Second

// Credential assumes the grant's role. Its errors are of type [*credential.Error].
func (s *STS) Credential(ctx context.Context, g policy.Grant) (credential.Credential, error) {
	if g.IsZero() {
		return credential.Credential{}, credential.Errorf(credential.ErrDenied, credential.ReasonRoleMissing, "nothing is granted")
	}
	input := &sts.AssumeRoleInput{
		RoleArn:         aws.String(g.Role().String()),
		RoleSessionName: aws.String(g.SessionName()),
		DurationSeconds: aws.Int32(int32(g.Duration() / time.Second)), //nolint:gosec // At most 12 h.
	}
	if id := g.ExternalID(); id != "" {
		input.ExternalId = aws.String(id)
	}
	if policy := g.SessionPolicy(); policy != "" {
		input.Policy = aws.String(policy)
	}
	for _, tag := range g.Tags() {
		input.Tags = append(input.Tags, types.Tag{Key: aws.String(tag.Key), Value: aws.String(tag.Value)})
	}
	for _, policyARN := range g.PolicyARNs() {
		input.PolicyArns = append(input.PolicyArns, types.PolicyDescriptorType{Arn: aws.String(policyARN)})
	}
	issued := time.Now()
	out, err := s.client.AssumeRole(ctx, input)
	if err != nil {
		return credential.Credential{}, classify(g, err)
	}
	c := out.Credentials
	if c == nil || aws.ToString(c.AccessKeyId) == "" || aws.ToString(c.SecretAccessKey) == "" || aws.ToString(c.SessionToken) == "" || c.Expiration == nil {
		return credential.Credential{}, credential.Errorf(credential.ErrUnavailable, credential.ReasonSTSUnavailable,
			"STS answered without complete credentials for %s", g.Role())
	}
	return credential.Credential{
		AccessKeyID:     *c.AccessKeyId,
		SecretAccessKey: credential.NewSecret(*c.SecretAccessKey),
		SessionToken:    credential.NewSecret(*c.SessionToken),
		Issued:          issued,
		Expiration:      *c.Expiration,
	}, nil
}

// Codes by what they call for; STS API reference and the common errors of the Query API. Throttling
// arrives as HTTP 400, so the code decides and not the status; retry.DefaultThrottleErrorCodes
// lists that kind.
var (
	baseCredentialCodes = []string{
		"ExpiredToken", "ExpiredTokenException", "InvalidClientTokenId", "UnrecognizedClientException",
		"SignatureDoesNotMatch", "RequestExpired", "MissingAuthenticationToken", "IncompleteSignature",
		"RegionDisabledException", // the broker's region, which no pod chose
	}
	rejectedCodes = []string{
		"ValidationError", "MalformedPolicyDocument", "MalformedPolicyDocumentException",
		"PackedPolicyTooLarge", "PackedPolicyTooLargeException", "InvalidParameterValue",
		"InvalidParameterCombination", "MissingParameter",
	}
)

// maxRejection bounds what is passed on of STS's own words.
const maxRejection = 500

// throttledWait is the least time before a throttled call is made again.
const throttledWait = time.Second

// classify says what err of AssumeRole means for the pod that waits.
func classify(g policy.Grant, err error) error {
	code, message, status := "", "", 0
	if e, ok := errors.AsType[smithy.APIError](err); ok {
		code, message = e.ErrorCode(), e.ErrorMessage()
	}
	if e, ok := errors.AsType[*smithyhttp.ResponseError](err); ok {
		status = e.HTTPStatusCode()
	}
	_, throttled := retry.DefaultThrottleErrorCodes[code]
	e := &credential.Error{Cause: err}
	switch {
	case throttled || status == http.StatusTooManyRequests:
		e.Kind, e.Reason, e.RetryAfter = credential.ErrUnavailable, credential.ReasonSTSThrottled, throttledWait
		e.Message = "STS throttles this account; the broker asks again by itself"
	case errors.Is(err, errOwnCredentials) || slices.Contains(baseCredentialCodes, code):
		e.Kind, e.Reason = credential.ErrUnavailable, credential.ReasonBaseCredential
		e.Message = "the broker's own AWS credentials do not work; its operator must see to it"
	case code == "AccessDenied" || code == "AccessDeniedException":
		e.Kind, e.Reason = credential.ErrDenied, credential.ReasonSTSDenied
		e.Message = fmt.Sprintf("STS refuses role %s: check that it exists, that its trust policy names the broker's role%s, and that the broker may assume it", g.Role(), conditions(g))
	case slices.Contains(rejectedCodes, code):
		e.Kind, e.Reason = credential.ErrInvalid, credential.ReasonSTSRejected
		e.Message = fmt.Sprintf("STS rejects the session for role %s (%s): %s", g.Role(), code, strings.ToValidUTF8(message[:min(len(message), maxRejection)], ""))
	default:
		e.Kind, e.Reason = credential.ErrUnavailable, credential.ReasonSTSUnavailable
		e.Message = "STS cannot be reached or fails; the broker asks again by itself"
	}
	return e
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
	if len(also) == 0 {
		return ""
	}
	return " with " + strings.Join(also, " and ")
}

// ownCredentials marks the failures to obtain the broker's own credentials, for which the SDK has no
// error type.
type ownCredentials struct{ aws.CredentialsProvider }

var errOwnCredentials = errors.New("obtaining the broker's own AWS credentials")

func (o ownCredentials) Retrieve(ctx context.Context) (aws.Credentials, error) {
	creds, err := o.CredentialsProvider.Retrieve(ctx)
	if err != nil {
		return aws.Credentials{}, fmt.Errorf("%w: %w", errOwnCredentials, err)
	}
	return creds, nil
}
