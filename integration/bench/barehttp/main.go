// Command barehttp is the smallest HTTP server that responds as a sidecar does: the baseline of the sidecar's speed and
// memory. It serves one body of --size bytes at every path, checks nothing, and runs until it is killed.
package main

import (
	"bytes"
	"flag"
	"fmt"
	"net/http"
	"os"
	"time"
)

func main() {
	listen := flag.String("listen", "127.0.0.1:0", "`address` to listen on")
	size := flag.Int("size", 1024, "`bytes` of a response")
	flag.Parse()
	body := bytes.Repeat([]byte("x"), *size)
	server := &http.Server{
		Addr:              *listen,
		ReadHeaderTimeout: time.Minute,
		Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			// Without it, net/http would derive the type from the body.
			w.Header().Set("Content-Type", "application/json")
			_, _ = w.Write(body)
		}),
	}
	fmt.Fprintln(os.Stderr, "barehttp:", server.ListenAndServe())
	os.Exit(1)
}
