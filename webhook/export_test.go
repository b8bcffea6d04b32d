package webhook

// Limits of reviews.
const (
	MaxReview = maxReview
	MaxShared = maxShared
	MaxMemory = maxMemory
	MaxSmall  = maxSmall
	MaxCost   = maxCost
	MaxLarge  = maxLarge
)

// MaxConnections is the maximum number of open connections.
const MaxConnections = maxConnections

// Refusal returns the response for an error.
var Refusal = refusal

// Cost is the memory that a review reserves, and ReadingCost the memory while it arrives.
var (
	Cost        = cost
	ReadingCost = readingCost
)
