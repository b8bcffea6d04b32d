package webhook

// Bounds of reviews.
const (
	MaxReview = maxReview
	MaxShared = maxShared
	MaxMemory = maxMemory
	MaxSmall  = maxSmall
	MaxCost   = maxCost
	MaxLarge  = maxLarge
)

// MaxConnections is how many connections may be open.
const MaxConnections = maxConnections

// Refusal is what a user is told of an error.
var Refusal = refusal

// Cost is the memory that is reserved for a review, and ReadingCost while it arrives.
var (
	Cost        = cost
	ReadingCost = readingCost
)
