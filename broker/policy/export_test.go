package policy

// What the tests outside of the package look into.
var (
	PodKeys       = podKeys[:]
	NamespaceKeys = namespaceKeys
	MatchGlob     = matchGlob
	EditDistance  = editDistance[Key]
)

// KeptExpressions is how many compiled expressions r keeps, and what they are estimated to take.
func (r *Rules) KeptExpressions() (n, cost int) {
	r.expressions.mu.RLock()
	defer r.expressions.mu.RUnlock()
	return len(r.expressions.kept), r.expressions.cost
}

const MaxMemo = maxMemo
