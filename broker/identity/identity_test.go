package identity_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"log/slog"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/credence-iam/credence/broker/identity"
)

// planted is the token that no output may contain. No name, type or address in the output has its two letters.
const planted = "QZQZQZQZQZQZQZQZ"

func mustNotLeak(t *testing.T, how, output string) {
	t.Helper()
	for _, trace := range []string{"QZ", "qz", "515a515a", "515A515A", "51 5a 51 5a", "51 5A 51 5A", "81 90 81", "121 132 121", "1010001 1011010", "UVpRWlFa"} {
		if strings.Contains(output, trace) {
			t.Errorf("%s prints %q, which contains %q", how, output, trace)
		}
	}
}

type call struct {
	Token identity.UnverifiedToken
	token identity.UnverifiedToken
	again *identity.UnverifiedToken
	byPod map[identity.Pod]identity.UnverifiedToken
}

func hidingPlaces() map[string]any {
	token := identity.NewUnverifiedToken(planted)
	c := call{token, token, &token, map[identity.Pod]identity.UnverifiedToken{{Name: "p"}: token}}
	return map[string]any{
		"token":           token,
		"pointer":         &token,
		"slice":           []identity.UnverifiedToken{token},
		"map value":       map[string]identity.UnverifiedToken{"k": token},
		"map key":         map[identity.UnverifiedToken]int{token: 1},
		"struct":          c,
		"pointer to it":   &c,
		"slice of it":     []call{c},
		"unexported only": struct{ t identity.UnverifiedToken }{token},
		"embedded":        struct{ identity.UnverifiedToken }{token},
		"error":           fmt.Errorf("verifying %v, %+v, %#v", token, c, c),
	}
}

func TestTokensAreNotPrinted(t *testing.T) {
	for place, value := range hidingPlaces() {
		for verb := 'A'; verb <= 'z'; verb++ {
			for _, flag := range []string{"", "+", "#", " ", "40", ".3", "#.3"} {
				format := "%" + flag + string(verb)
				mustNotLeak(t, place+" under "+format, fmt.Sprintf(format, value))
			}
		}
		var out bytes.Buffer
		slog.New(slog.NewJSONHandler(&out, nil)).Info("Value", "v", value)
		slog.New(slog.NewTextHandler(&out, nil)).Info("Value", "v", value, slog.Group("g", "v", value))
		if out.Len() == 0 {
			t.Fatal("nothing was logged")
		}
		mustNotLeak(t, place+" in slog", out.String())
		if encoded, err := json.Marshal(value); err == nil {
			mustNotLeak(t, place+" in JSON", string(encoded))
		}
		mustNotLeak(t, place+" in a difference", cmp.Diff(value, any(1)))
	}
}

func TestUnverifiedToken(t *testing.T) {
	token := identity.NewUnverifiedToken(planted)
	if token.Reveal() != planted {
		t.Error("Reveal does not return the text")
	}
	if got := fmt.Sprint(token); got != "[redacted token]" {
		t.Errorf("the token is printed as %q", got)
	}
	var zero identity.UnverifiedToken
	if zero.Reveal() != "" || zero.String() != "[redacted token]" {
		t.Error("the zero token is not empty")
	}
}

func TestPod(t *testing.T) {
	pod := identity.Pod{Namespace: "shop", Name: "cart-1", UID: "u"}
	if got := fmt.Sprint(pod); got != "shop/cart-1" {
		t.Errorf("the pod is printed as %q", got)
	}
	// The UID distinguishes a pod from an earlier one with its name.
	if pod == (identity.Pod{Namespace: "shop", Name: "cart-1", UID: "v"}) {
		t.Error("pods with different UIDs are equal")
	}
}

// TestPeers: all addresses that one machine can use count as one.
func TestPeers(t *testing.T) {
	if got := identity.PeerOf(t.Context()); got != "" {
		t.Errorf("without an address PeerOf returns %q", got)
	}
	for address, want := range map[string]string{
		"10.0.0.1": "10.0.0.1", "::ffff:10.0.0.1": "10.0.0.1", "bufconn": "bufconn", "": "",
		"2001:db8:0:1::1": "2001:db8:0:1::/64", "2001:db8:0:1:ffff::2": "2001:db8:0:1::/64", "2001:db8:0:2::1": "2001:db8:0:2::/64",
		"fe80::1%eth0": "fe80::/64",
	} {
		if got := identity.PeerOf(identity.WithPeer(t.Context(), address)); got != want {
			t.Errorf("PeerOf returns %[2]q for %[1]s, want %[3]q", address, got, want)
		}
	}
}
