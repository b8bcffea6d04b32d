// Package ststest is an STS over HTTP: a double of the AWS Security Token
// Service that is a real server, for tests and for the demo.
//
// It speaks the AWS Query protocol (version 2011-06-15) for AssumeRole,
// AssumeRoleWithWebIdentity and GetCallerIdentity, so the AWS SDKs and the AWS CLI
// talk to it unchanged and read its answers and errors as they read the service's
// own. Requests must be signed (Signature Version 4) with the base user's keys or
// with keys that the server issued; parameters are held to the limits of the STS
// API reference; sessions expire, and transitive tags and source identities go on
// through role chaining. What each role does can be changed while it serves:
// latency, faults, garbage, denial, a required external id. So can the whole
// server: it throttles, is away, and has a clock of its own. Every call is
// recorded.
//
// With a MinIO behind it (Config.MinIO), the keys it answers open a real object
// store, while role ARNs and identities stay those of AWS.
//
// It does not judge IAM policies, multi-factor parameters, session token sizes or
// the signatures of web identity tokens, and its packed size is an estimate. It is
// not for production: it keeps the secrets it issued in memory, and serves
// without TLS.
//
// All time comes from package time, so a test may run it in a
// testing/synctest bubble: see StartInMemory.
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

// maxBody bounds a request. The largest that STS accepts is dominated by its
// tags: 50 × (128+256) characters are at most 230 kB when percent-encoded. The
// rest fits in as much again.
const maxBody = 512 << 10

// keepExpired is how long an expired session is still known as expired
// (ExpiredToken) before it is forgotten (InvalidClientTokenId). It only bounds
// memory; an hour is longer than any test looks back.
const keepExpired = time.Hour

// Config says what a Server is. The zero value is usable: every role can be
// assumed at once, by base keys that New makes.
type Config struct {
	// Account is the twelve-digit account of the base user.
	// Default: 123456789012, the account of AWS's own examples.
	Account string

	// UserName is the base user's name. Default: broker.
	UserName string

	// AccessKeyID and SecretAccessKey are the base user's long-lived keys: both
	// or neither. Default: made by New; Server.Keys tells them.
	AccessKeyID     string
	SecretAccessKey credential.Secret

	// Default is what a role does that has no entry in Roles. With Default.Deny
	// set, only the roles in Roles can be assumed, and an unknown one is refused
	// as AWS refuses it, with AccessDenied.
	Default Behavior

	// Roles is what single roles do, by ARN. Default: none.
	Roles map[string]Behavior

	// SessionLife maps the duration a caller asked for (already checked: 15
	// minutes to 12 hours) to the life the session really gets. It is how a test
	// of renewal gets sessions of seconds. Expirations are cut to whole seconds,
	// as AWS states them. Default: what was asked.
	SessionLife func(requested time.Duration) time.Duration

	// Throttle limits the calls of all roles together. Default: no limit.
	Throttle *Throttle

	// MinIO makes a MinIO server mint the keys. Default: minted here; they open
	// nothing but this server.
	MinIO *MinIO

	// OnCall is told of each call when it has been answered or abandoned; one at
	// a time, so it need not be safe for concurrent use, but it holds up
	// answers. Default: nothing is called.
	OnCall func(Call)
}

// Server is the service. It is an http.Handler; Start and StartInMemory serve
// it. It is safe for concurrent use.
type Server struct {
	sessionLife func(time.Duration) time.Duration
	minio       *minioFront
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
	principals map[string]principal // :: access key id → who it is
	sweepAt    int                  // how many principals start the next sweep
}

// principal is who a set of keys belongs to.
type principal struct {
	secret  credential.Secret
	token   credential.Secret // empty for long-lived keys
	expires time.Time         // zero for long-lived keys
	arn     string
	userID  string
	account string

	chains         bool            // an assumed role: what it assumes in turn is chained
	transitive     map[string]bool // keys of its transitive tags, folded to lower case
	sourceIdentity string
}

var (
	accountPattern   = regexp.MustCompile(`^[0-9]{12}$`)
	accessKeyPattern = regexp.MustCompile(`^[A-Za-z0-9_]{16,128}$`) // IAM's limits for an access key id
	userNamePattern  = regexp.MustCompile(`^[\w+=,.@-]{1,64}$`)     // IAM's limits for a user's name
)

// New returns a Server that does what cfg says. It starts nothing: serve it as
// an http.Handler, or use Start.
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
		sessionLife: cfg.SessionLife,
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
	if cfg.MinIO != nil {
		var err error
		if s.minio, err = newMinIOFront(*cfg.MinIO); err != nil {
			return nil, err
		}
	}
	return s, nil
}

// Keys returns the base user's access key id and secret access key, which sign
// the first AssumeRole.
func (s *Server) Keys() (accessKeyID string, secretAccessKey credential.Secret) {
	return s.baseKeyID, s.base.secret
}

// UserARN returns the base user's ARN, which GetCallerIdentity answers for its
// keys.
func (s *Server) UserARN() string { return s.base.arn }

// SetRole changes what one role does, from the next call on. A role that is set
// no longer follows the default.
func (s *Server) SetRole(arn string, b Behavior) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.roles[arn] = newRole(b)
}

// SetDefault changes what all roles do that were not set by themselves, from the
// next call on.
func (s *Server) SetDefault(b Behavior) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.fallback = newRole(b)
}

// SetIdentity changes what GetCallerIdentity does, from the next call on. Only
// Latency, Hold and Fault count: AWS lets everybody ask who they are.
func (s *Server) SetIdentity(b Behavior) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.identity = newRole(b)
}

// Calls returns the calls so far, oldest first, those in progress included. The
// last 100,000 are kept.
func (s *Server) Calls() []Call { return s.log.calls() }

// Count returns how many calls have arrived for an action and a role; "" stands
// for any. Unlike Calls it forgets none.
func (s *Server) Count(action, roleARN string) int { return s.log.count(action, roleARN) }

// Answered returns how many calls were answered with an error code; "" stands for
// success, and "Garbled" for an answer that a fault spoilt. It forgets none.
func (s *Server) Answered(code string) int { return s.log.answered(code) }

// AwaitCount waits until Count(action, roleARN) is at least n. A call counts when
// it arrives, so it tells that a hanging call has begun. It fails when ctx ends.
func (s *Server) AwaitCount(ctx context.Context, action, roleARN string, n int) error {
	return s.log.await(ctx, action, roleARN, n)
}

// ServeHTTP answers one call.
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
		// The documented way to make net/http close the connection unanswered.
		panic(http.ErrAbortHandler)
	}
	var issued string
	if res, ok := result.(*assumeRoleResult); ok {
		issued = res.Credentials.AccessKeyID
	}
	answer := newAnswer(id, s.now(), result, err)
	code := codeOf(err)
	if garble != nil {
		garble(answer)
		code = garbled
	}
	// Recorded before it is written: whoever has the answer finds it in Calls.
	s.log.end(call, answer.Status, code, issued)
	answer.write(w)
}

// answer decides one call. An outage comes first, then throttling, then the faults a
// test asked for, so that all of them also meet callers whose keys are not good.
func (s *Server) answer(r *http.Request, form url.Values, body []byte, auth authorization, authErr error) (result any, garble func(*Answer), err error) {
	if err := s.upAndWilling(); err != nil {
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
	if action == "AssumeRoleWithWebIdentity" { // not signed: the token is what proves the caller
		result, err := s.assumeRoleWithWebIdentity(r.Context(), form, b)
		return orNil(result, err), garble, err
	}
	if authErr != nil {
		return nil, garble, authErr
	}
	caller, err := s.authenticate(r, body, auth)
	if err != nil {
		return nil, garble, err
	}
	if action == "GetCallerIdentity" {
		return &callerIdentityResult{Arn: caller.arn, UserID: caller.userID, Account: caller.account}, garble, nil
	}
	session, err := s.assumeRole(r.Context(), form, caller, b)
	return orNil(session, err), garble, err
}

// orNil keeps a nil result out of an interface, in which it would not be nil.
func orNil(result *assumeRoleResult, err error) any {
	if err != nil {
		return nil
	}
	return result
}

// authenticate returns who signed r, or STS's error for keys that are unknown,
// expired, or did not make this signature.
func (s *Server) authenticate(r *http.Request, body []byte, auth authorization) (principal, error) {
	s.mu.Lock()
	p, ok := s.principals[auth.accessKeyID]
	s.mu.Unlock()
	// Long-lived keys have no token, and one sent with them is as wrong as a
	// missing one with temporary keys.
	if !ok || !p.token.Equal(credential.NewSecret(r.Header.Get("X-Amz-Security-Token"))) {
		return principal{}, fail(http.StatusForbidden, "InvalidClientTokenId", "The security token included in the request is invalid.")
	}
	now := s.now()
	if !p.expires.IsZero() && !now.Before(p.expires) {
		return principal{}, fail(http.StatusForbidden, "ExpiredToken", "The security token included in the request is expired")
	}
	if err := auth.verify(r, body, p.secret, now); err != nil {
		return principal{}, err
	}
	return p, nil
}

// remember makes keys known, and now and then forgets those that expired long
// ago, so that a server that runs for days does not grow.
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

// newSecret returns 40 characters, as many as a secret access key has.
func newSecret() credential.Secret { return credential.NewSecret(randomBase64(30)) }

// newToken returns a session token. AWS promises no length; 400 characters are
// about what it sends.
func newToken() credential.Secret { return credential.NewSecret(randomBase64(300)) }

func randomBase64(n int) string {
	b := make([]byte, n)
	_, _ = rand.Read(b) // never fails, by its contract
	return base64.StdEncoding.EncodeToString(b)
}

func newRequestID() string {
	b := make([]byte, 16)
	_, _ = rand.Read(b)
	h := hex.EncodeToString(b)
	return h[:8] + "-" + h[8:12] + "-" + h[12:16] + "-" + h[16:20] + "-" + h[20:]
}
