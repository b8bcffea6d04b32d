// Package credential has the types that all parts of Credence share: an AWS session, its role, the source of sessions,
// and the errors that cross the wire between a pod and the broker.
//
// It guarantees: no verb, logger or encoder prints a secret; a [RoleARN] is valid or zero; an [Error] says
// what the user must change, and its cause never leaves the process. It imports only the standard library and makes no calls.
package credential

import (
	"context"
	"fmt"
	"log/slog"
	"time"
)

// Credential is one AWS session, the result of one sts:AssumeRole.
type Credential struct {
	// AccessKeyID names the session. It is not secret: it joins the audit log to CloudTrail.
	AccessKeyID string
	// SecretAccessKey signs requests.
	SecretAccessKey Secret
	// SessionToken accompanies each signed request. AWS does not limit its length.
	SessionToken Secret
	// Issued is when the caller of STS sent its request, by the caller's clock. So the session is never older than it looks.
	Issued time.Time
	// Expiration is when AWS stops accepting the session.
	Expiration time.Time
}

// Duration returns the session duration, L in the rules for renewal.
func (c Credential) Duration() time.Duration { return c.Expiration.Sub(c.Issued) }

// Remaining returns the time left at now. It is negative after the expiration.
func (c Credential) Remaining(now time.Time) time.Duration { return c.Expiration.Sub(now) }

// Valid reports whether c is complete at now and has not expired.
func (c Credential) Valid(now time.Time) bool {
	return c.AccessKeyID != "" && !c.SecretAccessKey.Empty() && !c.SessionToken.Empty() && now.Before(c.Expiration)
}

// String returns the access key ID and the expiration, without secrets.
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

// Lease is a session with all that its holder needs: what SDKs read beside it, and when to request it again.
type Lease struct {
	Credential
	// Role is the role of the session.
	Role RoleARN
	// Region is the AWS Region to report to SDKs that request one. Empty: unknown.
	Region string
	// RefreshAfter is how long the holder should wait before it requests the session again.
	RefreshAfter time.Duration
}

// Source returns credentials for keys of type K.
//
// Credential returns a session that is valid when it returns, or the zero Credential and an error. The error is or wraps
// an [*Error] if the user must fix the cause, or if it says when to retry. Issued and Expiration are both set, because
// renewal depends on the time between them. An implementation must return soon after ctx ends.
type Source[K any] interface {
	Credential(ctx context.Context, key K) (Credential, error)
}
