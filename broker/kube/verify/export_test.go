package verify

import "context"

// Occupy takes every slot for the verification of signatures, as calls under way do. Each call of release gives one back.
func (v *JWKS) Occupy(ctx context.Context) (release func()) {
	for range v.turns.slots[forAll] {
		_, _ = v.turns.take(ctx, claimant{}) // there is one
	}
	return func() { v.turns.give(forAll) }
}
