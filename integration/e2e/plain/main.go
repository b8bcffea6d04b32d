// Command plain is a client of the sidecar without an SDK, by the variables that SDKs read.
//
//	plain crowd N TIMES    asks for credentials N times at once, each on a connection of its own, and so often one after
//	                       the other; prints how many were answered with status 200
//	plain zone             prints the availability zone that instance metadata tells
//	plain read FILE...     prints mode, owner and length of each file, which it must be able to read; never its content
package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

func main() {
	if err := run(context.Background(), os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "plain:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	switch {
	case len(args) == 3 && args[0] == "crowd":
		n, err := strconv.Atoi(args[1])
		if err != nil {
			return err
		}
		times, err := strconv.Atoi(args[2])
		if err != nil {
			return err
		}
		return crowd(ctx, n, times)
	case len(args) == 1 && args[0] == "zone":
		return zone(ctx)
	case len(args) > 1 && args[0] == "read":
		return read(args[1:])
	}
	return errors.New("usage: plain crowd N TIMES, plain zone, or plain read FILES")
}

// patience bounds a request that waits for its turn behind ten thousand, of a server with a tenth of a processor. The
// kernel asks for a connection again after ever longer times, while the server's queue is full.
const patience = 5 * time.Minute

// tries is how often each asks, as SDKs do. What the kernel could not queue it has the client send again, after ever
// longer times; and who is silent for two seconds after being let in, is let go.
const tries = 5

func crowd(ctx context.Context, n, times int) error {
	target, err := url.Parse(os.Getenv("AWS_CONTAINER_CREDENTIALS_FULL_URI"))
	if err != nil {
		return err
	}
	request := "GET " + target.Path + " HTTP/1.1\r\nHost: " + target.Host + "\r\nConnection: close\r\nAuthorization: " +
		os.Getenv("AWS_CONTAINER_AUTHORIZATION_TOKEN") + "\r\n\r\n"
	var answered atomic.Int64
	var all sync.WaitGroup
	failures := make(chan error, n)
	for range n {
		all.Go(func() {
			for range times {
				err := ask(ctx, target.Host, request)
				for range tries - 1 {
					if !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, syscall.ECONNRESET) {
						break
					}
					err = ask(ctx, target.Host, request)
				}
				if err != nil {
					failures <- err
					return
				}
				answered.Add(1)
			}
		})
	}
	all.Wait()
	close(failures)
	fmt.Println(answered.Load())
	return <-failures
}

func ask(ctx context.Context, address, request string) error {
	conn, err := (&net.Dialer{Timeout: patience}).DialContext(ctx, "tcp", address)
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }()
	if err := conn.SetDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	if _, err := io.WriteString(conn, request); err != nil {
		return err
	}
	response, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		return err
	}
	defer func() { _ = response.Body.Close() }()
	if _, err := io.Copy(io.Discard, response.Body); err != nil {
		return err
	}
	if response.StatusCode != http.StatusOK {
		return errors.New(response.Status)
	}
	return nil
}

func zone(ctx context.Context) error {
	endpoint := os.Getenv("AWS_EC2_METADATA_SERVICE_ENDPOINT")
	token, err := text(ctx, http.MethodPut, endpoint+"/latest/api/token", "X-aws-ec2-metadata-token-ttl-seconds", "60")
	if err != nil {
		return err
	}
	zone, err := text(ctx, http.MethodGet, endpoint+"/latest/meta-data/placement/availability-zone", "X-aws-ec2-metadata-token", token)
	if err != nil {
		return err
	}
	fmt.Println(zone)
	return nil
}

func text(ctx context.Context, method, target, name, value string) (string, error) {
	request, err := http.NewRequestWithContext(ctx, method, target, http.NoBody) //nolint:gosec // G704: it asks whom it is told to.
	if err != nil {
		return "", err
	}
	request.Header.Set(name, value)
	response, err := http.DefaultClient.Do(request) //nolint:gosec // G704: as above.
	if err != nil {
		return "", err
	}
	defer func() { _ = response.Body.Close() }()
	body, err := io.ReadAll(response.Body)
	if err == nil && response.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s: %s", target, response.Status, body)
	}
	return string(body), err
}

func read(files []string) error {
	for _, file := range files {
		content, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		info, err := os.Stat(file)
		if err != nil {
			return err
		}
		owner, ok := info.Sys().(*syscall.Stat_t)
		if !ok {
			return errors.New("this system has no owners of files")
		}
		fmt.Printf("%s %s uid %d, some text: %t\n", file, info.Mode(), owner.Uid, len(content) > 0)
	}
	return nil
}
