// Package certs loads TLS key pairs and trusted roots from files, and follows
// those files while they are in use: a renewed certificate is served, and a
// new root trusted, without a restart.
//
// It promises that
//   - what stops a program at start-up (a file that is missing, does not parse,
//     or holds a key of another certificate) never stops it later: from then
//     on the last good content stays in use, the failure is logged once for
//     each bad content, and Err tells it to metrics and readiness;
//   - every new connection is judged by the files of that moment. Both sides
//     refuse session resumption, and [ClientConfig] would judge a resumed
//     session by the current roots all the same;
//   - a new pair can be held back until its clients are ready for it, while the
//     present one goes on being served: see [KeyPair.SetGate];
//   - only TLS 1.3 is spoken, and a value that was not made by its constructor
//     refuses every handshake.
//
// Files are read when a handshake needs them, and compared by content. Nothing
// watches them: the kubelet replaces a mounted Secret or ConfigMap by swapping
// the symbolic link ..data, which changes no inode that a watch would sit on,
// and a watching goroutine would wake an idle sidecar. Reading a small pair from
// memory-backed storage and hashing it costs some tens of microseconds
// (BenchmarkKeyPair), a fraction of the handshake that asks for it, so there is
// no minimum time between two reads, and no clock to wait for after a rotation.
//
// Connections that are already open keep what they were opened with. A server
// that wants them judged anew limits their age.
//
// It does not issue, renew or publish certificates, and it authenticates
// servers only: clients prove themselves by tokens, above TLS.
package certs
