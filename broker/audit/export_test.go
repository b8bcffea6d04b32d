package audit

// Bounds and names for tests.
const (
	MaxLine    = maxLine
	Window     = denialWindow
	OtherPeers = otherPeers
)
