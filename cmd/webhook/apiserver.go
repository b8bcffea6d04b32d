package main

import (
	"fmt"

	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/credence-iam/credence/cmd/internal/program"
)

// apiServer returns how to reach the API server: never through a proxy, whatever the environment says. The webhook calls
// nobody else.
func apiServer(kubeconfig string) (*rest.Config, error) {
	program.WithoutProxies()
	config, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		return nil, fmt.Errorf("reaching the API server (set --kubeconfig outside a cluster): %w", err)
	}
	return config, nil
}
