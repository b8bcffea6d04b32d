package sidecar

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/gorilla/mux"

	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/policy"
)

// Names of the EC2 instance metadata service, from "Use the Instance Metadata Service to access
// instance metadata" in the EC2 user guide.
const (
	metadataTokenPath = "/latest/api/token"
	metadataRolesPath = "/latest/meta-data/iam/security-credentials"
	metadataZonePath  = "/latest/meta-data/placement/availability-zone"

	headerToken    = "X-Aws-Ec2-Metadata-Token"
	headerTokenTTL = "X-Aws-Ec2-Metadata-Token-Ttl-Seconds"

	// maxTokenTTL is EC2's own bound, six hours.
	maxTokenTTL = 21600 * time.Second
)

// metadataEarly is how much before its real end a credential is said to expire on the metadata path.
// The Go SDK uses what it got there to the last second, and several SDKs use it longer still when
// they cannot renew, because EC2 forgives that; STS does not.
const metadataEarly = 5 * time.Minute

// routeMetadata serves the metadata service. Other paths of it are 404, security-credentials-extended
// too: SDKs that know that one fall back to the path served here on exactly that status.
func (s *Sidecar) routeMetadata(router *mux.Router) {
	s.route(router, http.MethodPut, metadataTokenPath, s.serveMetadataToken)
	s.route(router, http.MethodGet, metadataRolesPath+"/{role}", s.requireToken(s.serveRoleCredentials))
	for path, answer := range map[string]func(http.ResponseWriter, *state){
		metadataRolesPath:                            serveRoleName,
		"/latest/meta-data/iam/info":                 serveIAMInfo,
		"/latest/meta-data/placement/region":         serveRegion,
		metadataZonePath:                             s.serveZone,
		"/latest/dynamic/instance-identity/document": s.serveIdentityDocument,
	} {
		s.route(router, http.MethodGet, path, s.requireToken(s.withFacts(answer)))
	}
	s.route(router, http.MethodGet, "/latest/meta-data/instance-id", s.requireToken(s.serveInstanceID))
}

// serveMetadataToken begins a session of IMDSv2.
func (s *Sidecar) serveMetadataToken(w http.ResponseWriter, r *http.Request) {
	// EC2's rule: a request that came through a proxy may have been made for somebody outside.
	if _, forwarded := r.Header["X-Forwarded-For"]; forwarded {
		writeError(w, http.StatusForbidden, "FORWARDED", "requests with X-Forwarded-For get no token")
		return
	}
	header := r.Header.Get(headerTokenTTL)
	seconds, err := strconv.ParseUint(header, 10, 32)
	ttl := time.Duration(seconds) * time.Second
	if err != nil || ttl < time.Second || ttl > maxTokenTTL {
		writeError(w, http.StatusBadRequest, "TTL_INVALID", headerTokenTTL+" must be from 1 to 21600")
		return
	}
	// Who wants a token asks for credentials next, and many SDKs ask once: they wait here, and then there.
	if s.state.Load().got.IsZero() {
		_, _ = s.awaitFor(r)
	}
	// The Go and Rust SDKs refuse a token without it.
	w.Header().Set(headerTokenTTL, strconv.FormatUint(seconds, 10))
	writeText(w, s.metadataToken(time.Now().Add(ttl)))
}

// A session token is the second at which it ends and a signature of that, so that nothing has to be
// remembered of tokens given out, however many. The key dies with the process; SDKs get a new token on 401.
const (
	tokenTimeBytes = 8
	tokenBytes     = tokenTimeBytes + sha256.Size
)

func (s *Sidecar) metadataToken(end time.Time) string {
	message, _ := binary.Append(nil, binary.BigEndian, end.Unix()) // an int64 always has a binary form
	return base64.RawURLEncoding.EncodeToString(s.sign(message))
}

// sign appends the signature of message to it.
func (s *Sidecar) sign(message []byte) []byte {
	mac := hmac.New(sha256.New, s.metadataKey)
	mac.Write(message)
	return mac.Sum(message)
}

func (s *Sidecar) metadataTokenValid(token string, now time.Time) bool {
	if len(token) != base64.RawURLEncoding.EncodedLen(tokenBytes) {
		return false
	}
	raw, err := base64.RawURLEncoding.DecodeString(token)
	if err != nil || len(raw) != tokenBytes { // the decoder passes over line breaks
		return false
	}
	message := raw[:tokenTimeBytes:tokenTimeBytes] // the second bound keeps sign from writing into raw
	var end int64
	if _, err := binary.Decode(message, binary.BigEndian, &end); err != nil {
		return false
	}
	return hmac.Equal(raw, s.sign(message)) && now.Unix() < end
}

// requireToken lets requests of a session of IMDSv2 pass and, in v1 mode, those without any; a wrong
// token is refused in both, as EC2 does.
func (s *Sidecar) requireToken(next http.HandlerFunc) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		token := r.Header.Get(headerToken)
		if s.metadata == policy.MetadataV1 && token == "" || s.metadataTokenValid(token, time.Now()) {
			next(w, r)
			return
		}
		writeError(w, http.StatusUnauthorized, "METADATA_TOKEN_INVALID", "get a token with PUT "+metadataTokenPath)
	}
}

// awaitFor is await with the patience of whoever sent r.
func (s *Sidecar) awaitFor(r *http.Request) (*state, error) {
	if strings.Contains(r.UserAgent(), "aws-sdk-go-v2/") {
		return s.await(r.Context(), shortPatience)
	}
	return s.await(r.Context(), patience)
}

// withFacts hands what is known to answer, or says why nothing is. What a lease tells beside its keys stays true when
// it has ended: an SDK that is told no region complains of that, and not of the outage, and may remember it.
func (s *Sidecar) withFacts(answer func(http.ResponseWriter, *state)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		st := s.state.Load()
		if st.got.IsZero() {
			var err error
			if st, err = s.awaitFor(r); err != nil {
				writeFailure(w, err)
				return
			}
		}
		answer(w, st)
	}
}

func serveRoleName(w http.ResponseWriter, st *state) {
	writeText(w, st.lease.Role.Name())
}

// metadataCredentials is the metadata service's form of a credential. The Go, PHP and .NET SDKs want
// Code to be "Success". EC2 has no account here; the JavaScript SDK takes it where it is.
type metadataCredentials struct {
	Code        string
	LastUpdated string
	Type        string
	containerCredentials
}

func (s *Sidecar) serveRoleCredentials(w http.ResponseWriter, r *http.Request) {
	st, err := s.awaitFor(r)
	if err != nil {
		writeFailure(w, err)
		return
	}
	if mux.Vars(r)["role"] != st.lease.Role.Name() {
		writeError(w, http.StatusNotFound, "ROLE_UNKNOWN", "this pod's role has another name: "+metadataRolesPath+" tells it")
		return
	}
	credentials := credentialsOf(st.lease)
	credentials.Expiration = metadataExpiration(st.lease.Credential, time.Now()).UTC().Format(timeForm)
	writeJSON(w, http.StatusOK, mustJSON(metadataCredentials{
		Code: "Success", LastUpdated: st.lease.Issued.UTC().Format(timeForm), Type: "AWS-HMAC", containerCredentials: credentials,
	}))
}

// metadataExpiration is early, but not past: an SDK that is told of an expired credential makes up
// an expiration of its own, later than the real one.
func metadataExpiration(c credential.Credential, now time.Time) time.Time {
	if early := c.Expiration.Add(-metadataEarly); early.After(now) {
		return early
	}
	return c.Expiration
}

// serveIAMInfo names no instance profile, because the pod has none.
func serveIAMInfo(w http.ResponseWriter, st *state) {
	writeJSON(w, http.StatusOK, mustJSON(struct{ Code, LastUpdated string }{
		"Success", st.lease.Issued.UTC().Format(timeForm),
	}))
}

func serveRegion(w http.ResponseWriter, st *state) {
	if st.lease.Region == "" {
		regionUnknown(w)
		return
	}
	writeText(w, st.lease.Region)
}

// zoneOf is the zone to tell beside region, or empty: region and one letter, since SDKs make a region of it by cutting
// one off. Programs take it for where to put replicas, so none is made up: all would be put into the same.
func (s *Sidecar) zoneOf(region string) string {
	letter, ok := strings.CutPrefix(s.zone, region)
	if region == "" || !ok || len(letter) != 1 || letter < "a" || letter > "z" {
		return ""
	}
	return s.zone
}

func (s *Sidecar) serveZone(w http.ResponseWriter, st *state) {
	zone := s.zoneOf(st.lease.Region)
	if zone == "" {
		writeError(w, http.StatusNotFound, "ZONE_UNKNOWN", "the availability zone is not known here: ask for placement/region, or set AWS_REGION")
		return
	}
	writeText(w, zone)
}

// serveIdentityDocument tells what SDKs read of it. The account is the role's.
func (s *Sidecar) serveIdentityDocument(w http.ResponseWriter, st *state) {
	if st.lease.Region == "" {
		regionUnknown(w)
		return
	}
	writeJSON(w, http.StatusOK, mustJSON(struct {
		AccountID string `json:"accountId"`
		Region    string `json:"region"`
		Zone      string `json:"availabilityZone,omitempty"`
	}{st.lease.Role.Account(), st.lease.Region, s.zoneOf(st.lease.Region)}))
}

func regionUnknown(w http.ResponseWriter) {
	writeError(w, http.StatusNotFound, "REGION_UNKNOWN", "the broker told no region: set AWS_REGION, or the pod's region annotation")
}

// serveInstanceID answers with the form of an instance id that belongs to no instance and stays the
// same for the pod's life. It comes from the authorization, which must not be found out from it.
func (s *Sidecar) serveInstanceID(w http.ResponseWriter, _ *http.Request) {
	sum := sha256.Sum256(append([]byte("instance-id "), s.authorization...))
	writeText(w, "i-"+hex.EncodeToString(sum[:])[:17])
}

func writeText(w http.ResponseWriter, text string) {
	write(w, http.StatusOK, typeText, []byte(text))
}
