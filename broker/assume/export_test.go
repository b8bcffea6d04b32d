package assume

// Bounds for tests.
const (
	MaxAnswer = maxAnswer
	MaxSkew   = maxSkew
)

// The error codes of the table in docs/aws.md.
var (
	StaleCodes    = staleCodes
	OwnCodes      = append(append(append([]string{}, ownCodes...), regionCodes...), identityCodes...)
	DeniedCodes   = deniedCodes
	RejectedCodes = rejectedCodes
)
