// Package identity says who asks for credentials: a pod, proven by a service-account token that
// the API server bound to it.
//
// What has not been proven yet says so in its type: an [UnverifiedToken] becomes a [Pod] only
// through a [Verifier]. The package imports only the standard library and decides nothing.
package identity

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
)

// MaxTokenBytes bounds a token before anything looks into it. A pod-bound token of Kubernetes is
// about 1.2 kB; STS itself takes at most 20,000 characters, and a gRPC header list is limited to
// 16 kB by common proxies.
const MaxTokenBytes = 16 << 10

// UnverifiedToken is what a caller presented. It proves nothing, and it prints nothing: within its
// life a token can be replayed, so it must not reach a log.
type UnverifiedToken struct {
	// Where fmt may not call our methods it prints a pointer as an address; printers that follow
	// pointers come upon a function, and can go no further.
	text *func() string
}

// NewUnverifiedToken wraps what a caller presented.
func NewUnverifiedToken(text string) UnverifiedToken {
	reveal := func() string { return text }
	return UnverifiedToken{text: &reveal}
}

// Reveal returns the token's text, for the code that verifies it or presents it.
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

// Pod is a pod as its token names it. The UIDs tell a pod from another one that had the same name
// before.
type Pod struct {
	Namespace         string
	Name              string
	UID               string
	ServiceAccount    string
	ServiceAccountUID string
}

// String returns namespace/name.
func (p Pod) String() string { return p.Namespace + "/" + p.Name }

// peerKey is the key of the address in a context.
type peerKey struct{}

// WithPeer returns a context with the address that a call comes from, without its port. The caller cannot choose the
// address freely. It can choose everything in a token that is not verified yet. Of an IPv6 address only the first 64 bits
// count: one machine has all others (RFC 4291, section 2.5.4).
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

// PeerOf returns the address that a call comes from, or its network if that is IPv6; "" if that is not known.
func PeerOf(ctx context.Context) string {
	address, _ := ctx.Value(peerKey{}).(string)
	return address
}

// Verifier proves tokens. The context may have the caller's address, see [WithPeer]: callers at one address share
// what there is for verification.
//
// Verify returns the pod that the token is bound to, once the token's signature, issuer, audience
// and times have been checked. It returns the zero Pod with an error of kind
// credential.ErrUnauthenticated when the token proves nothing, and of kind
// credential.ErrUnavailable when that could not be found out. A token that is refused for its audience
// alone may have an [OtherAudienceError] as cause. Verify does not say that the pod is
// still alive: that is the binding's part.
type Verifier interface {
	Verify(ctx context.Context, token UnverifiedToken) (Pod, error)
}

// OtherAudienceError is the cause of a refusal for the audience of a token that is genuine otherwise: its signature,
// its issuer and its times were verified. So its pod is known, and can be told that the audience is set wrong. It
// must not be taken for an identity: the token was made for another service, which can replay it.
type OtherAudienceError struct{ Pod Pod }

// Error names the pod.
func (e *OtherAudienceError) Error() string { return "the token is that of pod " + e.Pod.String() }
