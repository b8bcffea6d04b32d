package webhook

// Bounds of reviews.
const (
	MaxReview = maxReview
	MaxBodies = maxBodies
)
