// Command plain is a client of the sidecar without an SDK. It reads the variables that SDKs read.
//
//	plain crowd N TIMES    requests credentials with N concurrent clients, TIMES each, on a new connection each time;
//	                       prints the number of responses with status 200
//	plain zone             prints the availability zone of the instance metadata
//	plain read FILE...     reads each file, and prints its mode and owner, but not its content
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

// patience is the timeout of a request. It can wait for ten thousand others, on a server with a tenth of a CPU. While the
// server's accept queue is full, the kernel retries a connection at growing intervals.
const patience = 5 * time.Minute

// tries is the number of attempts of each request, as in SDKs. The kernel resends what the server could not queue at
// growing intervals, and the server closes a connection that is silent for two seconds.
const tries = 5

func crowd(ctx context.Context, n, times int) error {
	target, err := url.Parse(os.Getenv("AWS_CONTAINER_CREDENTIALS_FULL_URI"))
	if err != nil {
		return err
	}
	request := "GET " + target.Path + " HTTP/1.1\r\nHost: " + target.Host + "\r\nConnection: close\r\nAuthorization: " +
		os.Getenv("AWS_CONTAINER_AUTHORIZATION_TOKEN") + "\r\n\r\n"
	var served atomic.Int64
	var all sync.WaitGroup
	failures := make(chan error, n)
	for range n {
		all.Go(func() {
			for range times {
				err := get(ctx, target.Host, request)
				for range tries - 1 {
					if !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, syscall.ECONNRESET) {
						break
					}
					err = get(ctx, target.Host, request)
				}
				if err != nil {
					failures <- err
					return
				}
				served.Add(1)
			}
		})
	}
	all.Wait()
	close(failures)
	fmt.Println(served.Load())
	return <-failures
}

func get(ctx context.Context, address, request string) error {
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
	request, err := http.NewRequestWithContext(ctx, method, target, http.NoBody) //nolint:gosec // G704: the environment names the server
	if err != nil {
		return "", err
	}
	request.Header.Set(name, value)
	response, err := http.DefaultClient.Do(request) //nolint:gosec // G704: as above
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
			return errors.New("files have no owner on this system")
		}
		fmt.Printf("%s %s uid %d, some text: %t\n", file, info.Mode(), owner.Uid, len(content) > 0)
	}
	return nil
}
