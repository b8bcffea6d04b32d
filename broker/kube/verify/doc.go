// Package verify verifies the service-account tokens of pods: offline with the API server's published signing keys
// ([JWKS]), or by asking the API server about each token ([TokenReview]).
//
// It promises that a token that both accept belongs to a pod, was made for our audience by an accepted issuer, and is
// within its life, which is bounded. A flood of worthless tokens neither keeps others from being verified, nor reaches
// the API server. An error says whether the token is bad or the API server could not be asked. No error, log or panic
// holds a token.
//
// It does not say whether the pod still exists: broker/kube's Directory does. It decides nothing about roles.
package verify
