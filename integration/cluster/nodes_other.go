//go:build unix && !linux

package cluster

import (
	"context"
	"errors"

	"github.com/credence-iam/credence/integration/process"
)

// There are no nodes here: what runs pods is Linux's.
type nodes struct{}

// NodesPossible returns nil where clusters can have nodes, and otherwise what is missing.
func NodesPossible() error { return errors.New("nodes need Linux") }

func newNodes(context.Context, *Cluster) (*nodes, error) { return nil, NodesPossible() }

func (*nodes) hub() process.Host                { return nil }
func (*nodes) start(context.Context, int) error { return NodesPossible() }
