package policy

// What the tests outside of the package look into.
var (
	PodKeys       = podKeys
	NamespaceKeys = namespaceKeys
	MatchGlob     = matchGlob
	EditDistance  = editDistance
)
