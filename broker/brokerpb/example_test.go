package brokerpb_test

import (
	"errors"
	"fmt"

	"github.com/credence-iam/credence/broker/brokerpb"
	"github.com/credence-iam/credence/broker/credential"
)

// A refusal keeps its kind, reason and message on the way from the broker to the sidecar. Its cause stays in the broker.
func Example() {
	refusal := &credential.Error{
		Kind: credential.ErrDenied, Reason: credential.ReasonRoleNotPermitted,
		Message: "namespace shop does not permit role cart",
		Cause:   errors.New("for the broker's log only"),
	}
	status := brokerpb.ToStatus(refusal) // the broker sends this
	fmt.Println(status.Code())

	received := brokerpb.FromError(status.Err()) // the sidecar gets this
	fmt.Println(credential.ReasonOf(received), errors.Is(received, credential.ErrDenied))
	fmt.Println(received)
	// Output:
	// PermissionDenied
	// ROLE_NOT_PERMITTED true
	// namespace shop does not permit role cart
}
