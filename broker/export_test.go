package broker

// Waiting returns how many pods wait for room in their namespaces.
func (p *Prefetch) Waiting() (n int) {
	for _, keys := range p.full.waiting {
		n += len(keys)
	}
	return n
}
