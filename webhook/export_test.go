package webhook

// Bounds of reviews.
const (
	MaxReview = maxReview
	MaxShared = maxBodies - maxReview
)
