package webhook_test

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"

	"k8s.io/apimachinery/pkg/api/resource"
	"sigs.k8s.io/yaml"

	"github.com/credence-iam/credence/webhook"
	"github.com/credence-iam/credence/webhook/inject/podview"
)

// discard is a client that keeps only status and length of the response.
type discard struct {
	header http.Header
	code   int
	bytes  int
}

func (d *discard) Header() http.Header { return d.header }
func (d *discard) WriteHeader(code int) {
	if d.code == 0 {
		d.code = code
	}
}

func (d *discard) Write(p []byte) (int, error) {
	d.WriteHeader(http.StatusOK)
	d.bytes += len(p)
	return len(p), nil
}

// allocated returns the bytes that one review allocates until its response, including garbage. This is the maximum of its
// memory, whenever the collector runs.
func allocated(t *testing.T, handler http.Handler, body string, length int) (bytes int64, w *discard) {
	t.Helper()
	request := httptest.NewRequestWithContext(t.Context(), http.MethodPost, "/mutate", strings.NewReader(body))
	request.Header.Set("Content-Type", "application/json")
	request.ContentLength = int64(length)
	w = &discard{header: http.Header{}}
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	handler.ServeHTTP(w, request)
	runtime.ReadMemStats(&after)
	return int64(after.TotalAlloc - before.TotalAlloc), w
}

// list repeats an element until the list has n elements or limit bytes.
func list(n, limit int, element func(n int) string) string {
	var b strings.Builder
	for at := range n {
		e := element(at)
		if b.Len()+len(e) >= limit {
			break
		}
		if at > 0 {
			b.WriteByte(',')
		}
		b.WriteString(e)
	}
	return b.String()
}

func always(s string) func(int) string { return func(int) string { return s } }

// worst returns the reviews that are known to allocate the most for their bytes. Each reaches one of the limits.
func worst() map[string]string {
	const most = podview.MaxObject - 4096
	values := podview.MaxValues - 100
	annotated := func(more, spec string) string {
		return `{"metadata":{"name":"p","annotations":{"iam.amazonaws.com/role":"` + permitted + `"` + more + `}},"spec":{` + spec + `}}`
	}
	container := func(fields string) string { return `"containers":[{"name":"app",` + fields + `}]` }
	named := func(fields string) func(int) string {
		return func(n int) string { return fmt.Sprintf(`{"name":"c%d",%s}`, n, fields) }
	}
	keys := `{"name":"AWS_PROFILE","value":"x"},{"name":"AWS_ACCESS_KEY_ID","value":"x"}`
	everything := `"envFrom":[{}],"env":[` + keys + `,{"name":"AWS_DEFAULT_PROFILE"},{"name":"AWS_SHARED_CREDENTIALS_FILE","value":"x"},{"name":"AWS_CONFIG_FILE","value":"x"},{"name":"AWS_EC2_METADATA_SERVICE_ENDPOINT"},{"name":"AWS_CONTAINER_X"}]`
	short := func(n int) string { return fmt.Sprintf(`"%x":""`, n) }
	numbered := func(fields string) func(n int) string {
		return func(n int) string { return fmt.Sprintf(`{%s"x":%d}`, fields, n) }
	}
	// another is a present sidecar of another version.
	another := `{"name":"credence-sidecar","image":"registry.example/credence-sidecar:v0","command":["/credence-sidecar"],"restartPolicy":"Always",` +
		`"volumeMounts":[{"name":"credence-identity","mountPath":"/var/run/secrets/kubernetes.io/serviceaccount"}],`
	return map[string]string{
		"a usual pod":                        review(pod(permitted, "")),
		"containers":                         review(annotated(`,"iam.amazonaws.com/region":"eu-central-1"`, `"containers":[`+list(podview.MaxContainers, most, named(`"env":[]`))+`]`)),
		"containers without variables":       review(annotated(`,"iam.amazonaws.com/region":"eu-central-1"`, `"containers":[`+list(podview.MaxContainers, most, named(`"x":0`))+`]`)),
		"containers with keys":               review(annotated(``, `"containers":[`+list(podview.MaxContainers, most, named(`"env":[`+keys+`]`))+`]`)),
		"containers with everything":         review(annotated(``, `"containers":[`+list(podview.MaxContainers, most, named(everything))+`]`)),
		"init containers":                    review(annotated(``, container(`"x":0`)+`,"initContainers":[`+list(podview.MaxContainers-1, most, named(everything))+`]`)),
		"containers of long names":           review(annotated(``, `"containers":[`+list(podview.MaxContainers, most, func(n int) string { return fmt.Sprintf(`{"name":"%0253d",%s}`, n, everything) })+`]`)),
		"too many containers":                review(annotated(``, `"containers":[`+list(values, most, always(`{}`))+`]`)),
		"sixty thousand containers":          review(annotated(``, `"containers":[`+list(60_000, 7<<20, named(`"env":[`+keys+`]`))+`]`)),
		"empty variables":                    review(annotated(``, container(`"env":[`+list(values/2, most, always(`{}`))+`]`))),
		"null variables":                     review(annotated(``, container(`"env":[`+list(values, most, always(`null`))+`]`))),
		"variables":                          review(annotated(``, container(`"env":[`+list(values/3, most, named(`"value":"x"`))+`]`))),
		"variables from elsewhere":           review(annotated(``, container(`"env":[`+list(values/12, most, always(`{"valueFrom":{"fieldRef":{},"secretKeyRef":{},"fileKeyRef":{},"resourceFieldRef":{}}}`))+`]`))),
		"one variable of many lines":         review(annotated(``, container(`"env":[{"name":"A","value":"`+strings.Repeat(`\n`, most/2)+`"}]`))),
		"one variable of escapes":            review(annotated(``, container(`"env":[{"name":"A","value":"`+strings.Repeat(`\u0000`, most/6)+`"}]`))),
		"one variable of the longest escape": review(annotated(``, container(`"env":[{"name":"AWS_CONTAINER_`+strings.Repeat(`\u2028`, most/6)+`"}]`))),
		"one variable of broken text":        review(annotated(``, container(`"env":[{"name":"AWS_CONTAINER_`+strings.Repeat("\xff", most)+`"}]`))),
		"one variable with our name":         review(annotated(``, container(`"env":[{"name":"AWS_CONTAINER_`+strings.Repeat("x", most)+`"}]`))),
		"a name":                             review(annotated(``, `"containers":[{"name":"`+strings.Repeat("x", most)+`"}]`)),
		"an image":                           review(annotated(``, container(`"image":"`+strings.Repeat("x", most)+`"`))),
		"our container with an image":        review(annotated(``, container(`"x":0`)+`,"volumes":[{"name":"credence-identity"}],"initContainers":[{"name":"credence-sidecar","image":"`+strings.Repeat("x", most)+`"}]`)),
		"a service account":                  review(annotated(``, container(`"x":0`)+`,"serviceAccountName":"`+strings.Repeat("x", most)+`"`)),
		"a name of the pod":                  review(`{"metadata":{"name":"` + strings.Repeat("x", most) + `","annotations":{"iam.amazonaws.com/role":"r"}}}`),
		"variables of a family":              review(annotated(``, container(`"env":[`+list(values/2, most, func(n int) string { return fmt.Sprintf(`{"name":"AWS_CONTAINER_%x"}`, n) })+`]`))),
		"variables of our container":         review(annotated(``, container(`"x":0`)+`,"volumes":[{"name":"credence-identity"}],"initContainers":[`+another+`"env":[{"name":"CREDENCE_AUTHORIZATION","valueFrom":{"fieldRef":{"fieldPath":"metadata.uid"}}},`+list(values/2, most, always(`{"name":"CREDENCE_X"}`))+`]}]`)),
		"name servers":                       review(annotated(``, container(`"x":0`)+`,"dnsPolicy":"None","dnsConfig":{"nameservers":[`+list(values, most, always(`""`))+`]}`)),
		"null search domains":                review(annotated(``, container(`"x":0`)+`,"dnsPolicy":"None","dnsConfig":{"nameservers":["10.96.0.10"],"searches":[`+list(values, most, always(`null`))+`]}`)),
		"DNS options":                        review(annotated(``, container(`"x":0`)+`,"dnsConfig":{"options":[`+list(values/2, most, always(`{}`))+`]}`)),
		"a name server":                      review(annotated(``, container(`"x":0`)+`,"dnsPolicy":"None","dnsConfig":{"searches":["x"],"nameservers":["fe80::1%`+strings.Repeat("x", most)+`"]}`)),
		"envFrom":                            review(annotated(``, container(`"envFrom":[`+list(values/2, most, always(`{}`))+`]`))),
		"ports":                              review(annotated(``, container(`"ports":[`+list(values/2, most, always(`{}`))+`]`))),
		"mounts":                             review(annotated(``, container(`"volumeMounts":[`+list(values/2, most, always(`{}`))+`]`))),
		"null mounts":                        review(annotated(``, container(`"volumeMounts":[`+list(values, most, always(`null`))+`]`))),
		"null containers":                    review(annotated(``, `"containers":[`+list(values, most, always(`null`))+`]`)),
		"volumes":                            review(annotated(``, container(`"x":0`)+`,"volumes":[`+list(values/2, most, always(`{}`))+`]`)),
		"projections":                        review(annotated(``, container(`"x":0`)+`,"volumes":[{"projected":{"sources":[`+list(values/3, most, always(`{"secret":{}}`))+`]}}]`)),
		"null projections":                   review(annotated(``, container(`"x":0`)+`,"volumes":[{"projected":{"sources":[`+list(values, most, always(`null`))+`]}}]`)),
		"projections of everything":          review(annotated(``, container(`"x":0`)+`,"volumes":[{"projected":{"sources":[`+list(values/12, most, always(`{"secret":{"items":[{}]},"downwardAPI":{"items":[{}]},"configMap":{"items":[{}]},"serviceAccountToken":{},"clusterTrustBundle":{},"podCertificate":{}}`))+`]}}]`)),
		"items":                              review(annotated(``, container(`"x":0`)+`,"volumes":[{"projected":{"sources":[{"configMap":{"items":[`+list(values, most, always(`null`))+`]}}]}}]`)),
		"pull secrets":                       review(annotated(``, container(`"x":0`)+`,"imagePullSecrets":[`+list(values/2, most, always(`{}`))+`]`)),
		"terms":                              review(annotated(``, container(`"x":0`)+`,"affinity":{"nodeAffinity":{"requiredDuringSchedulingIgnoredDuringExecution":{"nodeSelectorTerms":[`+list(values, most, always(`null`))+`]}}}`)),
		"expressions":                        review(annotated(``, container(`"x":0`)+`,"affinity":{"nodeAffinity":{"requiredDuringSchedulingIgnoredDuringExecution":{"nodeSelectorTerms":[{"matchExpressions":[`+list(values, most, always(`null`))+`]}]}}}`)),
		"other terms":                        review(annotated(``, container(`"x":0`)+`,"affinity":{"podAffinity":{"preferredDuringSchedulingIgnoredDuringExecution":[`+list(values, most, always(`null`))+`]}}`)),
		"arguments":                          review(annotated(``, container(`"args":[`+list(values, most, always(`""`))+`]`))),
		"arguments of a byte":                review(annotated(``, container(`"args":[`+list(values, most, always(`"x"`))+`]`))),
		"a probe":                            review(annotated(``, container(`"startupProbe":{"httpGet":{"httpHeaders":[`+list(values, most, always(`null`))+`]},"exec":{"command":[`+list(values/2, most, always(`"x"`))+`]}}`))),
		"resources":                          review(annotated(``, container(`"resources":{"limits":{`+list(values, most, func(n int) string { return fmt.Sprintf(`"%x":1`, n) })+`}}`))),
		"claims":                             review(annotated(``, container(`"resources":{"claims":[`+list(values, most, always(`null`))+`]}`))),
		"selectors":                          review(annotated(``, container(`"x":0`)+`,"nodeSelector":{`+list(values, most, short)+`}`)),
		"annotations":                        review(annotated(`,`+list(values, 250<<10, short), container(`"x":0`))),
		"too many annotations":               review(annotated(`,`+list(values, most, short), container(`"x":0`))),
		"long annotations":                   review(annotated(`,"a":"`+strings.Repeat("x", most)+`"`, container(`"x":0`))),
		"labels":                             review(`{"metadata":{"labels":{` + list(values, most, short) + `},"annotations":{"iam.amazonaws.com/role":"r"}},"spec":{` + container(`"x":0`) + `}}`),
		"unknown annotations":                review(annotated(`,`+list(values, 250<<10, func(n int) string { return fmt.Sprintf(`"iam.amazonaws.com/%x":""`, n) }), container(`"x":0`))),
		"a session policy":                   review(annotated(`,"iam.amazonaws.com/session-policy":"{\"Statement\":1`+strings.Repeat(`,\"abc\":1`, 25_000)+`}"`, container(`"x":0`))),
		"a session policy of other keys":     review(annotated(`,"iam.amazonaws.com/session-policy":"{\"Statement\":1,`+strings.ReplaceAll(list(values, 200<<10, func(n int) string { return fmt.Sprintf(`"%x":1`, n) }), `"`, `\"`)+`}"`, container(`"x":0`))),
		"a list of containers":               review(annotated(`,"iam.amazonaws.com/skip-containers":"`+list(1000, 200<<10, func(n int) string { return fmt.Sprintf("%0100d", n) })+`"`, `"containers":[`+list(podview.MaxContainers, most, named(everything))+`]`)),
		"a list of unknown containers":       review(annotated(`,"iam.amazonaws.com/containers":"`+list(1000, 200<<10, func(n int) string { return fmt.Sprintf("%0100d", n) })+`"`, `"containers":[`+list(podview.MaxContainers, most, named(everything))+`]`)),
		"managed fields":                     review(annotated(``, container(`"x":0`)), `"name":"p"`, `"name":"p","managedFields":[`+list(1_000_000, 2<<20, always(`{}`))+`]`),
		"containers in managed fields":       review(annotated(``, `"managedFields":[`+list(values, most, always(`{}`))+`],`+container(`"managedFields":[`+list(values, most, always(`{}`))+`]`))),
		"deep arrays":                        review(annotated(``, container(`"x":`+strings.Repeat("[", 1_000_000)+strings.Repeat("]", 1_000_000)))),
		"deep objects":                       review(annotated(``, container(`"x":`+strings.Repeat(`{"a":`, 90)+`1`+strings.Repeat("}", 90)))),
		"unknown fields":                     review(annotated(``, container(list(values, most, numbered0)))),
		"unknown objects":                    review(annotated(``, container(`"x":[`+list(values/2, most, numbered(``))+`]`))),
		"a field twice":                      review(annotated(``, container(list(values/1000, most, always(`"env":[`+list(300, most, always(`{}`))+`]`))))),
		"containers twice":                   review(annotated(``, list(20, most, always(`"containers":[`+list(1000, most, named(`"env":[{}]`))+`]`)))),
		"an object twice":                    `{"apiVersion":"admission.k8s.io/v1","kind":"AdmissionReview","request":{"uid":"0b2e5d3c",` + list(10, 3<<20, always(`"object":{"spec":{"x":"`+strings.Repeat("x", 300_000)+`"}}`)) + `}}`,
		"a long number":                      review(annotated(``, container(`"x":`+strings.Repeat("1", most)))),
		"a long grace period":                review(annotated(``, container(`"x":0`)+`,"terminationGracePeriodSeconds":`+strings.Repeat("1", most))),
		"a long quantity":                    review(annotated(``, container(`"resources":{"limits":{"cpu":"`+strings.Repeat("1", most)+`"}}`))),
		"groups":                             review(annotated(``, container(`"x":0`)), `"uid":`, `"userInfo":{"groups":[`+list(values, 900<<10, always(`""`))+`],"extra":{"a":[]}},"uid":`),
		"responses":                          review(annotated(``, container(`"x":0`)), `"request":`, `"response":{"warnings":[`+list(values, 900<<10, always(`""`))+`]},"request":`),
		"an old object":                      review(annotated(``, container(`"x":0`)), `"oldObject":null`, `"oldObject":{"a":"`+strings.Repeat("x", most)+`"}`),
		"spaces":                             strings.Repeat(" ", webhook.MaxReview-1000) + review(pod(permitted, "")),
		"longer than a review":               review(annotated(``, container(`"x":"`+strings.Repeat("x", webhook.MaxReview)+`"`))),
		"endless quotes":                     `"` + strings.Repeat(`\"`, most/2),
		"commas":                             `[` + strings.Repeat(`,`, most),
		"a uid":                              review("{}", "0b2e5d3c", strings.Repeat("x", most)),
		"a namespace":                        review(pod(permitted, ""), `"team-a"`, `"`+strings.Repeat("x", most)+`"`),
		"a resource":                         review(pod(permitted, ""), `"pods"`, `"`+strings.Repeat("x", most)+`"`),
		"a kind":                             review("{}", `"AdmissionReview"`, `"`+strings.Repeat("é", most/2)+`"`),
		"a boolean that is a string":         review("{}", `"dryRun":true`, `"dryRun":"`+strings.Repeat("x", most)+`"`),
	}
}

func numbered0(n int) string { return fmt.Sprintf(`"%x":0`, n) }

// TestCost: no known review allocates more memory than its reservation.
func TestCost(t *testing.T) {
	s := newServer(t)
	for name, body := range worst() {
		for _, length := range []int{-1, len(body)} { // An undeclared length costs more.
			if length > 0 && len(body) <= webhook.MaxReview {
				continue
			}
			began := time.Now()
			got, w := allocated(t, s, body, length)
			took := time.Since(began)
			read := min(len(body), webhook.MaxReview)
			if length > 0 {
				read = 8 << 10
			}
			values := podview.Measure([]byte(body)).Values
			if values > podview.MaxValues {
				values = 0 // The server refuses it before decoding.
			}
			containers := min(strings.Count(body, `"name":"c`)+strings.Count(body, `"name":"0`), podview.MaxContainers)
			reserved := webhook.Cost(read, values, containers)
			// The first review of its kind allocates what later ones reuse, and other goroutines allocate, too.
			for range 2 {
				if got > reserved {
					again, _ := allocated(t, s, body, length)
					got = min(got, again)
				}
			}
			t.Logf("%-36s %9d bytes %6d values: %9d allocated, %9d reserved (%.2f), response %d with %d bytes in %s",
				name, len(body), values, got, reserved, float64(got)/float64(reserved), w.code, w.bytes, took)
			if got > reserved {
				t.Errorf("%s: a review of %d bytes, %d values and %d containers allocates %d bytes, but reserves %d", name, len(body), values, containers, got, reserved)
			}
			if reserved > webhook.MaxCost {
				t.Errorf("%s: review costs %d, more than MaxCost, %d", name, reserved, webhook.MaxCost)
			}
			if w.bytes > 2<<20 {
				t.Errorf("%s: response has %d bytes, want at most 2 MiB", name, w.bytes)
			}
		}
	}
}

// TestMemoryFitsTheChart: all reviews at once take at most half of the webhook's memory in the chart.
func TestMemoryFitsTheChart(t *testing.T) {
	text, err := os.ReadFile("../charts/credence/values.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var values struct {
		Webhook struct {
			Resources struct {
				Limits struct {
					Memory resource.Quantity `json:"memory"`
				} `json:"limits"`
			} `json:"resources"`
		} `json:"webhook"`
	}
	if err := yaml.Unmarshal(text, &values); err != nil {
		t.Fatal(err)
	}
	limit := values.Webhook.Resources.Limits.Memory.Value()
	if limit == 0 {
		t.Fatal("chart has no memory limit for the webhook")
	}
	all := int64(webhook.MaxShared) + webhook.MaxLarge*webhook.MaxCost
	if all > limit/2 {
		t.Errorf("all reviews at once cost %d bytes, want %d or less", all, limit/2)
	}
	if all != webhook.MaxMemory {
		t.Errorf("all reviews at once cost %d bytes, but MaxMemory is %d", all, int64(webhook.MaxMemory))
	}
	if webhook.MaxSmall > webhook.MaxShared/8 {
		t.Errorf("shared memory fits %d small reviews, want at least 8", webhook.MaxShared/webhook.MaxSmall)
	}
}
