package main

import (
	"fmt"

	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/credence-iam/credence/cmd/internal/program"
)

// apiServer returns the configuration for calls to the API server. It disables the proxies of the environment for the whole
// program, because the webhook calls only the API server.
func apiServer(kubeconfig string) (*rest.Config, error) {
	program.WithoutProxies()
	config, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		return nil, fmt.Errorf("configuring the API server: %w; outside a cluster, set --kubeconfig", err)
	}
	return config, nil
}
