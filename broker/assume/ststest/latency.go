package ststest

import (
	"math"
	"math/rand/v2"
	"sync"
	"time"
)

// Uniform returns latencies for Behavior.Latencies, uniformly distributed from minimum to maximum. The same seed gives the same
// sequence.
func Uniform(minimum, maximum time.Duration, seed uint64) func() time.Duration {
	return draw(seed, func(r *rand.Rand) time.Duration {
		return minimum + time.Duration(r.Float64()*float64(maximum-minimum))
	})
}

// z99 is the 99th percentile of the standard normal distribution.
const z99 = 2.3263478740408408

// Percentiles returns latencies with the median p50 and the 99th percentile p99. They are log-normal, like those of services:
// never negative, with a long tail. Both must be positive.
func Percentiles(p50, p99 time.Duration, seed uint64) func() time.Duration {
	middle := math.Log(float64(p50))
	deviation := (math.Log(float64(p99)) - middle) / z99
	return draw(seed, func(r *rand.Rand) time.Duration {
		return time.Duration(math.Exp(middle + deviation*r.NormFloat64()))
	})
}

// draw makes f safe for concurrent use.
func draw(seed uint64, f func(*rand.Rand) time.Duration) func() time.Duration {
	var mu sync.Mutex
	r := rand.New(rand.NewPCG(seed, seed)) //nolint:gosec // Latencies must be repeatable.
	return func() time.Duration {
		mu.Lock()
		defer mu.Unlock()
		return f(r)
	}
}
