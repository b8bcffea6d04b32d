// Package assume turns grants into AWS sessions by calling STS AssumeRole. It is the only package
// that imports the AWS SDK.
//
// Its promise: exactly what the grant says is sent, nothing else, and what STS answers is told apart
// into refusals (a person must change something), throttling and outages (ask again), and failures
// of the broker's own credentials (an operator must act). It caches nothing but those credentials,
// which it renews ahead and reads again when STS takes them no longer. What answers and is not STS
// gives no credential, and nothing of what it said is passed on.
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
	// Region is the region whose STS endpoint is used. Default: the SDK's (AWS_REGION, profile). One
	// of the two is required.
	Region string
	// Endpoint replaces the regional STS endpoint, for STS-compatible services. Default: AWS's own.
	Endpoint string
	// FirstHop is a role to assume before any other, with the broker's own credentials. Default:
	// none. AWS limits sessions to one hour whenever the caller is itself an assumed role, as it is
	// behind this hop (role chaining).
	FirstHop credential.RoleARN
	// Observe is told of each call when it has ended, by whoever made it, and must not block.
	// Default: nobody is told.
	Observe func(Call)
	// Logger is told of own credentials that cannot be renewed and of a clock that is wrong. Default:
	// nobody is told.
	Logger *slog.Logger
	// Dial opens connections to STS, and to sources of the broker's own credentials, instead of the network. Default: TCP.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
}

// Call is one call that was made, for metrics: all its values are from small sets.
type Call struct {
	// Action is AssumeRole, GetCallerIdentity, or [ActionOwnCredentials].
	Action string
	// Outcome is "ok", or the text of the [credential.Reason] of the failure.
	Outcome string
	// Took is from the first byte to the verdict.
	Took time.Duration
}

// ActionOwnCredentials is a question to the source of the broker's own credentials: a file, instance
// metadata, or STS by a web identity token.
const ActionOwnCredentials = "OwnCredentials"

// STS assumes roles. It implements credential.Source for grants.
type STS struct {
	client  *sts.Client // signs with what each call brings
	own     *own
	clock   *clock
	region  string
	observe func(Call)
	proof   proof
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
		// One attempt: package cache decides when to try again, with the whole picture.
		config.WithRetryer(func() aws.Retryer { return aws.NopRetryer{} }),
		// The SDK's own kind of client: with another one it refuses AWS_CA_BUNDLE.
		config.WithHTTPClient(client),
		// EKS Pod Identity and the like would be asked by a client without these bounds.
		config.WithEndpointCredentialOptions(func(o *endpointcreds.Options) { o.HTTPClient = client }),
		// Its own lines are about connections, and would go to stderr as they are.
		config.WithLogger(logging.LoggerFunc(func(_ logging.Classification, format string, v ...any) {
			log.Debug("The AWS SDK reports", "text", fmt.Sprintf(format, v...))
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
		return nil, errors.New("no AWS region is known: set --region, or AWS_REGION")
	}
	s.region = loaded.Region
	s.client = sts.NewFromConfig(loaded, func(o *sts.Options) {
		o.HTTPSignerV4 = new(signer)
		if cfg.Endpoint != "" {
			o.BaseEndpoint = aws.String(cfg.Endpoint)
		}
	})
	s.own = &own{clock: s.clock, log: log, ask: func(ctx context.Context) (aws.Credentials, error) { return s.load(ctx, options) }}
	if !cfg.FirstHop.IsZero() {
		base := s.own
		s.own = &own{clock: s.clock, log: log, ask: func(ctx context.Context) (aws.Credentials, error) { return s.hop(ctx, base, cfg.FirstHop) }}
	}
	return s, nil
}

// Region returns the region whose STS is used.
func (s *STS) Region() string { return s.region }

// ClockSkew returns how far AWS's clock is ahead of ours, to the second, by the last answer; known is
// false before the first one.
func (s *STS) ClockSkew() (skew time.Duration, known bool) { return s.clock.read() }

// BaseExpiration returns when the credentials that sign the broker's calls expire, by AWS's clock;
// false while there are none, and for credentials without an end.
func (s *STS) BaseExpiration() (time.Time, bool) { return s.own.expiration() }

// Base asks STS who the broker is, and returns the base that completes role names to roles of the
// broker's own account.
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
		return credential.RoleBase{}, fmt.Errorf("asking STS for the broker's own account: %w", cause(err))
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

// Credential assumes the grant's role. Its errors are of type [*credential.Error].
func (s *STS) Credential(ctx context.Context, g policy.Grant) (credential.Credential, error) {
	if g.IsZero() {
		return credential.Credential{}, credential.Errorf(credential.ErrDenied, credential.ReasonRoleMissing, "nothing is granted")
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

// inputFor is the one place where a grant becomes a request: what is not put here is not sent.
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

// session makes a credential of an answer.
//
// The expiration that AWS states is told to pods as it is, because they compare it with clocks that
// need not be ours. Renewal is paced by our clock, though, and must not suffer when it is wrong. AWS
// gives exactly the duration that was asked for, or fails; so where the stated end seems further off
// than that, our clock is behind, and the session counts as ending when what was asked for has passed
// here: renewal keeps its pace, and pods whose clocks are right are told a little too early an end,
// which costs them a question and no more. Where our clock is ahead, sessions seem shorter than they
// are, so they are renewed early, and what pods are told is true. Moving the end back by the skew would
// pace renewal better, and tell pods with right clocks to use a session that has expired.
func (s *STS) session(g policy.Grant, out *sts.AssumeRoleOutput, issued time.Time) (credential.Credential, error) {
	c := out.Credentials
	if !complete(c) {
		return credential.Credential{}, credential.Errorf(credential.ErrUnavailable, credential.ReasonSTSUnavailable,
			"STS answered without complete credentials for %s", g.Role())
	}
	expiration := *c.Expiration
	if longest := issued.Add(g.Duration()).Round(0); expiration.Sub(longest) > maxSkew {
		expiration = longest
	}
	if !time.Now().Before(expiration) {
		why := "which an STS-compatible service may do whose clock is wrong"
		if skew, known := s.clock.read(); known && -skew > maxSkew {
			why = fmt.Sprintf("because the broker's clock is %s ahead of AWS's; its operator must set it", -skew)
		}
		return credential.Credential{}, credential.Errorf(credential.ErrUnavailable, credential.ReasonSTSUnavailable,
			"STS answered with a session for %s that has expired already, %s", g.Role(), why)
	}
	return credential.Credential{
		AccessKeyID:     *c.AccessKeyId,
		SecretAccessKey: credential.NewSecret(*c.SecretAccessKey),
		SessionToken:    credential.NewSecret(*c.SessionToken),
		Issued:          issued,
		Expiration:      expiration,
	}, nil
}

// complete reports whether an answer holds all that a session needs.
func complete(c *types.Credentials) bool {
	return c != nil && aws.ToString(c.AccessKeyId) != "" && aws.ToString(c.SecretAccessKey) != "" &&
		aws.ToString(c.SessionToken) != "" && c.Expiration != nil && !c.Expiration.IsZero()
}

// signed makes a call with own credentials. Where STS takes those for expired or wrong, they are read
// again and the call is made once more: a second refusal is final. The second try also mends a wrong
// clock: from the first answer the SDK has learned by how much to correct the date that it signs.
func (s *STS) signed(ctx context.Context, keys *own, action string, call func(sign func(*sts.Options)) error) error {
	for again := false; ; again = true {
		creds, version, err := keys.get(ctx)
		if err != nil {
			return err
		}
		began := time.Now()
		err = call(func(o *sts.Options) { o.Credentials = credentials.StaticCredentialsProvider{Value: creds} })
		v := judge(err)
		s.tell(action, v, began)
		if keys == s.own && knowsCaller(v, err) {
			s.proof.confirm()
		}
		switch v {
		case stale:
			if again || !keys.refused(version) {
				return err
			}
		case fine, denied, rejected:
			keys.accepted(version, v == denied)
			return err
		default:
			return err
		}
	}
}

// tell reports a call that has ended.
func (s *STS) tell(action string, v verdict, began time.Time) {
	if s.observe != nil {
		s.observe(Call{Action: action, Outcome: v.outcome(), Took: time.Since(began)})
	}
}

// load obtains own credentials from the SDK's default chain. The chain is made anew each time: it reads
// files once, and keeps what it got. A web identity token that STS does not take is read once more.
func (s *STS) load(ctx context.Context, options []func(*config.LoadOptions) error) (aws.Credentials, error) {
	for again := false; ; again = true {
		began := time.Now()
		var creds aws.Credentials
		cfg, err := config.LoadDefaultConfig(ctx, options...)
		if err == nil {
			creds, err = cfg.Credentials.Retrieve(ctx)
		}
		if err == nil {
			s.tell(ActionOwnCredentials, fine, began)
			return creds, nil
		}
		s.tell(ActionOwnCredentials, ownFault, began) // whatever it is: there are no credentials
		if v := judge(err); again || v != stale && v != identity {
			return aws.Credentials{}, err
		}
	}
}

// hopDuration is the most that AWS gives to a role that assumes a role, and every role allows it.
const hopDuration = time.Hour

// hop assumes the first role with the base credentials.
func (s *STS) hop(ctx context.Context, base *own, role credential.RoleARN) (aws.Credentials, error) {
	var out *sts.AssumeRoleOutput
	err := s.signed(ctx, base, "AssumeRole", func(sign func(*sts.Options)) (err error) {
		out, err = s.client.AssumeRole(ctx, &sts.AssumeRoleInput{
			RoleArn:         aws.String(role.String()),
			RoleSessionName: aws.String("credence-broker"),
			DurationSeconds: aws.Int32(int32(hopDuration / time.Second)),
		}, sign)
		if err == nil && !complete(out.Credentials) {
			err = errors.New("STS answered without complete credentials")
		}
		return err
	})
	if err != nil {
		return aws.Credentials{}, &hopError{role: role, err: cause(err)}
	}
	c := out.Credentials
	return aws.Credentials{
		AccessKeyID: *c.AccessKeyId, SecretAccessKey: *c.SecretAccessKey, SessionToken: *c.SessionToken,
		CanExpire: true, Expires: *c.Expiration,
	}, nil
}
