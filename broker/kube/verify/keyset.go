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
	// maxKeys bounds how many entries of a key set are read. An API server has one key per rotation that it still
	// remembers; an external signer (KEP-740) has some dozens at most.
	maxKeys = 256
	// maxClaimedKey bounds each member of an entry that is not usable, before it is logged or part of an error.
	maxClaimedKey = 64
	// unusableRetry is when a caller may try again whose key is not usable: keys change rarely.
	unusableRetry = time.Minute
)

// keySet is a JSON Web Key Set, as far as it can be used. Entries that the broker does not understand are ignored,
// one by one (RFC 7517, section 5), so that a key of a new kind does not take the others with it.
type keySet struct {
	usable  map[string][]jose.JSONWebKey // :: key id → keys of that id
	ignored []ignoredKey
	dropped int // entries after the first maxKeys
}

// ignoredKey is an entry that is not usable. Its members are those of RFC 7517, section 4.
type ignoredKey struct {
	digest            [sha256.Size]byte // of the entry as it was sent
	id, kty, alg, crv string
	use, why          string
}

// String names what the entry says that it is.
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

// decodeKeys reads the entries of a key set.
func decodeKeys(entries []json.RawMessage) keySet {
	set := keySet{usable: make(map[string][]jose.JSONWebKey), dropped: max(0, len(entries)-maxKeys)}
	for _, entry := range entries[:len(entries)-set.dropped] {
		var key jose.JSONWebKey
		why := ""
		switch err := json.Unmarshal(entry, &key); {
		case err != nil:
			why = err.Error()
		case key.Use != "" && key.Use != "sig":
			why = "it is not for signatures"
		case key.Algorithm != "" && !slices.Contains(algorithms, jose.SignatureAlgorithm(key.Algorithm)):
			why = "its algorithm is not accepted"
		case !key.IsPublic() || !key.Valid():
			why = "it is no valid public key"
		case !verifies(key):
			why = "its type is not accepted"
		}
		if why == "" {
			set.usable[key.KeyID] = append(set.usable[key.KeyID], key)
			continue
		}
		// The members that name it, as far as they are strings: the entry may be anything.
		var members map[string]any
		_ = json.Unmarshal(entry, &members)
		text := func(member string) string {
			value, _ := members[member].(string)
			return clip.Bytes(value, maxClaimedKey)
		}
		set.ignored = append(set.ignored, ignoredKey{
			digest: sha256.Sum256(entry), id: text("kid"), kty: text("kty"), alg: text("alg"), crv: text("crv"), use: text("use"),
			why: clip.Bytes(why, 2*maxClaimedKey),
		})
	}
	return set
}

// verifies reports whether the type of a key is one that [algorithms] use.
func verifies(key jose.JSONWebKey) bool {
	switch key.Key.(type) {
	case *rsa.PublicKey, *ecdsa.PublicKey:
		return true
	}
	return false
}

// report logs each entry that is not usable and was not in the set before. So an entry is logged once for as long
// as it is published.
func (s keySet) report(ctx context.Context, log *slog.Logger, before keySet) {
	for _, k := range s.ignored {
		if !slices.ContainsFunc(before.ignored, func(b ignoredKey) bool { return b.digest == k.digest }) {
			log.WarnContext(ctx, "Ignored a token-signing key that this broker cannot use",
				"kid", k.id, "kty", k.kty, "alg", k.alg, "crv", k.crv, "use", k.use, "cause", k.why)
		}
	}
	if s.dropped > 0 && s.dropped != before.dropped {
		log.WarnContext(ctx, "Ignored token-signing keys above the limit", "ignored", s.dropped, "limit", maxKeys)
	}
}

// unusable returns why tokens signed with the key of that id cannot be verified, although the API server publishes
// it; nil if that is not so. It is the broker that lacks something, not the token: the kind is
// credential.ErrUnavailable, and a broker of another version may know the key.
func (s keySet) unusable(id string) error {
	all := s.ignored
	what := "the API server publishes no token-signing key that this broker can use, only"
	if len(s.usable) > 0 {
		all = slices.DeleteFunc(slices.Clone(all), func(k ignoredKey) bool { return k.id != clip.Bytes(id, maxClaimedKey) })
		what = "the API server publishes the token's signing key in a form that this broker cannot use:"
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
		Message: what + " " + strings.Join(names, ", ") + "; have the API server sign with RSA, or ECDSA on P-256, P-384 or P-521",
	}
}
