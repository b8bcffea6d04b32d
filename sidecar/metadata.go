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

// These names are from "Use the Instance Metadata Service to access instance metadata" in the EC2 user guide.
const (
	metadataTokenPath = "/latest/api/token"
	metadataRolesPath = "/latest/meta-data/iam/security-credentials"
	metadataZonePath  = "/latest/meta-data/placement/availability-zone"

	headerToken    = "X-Aws-Ec2-Metadata-Token"
	headerTokenTTL = "X-Aws-Ec2-Metadata-Token-Ttl-Seconds"

	// maxTokenTTL is EC2's limit, six hours.
	maxTokenTTL = 21600 * time.Second
)

// metadataEarly is the time by which a session expires earlier on the metadata path. The SDK for Go uses such a session
// to its last second. Several SDKs use it even longer if they cannot renew it: EC2 tolerates that, STS does not.
const metadataEarly = 5 * time.Minute

// routeMetadata registers the metadata service. Its other paths give 404, also security-credentials-extended: SDKs that try
// it fall back to the path served here only after a 404.
func (s *Sidecar) routeMetadata(router *mux.Router) {
	s.route(router, http.MethodPut, metadataTokenPath, s.serveMetadataToken)
	s.route(router, http.MethodGet, metadataRolesPath+"/{role}", s.requireToken(s.serveRoleCredentials))
	for path, handle := range map[string]func(http.ResponseWriter, *state){
		metadataRolesPath:                            serveRoleName,
		"/latest/meta-data/iam/info":                 serveIAMInfo,
		"/latest/meta-data/placement/region":         serveRegion,
		metadataZonePath:                             s.serveZone,
		"/latest/dynamic/instance-identity/document": s.serveIdentityDocument,
	} {
		s.route(router, http.MethodGet, path, s.requireToken(s.withLease(handle)))
	}
	s.route(router, http.MethodGet, "/latest/meta-data/instance-id", s.requireToken(s.serveInstanceID))
}

// serveMetadataToken starts a session of IMDSv2.
func (s *Sidecar) serveMetadataToken(w http.ResponseWriter, r *http.Request) {
	// As on EC2: a proxy may have forwarded the request for a client outside.
	if _, forwarded := r.Header["X-Forwarded-For"]; forwarded {
		writeError(w, http.StatusForbidden, "FORWARDED", "requests with X-Forwarded-For get no token; call without a proxy")
		return
	}
	header := r.Header.Get(headerTokenTTL)
	seconds, err := strconv.ParseUint(header, 10, 32)
	ttl := time.Duration(seconds) * time.Second
	if err != nil || ttl < time.Second || ttl > maxTokenTTL {
		writeError(w, http.StatusBadRequest, "TTL_INVALID", headerTokenTTL+" must be from 1 to 21600")
		return
	}
	// A client requests credentials after the token, and many SDKs try once. So both requests wait for the first session.
	if s.state.Load().receivedAt.IsZero() {
		_, _ = s.awaitForSDK(r)
	}
	// The SDKs for Go and Rust refuse a token without it.
	w.Header().Set(headerTokenTTL, strconv.FormatUint(seconds, 10))
	writeText(w, s.metadataToken(time.Now().Add(ttl)))
}

// A session token is its expiration in seconds and a signature of that. So the sidecar stores no tokens, however many it
// issues. The key lasts as long as the process. SDKs request a new token after a 401.
const (
	tokenTimeBytes = 8
	tokenBytes     = tokenTimeBytes + sha256.Size
)

func (s *Sidecar) metadataToken(end time.Time) string {
	message, _ := binary.Append(nil, binary.BigEndian, end.Unix()) // never fails for an int64
	return base64.RawURLEncoding.EncodeToString(s.sign(message))
}

// sign returns message followed by its signature.
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
	if err != nil || len(raw) != tokenBytes { // the decoder ignores line breaks
		return false
	}
	message := raw[:tokenTimeBytes:tokenTimeBytes] // the capacity keeps sign from writing into raw
	var end int64
	if _, err := binary.Decode(message, binary.BigEndian, &end); err != nil {
		return false
	}
	return hmac.Equal(raw, s.sign(message)) && now.Unix() < end
}

// requireToken passes requests with a session token of IMDSv2 and, in v1 mode, those without any. A wrong token is refused
// in both modes, as on EC2.
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

// awaitForSDK calls await with the time limit of the SDK that sent r.
func (s *Sidecar) awaitForSDK(r *http.Request) (*state, error) {
	if strings.Contains(r.UserAgent(), "aws-sdk-go-v2/") {
		return s.await(r.Context(), maxWaitShort)
	}
	return s.await(r.Context(), maxWait)
}

// withLease calls handle with the last lease, even if it has expired: role, account and region do not expire. An SDK
// without a region would report that as the problem, instead of the outage, and may cache it.
func (s *Sidecar) withLease(handle func(http.ResponseWriter, *state)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		st := s.state.Load()
		if st.receivedAt.IsZero() {
			var err error
			if st, err = s.awaitForSDK(r); err != nil {
				writeFailure(w, err)
				return
			}
		}
		handle(w, st)
	}
}

func serveRoleName(w http.ResponseWriter, st *state) {
	writeText(w, st.lease.Role.Name())
}

// metadataCredentials is a session in the format of the metadata service. The SDKs for Go, PHP and .NET require that Code
// is "Success". EC2 sends no account; the SDK for JavaScript reads it if it is there.
type metadataCredentials struct {
	Code        string
	LastUpdated string
	Type        string
	containerCredentials
}

func (s *Sidecar) serveRoleCredentials(w http.ResponseWriter, r *http.Request) {
	st, err := s.awaitForSDK(r)
	if err != nil {
		writeFailure(w, err)
		return
	}
	if mux.Vars(r)["role"] != st.lease.Role.Name() {
		writeError(w, http.StatusNotFound, "ROLE_UNKNOWN", "this is not the name of this pod's role; see "+metadataRolesPath)
		return
	}
	credentials := credentialsOf(st.lease)
	credentials.Expiration = metadataExpiration(st.lease.Credential, time.Now()).UTC().Format(timeFormat)
	writeJSON(w, http.StatusOK, mustJSON(metadataCredentials{
		Code: "Success", LastUpdated: st.lease.Issued.UTC().Format(timeFormat), Type: "AWS-HMAC", containerCredentials: credentials,
	}))
}

// metadataExpiration returns an earlier expiration, but not one in the past. An SDK that gets a past expiration invents one
// that is later than the real one.
func metadataExpiration(c credential.Credential, now time.Time) time.Time {
	if early := c.Expiration.Add(-metadataEarly); early.After(now) {
		return early
	}
	return c.Expiration
}

// serveIAMInfo reports no instance profile, because the pod has none.
func serveIAMInfo(w http.ResponseWriter, st *state) {
	writeJSON(w, http.StatusOK, mustJSON(struct{ Code, LastUpdated string }{
		"Success", st.lease.Issued.UTC().Format(timeFormat),
	}))
}

func serveRegion(w http.ResponseWriter, st *state) {
	if st.lease.Region == "" {
		regionUnknown(w)
		return
	}
	writeText(w, st.lease.Region)
}

// zoneOf returns the zone to report beside region, or "". A zone must be region and one letter, because SDKs derive the
// region by removing one. Programs use it to place replicas, so an invented zone would put all replicas into the same.
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
		writeError(w, http.StatusNotFound, "ZONE_UNKNOWN", "the availability zone is unknown; use placement/region, or set AWS_REGION")
		return
	}
	writeText(w, zone)
}

// serveIdentityDocument serves the fields that SDKs read. The account is the role's.
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
	writeError(w, http.StatusNotFound, "REGION_UNKNOWN", "the broker sent no region; set AWS_REGION, or the pod's region annotation")
}

// serveInstanceID serves an ID in the form of an instance ID. It belongs to no instance, and stays the same for the pod's
// life. It is derived from the authorization, which it must not reveal.
func (s *Sidecar) serveInstanceID(w http.ResponseWriter, _ *http.Request) {
	sum := sha256.Sum256(append([]byte("instance-id "), s.authorization...))
	writeText(w, "i-"+hex.EncodeToString(sum[:])[:17])
}

func writeText(w http.ResponseWriter, text string) {
	write(w, http.StatusOK, typeText, []byte(text))
}
