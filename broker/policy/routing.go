package policy

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"strings"
)

// RoutingKey determines which brokers own the session of a pod: package placement ranks brokers by it. Pods that share a
// session have the same key, unless their annotations write the same in two ways, such as a role as a name and as an ARN. It
// grants nothing: any broker serves any pod.
//
// The webhook writes it into the sidecar's environment, and brokers compute it for the pods that they watch. If the two
// differ, as after a change of this file until pods are replaced, brokers fetch more sessions than necessary, and no pod
// notices.
type RoutingKey string

// ForPod returns the key of one pod with [ScopePod].
func (k RoutingKey) ForPod(uid string) RoutingKey { return k + "/" + RoutingKey(uid) }

// RoutingKey returns the key of a pod with these settings, without the part that [RoutingKey.ForPod] adds for [ScopePod]:
// the webhook does not know the pod's UID. It depends on the pod's namespace and service account only if the session
// depends on them whatever the rules file says. So two brokers fetch a role that many namespaces share, not all brokers.
func (s Settings) RoutingKey(namespace, serviceAccount string) RoutingKey {
	var owner string
	switch {
	case s.Scope == ScopeServiceAccount:
		owner = namespace + "/" + serviceAccount
	case s.Role == "": // the namespace has the default role
		owner = namespace
	}
	hash := sha256.New()
	for _, field := range []string{
		s.Role, s.SessionName, s.ExternalID, encodeTags(s.SessionTags), s.SessionPolicy, strings.Join(s.PolicyARNs, ","),
		string(s.Scope), s.Duration.String(), owner,
	} {
		// Each field is behind its length, so that no two lists of fields give one text.
		var length [4]byte
		binary.BigEndian.PutUint32(length[:], uint32(len(field))) //nolint:gosec // Annotations are bounded to 256 KiB.
		hash.Write(length[:])
		hash.Write([]byte(field))
	}
	return RoutingKey(hex.EncodeToString(hash.Sum(nil)[:16]))
}

// RoutingKey returns the key of a live pod. It fails with the error of [Request.Settings].
func (p Pod) RoutingKey() (RoutingKey, error) {
	s, err := p.Request.Settings()
	if err != nil {
		return "", fmt.Errorf("placing pod %s/%s: %w", p.Namespace, p.Name, err)
	}
	key := s.RoutingKey(p.Namespace, p.ServiceAccount)
	if s.Scope == ScopePod {
		key = key.ForPod(p.UID)
	}
	return key, nil
}
