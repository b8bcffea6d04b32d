package verify

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// TestTurnsUnderContention lets callers arrive, wait, give up and finish at random. The number of taken slots never exceeds the
// limit, only verified tokens get the slots for verified tokens, and no waiter and no lane is left at the end.
func TestTurnsUnderContention(t *testing.T) {
	for seed := range uint64(10) {
		synctest.Test(t, func(t *testing.T) {
			r := rand.New(rand.NewPCG(seed, 1))
			turns := newTurns(3, 2)
			var taken [numberOfSlots]atomic.Int64
			for range 3000 {
				c := caller{address: fmt.Sprint(r.IntN(5)), namespace: fmt.Sprint(r.IntN(5)), verified: r.IntN(3) == 0, expected: r.IntN(3) == 0}
				arrival, patience, work := time.Duration(r.IntN(1000)), time.Duration(r.IntN(50)), time.Duration(1+r.IntN(3))
				go func() {
					time.Sleep(arrival)
					ctx, cancel := context.WithTimeout(t.Context(), patience)
					defer cancel()
					s, err := turns.take(ctx, c)
					if err != nil {
						return
					}
					if n := taken[s].Add(1); n > int64(turns.slots[s]) || s == forVerified && !c.verified {
						t.Errorf("seed %d: %d callers have a slot of kind %d, the last one is %+v", seed, n, s, c)
					}
					time.Sleep(work)
					taken[s].Add(-1)
					turns.release(s)
				}()
			}
			time.Sleep(time.Second)
			if n, waiting := turns.state(); n != 0 || waiting != 0 {
				t.Errorf("seed %d: at the end %d slots are taken and %d callers wait", seed, n, waiting)
			}
			for kind := range turns.kinds {
				if g := &turns.kinds[kind]; len(g.lanes) != 0 || g.order.Len() != 0 {
					t.Errorf("seed %d: at the end there are lanes of kind %d", seed, kind)
				}
			}
		})
	}
}
