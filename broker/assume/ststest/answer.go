package ststest

import (
	"encoding/xml"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"time"
)

const xmlNamespace = "https://sts.amazonaws.com/doc/2011-06-15/"

// apiError is an error of the STS API.
type apiError struct {
	status  int
	code    string
	message string
}

func (e *apiError) Error() string { return e.code + ": " + e.message }

func fail(status int, code, format string, args ...any) error {
	return &apiError{status: status, code: code, message: fmt.Sprintf(format, args...)}
}

// asAPIError returns err as STS would return it. Any other error is an internal error of this server, whose text stays inside.
func asAPIError(err error) *apiError {
	if e, ok := errors.AsType[*apiError](err); ok {
		return e
	}
	return &apiError{http.StatusInternalServerError, "InternalFailure", "The request processing has failed because of an unknown error, exception or failure."}
}

// Code returns the error code of an error of Authenticate, and "" for nil.
func Code(err error) string {
	if err == nil {
		return ""
	}
	return asAPIError(err).code
}

type responseMetadata struct {
	RequestID string `xml:"RequestId"`
}

type assumeRoleResult struct {
	AssumedRoleUser  assumedRoleUser
	Credentials      credentialsXML
	PackedPolicySize int    `xml:",omitempty"` // percent
	SourceIdentity   string `xml:",omitempty"`

	// Only for AssumeRoleWithWebIdentity.
	Audience string `xml:",omitempty"`
	Provider string `xml:",omitempty"`
	Subject  string `xml:"SubjectFromWebIdentityToken,omitempty"`
}

type assumedRoleUser struct {
	AssumedRoleID string `xml:"AssumedRoleId"`
	Arn           string
}

type credentialsXML struct {
	AccessKeyID     string `xml:"AccessKeyId"`
	SecretAccessKey string
	SessionToken    string
	Expiration      string
}

type callerIdentityResult struct {
	Arn     string
	UserID  string `xml:"UserId"`
	Account string
}

// The documents of responses.
type (
	webIdentityResponse struct {
		XMLName          xml.Name          `xml:"AssumeRoleWithWebIdentityResponse"`
		Namespace        string            `xml:"xmlns,attr"`
		Result           *assumeRoleResult `xml:"AssumeRoleWithWebIdentityResult"`
		ResponseMetadata responseMetadata
	}
	assumeRoleResponse struct {
		XMLName          xml.Name          `xml:"AssumeRoleResponse"`
		Namespace        string            `xml:"xmlns,attr"`
		Result           *assumeRoleResult `xml:"AssumeRoleResult"`
		ResponseMetadata responseMetadata
	}
	callerIdentityResponse struct {
		XMLName          xml.Name              `xml:"GetCallerIdentityResponse"`
		Namespace        string                `xml:"xmlns,attr"`
		Result           *callerIdentityResult `xml:"GetCallerIdentityResult"`
		ResponseMetadata responseMetadata
	}
	errorResponse struct {
		XMLName   xml.Name `xml:"ErrorResponse"`
		Namespace string   `xml:"xmlns,attr"`
		Error     errorXML
		RequestID string `xml:"RequestId"`
	}
	errorXML struct {
		Type    string
		Code    string
		Message string
	}
)

// Answer is the response on the wire. A fault can change it; see Fault.Garble.
type Answer struct {
	Status int
	Header http.Header
	Body   []byte
}

// newAnswer makes the response for a result, or for err if result is nil, with the date now.
func newAnswer(requestID string, now time.Time, result any, err error) *Answer {
	status, doc := http.StatusOK, any(nil)
	switch result := result.(type) {
	case *assumeRoleResult:
		if result.Provider == "" {
			doc = assumeRoleResponse{Namespace: xmlNamespace, Result: result, ResponseMetadata: responseMetadata{requestID}}
		} else {
			doc = webIdentityResponse{Namespace: xmlNamespace, Result: result, ResponseMetadata: responseMetadata{requestID}}
		}
	case *callerIdentityResult:
		doc = callerIdentityResponse{Namespace: xmlNamespace, Result: result, ResponseMetadata: responseMetadata{requestID}}
	default:
		e := asAPIError(err)
		kind := "Sender"
		if e.status >= 500 {
			kind = "Receiver"
		}
		status = e.status
		doc = errorResponse{Namespace: xmlNamespace, RequestID: requestID, Error: errorXML{Type: kind, Code: e.code, Message: e.message}}
	}
	body, err := xml.MarshalIndent(doc, "", "  ")
	if err != nil { // It cannot fail, because the documents are plain structs of strings.
		status = http.StatusInternalServerError
	}
	header := http.Header{}
	header.Set("Content-Type", "text/xml")
	header.Set("X-Amzn-Requestid", requestID)
	header.Set("Date", now.UTC().Format(http.TimeFormat)) // net/http would use another clock.
	return &Answer{Status: status, Header: header, Body: body}
}

func (a *Answer) write(w http.ResponseWriter) {
	maps.Copy(w.Header(), a.Header)
	w.WriteHeader(a.Status)
	_, _ = w.Write(a.Body) // A client that has closed the connection is not an error.
}
