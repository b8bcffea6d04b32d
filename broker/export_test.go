package broker

// Waiting returns how many pods wait for room in their namespaces.
func (p *Prefetch) Waiting() (n int) {
	for _, keys := range p.full.waiting {
		n += len(keys)
	}
	return n
}

// Drain is how a server ends.
var Drain = drain

// Bounds of connections.
const (
	MaxUnauthenticated = maxUnauthenticated
	MaxWaiting         = maxWaiting
	MaxPerPod          = maxPerPod
	MaxAge             = maxAge
	DrainTime          = drainTime
	RequestTime        = requestTime
	IdleTime           = idleTime
)
