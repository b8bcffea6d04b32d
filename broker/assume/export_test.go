package assume

import (
	"context"
	"net"
)

// WithDial returns cfg with connections that dial opens.
func WithDial(cfg Config, dial func(ctx context.Context, network, address string) (net.Conn, error)) Config {
	cfg.dial = dial
	return cfg
}

// Bounds that tests need to know.
const (
	MaxAnswer = maxAnswer
	MaxSkew   = maxSkew
)

// The codes of each kind, for the table in docs/aws.md.
var (
	StaleCodes    = staleCodes
	OwnCodes      = append(append(append([]string{}, ownCodes...), regionCodes...), identityCodes...)
	DeniedCodes   = deniedCodes
	RejectedCodes = rejectedCodes
)
