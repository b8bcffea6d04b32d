package certs_test

import (
	"context"
	"encoding/pem"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"

	"github.com/credence-iam/credence/certs"
)

// A client verifies servers with the root certificates in a file. Each handshake checks the file, so new roots take effect
// without a restart.
func Example() {
	server := httptest.NewTLSServer(http.NotFoundHandler()) // its certificate is for example.com
	defer server.Close()
	dir, err := os.MkdirTemp("", "credence-example")
	check(err)
	defer func() { _ = os.RemoveAll(dir) }()
	file := filepath.Join(dir, "ca.crt")
	root := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw})
	check(os.WriteFile(file, root, 0o600))

	roots, err := certs.NewRoots(file, nil)
	check(err)
	client := http.Client{Transport: &http.Transport{TLSClientConfig: certs.ClientConfig(roots, "example.com")}}
	request, err := http.NewRequestWithContext(context.Background(), http.MethodGet, server.URL, http.NoBody)
	check(err)
	response, err := client.Do(request)
	check(err)
	defer response.Body.Close()
	fmt.Println(response.Status)
	// Output: 404 Not Found
}

func check(err error) {
	if err != nil {
		panic(err)
	}
}
