package apitest

import (
	"cmp"
	"encoding/json"
	"slices"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
)

const keyID = "apitest"

// Token has the properties of a pod's token. The zero value is a token that a kubelet projects for a broker.
type Token struct {
	// Audience is the audience. Default: credence-broker.
	Audience string
	// Issuer is the issuer. Default: [Issuer].
	Issuer string
	// Life is the lifetime. Default: an hour.
	Life time.Duration
}

// claims are those of a service-account token.
type claims struct {
	jwt.Claims
	Kubernetes kubernetes `json:"kubernetes.io"`
}

type kubernetes struct {
	Namespace      string  `json:"namespace"`
	Pod            subject `json:"pod"`
	ServiceAccount subject `json:"serviceaccount"`
}

type subject struct {
	Name string `json:"name"`
	UID  string `json:"uid"`
}

// Token returns a token of a pod. The server must have the pod's service account.
func (s *Server) Token(t testing.TB, pod *corev1.Pod, options Token) string {
	t.Helper()
	account := &corev1.ServiceAccount{}
	account.Namespace, account.Name = pod.Namespace, pod.Spec.ServiceAccountName
	if !s.Load(account) {
		t.Fatalf("there is no service account %s/%s", account.Namespace, account.Name)
	}
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: s.key, KeyID: keyID}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	token, err := jwt.Signed(signer).Claims(claims{
		Claims: jwt.Claims{
			Issuer: cmp.Or(options.Issuer, Issuer), Subject: "system:serviceaccount:" + account.Namespace + ":" + account.Name,
			Audience: jwt.Audience{cmp.Or(options.Audience, "credence-broker")}, IssuedAt: jwt.NewNumericDate(now), NotBefore: jwt.NewNumericDate(now),
			Expiry: jwt.NewNumericDate(now.Add(cmp.Or(options.Life, time.Hour))),
		},
		Kubernetes: kubernetes{
			Namespace: pod.Namespace, Pod: subject{pod.Name, string(pod.UID)}, ServiceAccount: subject{account.Name, string(account.UID)},
		},
	}).Serialize()
	if err != nil {
		t.Fatal(err)
	}
	return token
}

func (s *Server) keySet() jose.JSONWebKeySet {
	return jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: s.key.Public(), KeyID: keyID, Algorithm: string(jose.ES256), Use: "sig"}}}
}

// review makes a TokenReview. It accepts a token that the server's key signed for one of the requested audiences, if the
// pod exists. It accepts any issuer.
func (s *Server) review(sent object) object {
	var review authenticationv1.TokenReview
	must(json.Unmarshal(must2(json.Marshal(sent)), &review))
	review.Status.Error = "invalid bearer token"
	signed, err := jwt.ParseSigned(review.Spec.Token, []jose.SignatureAlgorithm{jose.ES256})
	var c claims
	if err == nil {
		err = signed.Claims(s.key.Public(), &c)
	}
	pod := &corev1.Pod{}
	pod.Namespace, pod.Name = c.Kubernetes.Namespace, c.Kubernetes.Pod.Name
	if err == nil && s.Load(pod) && string(pod.UID) == c.Kubernetes.Pod.UID {
		audiences := slices.DeleteFunc(slices.Clone(review.Spec.Audiences), func(a string) bool { return !slices.Contains(c.Audience, a) })
		review.Status = authenticationv1.TokenReviewStatus{
			Authenticated: len(audiences) > 0, Audiences: audiences,
			User: authenticationv1.UserInfo{
				Username: c.Subject, UID: c.Kubernetes.ServiceAccount.UID,
				Extra: map[string]authenticationv1.ExtraValue{
					"authentication.kubernetes.io/pod-name": {c.Kubernetes.Pod.Name},
					"authentication.kubernetes.io/pod-uid":  {c.Kubernetes.Pod.UID},
				},
			},
		}
	}
	return encode(review)
}
