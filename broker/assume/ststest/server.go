// Package ststest is a double of the AWS Security Token Service for tests and for the demo: a real server over HTTP.
//
// It implements the AWS Query protocol (version 2011-06-15) for AssumeRole, AssumeRoleWithWebIdentity and GetCallerIdentity.
// AWS SDKs and the AWS CLI use it unchanged, and read its responses and errors like those of AWS. It checks signatures
// (Signature Version 4) with the base user's keys or keys that it issued, and the limits of the STS API reference. Sessions
// expire. Role chaining passes on transitive tags and source identities. A test can change the behavior of each role at any
// time: latency, faults, garbage, denial, a required external ID. It can also throttle the whole server, make it unavailable,
// and set its clock. The server records each call.
//
// Doubles of other services can accept its keys: see Authenticate.
//
// It does not evaluate IAM policies, multi-factor parameters, sizes of session tokens, or signatures of web identity tokens. Its
// packed policy size is an estimate. It is not for production: it stores the issued secrets in memory, and serves without TLS.
//
// All time comes from package time, so it works in a testing/synctest bubble: see StartInMemory.
package ststest

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/url"
	"regexp"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"github.com/credence-iam/credence/broker/credential"
)

// maxBody bounds a request. The largest request that STS accepts consists mostly of tags: 50 × (128+256) characters have at most
// 230 kB when percent-encoded. The rest fits in the same size again.
const maxBody = 512 << 10

// keepExpired is how long an expired session is known as expired (ExpiredToken) before the server forgets it
// (InvalidClientTokenId). It only bounds memory; tests look back less than an hour.
const keepExpired = time.Hour

// Config configures [New]. With the zero value, each role can be assumed at once, with base keys that New makes.
type Config struct {
	// Account is the twelve-digit account of the base user.
	// Default: 123456789012, the account of AWS's own examples.
	Account string

	// UserName is the base user's name. Default: broker.
	UserName string

	// AccessKeyID and SecretAccessKey are the base user's long-lived keys: both or neither. Default: New makes them;
	// Server.Keys returns them.
	AccessKeyID     string
	SecretAccessKey credential.Secret

	// Default is the behavior of roles without an entry in Roles. With Default.Deny, only the roles in Roles can be assumed.
	// Other roles are refused with AccessDenied, as by AWS.
	Default Behavior

	// Roles has the behavior of single roles, by ARN. Default: none.
	Roles map[string]Behavior

	// SessionDuration maps the requested duration (after the check: 15 minutes to 12 hours) to the real duration. Tests of renewal
	// use it for sessions of seconds. Expirations have whole seconds, as in AWS. Default: the requested duration.
	SessionDuration func(requested time.Duration) time.Duration

	// Throttle limits the calls of all roles together. Default: no limit.
	Throttle *Throttle

	// OnCall gets each call after its response or its end without one. Calls of OnCall are serialized, and delay responses.
	// Default: none.
	OnCall func(Call)
}

// Server is the service. It is an http.Handler; Start and StartInMemory serve it. It is safe for concurrent use.
type Server struct {
	sessionLife func(time.Duration) time.Duration
	base        principal
	baseKeyID   string
	log         callLog
	serving     *serving // nil unless made by Start or StartInMemory

	mu         sync.Mutex
	limit      *rate.Limiter // nil: none
	outage     Outage
	ended      chan struct{} // closed, and replaced, when a refusing outage begins
	skew       time.Duration // of this server's clock
	identity   *role
	fallback   *role
	roles      map[string]*role
	principals map[string]principal // :: access key ID → its owner
	sweepAt    int                  // number of principals that starts the next sweep
}

// principal is the owner of a set of keys.
type principal struct {
	secret  credential.Secret
	token   credential.Secret // empty for long-lived keys
	expires time.Time         // zero for long-lived keys
	arn     string
	userID  string
	account string

	chains         bool            // It is an assumed role, so its own calls are role chaining.
	transitive     map[string]bool // keys of its transitive tags, in lower case
	sourceIdentity string
}

var (
	accountPattern   = regexp.MustCompile(`^[0-9]{12}$`)
	accessKeyPattern = regexp.MustCompile(`^[A-Za-z0-9_]{16,128}$`) // IAM's limits for an access key ID
	userNamePattern  = regexp.MustCompile(`^[\w+=,.@-]{1,64}$`)     // IAM's limits for a user's name
)

// New returns a Server. It starts nothing: serve it as an http.Handler, or use Start.
func New(cfg Config) (*Server, error) {
	account := cmp.Or(cfg.Account, "123456789012")
	user := cmp.Or(cfg.UserName, "broker")
	switch {
	case !accountPattern.MatchString(account):
		return nil, fmt.Errorf("checking Account %q: want twelve digits", account)
	case !userNamePattern.MatchString(user):
		return nil, fmt.Errorf("checking UserName %q: want 1 to 64 letters, digits or +=,.@-_", user)
	case (cfg.AccessKeyID == "") != cfg.SecretAccessKey.Empty():
		return nil, errors.New("checking AccessKeyID and SecretAccessKey: give both or neither")
	case cfg.AccessKeyID != "" && !accessKeyPattern.MatchString(cfg.AccessKeyID):
		return nil, errors.New("checking AccessKeyID: want 16 to 128 letters, digits or underscores")
	}
	for arn := range cfg.Roles {
		if _, err := parseRoleARN(arn); err != nil {
			return nil, fmt.Errorf("checking Roles: %w", err)
		}
	}
	secret := cfg.SecretAccessKey
	if secret.Empty() {
		secret = newSecret()
	}
	s := &Server{
		sessionLife: cfg.SessionDuration,
		baseKeyID:   cmp.Or(cfg.AccessKeyID, "AKIA"+rand.Text()[:16]),
		base: principal{
			secret:  secret,
			arn:     "arn:aws:iam::" + account + ":user/" + user,
			userID:  stableID("AIDA", account+"/"+user),
			account: account,
		},
		identity:   newRole(Behavior{}),
		fallback:   newRole(cfg.Default),
		roles:      make(map[string]*role, len(cfg.Roles)),
		ended:      make(chan struct{}),
		principals: make(map[string]principal),
		sweepAt:    1024,
	}
	s.log.init(cfg.OnCall)
	s.SetThrottle(cfg.Throttle)
	s.principals[s.baseKeyID] = s.base
	for arn, b := range cfg.Roles {
		s.roles[arn] = newRole(b)
	}
	return s, nil
}

// Keys returns the base user's access key ID and secret access key, which sign the first AssumeRole.
func (s *Server) Keys() (accessKeyID string, secretAccessKey credential.Secret) {
	return s.baseKeyID, s.base.secret
}

// UserARN returns the base user's ARN, which GetCallerIdentity returns for its keys.
func (s *Server) UserARN() string { return s.base.arn }

// SetRole changes the behavior of one role, from the next call on. The role no longer follows the default.
func (s *Server) SetRole(arn string, b Behavior) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.roles[arn] = newRole(b)
}

// SetDefault changes the behavior of all roles without one of their own, from the next call on.
func (s *Server) SetDefault(b Behavior) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.fallback = newRole(b)
}

// SetIdentity changes the behavior of GetCallerIdentity, from the next call on. Only Latency, Hold and Fault count, because AWS
// allows this action to everybody.
func (s *Server) SetIdentity(b Behavior) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.identity = newRole(b)
}

// Calls returns the calls so far, oldest first, including those in progress. It has the last 100,000 calls.
func (s *Server) Calls() []Call { return s.log.calls() }

// Count returns the number of calls for an action and a role; "" matches any. Unlike Calls, it counts all calls.
func (s *Server) Count(action, roleARN string) int { return s.log.count(action, roleARN) }

// Answered returns the number of responses with an error code; "" is success, and "Garbled" a response that a fault changed. It
// counts all calls.
func (s *Server) Answered(code string) int { return s.log.answered(code) }

// AwaitCount waits until Count(action, roleARN) is at least n. A call counts at its arrival, so this also detects a call that
// hangs. It returns an error when ctx ends.
func (s *Server) AwaitCount(ctx context.Context, action, roleARN string, n int) error {
	return s.log.await(ctx, action, roleARN, n)
}

// ServeHTTP handles one call.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	id := newRequestID()
	form, body, err := readForm(w, r)
	if err != nil {
		newAnswer(id, s.now(), nil, err).write(w)
		return
	}
	auth, authErr := parseAuthorization(r.Header.Get("Authorization"))
	call := s.log.begin(newCall(form, auth.accessKeyID))

	ctx, cancel := s.whileUp(r.Context())
	defer cancel()
	result, garble, err := s.answer(r.WithContext(ctx), form, body, auth, authErr)
	if errors.Is(err, errNoAnswer) {
		s.log.end(call, 0, "", "")
		// This panic makes net/http close the connection without a response, see http.ErrAbortHandler.
		panic(http.ErrAbortHandler)
	}
	var issued string
	if res, ok := result.(*assumeRoleResult); ok {
		issued = res.Credentials.AccessKeyID
	}
	answer := newAnswer(id, s.now(), result, err)
	code := Code(err)
	if garble != nil {
		garble(answer)
		code = garbled
	}
	// Record the call before its response, so that a caller with the response finds it in Calls.
	s.log.end(call, answer.Status, code, issued)
	answer.write(w)
}

// answer decides one call: first the outage, then throttling, then the faults of the test. So callers with invalid keys get
// them, too.
func (s *Server) answer(r *http.Request, form url.Values, body []byte, auth authorization, authErr error) (result any, garble func(*Answer), err error) {
	if err := s.checkCapacity(); err != nil {
		return nil, nil, err
	}
	action := form.Get("Action")
	var b Behavior
	switch action {
	case "AssumeRole", "AssumeRoleWithWebIdentity":
		b = s.take(form.Get("RoleArn"))
	case "GetCallerIdentity":
		b = s.takeIdentity()
	case "":
		return nil, nil, fail(http.StatusBadRequest, "MissingAction", "The request is missing an action")
	default:
		return nil, nil, fail(http.StatusBadRequest, "InvalidAction", "Could not find operation %s for version 2011-06-15", action)
	}
	if v := form.Get("Version"); v != "2011-06-15" {
		return nil, nil, fail(http.StatusBadRequest, "InvalidAction", "Could not find operation %s for version %s", action, cmp.Or(v, "NO_VERSION_SPECIFIED"))
	}
	if err := b.delay(r.Context()); err != nil {
		return nil, nil, err
	}
	if b.Fault != nil {
		garble = b.Fault.Garble
	}
	if action == "AssumeRoleWithWebIdentity" { // It is not signed. The token proves the caller.
		result, err := s.assumeRoleWithWebIdentity(form, b)
		return orNil(result, err), garble, err
	}
	if authErr != nil {
		return nil, garble, authErr
	}
	caller, err := s.authenticate(r, auth, sigService, hexSHA256(body))
	if err != nil {
		return nil, garble, err
	}
	if action == "GetCallerIdentity" {
		return &callerIdentityResult{Arn: caller.arn, UserID: caller.userID, Account: caller.account}, garble, nil
	}
	session, err := s.assumeRole(form, caller, b)
	return orNil(session, err), garble, err
}

// orNil keeps a nil result out of an interface, where it would not be nil.
func orNil(result *assumeRoleResult, err error) any {
	if err != nil {
		return nil
	}
	return result
}

// Authenticate returns the ARN of the signer of r, which is a request to a double of another service such as "s3". payload is the
// hash of the body in the canonical request. If the keys are unknown or expired, or did not make the signature, the error has a
// code of STS: see Code. The caller checks payload. The call is not recorded.
func (s *Server) Authenticate(r *http.Request, service, payload string) (arn string, err error) {
	auth, err := parseAuthorization(r.Header.Get("Authorization"))
	if err != nil {
		return "", err
	}
	p, err := s.authenticate(r, auth, service, payload)
	return p.arn, err
}

// authenticate returns the signer of r, or STS's error if the keys are unknown or expired, or did not make the signature.
func (s *Server) authenticate(r *http.Request, auth authorization, service, payload string) (principal, error) {
	s.mu.Lock()
	p, ok := s.principals[auth.accessKeyID]
	s.mu.Unlock()
	// Long-lived keys have no token. A token with them is as wrong as temporary keys without one.
	if !ok || !p.token.Equal(credential.NewSecret(r.Header.Get("X-Amz-Security-Token"))) {
		return principal{}, fail(http.StatusForbidden, "InvalidClientTokenId", "The security token included in the request is invalid.")
	}
	now := s.now()
	if !p.expires.IsZero() && !now.Before(p.expires) {
		return principal{}, fail(http.StatusForbidden, "ExpiredToken", "The security token included in the request is expired")
	}
	if err := auth.verify(r, service, payload, p.secret, now); err != nil {
		return principal{}, err
	}
	return p, nil
}

// remember registers keys. Now and then it forgets keys that expired long ago, so that a server that runs for days does not
// grow.
func (s *Server) remember(accessKeyID string, p principal) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.principals[accessKeyID] = p
	if len(s.principals) < s.sweepAt {
		return
	}
	limit := time.Now().Add(s.skew - keepExpired)
	maps.DeleteFunc(s.principals, func(_ string, p principal) bool {
		return !p.expires.IsZero() && p.expires.Before(limit)
	})
	s.sweepAt = max(1024, 2*len(s.principals))
}

func readForm(w http.ResponseWriter, r *http.Request) (url.Values, []byte, error) {
	if r.URL.Path != "/" {
		return nil, nil, fail(http.StatusNotFound, "UnknownOperationException", "There is nothing at %q; the service is at /", r.URL.Path)
	}
	if r.Method != http.MethodPost {
		return nil, nil, fail(http.StatusMethodNotAllowed, "InvalidAction", "Only POST is served, not %s", r.Method)
	}
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody))
	if err != nil {
		if _, tooLarge := errors.AsType[*http.MaxBytesError](err); tooLarge {
			return nil, nil, fail(http.StatusRequestEntityTooLarge, "RequestEntityTooLarge", "The request is larger than %d bytes", maxBody)
		}
		return nil, nil, fail(http.StatusBadRequest, "MalformedInput", "The request could not be read")
	}
	form, err := url.ParseQuery(string(body))
	if err != nil {
		return nil, nil, fail(http.StatusBadRequest, "MalformedInput", "The request is not a form")
	}
	return form, body, nil
}

// newSecret returns 40 characters, the length of a secret access key.
func newSecret() credential.Secret { return credential.NewSecret(randomBase64(30)) }

// newToken returns a session token. AWS promises no length; 400 characters are typical.
func newToken() credential.Secret { return credential.NewSecret(randomBase64(300)) }

func randomBase64(n int) string {
	b := make([]byte, n)
	_, _ = rand.Read(b) // It never fails.
	return base64.StdEncoding.EncodeToString(b)
}

func newRequestID() string {
	b := make([]byte, 16)
	_, _ = rand.Read(b)
	h := hex.EncodeToString(b)
	return h[:8] + "-" + h[8:12] + "-" + h[12:16] + "-" + h[16:20] + "-" + h[20:]
}
