package broker

// Waiting returns how many pods wait until their namespaces may have one more grant.
func (p *Prefetch) Waiting() (n int) {
	for _, keys := range p.full.waiting {
		n += len(keys)
	}
	return n
}

// Drain shuts a server down.
var Drain = drain

// Limits of connections.
const (
	MaxUnauthenticated = maxUnauthenticated
	MaxWaiting         = maxWaiting
	MaxPerPod          = maxPerPod
	MaxAge             = maxAge
	DrainTime          = drainTime
	RequestTime        = requestTime
	IdleTime           = idleTime
)
