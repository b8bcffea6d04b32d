package certs

import (
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"time"
)

// A KeyPair is a certificate chain and its private key, followed on disk. Make
// one with [NewKeyPair]; the zero value refuses every handshake. Its methods
// may be called concurrently.
type KeyPair struct {
	files *reloader[tls.Certificate]
}

// NewKeyPair loads the PEM files of a certificate chain, leaf first, and of the
// leaf's private key. It returns an error if either cannot be read, is larger
// than 1 MiB, does not parse, or belongs to another one: a program should not
// start with it. A leaf that has expired is loaded, because its renewal may be
// on the way; see [KeyPair.NotAfter].
//
// log gets one record for each content that was loaded later, and one for each
// that could not be; nil discards them. Neither holds key material.
func NewKeyPair(certFile, keyFile string, log *slog.Logger) (*KeyPair, error) {
	if certFile == "" || keyFile == "" {
		return nil, errors.New("loading key pair: a certificate file and a key file are needed")
	}
	files, err := newReloader("key pair", []string{certFile, keyFile}, log,
		func(contents [][]byte) (*tls.Certificate, error) {
			// Of all its errors, none quotes the key.
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

// GetCertificate has the form of tls.Config.GetCertificate. It returns the pair
// that the files hold at this moment, or the last good one; an error only from
// the zero value.
func (p *KeyPair) GetCertificate(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	cert, stale := p.current()
	if cert == nil {
		return nil, stale
	}
	return cert, nil
}

// NotAfter returns the end of validity of the leaf that is served at this
// moment, for metrics and readiness. The zero value answers the zero time,
// which is long past.
func (p *KeyPair) NotAfter() time.Time {
	cert, _ := p.current()
	if cert == nil {
		return time.Time{}
	}
	return cert.Leaf.NotAfter
}

// ErrPending is in what [KeyPair.Err] returns while the files hold a good pair that
// is not served yet.
var ErrPending = errors.New("the new pair is held back")

// SetGate lets allow decide when a pair that has appeared on disk replaces the
// one that is served. allow returns nil to have next served from now on, or why
// not yet, and is asked again at each handshake; so it must be quick, and must
// not call methods of p. The pair that NewKeyPair loaded is not judged: beside
// it there is nothing to serve.
//
// A pair that is held back is kept in memory beside the other. If the files
// change again, the newest is judged.
func (p *KeyPair) SetGate(allow func(serving, next *tls.Certificate) error) {
	if p == nil || p.files == nil {
		return // The zero value serves nothing.
	}
	p.files.mu.Lock()
	defer p.files.mu.Unlock()
	p.files.allow = allow
}

// Err returns nil if what is served is what the files hold at this moment, and
// otherwise why it is an earlier pair.
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

// ServerConfig returns the TLS configuration of a server that proves itself
// with pair and asks clients for no certificate. A new pair on disk is served
// from the next handshake on.
//
// The result may be given to an http.Server or to gRPC's credentials.NewTLS;
// each adds its own ALPN protocols.
func ServerConfig(pair *KeyPair) *tls.Config {
	return &tls.Config{
		MinVersion:     tls.VersionTLS13,
		GetCertificate: pair.GetCertificate,
		// A resumed session would not prove possession of the current key.
		SessionTicketsDisabled: true,
	}
}
