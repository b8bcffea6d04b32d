package credential_test

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"text/template"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/credence-iam/credence/broker/credential"
)

// planted is the secret that no output may contain. No name, type or address in the output contains its two letters, so
// the test finds even a part of it.
const planted = "QZQZQZQZQZQZQZQZ"

// traces are the forms in which a formatter or encoder could print planted.
var traces = []string{
	"QZ", "qz",
	"515a515a", "515A515A", "51 5a 51 5a", "51 5A 51 5A", // hexadecimal; addresses may contain shorter runs
	"81 90 81", "81,90,81", // bytes in decimal
	"121 132 121",     // in octal
	"1010001 1011010", // in binary
	base64.StdEncoding.EncodeToString([]byte(planted))[:8],
}

func mustNotLeak(t *testing.T, how, output string) {
	t.Helper()
	for _, trace := range traces {
		if strings.Contains(output, trace) {
			t.Errorf("%s prints %q, which contains %q", how, output, trace)
		}
	}
}

type unexported struct {
	secret     credential.Secret
	credential credential.Credential
	lease      *credential.Lease
	byName     map[string]credential.Secret
	anything   any
}

type exported struct {
	Secret     credential.Secret
	Credential credential.Credential
	Pointer    *credential.Secret
	List       []credential.Secret
	Any        any
}

type embedded struct{ credential.Secret }

type embeddedBeside struct {
	credential.Credential
	Name string
}

// hidingPlaces returns values that contain a secret in different ways.
func hidingPlaces() map[string]any {
	secret := credential.NewSecret(planted)
	cred := credential.Credential{
		AccessKeyID: "ASIAEXAMPLE", SecretAccessKey: secret, SessionToken: secret,
		Issued: time.Unix(0, 0), Expiration: time.Unix(3600, 0),
	}
	lease := credential.Lease{Credential: cred, Region: "eu-central-1"}
	pointer := &secret
	inner := unexported{secret, cred, &lease, map[string]credential.Secret{"a": secret}, secret}
	outer := exported{secret, cred, &secret, []credential.Secret{secret}, inner}
	return map[string]any{
		"secret":                   secret,
		"pointer":                  &secret,
		"pointer to pointer":       &pointer,
		"credential":               cred,
		"pointer to credential":    &cred,
		"lease":                    lease,
		"pointer to lease":         &lease,
		"slice":                    []credential.Secret{secret},
		"array":                    [1]credential.Credential{cred},
		"slice of pointers":        []*credential.Credential{&cred},
		"map value":                map[string]credential.Secret{"k": secret},
		"map of credentials":       map[string]credential.Credential{"k": cred},
		"map key":                  map[credential.Secret]int{secret: 1},
		"any":                      []any{secret, &secret, cred},
		"unexported fields":        inner,
		"pointer to unexported":    &inner,
		"exported fields":          outer,
		"pointer to exported":      &outer,
		"embedded":                 embedded{secret},
		"embedded beside":          embeddedBeside{cred, "n"},
		"unexported, in a slice":   []unexported{inner},
		"unexported, in a map":     map[string]unexported{"k": inner},
		"anonymous, two deep":      struct{ a struct{ b credential.Secret } }{struct{ b credential.Secret }{secret}},
		"unexported slice":         struct{ s []credential.Secret }{[]credential.Secret{secret}},
		"unexported pointer":       struct{ s *credential.Credential }{&cred},
		"unexported map key":       struct{ m map[credential.Secret]int }{map[credential.Secret]int{secret: 1}},
		"error with a secret":      fmt.Errorf("calling: %v", secret),
		"error with a struct":      fmt.Errorf("calling with %+v", outer),
		"error with the wrong %w":  wrongWrap(secret),
		"credential.Error message": credential.Errorf(credential.ErrDenied, credential.ReasonInternal, "%v %+v %#v", secret, cred, lease),
	}
}

// wrongWrap misuses %w. Then fmt prints the value without calling its methods.
func wrongWrap(s credential.Secret) error {
	format := "calling: %w" // a variable, because vet refuses a constant
	return fmt.Errorf(format, any(s))
}

func TestSecretsAreNotPrinted(t *testing.T) {
	flags := []string{"", "+", "#", "-", " ", "0", "+#", "# ", "40", "-40", ".3", "40.3", "#.3"}
	surplus := strings.ToLower("%D") // computed, because linters refuse a constant
	for place, value := range hidingPlaces() {
		// All letters, not only verbs: fmt prints the value for an unknown verb too.
		for verb := 'A'; verb <= 'z'; verb++ {
			for _, flag := range flags {
				format := "%" + flag + string(verb)
				mustNotLeak(t, fmt.Sprintf("%s under %s", place, format), fmt.Sprintf(format, value))
			}
		}
		mustNotLeak(t, place+" under Sprint", fmt.Sprint(value))
		mustNotLeak(t, place+" under Sprintln", fmt.Sprintln(value))
		mustNotLeak(t, place+" as a surplus argument", fmt.Sprintf(surplus, 1, value))
		mustNotLeak(t, place+" as a width", fmt.Sprintf("%*d", value, 1))
	}
}

func TestSecretsAreNotLogged(t *testing.T) {
	for place, value := range hidingPlaces() {
		var out bytes.Buffer
		options := &slog.HandlerOptions{Level: slog.LevelDebug}
		for _, handler := range []slog.Handler{slog.NewJSONHandler(&out, options), slog.NewTextHandler(&out, options)} {
			log := slog.New(handler)
			log.Info("Value", "v", value)
			log.Info("Group", slog.Group("g", slog.Any("v", value)))
			log.With("with", value).WithGroup("g").Info("Attached", "v", value)
			log.Info("Odd", value)
		}
		if out.Len() == 0 {
			t.Fatal("nothing was logged")
		}
		mustNotLeak(t, place+" in slog", out.String())
	}
}

func TestSecretsAreNotEncoded(t *testing.T) {
	for place, value := range hidingPlaces() {
		// An encoding error is no leak, but its text could contain the secret.
		if out, err := json.Marshal(value); err != nil {
			mustNotLeak(t, place+" in a JSON error", err.Error())
		} else {
			mustNotLeak(t, place+" in JSON", string(out))
		}
		if out, err := xml.Marshal(value); err != nil {
			mustNotLeak(t, place+" in an XML error", err.Error())
		} else {
			mustNotLeak(t, place+" in XML", string(out))
		}
		var out bytes.Buffer
		if err := template.Must(template.New("").Parse("{{.}} {{printf `%+v %#v %x` . . .}}")).Execute(&out, value); err == nil {
			mustNotLeak(t, place+" in a template", out.String())
		}
	}
}

// Differences appear in the output of tests, and so in the logs of builds.
func TestSecretsAreNotDiffed(t *testing.T) {
	a := credential.Credential{AccessKeyID: "A", SecretAccessKey: credential.NewSecret(planted)}
	b := credential.Credential{AccessKeyID: "B", SecretAccessKey: credential.NewSecret(planted + "Z")}
	diff := cmp.Diff(a, b)
	if diff == "" {
		t.Error("two credentials with different secrets have no difference")
	}
	mustNotLeak(t, "cmp.Diff", diff)
	mustNotLeak(t, "cmp.Diff of secrets", cmp.Diff(a.SecretAccessKey, b.SecretAccessKey))
	mustNotLeak(t, "cmp.Diff with another type", cmp.Diff(any(a), any(a.SecretAccessKey)))
	if diff := cmp.Diff(a, credential.Credential{AccessKeyID: "A", SecretAccessKey: credential.NewSecret(planted)}); diff != "" {
		t.Errorf("equal credentials differ:\n%s", diff)
	}
}

func TestRedactionIsVisible(t *testing.T) {
	for _, format := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%d"} {
		if got := fmt.Sprintf(format, credential.NewSecret(planted)); got != "[redacted]" {
			t.Errorf("%s prints %q", format, got)
		}
	}
	cred := credential.Credential{
		AccessKeyID: "ASIAEXAMPLE", SecretAccessKey: credential.NewSecret(planted), Expiration: time.Unix(0, 0),
	}
	if got, want := cred.String(), "ASIAEXAMPLE until 1970-01-01T00:00:00Z"; got != want {
		t.Errorf("the credential prints as %q, want %q", got, want)
	}
	encoded, err := json.Marshal(cred)
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(encoded), `"SecretAccessKey":"[redacted]"`) {
		t.Errorf("the credential is encoded as %s", encoded)
	}
}

func TestSecret(t *testing.T) {
	secret := credential.NewSecret(planted)
	if secret.Reveal() != planted {
		t.Error("Reveal does not return the text")
	}
	var zero credential.Secret
	if !zero.Empty() || zero.Reveal() != "" || zero != (credential.Secret{}) {
		t.Error("the zero Secret is not empty")
	}
	if secret.Empty() || !credential.NewSecret("").Empty() {
		t.Error("Empty does not distinguish a text from an empty one")
	}
	for _, tt := range []struct {
		a, b credential.Secret
		want bool
	}{
		{secret, credential.NewSecret(planted), true},
		{secret, credential.NewSecret(planted[1:]), false},
		{secret, credential.NewSecret(planted[1:] + "x"), false},
		{secret, zero, false},
		{zero, credential.NewSecret(""), true},
	} {
		if tt.a.Equal(tt.b) != tt.want || tt.b.Equal(tt.a) != tt.want {
			t.Errorf("Equal of texts of %d and %d bytes = %v, want %v", len(tt.a.Reveal()), len(tt.b.Reveal()), !tt.want, tt.want)
		}
	}
}

func TestCredentialTimes(t *testing.T) {
	issued := time.Date(2026, 1, 1, 12, 0, 0, 0, time.UTC)
	whole := credential.Credential{
		AccessKeyID: "ASIA", SecretAccessKey: credential.NewSecret("s"), SessionToken: credential.NewSecret("t"),
		Issued: issued, Expiration: issued.Add(time.Hour),
	}
	if whole.Duration() != time.Hour {
		t.Errorf("Life = %s", whole.Duration())
	}
	if got := whole.Remaining(issued.Add(90 * time.Minute)); got != -30*time.Minute {
		t.Errorf("Remaining after the expiration = %s", got)
	}
	without := func(change func(*credential.Credential)) credential.Credential {
		c := whole
		change(&c)
		return c
	}
	for name, tt := range map[string]struct {
		cred credential.Credential
		at   time.Time
		want bool
	}{
		"whole":             {whole, issued, true},
		"just before":       {whole, issued.Add(time.Hour - 1), true},
		"at its expiration": {whole, issued.Add(time.Hour), false},
		"zero":              {credential.Credential{}, issued, false},
		"zero, long ago":    {credential.Credential{}, time.Time{}.Add(-1), false},
		"without a key id":  {without(func(c *credential.Credential) { c.AccessKeyID = "" }), issued, false},
		"without a secret":  {without(func(c *credential.Credential) { c.SecretAccessKey = credential.Secret{} }), issued, false},
		"with an empty secret": {
			without(func(c *credential.Credential) { c.SecretAccessKey = credential.NewSecret("") }), issued, false,
		},
		"without a token":       {without(func(c *credential.Credential) { c.SessionToken = credential.Secret{} }), issued, false},
		"without an expiration": {without(func(c *credential.Credential) { c.Expiration = time.Time{} }), issued, false},
	} {
		if got := tt.cred.Valid(tt.at); got != tt.want {
			t.Errorf("%s: Valid = %v", name, got)
		}
	}
}

func TestError(t *testing.T) {
	cause := errors.New("dialing the moon")
	err := fmt.Errorf("calling: %w", &credential.Error{
		Kind: credential.ErrUnavailable, Reason: credential.ReasonSTSUnavailable, Message: "STS does not respond", Cause: cause,
	})
	if !errors.Is(err, credential.ErrUnavailable) || !errors.Is(err, cause) {
		t.Errorf("%v is not of its kind, or does not wrap its cause", err)
	}
	if errors.Is(err, credential.ErrDenied) {
		t.Errorf("%v is of two kinds", err)
	}
	if got, want := err.Error(), "calling: STS does not respond: dialing the moon"; got != want {
		t.Errorf("Error() = %q, want %q", got, want)
	}
	for _, tt := range []struct {
		err  error
		want credential.Reason
	}{
		{nil, ""},
		{err, credential.ReasonSTSUnavailable},
		{cause, credential.ReasonInternal},
		{credential.Errorf(credential.ErrDenied, credential.ReasonRoleNotPermitted, "no %s", "way"), credential.ReasonRoleNotPermitted},
	} {
		if got := credential.ReasonOf(tt.err); got != tt.want {
			t.Errorf("ReasonOf(%v) = %q, want %q", tt.err, got, tt.want)
		}
	}
}
