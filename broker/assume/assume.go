// Package assume turns grants into AWS sessions by calling STS AssumeRole. Only this package imports the AWS SDK.
//
// It guarantees:
//   - it sends exactly the inputs of the grant;
//   - its errors distinguish refusals (a user must change something), throttling and outages (a retry may help), and
//     failures of the broker's own credentials (a cluster admin must act);
//   - a response that is not from STS gives no session, and no error passes on its content.
//
// It caches only the broker's own credentials. It renews them before they expire, and loads them again if STS refuses them.
package assume

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/aws/arn"
	awshttp "github.com/aws/aws-sdk-go-v2/aws/transport/http"
	"github.com/aws/aws-sdk-go-v2/config"
	"github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/credentials/endpointcreds"
	"github.com/aws/aws-sdk-go-v2/service/sts"
	"github.com/aws/aws-sdk-go-v2/service/sts/types"
	"github.com/aws/smithy-go/logging"
	"github.com/aws/smithy-go/middleware"

	"github.com/credence-iam/credence/broker/clip"
	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/policy"
)

// Config configures [New].
type Config struct {
	// Region selects the STS endpoint. Required, unless the SDK finds one (AWS_REGION, profile).
	Region string
	// Endpoint replaces the regional STS endpoint, for STS-compatible services. Default: AWS's own.
	Endpoint string
	// AssumeRole is a role that the broker assumes first; its session then signs all other calls. AWS limits sessions to one
	// hour if the caller is itself an assumed role (role chaining). Default: none.
	AssumeRole credential.RoleARN
	// Observe gets each call after it finished, on the goroutine of the call. It must not block. Default: none.
	Observe func(Call)
	// Logger gets failures to renew the broker's own credentials, and a wrong clock. Default: none.
	Logger *slog.Logger
	// Dial opens connections to STS and to sources of the broker's own credentials. Default: TCP.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
}

// Call describes one finished call for metrics. All its values are from small sets.
type Call struct {
	// Action is AssumeRole, GetCallerIdentity, or OwnCredentials.
	Action string
	// Outcome is "ok", or the text of the [credential.Reason] of the failure.
	Outcome string
	// Took is the duration of the call.
	Took time.Duration
}

// actionOwnCredentials is a call to the source of the broker's own credentials: a file, instance metadata, or STS with a
// web identity token.
const actionOwnCredentials = "OwnCredentials"

// STS assumes roles. It implements credential.Source for grants.
type STS struct {
	client  *sts.Client // signs with the credentials of each call
	own     *own
	clock   *clock
	region  string
	observe func(Call)
	proof   identityState
}

var _ credential.Source[policy.Grant] = (*STS)(nil)

// callTimeout bounds one HTTP exchange with STS. STS responds in 50 to 300 ms. After 10 s, another role needs the slot more.
const callTimeout = 10 * time.Second

// maxIdleConns is the number of idle connections to STS. It equals the default concurrency of package cache, so that a burst
// of renewals needs no handshakes.
const maxIdleConns = 64

// New loads the broker's own AWS configuration from the SDK's default chain. It makes no call.
func New(ctx context.Context, cfg Config) (*STS, error) {
	log := cfg.Logger
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	s := &STS{clock: &clock{log: log}, observe: cfg.Observe}
	client := awshttp.NewBuildableClient().WithTimeout(callTimeout).WithTransportOptions(func(t *http.Transport) {
		t.MaxIdleConnsPerHost = maxIdleConns
		t.MaxResponseHeaderBytes = maxAnswerHeader
		t.OnProxyConnectResponse = proxyRefused
		if cfg.Dial != nil {
			t.DialContext = cfg.Dial
		}
	})
	options := []func(*config.LoadOptions) error{
		// One attempt, because package cache schedules retries over all roles.
		config.WithRetryer(func() aws.Retryer { return aws.NopRetryer{} }),
		// The SDK refuses AWS_CA_BUNDLE with any other type of client.
		config.WithHTTPClient(client),
		// Without this option, calls to EKS Pod Identity and similar endpoints have no bounds.
		config.WithEndpointCredentialOptions(func(o *endpointcreds.Options) { o.HTTPClient = client }),
		// By default, the SDK writes its messages about connections to stderr, unformatted.
		config.WithLogger(logging.LoggerFunc(func(_ logging.Classification, format string, v ...any) {
			log.Debug("The AWS SDK logged a message", "text", fmt.Sprintf(format, v...))
		})),
		config.WithAPIOptions([]func(*middleware.Stack) error{wire{s.clock}.add, proxied{http.ProxyFromEnvironment}.add}),
	}
	if cfg.Region != "" {
		options = append(options, config.WithRegion(cfg.Region))
	}
	loaded, err := config.LoadDefaultConfig(ctx, options...)
	if err != nil {
		return nil, fmt.Errorf("loading the AWS configuration: %w", err)
	}
	if loaded.Region == "" {
		return nil, errors.New("no AWS region is configured; set --region or AWS_REGION")
	}
	s.region = loaded.Region
	s.client = sts.NewFromConfig(loaded, func(o *sts.Options) {
		o.HTTPSignerV4 = new(signer)
		if cfg.Endpoint != "" {
			o.BaseEndpoint = aws.String(cfg.Endpoint)
		}
	})
	s.own = &own{clock: s.clock, log: log, load: func(ctx context.Context) (aws.Credentials, error) { return s.load(ctx, options) }}
	if !cfg.AssumeRole.IsZero() {
		base := s.own
		s.own = &own{clock: s.clock, log: log, load: func(ctx context.Context) (aws.Credentials, error) { return s.assumeFirst(ctx, base, cfg.AssumeRole) }}
	}
	return s, nil
}

// Region returns the region of the STS that New configured.
func (s *STS) Region() string { return s.region }

// ClockSkew returns how far AWS's clock is ahead of ours, to the second, by the last response. known is false before the
// first response.
func (s *STS) ClockSkew() (skew time.Duration, known bool) { return s.clock.read() }

// OwnExpiration returns when the broker's own credentials expire, by AWS's clock. It returns false if there are none, or
// if they do not expire.
func (s *STS) OwnExpiration() (time.Time, bool) { return s.own.expiration() }

// Base calls GetCallerIdentity, and returns the base that completes role names to ARNs of the broker's own account.
func (s *STS) Base(ctx context.Context) (credential.RoleBase, error) {
	var out *sts.GetCallerIdentityOutput
	err := s.signed(ctx, s.own, "GetCallerIdentity", func(sign func(*sts.Options)) (err error) {
		out, err = s.client.GetCallerIdentity(ctx, &sts.GetCallerIdentityInput{}, sign)
		return err
	})
	if err != nil {
		if ctx.Err() == nil {
			s.proof.fail(s.problem(err), unsupported(err))
		}
		return credential.RoleBase{}, fmt.Errorf("calling STS for the broker's own account: %w", cause(err))
	}
	caller, err := arn.Parse(aws.ToString(out.Arn))
	if err != nil {
		return credential.RoleBase{}, fmt.Errorf("reading the broker's own ARN %q: %w", clip.Bytes(aws.ToString(out.Arn), maxWords), err)
	}
	base, err := credential.BaseOf(caller.Partition, aws.ToString(out.Account))
	if err != nil {
		return credential.RoleBase{}, fmt.Errorf("reading the broker's own ARN %q: %w", clip.Bytes(aws.ToString(out.Arn), maxWords), bounded{err})
	}
	return base, nil
}

// Credential assumes the role of the grant. Its errors are of type [*credential.Error].
func (s *STS) Credential(ctx context.Context, g policy.Grant) (credential.Credential, error) {
	if g.IsZero() {
		return credential.Credential{}, credential.Errorf(credential.ErrDenied, credential.ReasonRoleMissing, "the grant is empty")
	}
	input := inputFor(g)
	var cred credential.Credential
	err := s.signed(ctx, s.own, "AssumeRole", func(sign func(*sts.Options)) error {
		issued := time.Now()
		out, err := s.client.AssumeRole(ctx, input, sign)
		if err != nil {
			return err
		}
		cred, err = s.session(g, out, issued)
		return err
	})
	if err != nil {
		return credential.Credential{}, s.classify(g, err)
	}
	return cred, nil
}

// inputFor is the only place that turns a grant into a request.
func inputFor(g policy.Grant) *sts.AssumeRoleInput {
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
	input.TransitiveTagKeys = g.TransitiveTagKeys()
	if identity := g.SourceIdentity(); identity != "" {
		input.SourceIdentity = aws.String(identity)
	}
	for _, policyARN := range g.PolicyARNs() {
		input.PolicyArns = append(input.PolicyArns, types.PolicyDescriptorType{Arn: aws.String(policyARN)})
	}
	return input
}

// session converts a response to a session.
//
// Pods get the expiration that AWS states, because they compare it with clocks other than ours. The broker schedules renewals
// by its own clock, which may be wrong. AWS gives exactly the requested duration or fails. So if the stated end is later than
// the requested duration allows, our clock is behind. Then the session ends, for us and for pods, when the requested duration
// has passed here. Renewals stay in time, and pods with correct clocks renew a little early. If our clock is ahead, sessions
// seem shorter, so the broker renews them early, and pods get the true end. Correcting the end by the skew would schedule
// renewals better. But pods with correct clocks would then use an expired session.
func (s *STS) session(g policy.Grant, out *sts.AssumeRoleOutput, issued time.Time) (credential.Credential, error) {
	c := out.Credentials
	if !complete(c) {
		return credential.Credential{}, credential.Errorf(credential.ErrUnavailable, credential.ReasonSTSUnavailable,
			"STS returned incomplete credentials for %s", g.Role())
	}
	expiration := *c.Expiration
	if longest := issued.Add(g.Duration()).Round(0); expiration.Sub(longest) > maxSkew {
		expiration = longest
	}
	if !time.Now().Before(expiration) {
		why := "the clock of an STS-compatible service may be wrong"
		if skew, known := s.clock.read(); known && -skew > maxSkew {
			why = fmt.Sprintf("the broker's clock is %s ahead of AWS's; a cluster admin must set the node's clock", -skew)
		}
		return credential.Credential{}, credential.Errorf(credential.ErrUnavailable, credential.ReasonSTSUnavailable,
			"STS returned a session for %s that has already expired: %s", g.Role(), why)
	}
	return credential.Credential{
		AccessKeyID:     *c.AccessKeyId,
		SecretAccessKey: credential.NewSecret(*c.SecretAccessKey),
		SessionToken:    credential.NewSecret(*c.SessionToken),
		Issued:          issued,
		Expiration:      expiration,
	}, nil
}

// complete reports whether a response has all parts of a session.
func complete(c *types.Credentials) bool {
	return c != nil && aws.ToString(c.AccessKeyId) != "" && aws.ToString(c.SecretAccessKey) != "" &&
		aws.ToString(c.SessionToken) != "" && c.Expiration != nil && !c.Expiration.IsZero()
}

// signed makes a call with credentials from keys. If STS refuses these as expired or wrong, it loads them again and repeats the
// call once. The repeated call also helps if the clock is wrong: the SDK corrects the date after the first response.
func (s *STS) signed(ctx context.Context, keys *own, action string, call func(sign func(*sts.Options)) error) error {
	for repeated := false; ; repeated = true {
		creds, version, err := keys.get(ctx)
		if err != nil {
			return err
		}
		began := time.Now()
		err = call(func(o *sts.Options) { o.Credentials = credentials.StaticCredentialsProvider{Value: creds} })
		v := outcomeOf(err)
		s.report(action, v, began)
		if keys == s.own && knowsCaller(v, err) {
			s.proof.confirm()
		}
		switch v {
		case stale:
			if repeated || !keys.refused(version) {
				return err
			}
		case success, denied, rejected:
			keys.accepted(version, v == denied)
			return err
		default:
			return err
		}
	}
}

// report passes a finished call to Config.Observe.
func (s *STS) report(action string, v outcome, began time.Time) {
	if s.observe != nil {
		s.observe(Call{Action: action, Outcome: v.label(), Took: time.Since(began)})
	}
}

// load loads the broker's own credentials through the SDK's default chain. It builds the chain each time, because a chain reads
// files once and caches the result. If STS refuses a web identity token, load reads the token once more.
func (s *STS) load(ctx context.Context, options []func(*config.LoadOptions) error) (aws.Credentials, error) {
	for repeated := false; ; repeated = true {
		began := time.Now()
		var creds aws.Credentials
		cfg, err := config.LoadDefaultConfig(ctx, options...)
		if err == nil {
			creds, err = cfg.Credentials.Retrieve(ctx)
		}
		if err == nil {
			s.report(actionOwnCredentials, success, began)
			return creds, nil
		}
		s.report(actionOwnCredentials, ownFault, began) // For each cause, there are no credentials.
		if v := outcomeOf(err); repeated || v != stale && v != identity {
			return aws.Credentials{}, err
		}
	}
}

// chainingDuration is the maximum session duration for role chaining. Every role allows it.
const chainingDuration = time.Hour

// assumeFirst assumes the role of Config.AssumeRole with credentials from base.
func (s *STS) assumeFirst(ctx context.Context, base *own, role credential.RoleARN) (aws.Credentials, error) {
	var out *sts.AssumeRoleOutput
	err := s.signed(ctx, base, "AssumeRole", func(sign func(*sts.Options)) (err error) {
		out, err = s.client.AssumeRole(ctx, &sts.AssumeRoleInput{
			RoleArn:         aws.String(role.String()),
			RoleSessionName: aws.String("credence-broker"),
			DurationSeconds: aws.Int32(int32(chainingDuration / time.Second)),
		}, sign)
		if err == nil && !complete(out.Credentials) {
			err = errors.New("STS returned incomplete credentials")
		}
		return err
	})
	if err != nil {
		return aws.Credentials{}, &assumeFirstError{role: role, err: cause(err)}
	}
	c := out.Credentials
	return aws.Credentials{
		AccessKeyID: *c.AccessKeyId, SecretAccessKey: *c.SecretAccessKey, SessionToken: *c.SessionToken,
		CanExpire: true, Expires: *c.Expiration,
	}, nil
}
