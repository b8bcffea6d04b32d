package webhook

// Bounds of reviews.
const (
	MaxReview = maxReview
	MaxShared = maxBodies - maxReview
)

// Refusal is what a user is told of an error.
var Refusal = refusal
