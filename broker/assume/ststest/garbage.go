package ststest

import (
	"bytes"
	"net/http"
	"regexp"
)

// garbled is the code of a changed response in the call log.
const garbled = "Garbled"

// The faults below send responses that are not from STS, like proxies, load balancers and broken services. Each is made from
// the valid response, so it has parts of valid keys.

// HTMLPage returns an HTML page with status 200, like a captive proxy.
func HTMLPage() *Fault {
	return garble(func(a *Answer) {
		a.Header.Set("Content-Type", "text/html; charset=utf-8")
		a.Body = append(append([]byte("<!DOCTYPE html>\n<html><head><title>Sign in</title></head><body><p>Sign in to continue.<pre>"), a.Body...), "</pre></body></html>"...)
	})
}

// TruncatedXML ends the document in the middle, as if it were complete.
func TruncatedXML() *Fault {
	return garble(func(a *Answer) { a.Body = a.Body[:len(a.Body)/2] })
}

// ShortBody states the length of the document, and closes the connection before its end.
func ShortBody() *Fault {
	return garble(func(a *Answer) {
		a.Header.Set("Content-Length", "1000000")
		a.Body = a.Body[:len(a.Body)/2]
	})
}

// EmptyBody has status 200 and no content.
func EmptyBody() *Fault {
	return garble(func(a *Answer) { a.Body = nil })
}

// WrongContentType has JSON, which STS never sends to clients of the Query protocol.
func WrongContentType() *Fault {
	return garble(func(a *Answer) {
		a.Header.Set("Content-Type", "application/json")
		a.Body = []byte(`{"AssumeRoleResponse":{"AssumeRoleResult":{"Credentials":{"SecretAccessKey":"` + element(a.Body, "SecretAccessKey") + `"}}}}`)
	})
}

// HugeBody sends 8 MiB of spaces before the keys. The rest is valid.
func HugeBody() *Fault {
	return garble(func(a *Answer) {
		a.Body = bytes.Replace(a.Body, []byte("<Credentials>"), append([]byte("<Credentials>"), bytes.Repeat([]byte(" "), 8<<20)...), 1)
	})
}

// WithoutElement removes an element from the document, with its content.
func WithoutElement(name string) *Fault {
	return garble(func(a *Answer) { a.Body = elementPattern(name).ReplaceAll(a.Body, nil) })
}

// WithElement replaces the content of an element.
func WithElement(name, text string) *Fault {
	return garble(func(a *Answer) {
		a.Body = elementPattern(name).ReplaceAllLiteral(a.Body, []byte("<"+name+">"+text+"</"+name+">"))
	})
}

// StatusPage has an HTML page with an error status, like a load balancer.
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

// element returns the text of the first element with this name, or "".
func element(body []byte, name string) string {
	m := regexp.MustCompile(`<` + regexp.QuoteMeta(name) + `>([^<]*)<`).FindSubmatch(body)
	if m == nil {
		return ""
	}
	return string(m[1])
}
