package verify

import "context"

// Occupy takes every slot for signatures, as calls under way do. Each call of release releases one slot.
func (v *JWKS) Occupy(ctx context.Context) (release func()) {
	for range v.turns.slots[forAll] {
		_, _ = v.turns.take(ctx, caller{}) // a slot is free
	}
	return func() { v.turns.release(forAll) }
}
