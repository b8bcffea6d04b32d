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

// However callers come, wait, give up and leave, no more have slots than there are, those for verified tokens are for
// these alone, and at the end nothing is left of anybody.
func TestTurnsUnderContention(t *testing.T) {
	for seed := range uint64(10) {
		synctest.Test(t, func(t *testing.T) {
			r := rand.New(rand.NewPCG(seed, 1))
			turns := newTurns(3, 2)
			var taken [numberOfSlots]atomic.Int64
			for range 3000 {
				who := claimant{address: fmt.Sprint(r.IntN(5)), namespace: fmt.Sprint(r.IntN(5)), verified: r.IntN(3) == 0, expected: r.IntN(3) == 0}
				comes, patience, stays := time.Duration(r.IntN(1000)), time.Duration(r.IntN(50)), time.Duration(1+r.IntN(3))
				go func() {
					time.Sleep(comes)
					ctx, cancel := context.WithTimeout(t.Context(), patience)
					defer cancel()
					s, err := turns.take(ctx, who)
					if err != nil {
						return
					}
					if n := taken[s].Add(1); n > int64(turns.slots[s]) || s == forVerified && !who.verified {
						t.Errorf("seed %d: %d have a slot of kind %d, the last is %+v", seed, n, s, who)
					}
					time.Sleep(stays)
					taken[s].Add(-1)
					turns.give(s)
				}()
			}
			time.Sleep(time.Second)
			if n, waiting := turns.state(); n != 0 || waiting != 0 {
				t.Errorf("seed %d: %d slots are taken, and %d wait", seed, n, waiting)
			}
			for kind := range turns.kinds {
				if g := &turns.kinds[kind]; len(g.lanes) != 0 || g.order.Len() != 0 {
					t.Errorf("seed %d: lanes of kind %d are left", seed, kind)
				}
			}
		})
	}
}
