// Package brokerpb is the wire format of the broker's only call: broker.proto, the code generated from it, and the
// conversion of a [credential.Error] to a gRPC status and back.
//
// Only this package, package client and the broker's RPC method use the wire types. Their String methods print every
// field, secrets included, so no message may be logged.
package brokerpb
