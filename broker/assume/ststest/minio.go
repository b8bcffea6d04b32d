package ststest

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/url"
	"strconv"
	"time"

	"github.com/credence-iam/credence/broker/credential"
)

const (
	// minioTimeout bounds a call of MinIO, which responds within milliseconds.
	minioTimeout = 10 * time.Second

	// maxMinIOAnswer bounds a response of MinIO: three keys. The longest, the token, grows with the policy inside and stays below
	// 8 kB.
	maxMinIOAnswer = 64 << 10
)

// denyAll is the policy of a role without one.
const denyAll = `{"Version":"2012-10-17","Statement":[{"Effect":"Deny","Action":["s3:*"],"Resource":["arn:aws:s3:::*"]}]}`

// MinIO is a MinIO server that makes the keys.
//
// MinIO's own AssumeRole has no roles. It gives the caller a session with the rights of one MinIO user, limited by the policy
// in the request, for at least 15 minutes. So a role is a policy here. If Config.SessionDuration shortens sessions, they end early
// for this server and its callers, but MinIO accepts the keys for the requested duration. Their IDs do not begin with ASIA.
type MinIO struct {
	// Endpoint is its base URL, such as http://127.0.0.1:9000. Required.
	Endpoint string

	// AccessKey and SecretKey belong to the MinIO user whose rights limit each session. Required. They cannot be temporary,
	// because MinIO has no role chaining.
	AccessKey string
	SecretKey credential.Secret

	// Policies has the IAM policy of each role in JSON, by role ARN. Nil gives each role the user's rights. Otherwise a role
	// without an entry can be assumed, as on AWS, but has no rights. MinIO accepts one policy. So a call with a session policy
	// for a role with an entry is refused, because it would get too many rights.
	Policies map[string]string

	// Region is the region in signatures. Default: us-east-1, MinIO's own.
	Region string

	// Client calls Endpoint. Default: a client without a proxy.
	Client *http.Client
}

type minioFront struct {
	url      string
	key      string
	secret   credential.Secret
	region   string
	policies map[string]string
	client   *http.Client
}

func newMinIOFront(cfg MinIO) (*minioFront, error) {
	u, err := url.Parse(cfg.Endpoint)
	if err != nil || u.Host == "" || (u.Scheme != "http" && u.Scheme != "https") || (u.Path != "" && u.Path != "/") {
		return nil, fmt.Errorf("checking MinIO.Endpoint %q: want http://HOST:PORT", cfg.Endpoint)
	}
	if cfg.AccessKey == "" || cfg.SecretKey.Empty() {
		return nil, errors.New("checking MinIO.AccessKey and MinIO.SecretKey: both are required")
	}
	for arn, policy := range cfg.Policies {
		if _, err := parseRoleARN(arn); err != nil {
			return nil, fmt.Errorf("checking MinIO.Policies: %w", err)
		}
		if !json.Valid([]byte(policy)) || len(policy) > maxPolicy {
			return nil, fmt.Errorf("checking MinIO.Policies: the policy of %s must be JSON of at most %d bytes", arn, maxPolicy)
		}
	}
	client := cfg.Client
	if client == nil {
		// It uses no proxy, because MinIO runs on this machine or near it.
		client = &http.Client{Transport: &http.Transport{IdleConnTimeout: time.Minute}, Timeout: minioTimeout}
	}
	return &minioFront{
		url:      u.Scheme + "://" + u.Host + "/",
		key:      cfg.AccessKey,
		secret:   cfg.SecretKey,
		region:   cmp.Or(cfg.Region, "us-east-1"),
		policies: maps.Clone(cfg.Policies),
		client:   client,
	}, nil
}

// minted is a session of MinIO.
type minted struct {
	id            string
	secret, token credential.Secret
	expires       time.Time
}

// policy returns the policy that MinIO puts on the session for q.
func (m *minioFront) policy(q assumeRoleInput) (string, error) {
	if m.policies == nil {
		return q.policy, nil
	}
	own, ok := m.policies[q.arn]
	switch {
	case !ok:
		return denyAll, nil
	case q.policy != "":
		return "", validation("The role %s has a MinIO policy, and MinIO cannot narrow it by a session policy", q.arn)
	}
	return own, nil
}

// assumeRole calls MinIO for the keys of q. If the request is valid and MinIO fails, it returns ServiceUnavailable, because for
// callers MinIO is a part of this service.
func (m *minioFront) assumeRole(ctx context.Context, q assumeRoleInput) (minted, error) {
	policy, err := m.policy(q)
	if err != nil {
		return minted{}, err
	}
	form := url.Values{
		"Action":          {"AssumeRole"},
		"Version":         {"2011-06-15"},
		"RoleArn":         {q.arn},
		"RoleSessionName": {q.sessionName},
		"DurationSeconds": {strconv.Itoa(int(q.duration / time.Second))},
	}
	if policy != "" {
		form.Set("Policy", policy)
	}
	body := []byte(form.Encode())
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, m.url, bytes.NewReader(body))
	if err != nil {
		return minted{}, unavailable("making a request for MinIO failed")
	}
	r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	signRequest(r, body, m.key, m.secret, m.region, time.Now())
	resp, err := m.client.Do(r)
	if err != nil {
		if ctx.Err() != nil {
			return minted{}, errNoAnswer
		}
		return minted{}, unavailable("MinIO at " + m.url + " cannot be reached")
	}
	defer func() { _ = resp.Body.Close() }()
	answer, err := io.ReadAll(io.LimitReader(resp.Body, maxMinIOAnswer))
	if err != nil {
		return minted{}, unavailable("reading MinIO's answer failed")
	}
	return parseMinIO(resp.StatusCode, answer)
}

func parseMinIO(status int, answer []byte) (minted, error) {
	if status != http.StatusOK {
		var e errorResponse
		if xml.Unmarshal(answer, &e) != nil || e.Error.Code == "" {
			return minted{}, unavailable("MinIO answered status " + strconv.Itoa(status))
		}
		if status == http.StatusBadRequest {
			return minted{}, fail(http.StatusBadRequest, e.Error.Code, "%s", e.Error.Message)
		}
		// The error has only the code, because a 403 is about MinIO's keys, not about the caller.
		return minted{}, unavailable("MinIO answered status " + strconv.Itoa(status) + " " + e.Error.Code)
	}
	var doc assumeRoleResponse
	if err := xml.Unmarshal(answer, &doc); err != nil || doc.Result == nil {
		return minted{}, unavailable("MinIO's answer is not an AssumeRoleResponse")
	}
	c := doc.Result.Credentials
	expires, err := time.Parse(time.RFC3339, c.Expiration)
	if err != nil || c.AccessKeyID == "" || c.SecretAccessKey == "" || c.SessionToken == "" {
		return minted{}, unavailable("MinIO's answer lacks keys or their expiration")
	}
	return minted{
		id:      c.AccessKeyID,
		secret:  credential.NewSecret(c.SecretAccessKey),
		token:   credential.NewSecret(c.SessionToken),
		expires: expires.UTC().Truncate(time.Second),
	}, nil
}

func unavailable(message string) error {
	return fail(http.StatusServiceUnavailable, "ServiceUnavailable", "%s", message)
}
