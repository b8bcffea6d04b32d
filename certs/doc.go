// Package certs loads TLS key pairs and root certificates from files and follows the files on disk: servers serve a renewed
// certificate, and clients trust a new root, without a restart.
//
// It guarantees:
//   - A file that is missing or malformed, or a key of another certificate, stops a program only at startup. Later, the last
//     good content stays in use. The log says so once per bad content, and Err reports it to metrics and readiness.
//   - Each new connection is verified with the files of that moment. Neither side resumes sessions, and a client from
//     [ClientConfig] would verify even a resumed session with the current roots.
//   - A new pair can stay pending until its clients have its root, while the present one is served: see [KeyPair.SetGate].
//   - Only TLS 1.3 is accepted, and a value that no constructor made refuses every handshake.
//
// Each handshake reads the files and compares their content. There is no file watch, because the kubelet replaces a mounted
// Secret or ConfigMap by changing the symbolic link ..data: no watched inode would change. A watching goroutine would also
// wake an idle sidecar. Reading a small pair from memory-backed storage and hashing it takes tens of microseconds
// (BenchmarkKeyPair), a fraction of a handshake. So there is no minimum time between two reads, and nothing delays a
// rotation.
//
// Open connections keep the certificates of their handshake. A server that must not wait for them to close limits their age.
//
// The package does not issue, renew or publish certificates. It authenticates servers only; clients authenticate with tokens,
// above TLS.
package certs
