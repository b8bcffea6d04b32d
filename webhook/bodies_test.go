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

// asks gives s a review of that length, whose body comes from r, and returns where its answer will be.
func asks(t *testing.T, s *webhook.Server, length int64, r io.Reader) chan *httptest.ResponseRecorder {
	t.Helper()
	request := httptest.NewRequestWithContext(t.Context(), http.MethodPost, "/mutate", r)
	request.Header.Set("Content-Type", "application/json")
	request.ContentLength = length
	answered := make(chan *httptest.ResponseRecorder, 1)
	go func() {
		w := httptest.NewRecorder()
		s.ServeHTTP(w, request)
		answered <- w
	}()
	synctest.Wait()
	return answered
}

// sends starts n reviews of length, and sends the beginning of each. What ends their bodies is returned.
func sends(t *testing.T, s *webhook.Server, n int, length int64, begin string) (writers []*io.PipeWriter, answered []chan *httptest.ResponseRecorder) {
	t.Helper()
	for range n {
		reader, writer := io.Pipe()
		answered = append(answered, asks(t, s, length, reader))
		go func() { _, _ = io.WriteString(writer, begin) }() // refused, nobody reads the rest
		writers = append(writers, writer)
	}
	synctest.Wait()
	return writers, answered
}

// A body that does not arrive takes no memory from others, whatever length it declares.
func TestSilentBodiesTakeNothing(t *testing.T) {
	for name, length := range map[string]int64{"declared": webhook.MaxReview, "not declared": -1} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newServer(t)
				writers, _ := sends(t, s, 1000, length, strings.Repeat(" ", 4<<10))
				select {
				case w := <-asks(t, s, 10<<10, strings.NewReader(review(pod(permitted, ""))+strings.Repeat(" ", 9<<10))):
					if w.Code != http.StatusOK {
						t.Errorf("answered %d: %s", w.Code, w.Body)
					}
				default:
					t.Error("a review waits for those that do not arrive")
				}
				for _, writer := range writers {
					writer.Close()
				}
			})
		})
	}
}

// Reviews that come at once wait for each other's memory: each that gets some in time is answered, and the others are
// refused with the reason.
func TestBodiesAreBounded(t *testing.T) {
	for name, tt := range map[string]struct {
		sent bool // two of the bodies under way arrive
		want int
	}{
		"memory in time": {true, http.StatusOK},
		"none in time":   {false, http.StatusServiceUnavailable},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newServer(t)
				const part = 16 << 10
				// The last one waits itself, and others wait behind it.
				writers, _ := sends(t, s, int(webhook.MaxShared/webhook.ReadingCost(part))+1, 200<<10, strings.Repeat(" ", part-1))
				// It needs as much to begin with as the one that it waits behind, which gives up at the same instant: memory
				// that is too little for one is too little for both.
				body := strings.Repeat(" ", part) + review(pod(permitted, ""))
				answered := asks(t, s, int64(len(body)), strings.NewReader(body))
				select {
				case w := <-answered:
					t.Fatalf("a further review was answered %d while there was no memory for it", w.Code)
				default:
				}
				began := time.Now()
				if tt.sent {
					writers[0].Close()
					writers[1].Close()
				}
				w := <-answered
				if w.Code != tt.want {
					t.Errorf("answered %d: %s", w.Code, w.Body)
				}
				if took := time.Since(began); took > 4*time.Second || !tt.sent && took < 4*time.Second {
					t.Errorf("answered after %s", took)
				}
				if tt.want != http.StatusOK && !strings.HasPrefix(w.Body.String(), "too many reviews at once: of the 134217728 bytes") {
					t.Errorf("answered %s", w.Body)
				}
				for _, writer := range writers {
					writer.Close()
				}
			})
		})
	}
}

// Large bodies that do not arrive, and others that wait behind them, do not hold up reviews of usual pods.
func TestLargeReviewsDoNotHoldUpSmallOnes(t *testing.T) {
	for name, length := range map[string]int64{"declared": webhook.MaxReview, "not declared": -1} {
		t.Run(name, func(t *testing.T) { synctest.Test(t, func(t *testing.T) { largeReviews(t, length) }) })
	}
}

func largeReviews(t *testing.T, length int64) {
	s := newServer(t)
	large, _ := sends(t, s, 100, length, strings.Repeat(" ", 1<<20))
	body := review(pod(permitted, ""))
	for range 100 {
		select {
		case w := <-asks(t, s, int64(len(body)), strings.NewReader(body)):
			if w.Code != http.StatusOK {
				t.Errorf("answered %d: %s", w.Code, w.Body)
			}
		default:
			t.Error("a usual review waits for large ones")
		}
	}
	for _, writer := range large {
		writer.Close()
	}
}

// endless is a body that never ends. It fails the test where more is read of it than a review may have.
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
	if e.read += len(p); e.read > 8<<20 { // the limit of 4 MiB, and bytes that are read ahead
		e.t.Errorf("%d bytes of a body without end were read", e.read)
		return 0, io.ErrUnexpectedEOF
	}
	return len(p), nil
}

// A body in chunks without end is cut at the limit, and refused by an answer where the uid was among its first bytes.
func TestBodyWithoutEnd(t *testing.T) {
	s := newServer(t)
	begin := strings.TrimSuffix(review(`{"x":"`), `","oldObject":null,"dryRun":true,"options":{"kind":"CreateOptions"}}}`)
	for name, tt := range map[string]struct {
		begin string
		code  int
	}{
		"with a uid":        {begin, http.StatusOK},
		"of another kind":   {strings.Replace(begin, "v1", "v2", 1), http.StatusRequestEntityTooLarge},
		"of blanks":         {"", http.StatusRequestEntityTooLarge},
		"of no JSON":        {"]", http.StatusRequestEntityTooLarge},
		"of an open string": {`{"apiVersion":"`, http.StatusRequestEntityTooLarge},
	} {
		t.Run(name, func(t *testing.T) {
			request := httptest.NewRequestWithContext(t.Context(), http.MethodPost, "/mutate", &endless{t: t, begin: tt.begin})
			request.Header.Set("Content-Type", "application/json")
			w := httptest.NewRecorder()
			s.ServeHTTP(w, request)
			if w.Code != tt.code {
				t.Errorf("answered %d: %s", w.Code, w.Body)
			}
			if tt.code == http.StatusOK {
				if got := decodeReview(t, w.Body.String(), "0b2e5d3c"); got.Allowed || !strings.Contains(got.Result.Message, "the review is longer than 4194304 bytes") {
					t.Errorf("answered %s", w.Body)
				}
			}
		})
	}
}

// Large bodies that arrive at once, each with a part for which there is memory, do not wait for each other for ever.
func TestLargeBodiesAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newServer(t)
		const length, first = 3 << 20, 1<<20 - 1
		began := time.Now()
		writers, answered := sends(t, s, 24, length, strings.Repeat(" ", first))
		end := review(pod(permitted, ""))
		rest := strings.Repeat(" ", length-first-len(end)) + end
		for _, writer := range writers {
			go func() {
				_, _ = io.WriteString(writer, rest)
				writer.Close()
			}()
		}
		for _, a := range answered {
			if w := <-a; w.Code != http.StatusOK {
				t.Errorf("answered %d after %s: %s", w.Code, time.Since(began), w.Body)
			}
		}
	})
}

// What a body was given is given back: more are answered one after the other than there is memory for at once.
func TestMemoryIsGivenBack(t *testing.T) {
	s := newServer(t)
	body := strings.Repeat(" ", 1<<20) + review(pod(permitted, ""))
	for n := range 64 {
		if w := recorded(t, s, http.MethodPost, "/mutate", body); w.Code != http.StatusOK {
			t.Fatalf("after %d reviews: %d %s", n, w.Code, w.Body)
		}
	}
}

// A body has two seconds for each part, and the four of the review for all. What it took to arrive does not cut short
// the decision.
func TestBodiesThatArriveSlowly(t *testing.T) {
	const second = time.Second
	for name, tt := range map[string]struct {
		pauses  []time.Duration // before each further part; the last one completes the body
		cut     bool            // the last part is not sent
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
				code, text := answered(t, connection)
				if took := time.Since(began); code != tt.want || took != tt.took {
					t.Errorf("answered %d after %s, want %d after %s: %s", code, took, tt.want, tt.took, text)
				}
				if code == http.StatusOK && !decodeReview(t, text, "0b2e5d3c").Allowed {
					t.Errorf("answered %s", text)
				}
			})
		})
	}
}

// connect returns a connection to a server that runs until the test of synctest ends.
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
		raw.Close() // without the alert of TLS, for which nobody may be there
		if err := stop(); err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	connection := tls.Client(raw, &tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS13})
	if err := connection.HandshakeContext(t.Context()); err != nil {
		t.Fatal(err)
	}
	// More than any limit of the server's.
	if err := connection.SetDeadline(time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	return connection
}

// answered reads a response.
func answered(t *testing.T, connection net.Conn) (code int, text string) {
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
