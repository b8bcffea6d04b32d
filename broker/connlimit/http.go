package connlimit

import (
	"context"
	"crypto/tls"
	"io"
	"net"
	"net/http"
	"sync"
)

// HTTP makes server, which speaks HTTP/1.1, report the progress of its connections if they belong to a [Limiter]. A
// request has arrived when the server has read its whole body. HTTP replaces Handler, ConnState and ConnContext of
// server. Call it before the server serves.
func HTTP(server *http.Server) {
	handler := server.Handler
	server.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if c, ok := r.Context().Value(contextKey{}).(*Conn); ok {
			if r.ContentLength == 0 {
				c.Begin()
			} else {
				r.Body = &body{ReadCloser: r.Body, conn: c}
			}
		}
		handler.ServeHTTP(w, r)
	})
	server.ConnContext = func(ctx context.Context, conn net.Conn) context.Context {
		if c := connOf(conn); c != nil {
			return context.WithValue(ctx, contextKey{}, c)
		}
		return ctx
	}
	server.ConnState = func(conn net.Conn, state http.ConnState) {
		c := connOf(conn)
		switch {
		case c == nil:
		case state == http.StateActive: // the server has read the header
			c.Handshaken()
			c.arrive()
		case state == http.StateIdle: // the server has sent the response
			c.End()
		}
	}
}

type contextKey struct{}

// connOf returns the [Conn] below conn; nil if there is none.
func connOf(conn net.Conn) *Conn {
	if secured, ok := conn.(*tls.Conn); ok {
		conn = secured.NetConn()
	}
	c, _ := conn.(*Conn)
	return c
}

// body reports when it has been read to the end.
type body struct {
	io.ReadCloser
	conn *Conn
	once sync.Once
}

// Read implements io.Reader.
func (b *body) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if err == io.EOF {
		b.once.Do(b.conn.Begin)
	}
	return n, err //nolint:wrapcheck // Readers return errors unchanged.
}
