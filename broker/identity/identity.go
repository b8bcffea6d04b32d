// Package identity identifies callers of the broker: a caller is a pod, and proves it by a service-account token that the
// API server bound to that pod.
//
// The type shows what is proven: only a [Verifier] turns an [UnverifiedToken] into a [Pod]. The package makes no decision
// and imports only the standard library.
package identity

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
)

// MaxTokenBytes bounds a token before it is parsed. A pod-bound token of Kubernetes has about 1.2 kB. STS itself accepts at
// most 20,000 characters, and common proxies limit a gRPC header list to 16 kB.
const MaxTokenBytes = 16 << 10

// UnverifiedToken is a token as a caller sent it. It proves nothing. It never prints its text, because until it expires
// everyone who reads it in a log can replay it.
type UnverifiedToken struct {
	// fmt prints a pointer as an address if it cannot call our methods. Printers that follow pointers find a function and stop.
	text *func() string
}

// NewUnverifiedToken wraps the text of a token.
func NewUnverifiedToken(text string) UnverifiedToken {
	reveal := func() string { return text }
	return UnverifiedToken{text: &reveal}
}

// Reveal returns the token's text. Use it only to verify or send the token.
func (t UnverifiedToken) Reveal() string {
	if t.text == nil {
		return ""
	}
	return (*t.text)()
}

const redacted = "[redacted token]"

// Format implements [fmt.Formatter] for every verb.
func (t UnverifiedToken) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, redacted) }

// String implements [fmt.Stringer].
func (t UnverifiedToken) String() string { return redacted }

// GoString implements [fmt.GoStringer].
func (t UnverifiedToken) GoString() string { return redacted }

// LogValue implements [slog.LogValuer].
func (t UnverifiedToken) LogValue() slog.Value { return slog.StringValue(redacted) }

// MarshalText implements [encoding.TextMarshaler].
func (t UnverifiedToken) MarshalText() ([]byte, error) { return []byte(redacted), nil }

// Pod is a pod as its token names it. The UIDs distinguish it from an earlier pod or service account with the same name.
type Pod struct {
	Namespace         string
	Name              string
	UID               string
	ServiceAccount    string
	ServiceAccountUID string
}

// String returns namespace/name.
func (p Pod) String() string { return p.Namespace + "/" + p.Name }

// peerKey is the context key of the caller's address.
type peerKey struct{}

// WithPeer returns a context with the caller's address, without its port. A caller cannot choose its address freely, but it
// can choose everything in an unverified token. Only the first 64 bits of an IPv6 address count, because one machine can use
// all addresses that share them (RFC 4291, section 2.5.4).
func WithPeer(ctx context.Context, address string) context.Context {
	if ip, err := netip.ParseAddr(address); err == nil {
		ip = ip.Unmap().WithZone("")
		address = ip.String()
		if ip.Is6() {
			address = netip.PrefixFrom(ip, 64).Masked().String()
		}
	}
	return context.WithValue(ctx, peerKey{}, address)
}

// PeerOf returns the caller's address, or its network for IPv6; "" if the context has none.
func PeerOf(ctx context.Context) string {
	address, _ := ctx.Value(peerKey{}).(string)
	return address
}

// Verifier verifies tokens. Implementations must be safe for concurrent use.
type Verifier interface {
	// Verify checks the token's signature, issuer, audience and times, and returns the pod that the token is bound to. It
	// may block until ctx ends. If ctx has the caller's address (see [WithPeer]), callers at one address share one place in
	// the queue for verification.
	//
	// An error comes with the zero Pod. It is of kind credential.ErrUnauthenticated if the token is bad, and of kind
	// credential.ErrUnavailable if Verify could not find out. If only the audience is wrong, the error may have an
	// [OtherAudienceError] as cause. Verify does not check that the pod still exists.
	Verify(ctx context.Context, token UnverifiedToken) (Pod, error)
}

// OtherAudienceError is the cause of a refusal if only the token's audience is wrong: its signature, issuer and times were
// verified. So its pod is known, and an Event on that pod can report the wrong audience. Pod is not an identity: the token
// was made for another service, which can replay it.
type OtherAudienceError struct{ Pod Pod }

// Error names the pod.
func (e *OtherAudienceError) Error() string { return "the token is that of pod " + e.Pod.String() }
