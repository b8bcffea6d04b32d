//go:build unix

package main

import (
	"slices"
	"strings"
)

// The paths: the ways by which a client finds its credentials.
const (
	// container is the environment of an injected pod, with the container-credentials endpoint.
	container = "container"
	// metadataV2 lacks AWS_CONTAINER_*, so that instance metadata with session tokens remains.
	metadataV2 = "imds-v2"
	// metadataV1 is the same in a pod annotated for version 1, for a client without session tokens.
	metadataV1 = "imds-v1"
)

// outcome is how a client ended a scenario, in the words of the page, which explains them.
type outcome string

const (
	works      outcome = "yes"
	nextCall   outcome = "next call"
	newSession outcome = "new session"
	reason     outcome = "reason"
	noReason   outcome = "no reason"
	expired    outcome = "keeps expired"
	byMetadata outcome = "by metadata"
	hangs      outcome = "hangs"
	cannot     outcome = "cannot"
	notFound   outcome = "not found"
	none       outcome = "none"
	fails      outcome = "no"

	// ifAsked is works for the region, after a call by the program.
	ifAsked outcome = "if asked"
	// sometimes is for botocore, which renews when its own prolongation ends, so chance decides.
	sometimes outcome = "yes, or new session"
)

// met reports whether got is as expected.
func (expected outcome) met(got outcome) bool {
	return expected == got || expected == ifAsked && got == works || slices.Contains(strings.Split(string(expected), ", or "), string(got))
}

// The scenarios: the columns of the table.
const (
	first    = "first credentials"
	sessions = "new sessions"
	renewal  = "renewal"
	away     = "broker away"
	longer   = "away for longer"
	back     = "broker back"
	refused  = "role refused"
	slow     = "slow start"
	token    = "wrong token"
	region   = "region"
)

// scenarios lists the columns in the order of the page, with the usual outcome.
var scenarios = []struct {
	name  string
	usual outcome
}{
	{first, works},
	{sessions, works},
	{renewal, works},
	{away, works},
	{longer, reason},
	{back, works},
	{refused, reason},
	{slow, works},
	{token, reason},
	{region, works},
}

// sdk is one client in a range of versions. "make sdks" builds and downloads scripts into .build/sdks.
type sdk struct {
	name    string // begins with the name that the script reports
	about   string
	runtime string // the program that runs the script, looked for in PATH; empty: the script is a program
	script  string // below the root of the checkout
	args    []string
	from    string // the first version; empty: any
	before  string // the first version that is too new; empty: none
	paths   []string
	// region is works if the client finds the region by itself, and ifAsked if the program has to make a call.
	region outcome
	// differs has the outcomes that are not the usual ones, by path and scenario.
	differs map[string]map[string]outcome
	// unusable is the text of the error of a client that cannot use its paths, and does not even connect to the sidecar.
	unusable string
	// slow clients start a program for each call, which takes a second of CPU.
	slow bool
}

const goClients = ".build/sdks/go-clients"

var both = []string{container, metadataV2}

// On the metadata path botocore prolongs credentials that expire soon.
var botocoreDiffers = map[string]map[string]outcome{
	metadataV2: {renewal: expired, longer: expired, back: sometimes, refused: noReason},
}

// The errors of these clients have no reason on any path.
var silentDiffers = map[string]map[string]outcome{
	container:  {longer: noReason, refused: noReason, token: noReason},
	metadataV2: {longer: noReason, refused: noReason},
}

// The errors of the AWS CLI have no reason on the metadata path.
var cliDiffers = map[string]map[string]outcome{metadataV2: {longer: noReason, refused: noReason}}

// sdks lists the rows of the matrix. curl signs requests to AWS from 7.75.0 on.
var sdks = []sdk{
	{
		name: "go-v2", about: "AWS SDK for Go v2", script: goClients, args: []string{"go-v2"}, paths: both, region: ifAsked,
		// Its metadata provider prolongs credentials that it cannot renew.
		differs: map[string]map[string]outcome{metadataV2: {longer: expired, back: newSession, refused: noReason}},
	},
	{
		name: "go-v1", about: "AWS SDK for Go v1", script: goClients, args: []string{"go-v1"}, paths: both, region: ifAsked,
		differs: silentDiffers,
	},
	{
		name: "minio-go", about: "MinIO client for Go", script: goClients, args: []string{"minio-go"}, paths: both, region: none,
		// It requests credentials once, and its errors are the HTTP status.
		differs: map[string]map[string]outcome{
			container:  {longer: noReason, refused: noReason, token: noReason, slow: nextCall},
			metadataV2: {longer: noReason, refused: noReason},
		},
	},
	{
		name: "botocore-old", about: "botocore before 1.34.41, which boto3 is built on", runtime: "python3", script: "integration/sdks/clients/python/client.py",
		before: "1.34.41", paths: both, region: ifAsked, differs: botocoreDiffers,
	},
	{
		name: "botocore-new", about: "botocore from 1.34.41 on", runtime: "python3", script: "integration/sdks/clients/python/client.py",
		from: "1.34.41", paths: both, region: ifAsked, differs: botocoreDiffers, // it reads a token's file at each renewal
	},
	{
		name: "awscli-v1", about: "AWS CLI, version 1", runtime: "aws", script: "integration/sdks/clients/cli/client.py", paths: both, region: none,
		slow: true, differs: cliDiffers,
	},
	{
		name: "awscli-v2", about: "AWS CLI, version 2", runtime: "aws", script: "integration/sdks/clients/cli/client.py", paths: both, region: works,
		slow: true, differs: cliDiffers,
	},
	{
		name: "js-v3", about: "AWS SDK for JavaScript v3", runtime: "node", script: ".build/sdks/js/v3.mjs", paths: both, region: works, differs: silentDiffers,
	},
	{
		name: "js-v2", about: "AWS SDK for JavaScript v2", runtime: "node", script: ".build/sdks/js/v2.mjs", paths: both, region: none,
		differs: map[string]map[string]outcome{
			container: {longer: noReason, refused: noReason, token: byMetadata},
			// If credentials have less than 15 s left, its metadata provider calls a logger that does not exist.
			metadataV2: {away: hangs, longer: hangs, back: newSession, refused: noReason},
		},
	},
	{
		// It takes the host of the metadata endpoint, and calls port 80.
		name: "ruby", about: "AWS SDK for Ruby before 3.171", runtime: "ruby", script: "integration/sdks/clients/ruby/client.rb", before: "3.171.0", paths: both,
		unusable: "unable to sign request without credentials set",
	},
	{
		name: "ruby-port", about: "the same, in a program that passes the port of the metadata service to it", runtime: "ruby", script: "integration/sdks/clients/ruby/client.rb",
		args: []string{"port"}, before: "3.171.0", paths: []string{metadataV2}, region: none,
		differs: map[string]map[string]outcome{metadataV2: {longer: expired, back: newSession, refused: noReason}},
	},
	{
		name: "curl", about: "curl, which does not retry and shows the response", runtime: "sh", script: "integration/sdks/clients/curl/client.sh", from: "7.75.0",
		paths: []string{container, metadataV2, metadataV1}, region: ifAsked,
		differs: map[string]map[string]outcome{container: {slow: nextCall}, metadataV1: {slow: nextCall}},
	},
}

// expected returns the outcome that is expected of s in a scenario; empty if it is not tried there.
func (s sdk) expected(path, scenario string) outcome {
	switch {
	case s.unusable != "" && scenario == first:
		return cannot
	case s.unusable != "", scenario == token && path != container:
		return ""
	case scenario == region:
		return s.region
	}
	if o, ok := s.differs[path][scenario]; ok {
		return o
	}
	for _, c := range scenarios {
		if c.name == scenario {
			return c.usual
		}
	}
	return ""
}
