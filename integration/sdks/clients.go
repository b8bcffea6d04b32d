//go:build unix

package main

import (
	"context"
)

// Path is a way by which a client finds its credentials.
type Path string

// The paths.
const (
	// Container is the environment as it is injected, which names the container-credentials endpoint.
	Container Path = "container"
	// MetadataV2 is the same without AWS_CONTAINER_*: what is left is instance metadata, with session tokens.
	MetadataV2 Path = "imds-v2"
	// MetadataV1 is that in a pod annotated for version 1, for a client that asks without a session token.
	MetadataV1 Path = "imds-v1"
)

// client is one SDK, or another program that finds AWS credentials by itself.
type client struct {
	name  string
	about string // what it is, for a reader
	paths []Path
	// find finds what is installed of it. A notRun error says that this is nothing.
	find func(*finder, context.Context) (installation, error)
	// asks is what a program has to ask for so that the region is looked up; empty if the client does it by itself, or
	// not at all.
	asks string
	// sessions is how many new sessions it makes in a row; 0: many.
	sessions int
	// expect holds what differs from what is expected of all, by path and scenario.
	expect map[Path]expectations
	// unusable are the paths that it cannot use, with a text of the error. It does not even come to the sidecar there.
	unusable map[Path]string
}

// expectations are the outcomes that a scenario may have, by its name. There is more than one where chance decides.
type expectations map[string][]Outcome

// notRun is why a client cannot be run here, which is no failure.
type notRun string

func (n notRun) Error() string { return string(n) }

// fewSessions is for clients that start a program of a second's processor time for each call.
const fewSessions = 5

// botocoreExpects is of both: on the metadata path it makes up a later end for credentials that end soon.
var botocoreExpects = map[Path]expectations{
	MetadataV2: {renewal: {Expired}, expired: {Expired}, back: {Works, NewSession}, refused: {Hidden}},
}

const rubyWithout = "unable to sign request without credentials set"

const botocoreAsks = "`botocore.utils.IMDSRegionProvider(session).provide()`"

// clients are the rows of the matrix, in its order.
var clients = []client{
	{
		name: "go-v2", about: "AWS SDK for Go v2", paths: []Path{Container, MetadataV2},
		find: golang("go-v2", "github.com/aws/aws-sdk-go-v2"), asks: "the option `config.WithEC2IMDSRegion()`",
		expect: map[Path]expectations{
			// Its provider of instance metadata makes up a later end when it cannot renew.
			MetadataV2: {expired: {Expired}, back: {NewSession}, refused: {Hidden}},
		},
	},
	{
		name: "go-v1", about: "AWS SDK for Go v1", paths: []Path{Container, MetadataV2},
		find: golang("go-v1", "github.com/aws/aws-sdk-go"), asks: "`ec2metadata.New(session).Region()`",
		expect: map[Path]expectations{
			Container:  {expired: {Hidden}, refused: {Hidden}, token: {Hidden}},
			MetadataV2: {expired: {Hidden}, refused: {Hidden}},
		},
	},
	{
		name: "minio-go", about: "MinIO client for Go", paths: []Path{Container, MetadataV2},
		find: golang("minio-go", "github.com/minio/minio-go/v7"),
		expect: map[Path]expectations{
			// It asks once, and its errors are the HTTP status alone.
			Container:  {expired: {Hidden}, refused: {Hidden}, token: {Hidden}, slow: {NextCall}, region: {Unsupported}},
			MetadataV2: {expired: {Hidden}, refused: {Hidden}, region: {Unsupported}},
		},
	},
	{
		name: "botocore-old", about: "botocore before 1.34.41, which boto3 is built on", paths: []Path{Container, MetadataV2},
		find: (*finder).botocoreOld, asks: botocoreAsks,
		expect: botocoreExpects,
	},
	{
		name: "botocore-new", about: "botocore from 1.34.41 on", paths: []Path{Container, MetadataV2},
		find: (*finder).botocoreNew, asks: botocoreAsks,
		expect: botocoreExpects,
	},
	{
		name: "awscli-v1", about: "AWS CLI, version 1", paths: []Path{Container, MetadataV2},
		find: (*finder).awscliV1, sessions: fewSessions,
		expect: map[Path]expectations{
			Container:  {region: {Unsupported}},
			MetadataV2: {expired: {Hidden}, refused: {Hidden}, region: {Unsupported}},
		},
	},
	{
		name: "awscli-v2", about: "AWS CLI, version 2", paths: []Path{Container, MetadataV2},
		find: (*finder).awscliV2, sessions: fewSessions,
		expect: map[Path]expectations{
			MetadataV2: {expired: {Hidden}, refused: {Hidden}},
		},
	},
	{
		name: "js-v3", about: "AWS SDK for JavaScript v3", paths: []Path{Container, MetadataV2},
		find: (*finder).jsV3,
		expect: map[Path]expectations{
			Container:  {expired: {Hidden}, refused: {Hidden}, token: {Hidden}},
			MetadataV2: {expired: {Hidden}, refused: {Hidden}},
		},
	},
	{
		name: "js-v2", about: "AWS SDK for JavaScript v2", paths: []Path{Container, MetadataV2},
		find: (*finder).jsV2,
		expect: map[Path]expectations{
			Container: {expired: {Hidden}, refused: {Hidden}, token: {Metadata}, region: {Unsupported}},
			// Offered credentials with less than 15 s left, its metadata provider calls a logger that it does not have, and
			// nobody hears of the error.
			MetadataV2: {away: {Hangs}, expired: {Hangs}, back: {NewSession}, refused: {Hidden}, region: {Unsupported}},
		},
	},
	{
		name: "ruby", about: "AWS SDK for Ruby before 3.171", paths: []Path{Container, MetadataV2},
		find:   ruby(),
		expect: map[Path]expectations{Container: {first: {Unusable}}, MetadataV2: {first: {Unusable}}},
		unusable: map[Path]string{
			Container: rubyWithout,
			// It takes the host of the endpoint, and asks at port 80.
			MetadataV2: rubyWithout,
		},
	},
	{
		name: "ruby-port", about: "the same, in a program that tells it the port of the metadata service", paths: []Path{MetadataV2},
		find: ruby("port"),
		expect: map[Path]expectations{
			MetadataV2: {expired: {Expired}, back: {NewSession}, refused: {Hidden}, region: {Unsupported}},
		},
	},
	{
		name: "curl", about: "curl, which asks once and shows what it is answered", paths: []Path{Container, MetadataV2, MetadataV1},
		find: (*finder).curl, asks: "`/latest/meta-data/placement/region`",
		expect: map[Path]expectations{
			Container:  {slow: {NextCall}},
			MetadataV1: {slow: {NextCall}},
		},
	},
}

// clientOf returns the client of that name.
func clientOf(name string) client {
	for _, c := range clients {
		if c.name == name {
			return c
		}
	}
	return client{name: name}
}

// tries says whether a scenario is tried with it on a path. On one that it cannot use, that is all that is seen.
func (c client) tries(path Path, s scenario) bool {
	_, unusable := c.unusable[path]
	return s.on(path) && (!unusable || s.name == first)
}

// expected is what a client should do in a scenario on a path.
func (c client) expected(path Path, s scenario) []Outcome {
	if outcomes, ok := c.expect[path][s.name]; ok {
		return outcomes
	}
	return []Outcome{s.usual}
}
