// Package brokerpb is the wire form of the broker's one call: broker.proto, the code generated from
// it, and the mapping of [credential.Error] to and from gRPC statuses.
//
// Wire types stop here: only this package, package client and the broker's RPC method see them.
// Their String methods print every field, secrets included, so no message is ever logged.
package brokerpb
