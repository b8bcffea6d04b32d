package ststest

import (
	"bytes"
	"net/http"
	"regexp"
)

// garbled is the code of a spoilt answer in the call log.
const garbled = "Garbled"

// The faults below answer what is no answer of STS, as proxies, load balancers and
// half-broken services do. Each is made from the answer that the call would have
// had, so keys that were minted for it lie about in it.

// HTMLPage returns a page for people, with status 200, as a captive proxy does.
func HTMLPage() *Fault {
	return garble(func(a *Answer) {
		a.Header.Set("Content-Type", "text/html; charset=utf-8")
		a.Body = append(append([]byte("<!DOCTYPE html>\n<html><head><title>Sign in</title></head><body><p>Sign in to go on.<pre>"), a.Body...), "</pre></body></html>"...)
	})
}

// TruncatedXML ends the document in its middle, as if it were whole.
func TruncatedXML() *Fault {
	return garble(func(a *Answer) { a.Body = a.Body[:len(a.Body)/2] })
}

// ShortBody says how long the document is, and closes the connection before its end.
func ShortBody() *Fault {
	return garble(func(a *Answer) {
		a.Header.Set("Content-Length", "1000000")
		a.Body = a.Body[:len(a.Body)/2]
	})
}

// EmptyBody answers status 200 and nothing else.
func EmptyBody() *Fault {
	return garble(func(a *Answer) { a.Body = nil })
}

// WrongContentType answers JSON, which STS does for no client of the Query protocol.
func WrongContentType() *Fault {
	return garble(func(a *Answer) {
		a.Header.Set("Content-Type", "application/json")
		a.Body = []byte(`{"AssumeRoleResponse":{"AssumeRoleResult":{"Credentials":{"SecretAccessKey":"` + element(a.Body, "SecretAccessKey") + `"}}}}`)
	})
}

// HugeBody sends 8 MiB of blanks in front of the keys. What is after them is right.
func HugeBody() *Fault {
	return garble(func(a *Answer) {
		a.Body = bytes.Replace(a.Body, []byte("<Credentials>"), append([]byte("<Credentials>"), bytes.Repeat([]byte(" "), 8<<20)...), 1)
	})
}

// WithoutElement leaves an element out of the document, with what is in it.
func WithoutElement(name string) *Fault {
	return garble(func(a *Answer) { a.Body = elementPattern(name).ReplaceAll(a.Body, nil) })
}

// WithElement replaces what is in an element.
func WithElement(name, text string) *Fault {
	return garble(func(a *Answer) {
		a.Body = elementPattern(name).ReplaceAllLiteral(a.Body, []byte("<"+name+">"+text+"</"+name+">"))
	})
}

// StatusPage answers an HTML page with an error status, as a load balancer does.
func StatusPage(status int) *Fault {
	return garble(func(a *Answer) {
		a.Status = status
		a.Header.Set("Content-Type", "text/html")
		a.Body = []byte("<html><head><title>" + http.StatusText(status) + "</title></head><body><hr>" + element(a.Body, "SecretAccessKey") + "</body></html>")
	})
}

func garble(f func(*Answer)) *Fault { return &Fault{Garble: f} }

func elementPattern(name string) *regexp.Regexp {
	name = regexp.QuoteMeta(name)
	return regexp.MustCompile(`(?s)<` + name + `>.*</` + name + `>`)
}

// element returns the text of a document's first element of this name; "" without one.
func element(body []byte, name string) string {
	m := regexp.MustCompile(`<` + regexp.QuoteMeta(name) + `>([^<]*)<`).FindSubmatch(body)
	if m == nil {
		return ""
	}
	return string(m[1])
}
