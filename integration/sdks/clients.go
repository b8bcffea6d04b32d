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
	// find returns the command line of its driver, or a notRun error.
	find func(*finder, context.Context) ([]string, error)
	// sessions is how many new sessions it makes in a row; 0: many.
	sessions int
	// expect holds what differs from what is expected of all, by path and scenario.
	expect map[Path]map[string][]Outcome
}

// notRun is why a client cannot be run here, which is no failure.
type notRun string

func (n notRun) Error() string { return string(n) }

// fewSessions is for clients that start a program of a second's processor time for each call.
const fewSessions = 5

// clients are the rows of the matrix, in its order.
var clients = []client{
	{
		name: "go-v2", about: "AWS SDK for Go v2", paths: []Path{Container, MetadataV2},
		find: golang("go-v2"),
	},
	{
		name: "go-v1", about: "AWS SDK for Go v1", paths: []Path{Container, MetadataV2},
		find: golang("go-v1"),
	},
	{
		name: "minio-go", about: "MinIO client for Go", paths: []Path{Container, MetadataV2},
		find: golang("minio-go"),
	},
	{
		name: "botocore-old", about: "botocore before 1.34.41, which boto3 is built on", paths: []Path{Container, MetadataV2},
		find: (*finder).botocoreOld,
	},
	{
		name: "botocore-new", about: "botocore from 1.34.41 on", paths: []Path{Container, MetadataV2},
		find: (*finder).botocoreNew,
	},
	{
		name: "awscli-v1", about: "AWS CLI, version 1", paths: []Path{Container, MetadataV2},
		find: (*finder).awscliV1, sessions: fewSessions,
	},
	{
		name: "awscli-v2", about: "AWS CLI, version 2", paths: []Path{Container, MetadataV2},
		find: (*finder).awscliV2, sessions: fewSessions,
	},
	{
		name: "js-v3", about: "AWS SDK for JavaScript v3", paths: []Path{Container, MetadataV2},
		find: (*finder).jsV3,
	},
	{
		name: "js-v2", about: "AWS SDK for JavaScript v2", paths: []Path{Container, MetadataV2},
		find: (*finder).jsV2,
	},
	{
		name: "ruby", about: "AWS SDK for Ruby before 3.171, which knows no container endpoint but that of ECS", paths: []Path{MetadataV2},
		find: (*finder).ruby,
	},
	{
		name: "curl", about: "curl, which asks once and shows what it is answered", paths: []Path{Container, MetadataV2, MetadataV1},
		find: (*finder).curl,
	},
}

// expected is what a client should do in a scenario on a path.
func (c client) expected(path Path, s scenario) []Outcome {
	if outcomes, ok := c.expect[path][s.name]; ok {
		return outcomes
	}
	return []Outcome{s.usual}
}
