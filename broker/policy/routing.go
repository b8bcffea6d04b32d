package policy

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"strings"
)

// RoutingKey says which brokers have the session of a pod warm: package placement ranks brokers by it. Pods
// that share a session have the same one, unless their annotations say the same in two ways, such as a role as a name
// and as an ARN. It grants nothing: any
// broker answers any pod.
//
// The webhook writes it into the sidecar's environment, and brokers make it of the pod that they watch. Where
// the two differ, as they do after a change of this file until pods are replaced, sessions are fetched more
// often than need be, and no pod notices.
type RoutingKey string

// ForPod is the key of one pod among those whose sessions are their own.
func (k RoutingKey) ForPod(uid string) RoutingKey { return k + "/" + RoutingKey(uid) }

// RoutingKey returns the key of a pod whose annotations these are, but for what is added by
// [RoutingKey.ForPod] with [ScopePod]: the webhook cannot know a pod's name and UID. Beside the annotations it
// depends on the pod's namespace and service account only where its session does whatever the rules file says, so
// that a role which many namespaces share is fetched by two brokers and not by all.
func (s Settings) RoutingKey(namespace, serviceAccount string) RoutingKey {
	var owner string
	switch {
	case s.Scope == ScopeServiceAccount:
		owner = namespace + "/" + serviceAccount
	case s.Role == "": // It is the namespace that says which.
		owner = namespace
	}
	hash := sha256.New()
	for _, field := range []string{
		s.Role, s.SessionName, s.ExternalID, encodeTags(s.SessionTags), s.SessionPolicy, strings.Join(s.PolicyARNs, ","),
		string(s.Scope), s.Duration.String(), owner,
	} {
		// Behind its length, so that no two lists of fields are one text.
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
