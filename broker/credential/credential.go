// Package credential holds the nouns that every part of Credence speaks: an AWS session credential,
// the role it belongs to, where credentials come from, and the kinds of error that cross the
// boundary between a pod and the broker.
//
// Its promises: a secret never prints itself, whatever verb, logger or encoder is used; a [RoleARN]
// that exists is valid; an [Error] says what the user should do and keeps its cause inside the
// process. It imports only the standard library and talks to nobody.
package credential

import (
	"context"
	"fmt"
	"log/slog"
	"time"
)

// Credential is one AWS session: the answer of STS AssumeRole.
type Credential struct {
	// AccessKeyID names the session. It is no secret: it joins our audit log to CloudTrail.
	AccessKeyID string
	// SecretAccessKey signs requests.
	SecretAccessKey Secret
	// SessionToken accompanies each signed request. AWS gives its length no bound.
	SessionToken Secret
	// Issued is when the session was asked for, by our clock, so that age is never underestimated.
	Issued time.Time
	// Expiration is when AWS stops accepting the session.
	Expiration time.Time
}

// Life is the length of the whole session, L in the rules for renewal.
func (c Credential) Life() time.Duration { return c.Expiration.Sub(c.Issued) }

// Remaining is how much of the session is left at now; negative once it has expired.
func (c Credential) Remaining(now time.Time) time.Duration { return c.Expiration.Sub(now) }

// Valid reports whether c is complete and not expired at now.
func (c Credential) Valid(now time.Time) bool {
	return c.AccessKeyID != "" && !c.SecretAccessKey.Empty() && !c.SessionToken.Empty() && now.Before(c.Expiration)
}

// String names the session without its secrets.
func (c Credential) String() string {
	return fmt.Sprintf("%s until %s", c.AccessKeyID, c.Expiration.UTC().Format(time.RFC3339))
}

// LogValue implements [slog.LogValuer].
func (c Credential) LogValue() slog.Value {
	return slog.GroupValue(
		slog.String("access_key_id", c.AccessKeyID),
		slog.Time("expiration", c.Expiration),
	)
}

// Lease is a credential together with what its holder needs to serve it to an SDK and to know when
// to ask again.
type Lease struct {
	Credential
	// Role is the role whose session this is.
	Role RoleARN
	// Region is the AWS region to report to clients that ask for one; empty when unknown.
	Region string
	// RefreshAfter is how long the holder should wait before asking again.
	RefreshAfter time.Duration
}

// Source yields credentials for keys of type K.
//
// Credential returns a credential that is valid when it returns, or an error and the zero
// Credential. Where the failure is for the user to mend, or says when to try again, the error is or
// wraps an [*Error]. Issued and Expiration are both set: renewal is paced by the time between them. An
// implementation must return soon after ctx ends.
type Source[K any] interface {
	Credential(ctx context.Context, key K) (Credential, error)
}
