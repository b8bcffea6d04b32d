// Package sessions shows the sessions of all brokers of an installation, has the brokers renew or drop those of a role,
// and finds the pods that had an access key.
//
// Each part has three steps: gather a [Snapshot] or [Sources] from the cluster, compute rows from it without input or
// output, and print the rows. It guarantees: a broker that does not respond, or responds with nonsense, is named and does
// not hide the others; what brokers, pods and files contain cannot move the reader's cursor, and its size is limited.
package sessions

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/credence-iam/credence/broker/debugapi"
	"github.com/credence-iam/credence/operator/installation"
)

// Query selects sessions. Its zero value selects all.
type Query struct {
	// Role is the ARN of a role or its name, with or without its path.
	Role string
	// Pod is NAMESPACE/NAME of a pod.
	Pod string
	// Failing selects the sessions whose last fetch failed.
	Failing bool
}

// Snapshot is what the brokers have at one time.
type Snapshot struct {
	Namespace string
	Brokers   []Broker // by name
}

// Broker is one broker of a [Snapshot].
type Broker struct {
	Name string
	Page debugapi.Page
	// Err is why Page lacks grants.
	Err error
}

// errOlder means that a broker does not know a parameter.
var errOlder = errors.New("the broker is older than this command and cannot select by pod; upgrade it, or select by --role")

// readersAtOnce is how many brokers are read at a time. Each has its own connection to the API server.
const readersAtOnce = 16

// Gather reads the grants of all brokers in the namespace that the query may select. [Snapshot.Rows] selects the others
// out. It fails only if the brokers cannot be listed, or if there are none.
func Gather(ctx context.Context, client *installation.Client, namespace string, q Query) (Snapshot, error) {
	brokers, err := brokersOf(ctx, client, namespace)
	if err != nil {
		return Snapshot{}, err
	}
	values := url.Values{}
	if strings.HasPrefix(q.Role, "arn:") {
		values.Set("role", q.Role)
	}
	if q.Pod != "" {
		values.Set("pod", q.Pod)
	}
	if q.Failing {
		values.Set("failing", "true")
	}
	s := Snapshot{Namespace: namespace, Brokers: make([]Broker, len(brokers))}
	var group errgroup.Group
	group.SetLimit(readersAtOnce)
	for n, b := range brokers {
		group.Go(func() error {
			page, err := b.Grants(ctx, values)
			if status, ok := errors.AsType[*installation.StatusError](err); ok && q.Pod != "" && status.Status == http.StatusBadRequest && strings.HasPrefix(status.Text, "unknown parameter") {
				err = errOlder
			}
			if err != nil && b.Pod.DeletionTimestamp != nil {
				err = fmt.Errorf("it shuts down: %w", err)
			}
			s.Brokers[n] = Broker{b.Pod.Name, page, err}
			return nil
		})
	}
	return s, group.Wait()
}

func brokersOf(ctx context.Context, client *installation.Client, namespace string) ([]installation.Broker, error) {
	brokers, err := client.Brokers(ctx, namespace)
	if err == nil && len(brokers) == 0 {
		err = errors.New("no broker runs in namespace " + namespace + "; name the namespace of Credence with --credence-namespace, or see its pods")
	}
	return brokers, err
}

// Row is one session: the state of a grant in one broker.
type Row struct {
	Broker string `json:"broker"`
	// Owner is set if the broker renews the session for live pods. A broker that is no owner has it because a pod called it.
	Owner bool `json:"owner"`
	// AgeSeconds is the time since STS issued the session, by the broker's clock.
	AgeSeconds float64 `json:"age_seconds,omitempty"`
	debugapi.Grant

	now time.Time // of the broker
}

// Rows returns the sessions that the query selects, by role, session name and broker.
func (s Snapshot) Rows(q Query) []Row {
	rows := []Row{}
	for _, b := range s.Brokers {
		for _, g := range b.Page.Grants {
			if !matches(q.Role, g.Role) || q.Failing && g.Failures == 0 && g.Reason == "" {
				continue
			}
			row := Row{Broker: b.Name, Owner: g.Pods > 0, Grant: g, now: b.Page.Time}
			if g.Issued != nil {
				row.AgeSeconds = b.Page.Time.Sub(*g.Issued).Round(time.Second).Seconds()
			}
			rows = append(rows, row)
		}
	}
	slices.SortStableFunc(rows, func(a, b Row) int {
		return cmp.Or(cmp.Compare(a.Role, b.Role), cmp.Compare(a.SessionName, b.SessionName), cmp.Compare(a.Grant.Grant, b.Grant.Grant), cmp.Compare(a.Broker, b.Broker))
	})
	return rows
}

// matches reports whether role has this ARN or name. An empty name matches all.
func matches(name, role string) bool {
	if name == "" || name == role {
		return true
	}
	_, path, _ := strings.Cut(role, ":role/")
	return path == name || strings.HasSuffix(path, "/"+name)
}

// Failed reports whether a broker could not be read.
func (s Snapshot) Failed() bool {
	return slices.ContainsFunc(s.Brokers, func(b Broker) bool { return b.Err != nil })
}
