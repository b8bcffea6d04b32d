package certs

import (
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"time"
)

// KeyPair is a certificate chain with its private key, followed on disk. Make it with [NewKeyPair]; the zero value refuses
// every handshake. Its methods may be called concurrently.
type KeyPair struct {
	files *reloader[tls.Certificate]
}

// NewKeyPair loads two PEM files: a certificate chain, leaf first, and the leaf's private key. It returns an error if one of
// them cannot be read, is larger than 1 MiB or malformed, or if the key belongs to another certificate. A program should not
// start then. NewKeyPair accepts an expired leaf, because its renewal may be on the way; see [KeyPair.NotAfter].
//
// log receives one line for each content that is loaded later and one for each bad content. No line contains key material. If
// log is nil, nothing is logged.
func NewKeyPair(certFile, keyFile string, log *slog.Logger) (*KeyPair, error) {
	if certFile == "" || keyFile == "" {
		return nil, errors.New("loading key pair: a certificate file and a key file are required")
	}
	files, err := newReloader("key pair", []string{certFile, keyFile}, log,
		func(contents [][]byte) (*tls.Certificate, error) {
			// No error of X509KeyPair quotes the key.
			cert, err := tls.X509KeyPair(contents[0], contents[1])
			if err != nil {
				return nil, fmt.Errorf("parsing %s and %s: %w", certFile, keyFile, err)
			}
			return &cert, nil
		})
	if err != nil {
		return nil, err
	}
	return &KeyPair{files}, nil
}

// GetCertificate implements tls.Config.GetCertificate. It returns the pair that the files contain now, or the last good one.
// Only the zero value returns an error.
func (p *KeyPair) GetCertificate(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	cert, stale := p.current()
	if cert == nil {
		return nil, stale
	}
	return cert, nil
}

// NotAfter returns the expiration of the served leaf, for metrics and readiness. The zero value returns the zero time, which
// is in the past.
func (p *KeyPair) NotAfter() time.Time {
	cert, _ := p.current()
	if cert == nil {
		return time.Time{}
	}
	return cert.Leaf.NotAfter
}

// ErrPending is in the error of [KeyPair.Err] while the files contain a good pair that is not served yet.
var ErrPending = errors.New("the new pair is pending")

// SetGate makes allow decide when a new pair from the files replaces the served one. allow returns nil to serve next from now
// on, or the reason to wait. It is called again at each handshake, so it must be quick. It must not call methods of p. The
// pair that NewKeyPair loaded needs no permission, because there is no other pair to serve.
//
// A pending pair stays in memory beside the served one. If the files change again, the newest pair is pending.
func (p *KeyPair) SetGate(allow func(serving, next *tls.Certificate) error) {
	if p == nil || p.files == nil {
		return // The zero value serves nothing.
	}
	p.files.mu.Lock()
	defer p.files.mu.Unlock()
	p.files.allow = allow
}

// Err returns nil if the served pair is the one that the files contain now, and otherwise the reason why it is an earlier one.
func (p *KeyPair) Err() error {
	_, stale := p.current()
	return stale
}

func (p *KeyPair) current() (*tls.Certificate, error) {
	if p == nil {
		return (*reloader[tls.Certificate])(nil).current()
	}
	return p.files.current()
}

// ServerConfig returns the TLS configuration of a server that authenticates with pair and requests no client certificate. The
// server serves a new pair from the next handshake on.
//
// The result may be passed to an http.Server or to gRPC's credentials.NewTLS, which add their own ALPN protocols.
func ServerConfig(pair *KeyPair) *tls.Config {
	return &tls.Config{
		MinVersion:     tls.VersionTLS13,
		GetCertificate: pair.GetCertificate,
		// A resumed session would not prove that the server has the current key.
		SessionTicketsDisabled: true,
	}
}
