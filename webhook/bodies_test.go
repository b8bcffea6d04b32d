package webhook_test

import (
	"bufio"
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/credence-iam/credence/broker/policy"
	"github.com/credence-iam/credence/webhook"
)

// begin calls s with a review of the given length, whose body comes from r. The response arrives in the channel.
func begin(t *testing.T, s *webhook.Server, length int64, r io.Reader) chan *httptest.ResponseRecorder {
	t.Helper()
	request := httptest.NewRequestWithContext(t.Context(), http.MethodPost, "/mutate", r)
	request.Header.Set("Content-Type", "application/json")
	request.ContentLength = length
	responses := make(chan *httptest.ResponseRecorder, 1)
	go func() {
		w := httptest.NewRecorder()
		s.ServeHTTP(w, request)
		responses <- w
	}()
	synctest.Wait()
	return responses
}

// beginMany calls s with n reviews of the given length, and sends the start of each body. Closing a writer ends its body.
func beginMany(t *testing.T, s *webhook.Server, n int, length int64, start string) (writers []*io.PipeWriter, responses []chan *httptest.ResponseRecorder) {
	t.Helper()
	for range n {
		reader, writer := io.Pipe()
		responses = append(responses, begin(t, s, length, reader))
		go func() { _, _ = io.WriteString(writer, start) }() // After a refusal, the server does not read the rest.
		writers = append(writers, writer)
	}
	synctest.Wait()
	return writers, responses
}

// TestSilentBodiesTakeNoMemory: a body that does not arrive takes no memory from others, whatever length it declares.
func TestSilentBodiesTakeNoMemory(t *testing.T) {
	for name, length := range map[string]int64{"declared": webhook.MaxReview, "not declared": -1} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newServer(t)
				writers, _ := beginMany(t, s, 1000, length, strings.Repeat(" ", 4<<10))
				select {
				case w := <-begin(t, s, 10<<10, strings.NewReader(review(pod(permitted, ""))+strings.Repeat(" ", 9<<10))):
					if w.Code != http.StatusOK {
						t.Errorf("response is %d: %s", w.Code, w.Body)
					}
				default:
					t.Error("a review waits for bodies that do not arrive")
				}
				for _, writer := range writers {
					writer.Close()
				}
			})
		})
	}
}

// TestBodiesAreBounded: concurrent reviews wait for each other's memory. The webhook refuses those that get none in time,
// with the reason.
func TestBodiesAreBounded(t *testing.T) {
	for name, tt := range map[string]struct {
		sent bool // two of the bodies arrive
		want int
	}{
		"memory in time": {true, http.StatusOK},
		"none in time":   {false, http.StatusServiceUnavailable},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newServer(t)
				const part = 16 << 10
				// The last one waits, and further ones wait behind it.
				writers, _ := beginMany(t, s, int(webhook.MaxShared/webhook.ReadingCost(part))+1, 200<<10, strings.Repeat(" ", part-1))
				// At first it needs as much as the one before it, which gives up at the same instant. So memory that is too
				// little for one is too little for both.
				body := strings.Repeat(" ", part) + review(pod(permitted, ""))
				responses := begin(t, s, int64(len(body)), strings.NewReader(body))
				select {
				case w := <-responses:
					t.Fatalf("response %d to a review for which there is no memory", w.Code)
				default:
				}
				began := time.Now()
				if tt.sent {
					writers[0].Close()
					writers[1].Close()
				}
				w := <-responses
				if w.Code != tt.want {
					t.Errorf("response is %d: %s", w.Code, w.Body)
				}
				if took := time.Since(began); took > 4*time.Second || !tt.sent && took < 4*time.Second {
					t.Errorf("response after %s, want one within 4s if memory becomes free, else after 4s", took)
				}
				if tt.want != http.StatusOK && !strings.HasPrefix(w.Body.String(), "too many reviews at once for 134217728 bytes of memory: ") {
					t.Errorf("response is %s", w.Body)
				}
				for _, writer := range writers {
					writer.Close()
				}
			})
		})
	}
}

// TestLargeReviewsDoNotDelaySmallOnes: large bodies that do not arrive, and those that wait behind them, do not delay
// reviews of usual pods.
func TestLargeReviewsDoNotDelaySmallOnes(t *testing.T) {
	for name, length := range map[string]int64{"declared": webhook.MaxReview, "not declared": -1} {
		t.Run(name, func(t *testing.T) { synctest.Test(t, func(t *testing.T) { largeReviews(t, length) }) })
	}
}

func largeReviews(t *testing.T, length int64) {
	s := newServer(t)
	large, _ := beginMany(t, s, 100, length, strings.Repeat(" ", 1<<20))
	body := review(pod(permitted, ""))
	for range 100 {
		select {
		case w := <-begin(t, s, int64(len(body)), strings.NewReader(body)):
			if w.Code != http.StatusOK {
				t.Errorf("response is %d: %s", w.Code, w.Body)
			}
		default:
			t.Error("a usual review waits for large ones")
		}
	}
	for _, writer := range large {
		writer.Close()
	}
}

// endless is a body that never ends. It fails the test if a reader takes more than the maximum of a review.
type endless struct {
	t     *testing.T
	begin string
	read  int
}

func (e *endless) Read(p []byte) (int, error) {
	n := copy(p, e.begin)
	e.begin = e.begin[n:]
	for at := n; at < len(p); at++ {
		p[at] = ' '
	}
	if e.read += len(p); e.read > 8<<20 { // the limit of 4 MiB, and read-ahead
		e.t.Errorf("server read %d bytes of an endless body", e.read)
		return 0, io.ErrUnexpectedEOF
	}
	return len(p), nil
}

// TestBodyWithoutEnd: the server stops to read an endless body at the limit. It refuses the pod if the first bytes have the
// uid.
func TestBodyWithoutEnd(t *testing.T) {
	s := newServer(t)
	begin := strings.TrimSuffix(review(`{"x":"`), `","oldObject":null,"dryRun":true,"options":{"kind":"CreateOptions"}}}`)
	for name, tt := range map[string]struct {
		begin string
		code  int
	}{
		"with a uid":   {begin, http.StatusOK},
		"another kind": {strings.Replace(begin, "v1", "v2", 1), http.StatusRequestEntityTooLarge},
		"spaces":       {"", http.StatusRequestEntityTooLarge},
		"not JSON":     {"]", http.StatusRequestEntityTooLarge},
		"open string":  {`{"apiVersion":"`, http.StatusRequestEntityTooLarge},
	} {
		t.Run(name, func(t *testing.T) {
			request := httptest.NewRequestWithContext(t.Context(), http.MethodPost, "/mutate", &endless{t: t, begin: tt.begin})
			request.Header.Set("Content-Type", "application/json")
			w := httptest.NewRecorder()
			s.ServeHTTP(w, request)
			if w.Code != tt.code {
				t.Errorf("response is %d: %s", w.Code, w.Body)
			}
			if tt.code == http.StatusOK {
				if got := decodeReview(t, w.Body.String(), "0b2e5d3c"); got.Allowed || !strings.Contains(got.Result.Message, "the review is longer than 4194304 bytes") {
					t.Errorf("response is %s", w.Body)
				}
			}
		})
	}
}

// TestLargeBodiesAtOnce: concurrent large bodies, of which each has memory for a part, do not deadlock.
func TestLargeBodiesAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newServer(t)
		const length, first = 3 << 20, 1<<20 - 1
		began := time.Now()
		writers, responses := beginMany(t, s, 24, length, strings.Repeat(" ", first))
		end := review(pod(permitted, ""))
		rest := strings.Repeat(" ", length-first-len(end)) + end
		for _, writer := range writers {
			go func() {
				_, _ = io.WriteString(writer, rest)
				writer.Close()
			}()
		}
		for _, a := range responses {
			if w := <-a; w.Code != http.StatusOK {
				t.Errorf("response is %d after %s: %s", w.Code, time.Since(began), w.Body)
			}
		}
	})
}

// TestMemoryIsReleased: in sequence, the server can read more bodies than it has memory for at once.
func TestMemoryIsReleased(t *testing.T) {
	s := newServer(t)
	body := strings.Repeat(" ", 1<<20) + review(pod(permitted, ""))
	for n := range 64 {
		if w := recorded(t, s, http.MethodPost, "/mutate", body); w.Code != http.StatusOK {
			t.Fatalf("after %d reviews: %d %s", n, w.Code, w.Body)
		}
	}
}

// TestSlowBodies: a body may pause for two seconds, and take the four seconds of the review. Its time does not shorten the
// decision.
func TestSlowBodies(t *testing.T) {
	const second = time.Second
	for name, tt := range map[string]struct {
		pauses  []time.Duration // before each part; the last part completes the body
		cut     bool            // the last part is missing
		decides time.Duration
		want    int
		took    time.Duration
	}{
		"nothing":          {cut: true, want: http.StatusRequestTimeout, took: 2 * second},
		"a part only":      {pauses: []time.Duration{second}, cut: true, want: http.StatusRequestTimeout, took: 3 * second},
		"bit by bit":       {pauses: []time.Duration{second, second, second, second * 9 / 10, second}, want: http.StatusRequestTimeout, took: 4 * second},
		"slowly":           {pauses: []time.Duration{second, second, second}, want: http.StatusOK, took: 3 * second},
		"at once":          {pauses: []time.Duration{0}, decides: 3 * second, want: http.StatusOK, took: 3 * second},
		"slowly, and then": {pauses: []time.Duration{second}, decides: 2 * second, want: http.StatusOK, took: 3 * second},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				connection := connect(t, func(c *webhook.Config) {
					c.Namespaces = namespaces(func(ctx context.Context, name string) (policy.Namespace, error) {
						select {
						case <-time.After(tt.decides):
							return teamA(ctx, name)
						case <-ctx.Done():
							return policy.Namespace{}, ctx.Err()
						}
					})
				})
				body := review(pod(permitted, ""))
				began := time.Now()
				fmt.Fprintf(connection, "POST /mutate HTTP/1.1\r\nHost: webhook\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n", len(body))
				go func() {
					for n, pause := range tt.pauses {
						time.Sleep(pause)
						part := body[n : n+1]
						if n == len(tt.pauses)-1 && !tt.cut {
							part = body[n:]
						}
						if _, err := io.WriteString(connection, part); err != nil {
							return
						}
					}
				}()
				code, text := readResponse(t, connection)
				if took := time.Since(began); code != tt.want || took != tt.took {
					t.Errorf("response is %d after %s, want %d after %s: %s", code, took, tt.want, tt.took, text)
				}
				if code == http.StatusOK && !decodeReview(t, text, "0b2e5d3c").Allowed {
					t.Errorf("response is %s", text)
				}
			})
		})
	}
}

// connect returns a connection to a server that runs until the synctest bubble ends.
func connect(t *testing.T, change ...func(*webhook.Config)) *tls.Conn {
	t.Helper()
	cfg := config(t)
	for _, f := range change {
		f(&cfg)
	}
	s, err := webhook.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	pipes := newPipes()
	_, stop := start(t, s, cfg.KeyPair, pipes, pipes.dial)
	raw, err := pipes.dial(t.Context(), "", "")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		raw.Close() // without a TLS alert, which the server may not read
		if err := stop(); err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	connection := tls.Client(raw, &tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS13})
	if err := connection.HandshakeContext(t.Context()); err != nil {
		t.Fatal(err)
	}
	// Longer than each limit of the server.
	if err := connection.SetDeadline(time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	return connection
}

// readResponse reads a response.
func readResponse(t *testing.T, connection net.Conn) (code int, text string) {
	t.Helper()
	response, err := http.ReadResponse(bufio.NewReader(connection), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err != nil {
		t.Fatal(err)
	}
	return response.StatusCode, string(body)
}
