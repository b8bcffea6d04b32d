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
	// minioTimeout bounds a call of MinIO, which answers within milliseconds.
	minioTimeout = 10 * time.Second

	// maxMinIOAnswer bounds what is read of one: three keys of which the longest,
	// a token, grows with the policy inside it and stays below 8 kB.
	maxMinIOAnswer = 64 << 10
)

// denyAll is the policy of a role that has none.
const denyAll = `{"Version":"2012-10-17","Statement":[{"Effect":"Deny","Action":["s3:*"],"Resource":["arn:aws:s3:::*"]}]}`

// MinIO is a MinIO server that mints the keys.
//
// MinIO's own AssumeRole knows no roles: it gives its caller a session with the
// rights of one MinIO user, narrowed by the policy in the request, for 15 minutes
// or more. So a role is a policy here. Sessions made shorter by
// Config.SessionLife end early for this server and its callers; MinIO itself
// takes the keys for as long as was asked. Their ids do not begin with ASIA.
type MinIO struct {
	// Endpoint is its base URL, as http://127.0.0.1:9000. Required.
	Endpoint string

	// AccessKey and SecretKey are those of the MinIO user whose rights bound every
	// session. Required. They cannot be temporary: MinIO does not chain.
	AccessKey string
	SecretKey credential.Secret

	// Policies is what each role may do: an IAM policy in JSON, by role ARN. Nil:
	// every role has the user's rights. Otherwise a role that is not in it can
	// be assumed, as on AWS, but may do nothing. MinIO takes one policy, so a
	// role with one here cannot be narrowed by a session policy: such a call is
	// refused rather than answered with too much.
	Policies map[string]string

	// Region is the one requests are signed for. Default: us-east-1, MinIO's own.
	Region string

	// Client reaches Endpoint, where that takes more than a plain connection.
	// Default: one that uses no proxy.
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
		// No proxy: MinIO is on this machine or near it.
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

// policy returns the one policy that MinIO is to put on a session for q.
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

// assumeRole has MinIO mint keys for q. An error that is not the request's own
// fault is answered as ServiceUnavailable: to callers, MinIO is a part of this
// service that is away.
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
		// Its code only: a 403 is about MinIO's keys, not about the caller.
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
