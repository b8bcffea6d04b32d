package installation

import apierrors "k8s.io/apimachinery/pkg/api/errors"

// ForbiddenError means that the user of the command lacks a right.
type ForbiddenError struct {
	// Right is the missing right, such as "create pods/portforward in namespace credence".
	Right string
	// Err is the response of the API server.
	Err error
}

// Error implements error.
func (e *ForbiddenError) Error() string { return "your user may not do this; needs: " + e.Right }

// Unwrap returns the response of the API server.
func (e *ForbiddenError) Unwrap() error { return e.Err }

// forbidden returns a [*ForbiddenError] with the right if the API server's authorization has refused, otherwise err.
func forbidden(err error, right string) error {
	if apierrors.IsForbidden(err) {
		return &ForbiddenError{right, err}
	}
	return err
}
