package ststest

import (
	"encoding/xml"
	"errors"
	"fmt"
	"net/http"
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

// asAPIError returns err as STS would answer it. What is not an error of the API
// is this server's own, and its text stays inside.
func asAPIError(err error) *apiError {
	if e, ok := errors.AsType[*apiError](err); ok {
		return e
	}
	return &apiError{http.StatusInternalServerError, "InternalFailure", "The request processing has failed because of an unknown error, exception or failure."}
}

func statusOf(err error) int {
	if err == nil {
		return http.StatusOK
	}
	return asAPIError(err).status
}

func codeOf(err error) string {
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

// The three documents that are answered.
type (
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

// writeAnswer sends a result, or the error in its place.
func writeAnswer(w http.ResponseWriter, requestID string, result any, err error) {
	status, doc := http.StatusOK, any(nil)
	switch result := result.(type) {
	case *assumeRoleResult:
		doc = assumeRoleResponse{Namespace: xmlNamespace, Result: result, ResponseMetadata: responseMetadata{requestID}}
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
	if err != nil { // cannot be: the documents above are plain structs of strings
		http.Error(w, "encoding the answer failed", http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "text/xml")
	w.Header().Set("X-Amzn-Requestid", requestID)
	w.WriteHeader(status)
	_, _ = w.Write(body) // a client that has gone is no error of ours
}
