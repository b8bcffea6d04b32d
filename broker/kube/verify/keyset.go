package verify

import (
	"context"
	"crypto/ecdsa"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/credence-iam/credence/broker/clip"
	"github.com/credence-iam/credence/broker/credential"
)

const (
	// maxKeys bounds the entries of a key set that are read. An API server has one key per rotation that it still
	// remembers; an external signer (KEP-740) has some dozens at most.
	maxKeys = 256
	// maxMember bounds each member of an unusable entry in logs and errors, in bytes.
	maxMember = 64
	// unusableRetry is when a caller with an unusable key may try again. Keys change rarely.
	unusableRetry = time.Minute
)

// keySet is a JSON Web Key Set. It ignores each entry that the broker does not understand (RFC 7517, section 5), so that a
// key of a new type does not make the other keys unusable.
type keySet struct {
	usable  map[string][]jose.JSONWebKey // :: key ID → keys with that ID
	ignored []ignoredKey
	dropped int // entries after the first maxKeys
}

// ignoredKey is an unusable entry. It has members of RFC 7517, section 4.
type ignoredKey struct {
	digest            [sha256.Size]byte // of the entry as the API server sent it
	id, kty, alg, crv string
	use, cause        string
}

// String lists the members that the entry has.
func (k ignoredKey) String() string {
	var all []string
	for _, member := range [][2]string{{"kid", k.id}, {"kty", k.kty}, {"alg", k.alg}, {"crv", k.crv}, {"use", k.use}} {
		if member[1] != "" {
			all = append(all, fmt.Sprintf("%s %q", member[0], member[1]))
		}
	}
	if len(all) == 0 {
		return "an entry without kty"
	}
	return strings.Join(all, " ")
}

func decodeKeys(entries []json.RawMessage) keySet {
	set := keySet{usable: make(map[string][]jose.JSONWebKey), dropped: max(0, len(entries)-maxKeys)}
	for _, entry := range entries[:len(entries)-set.dropped] {
		var key jose.JSONWebKey
		cause := ""
		switch err := json.Unmarshal(entry, &key); {
		case err != nil:
			cause = err.Error()
		case key.Use != "" && key.Use != "sig":
			cause = "the key is not for signatures"
		case key.Algorithm != "" && !slices.Contains(algorithms, jose.SignatureAlgorithm(key.Algorithm)):
			cause = "the algorithm is not accepted"
		case !key.IsPublic() || !key.Valid():
			cause = "not a valid public key"
		case !isRSAOrECDSA(key):
			cause = "the key type is not accepted"
		}
		if cause == "" {
			set.usable[key.KeyID] = append(set.usable[key.KeyID], key)
			continue
		}
		// The entry may be any JSON value. Only members that are strings are kept.
		var members map[string]any
		_ = json.Unmarshal(entry, &members)
		text := func(member string) string {
			value, _ := members[member].(string)
			return clip.Bytes(value, maxMember)
		}
		set.ignored = append(set.ignored, ignoredKey{
			digest: sha256.Sum256(entry), id: text("kid"), kty: text("kty"), alg: text("alg"), crv: text("crv"), use: text("use"),
			cause: clip.Bytes(cause, 2*maxMember),
		})
	}
	return set
}

// isRSAOrECDSA reports whether [algorithms] use keys of this type.
func isRSAOrECDSA(key jose.JSONWebKey) bool {
	switch key.Key.(type) {
	case *rsa.PublicKey, *ecdsa.PublicKey:
		return true
	}
	return false
}

// report logs each unusable entry that was not in the set before. So it logs an entry once while the API server publishes
// it.
func (s keySet) report(ctx context.Context, log *slog.Logger, before keySet) {
	for _, k := range s.ignored {
		if !slices.ContainsFunc(before.ignored, func(b ignoredKey) bool { return b.digest == k.digest }) {
			log.WarnContext(ctx, "Ignored a token-signing key that this broker cannot use",
				"kid", k.id, "kty", k.kty, "alg", k.alg, "crv", k.crv, "use", k.use, "cause", k.cause)
		}
	}
	if s.dropped > 0 && s.dropped != before.dropped {
		log.WarnContext(ctx, "Ignored token-signing keys above the limit", "ignored", s.dropped, "limit", maxKeys)
	}
}

// unusable returns an error if the API server publishes the key with that ID in a form that the broker cannot use. The
// broker lacks something, not the token. So the kind is credential.ErrUnavailable: a broker of another version may support
// the key.
func (s keySet) unusable(id string) error {
	all := s.ignored
	problem := "the API server publishes no token-signing key that this broker can use, only"
	if len(s.usable) > 0 {
		all = slices.DeleteFunc(slices.Clone(all), func(k ignoredKey) bool { return k.id != clip.Bytes(id, maxMember) })
		problem = "the API server publishes the token's signing key in a form that this broker cannot use:"
	}
	if len(all) == 0 {
		return nil
	}
	names := make([]string, 0, 3)
	for _, k := range all[:min(len(all), cap(names))] {
		names = append(names, k.String())
	}
	if more := len(all) - len(names); more > 0 {
		names = append(names, fmt.Sprintf("%d more", more))
	}
	return &credential.Error{
		Kind: credential.ErrUnavailable, Reason: credential.ReasonTokenKey, RetryAfter: unusableRetry,
		Message: problem + " " + strings.Join(names, ", ") + "; make the API server sign with RSA, or ECDSA on P-256, P-384 or P-521",
	}
}
