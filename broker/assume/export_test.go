package assume

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
