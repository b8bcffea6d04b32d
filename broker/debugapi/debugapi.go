// Package debugapi has the JSON that a broker's debug pages serve and the credence command reads. It has no secret.
//
// A broker and a command can be one version apart: a reader ignores fields that it does not know, and a field that the
// broker does not send is zero.
package debugapi

import "time"

// Paths of the pages. [RenewPath] and [DropPath] take POST and ?role=ARN.
const (
	GrantsPath = "/debug/grants"
	RenewPath  = "/debug/grants/renew"
	DropPath   = "/debug/grants/drop"
)

// MaxGrants is the greatest number of grants on one page, and MaxPodNames that of names of pods in one grant.
const (
	MaxGrants   = 10_000
	MaxPodNames = 20
)

// CommandAudience is added to the brokers' audience for the tokens that commands may need.
const CommandAudience = "-commands"

// Grant is the state of one grant and its session. Times are in UTC, durations in seconds.
type Grant struct {
	Grant            string     `json:"grant"` // role, session name and scope
	Role             string     `json:"role"`
	SessionName      string     `json:"session_name"`
	Duration         float64    `json:"duration_seconds"`
	ExternalID       bool       `json:"external_id"` // whether there is one
	SessionPolicy    bool       `json:"session_policy"`
	PolicyARNs       int        `json:"policy_arns"`
	Tags             int        `json:"tags"`
	Pods             int        `json:"pods"`                 // live pods that use it
	PodNames         []string   `json:"pod_names,omitempty"`  // the first of these pods, as namespace/name
	Namespaces       []string   `json:"namespaces,omitempty"` // whose pods requested it
	AccessKeyID      string     `json:"access_key_id,omitempty"`
	Issued           *time.Time `json:"issued,omitempty"`
	Expiration       *time.Time `json:"expiration,omitempty"`
	RemainingSeconds float64    `json:"remaining_seconds"`
	NextLook         *time.Time `json:"next_look,omitempty"`
	Fetching         bool       `json:"fetching"`
	Waiters          int        `json:"waiters"`
	Failures         int        `json:"failures"`
	Reason           string     `json:"reason,omitempty"`
	Message          string     `json:"message,omitempty"`
	NotBefore        *time.Time `json:"not_before,omitempty"`
}

// Page is a response of [GrantsPath].
type Page struct {
	Time    time.Time `json:"time"`
	Matched int       `json:"matched"`
	Offset  int       `json:"offset"`
	LeftOut int       `json:"left_out"` // after those shown
	Grants  []Grant   `json:"grants"`
}

// Result is the response to a command on the sessions of one role.
type Result struct {
	Role     string `json:"role"`
	Order    string `json:"order"`
	Sessions int    `json:"sessions"`
}
