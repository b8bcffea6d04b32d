//go:build unix && !linux

package cluster

import (
	"context"
	"errors"

	"github.com/credence-iam/credence/integration/process"
)

// nodes is unused: pods need Linux.
type nodes struct{}

// NodesPossible returns nil if clusters can have nodes, and otherwise the cause.
func NodesPossible() error { return errors.New("nodes need Linux") }

func newNodes(context.Context, *Cluster) (*nodes, error) { return nil, NodesPossible() }

func (*nodes) hub() process.Host                { return nil }
func (*nodes) start(context.Context, int) error { return NodesPossible() }
