//go:build unix

package main

import (
	"context"
	"errors"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/credence-iam/credence/integration/stack"
)

// try lets doubles live through all scenarios in virtual time, each as one client on one path, and returns what was found.
func try(ctx context.Context, t *testing.T, w *toy, progress *strings.Builder, rows ...*row) (*Report, error) {
	t.Helper()
	m := &matrix{world: w, life: w.life, progress: progress, rows: rows}
	defer m.close()
	if err := m.run(ctx); err != nil {
		return nil, err
	}
	return m.report(), nil
}

// doubled is a row whose client is that double.
func doubled(name string, path Path) *row {
	c := client{name: name}
	return &row{client: c, path: path, found: installation{[]string{name}, "1.2.3"}, report: Row{Client: name, Path: path}}
}

// good is what a client comes to that does all it should.
var good = map[string]Outcome{
	first: Works, sessions: Works, renewal: Works, away: Works, expired: Reason, back: Works,
	refused: Reason, slow: Works, token: Reason, region: Works,
}

// Each double does one thing wrong, and the scenarios must see that, in the cells where it shows and in no others.
func TestScenariosSeeWhatClientsDoWrong(t *testing.T) {
	t.Parallel()
	nothing := map[string]Outcome{}
	for name, test := range map[string]struct {
		double
		path Path // default: Container
		want map[string]Outcome
		text string // in the list of what is not as expected
	}{
		"does all well":             {want: nothing},
		"does all well, of another": {want: nothing, path: MetadataV2},
		"keeps expired credentials": {
			double: double{answer: func(d *toyDouble, command string) any {
				if command == "call" && d.key != "" {
					return d.sign(d.key, d.end)
				}
				return d.good(command)
			}},
			want: map[string]Outcome{renewal: Expired, expired: Expired, back: NewSession},
			text: "renewal: expired, expected works: ExpiredToken",
		},
		"keeps its first key, which STS goes on to take": {
			double: double{answer: func(d *toyDouble, command string) any {
				if command == "call" && d.key != "" {
					return answer{ARN: assumed(d.role()), Key: d.key}
				}
				return d.good(command)
			}},
			want: map[string]Outcome{renewal: Fails, expired: Fails},
			text: "the key is still the first one's",
		},
		"has credentials whatever it is answered": {
			double: double{answer: func(d *toyDouble, command string) any {
				if a := d.good(command); a.Error == "" {
					return a
				}
				return answer{ARN: assumed(d.role()), Key: "ASIAOWN"}
			}},
			want: map[string]Outcome{expired: Fails, refused: Fails, token: Metadata},
			text: "expired: fails, expected reason: it has credentials that are valid",
		},
		"is of another role": {
			double: double{answer: func(d *toyDouble, command string) any {
				a := d.good(command)
				if a.ARN != "" {
					a.ARN = assumed("another")
				}
				return a
			}},
			want: map[string]Outcome{first: Fails, sessions: Fails, renewal: Fails, away: Fails, back: Fails, slow: Fails},
			text: "it is " + assumed("another"),
		},
		"does not say why it fails": {
			double: double{answer: func(d *toyDouble, command string) any {
				a := d.good(command)
				if a.Error != "" && a.Code != "ExpiredToken" {
					a.Error = "no"
				}
				return a
			}},
			want: map[string]Outcome{expired: Hidden, refused: Hidden, token: Hidden},
			text: "refused: hidden, expected reason: Refused no",
		},
		"recovers in new sessions only": {
			double: double{answer: func(d *toyDouble, command string) any {
				if command == "call" && d.dead {
					return answer{Error: "broken"}
				}
				a := d.good(command)
				d.dead = a.Error != ""
				return a
			}},
			want: map[string]Outcome{back: NewSession},
			text: "back: new session, expected works",
		},
		"does not recover": {
			double: double{answer: func(d *toyDouble, command string) any {
				if d.dead {
					return answer{Error: "broken"}
				}
				a := d.good(command)
				d.dead = a.Error != ""
				return a
			}},
			want: map[string]Outcome{back: Fails},
			text: "back: fails, expected works: broken",
		},
		"recovers in the last second": {
			double: double{answer: func(d *toyDouble, command string) any {
				a := d.good(command)
				if a.Error != "" && d.away() {
					d.recovers = time.Now().Add(recovery - pause)
				}
				if time.Now().Before(d.recovers) {
					return answer{Error: "BROKER_UNREACHABLE"}
				}
				return a
			}},
			want: nothing,
		},
		"lets its sidecar ask at each call": {
			double: double{answer: func(d *toyDouble, command string) any {
				d.asked()
				return d.good(command)
			}},
			want: nothing,
			text: "the sidecar asked the broker",
		},
		"drops credentials that end soon": {
			double: double{answer: func(d *toyDouble, command string) any {
				_, end, refused := d.get(d.env, value(d.env, authorizationVariable))
				if command != "region" && d.away() && refused == nil && time.Until(end) < justBefore+time.Second {
					return answer{Error: "they end soon"}
				}
				return d.good(command)
			}},
			want: map[string]Outcome{away: Fails},
			text: "away: fails, expected works: they end soon",
		},
		"is overtaken by the end": {
			double: double{answer: func(d *toyDouble, command string) any {
				_, end, _ := d.get(d.env, value(d.env, authorizationVariable))
				if left := time.Until(end); command == "call" && d.away() && left > 0 && left <= justBefore {
					time.Sleep(left)
					return answer{Error: "ExpiredToken: in the middle of a call"}
				}
				return d.good(command)
			}},
			want: nothing,
		},
		"takes longer than the session lasts": {
			double: double{answer: func(d *toyDouble, command string) any {
				if d.away() {
					time.Sleep(answerTimeout - 5*time.Second)
				}
				return d.good(command)
			}},
			want: map[string]Outcome{away: Fails},
			text: "its first calls took longer than",
		},
		"answers no more": {
			double: double{answer: func(d *toyDouble, command string) any {
				if d.calls == 3 {
					time.Sleep(time.Hour)
				}
				return d.good(command)
			}},
			want: map[string]Outcome{sessions: Hangs, renewal: Hangs, away: Hangs, expired: Hangs, back: NewSession},
			text: "nothing came within 1m0s",
		},
		"answers too late": {
			// The answer that comes in the end must not be taken for that to the next command.
			double: double{answer: func(d *toyDouble, command string) any {
				if d.calls == 3 {
					time.Sleep(answerTimeout + time.Second)
				}
				return d.good(command)
			}},
			want: map[string]Outcome{sessions: Hangs, renewal: Hangs, away: Hangs, expired: Hangs, back: NewSession},
			text: `sending "call" after what came before`,
		},
		"takes its time": {
			double: double{answer: func(d *toyDouble, command string) any {
				if command == "region" {
					time.Sleep(answerTimeout - time.Second)
				}
				return d.good(command)
			}},
			want: nothing,
		},
		"writes something else": {
			double: double{answer: func(d *toyDouble, command string) any {
				if command == "region" || d.calls == 2 {
					return "panic: {"
				}
				return d.good(command)
			}},
			want: map[string]Outcome{sessions: Fails, renewal: Fails, away: Fails, expired: Fails, back: Fails, region: Fails},
			text: `it wrote something other than a line of JSON ("panic: {")`,
		},
		"finds another region": {
			double: double{answer: func(d *toyDouble, command string) any {
				if command == "region" {
					return answer{Region: "us-east-1"}
				}
				return d.good(command)
			}},
			want: map[string]Outcome{region: Fails},
			text: "it found us-east-1",
		},
		"finds no region": {
			double: double{answer: func(d *toyDouble, command string) any {
				if command == "region" {
					return answer{Error: "none"}
				}
				return d.good(command)
			}},
			want: map[string]Outcome{region: NotFound},
			text: "region: not found, expected works: none",
		},
		"asks once": {
			double: double{answer: func(d *toyDouble, command string) any {
				if command == "region" {
					return answer{Error: "unsupported"}
				}
				key, end, refused := d.fetch(1)
				if refused != nil {
					return failing(refused)
				}
				return d.sign(key, end)
			}},
			want: map[string]Outcome{slow: NextCall, region: Unsupported},
			text: "slow: next call, expected works",
		},
		"is lost after a slow start": {
			double: double{answer: func(d *toyDouble, command string) any {
				if strings.HasPrefix(d.role(), slow) && (command == "call" || d.calls < 5) {
					_, _, _ = d.fetch(1)
					return answer{Error: "none"}
				}
				return d.good(command)
			}},
			want: map[string]Outcome{slow: NewSession},
			text: "slow: new session, expected works",
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				path := test.path
				if path == "" {
					path = Container
				}
				r := doubled("double", path)
				report, err := try(t.Context(), t, newToy(map[string]double{"double": test.double}), new(strings.Builder), r)
				if err != nil {
					t.Fatal(err)
				}
				got, want := make(map[string]Outcome), but(good, test.want)
				if path != Container {
					delete(want, token)
				}
				for _, c := range report.Rows[0].Cells {
					got[c.Scenario] = c.Outcome
				}
				if diff := cmp.Diff(want, got); diff != "" {
					t.Errorf("outcomes (-want +got):\n%s", diff)
				}
				unmet := strings.Join(report.unmet(), "\n")
				if !strings.Contains(unmet, test.text) || test.text == "" && unmet != "" {
					t.Errorf("not as expected is %q, want %q", unmet, test.text)
				}
			})
		})
	}
}

// Calls of a client are counted where they were made.
func TestCallsAreCountedByScenario(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		storm := double{answer: func(d *toyDouble, command string) any {
			if strings.HasPrefix(d.role(), slow) || d.role() == refusedRole {
				for range 20 {
					d.asked()
				}
			}
			if command == "fresh" && !d.away() {
				d.asked()
			}
			return d.good(command)
		}}
		report, err := try(t.Context(), t, newToy(map[string]double{"double": storm}), new(strings.Builder), doubled("double", Container))
		if err != nil {
			t.Fatal(err)
		}
		if c, _ := report.Rows[0].cell(sessions); c.BrokerCalls != manySessions || c.Calls != manySessions {
			t.Errorf("of %d calls, each with one to the broker, %d and %d are counted", manySessions, c.Calls, c.BrokerCalls)
		}
		if c, _ := report.Rows[0].cell(expired); c.BrokerCalls != 0 {
			t.Errorf("without a broker %d calls to it are counted", c.BrokerCalls)
		}
		all := strings.Join(report.storms(), "\n")
		for _, want := range []string{"double, container: the sidecar", "pod refused-imds-v2: the sidecar", "pod slow-double-container: the sidecar"} {
			if !strings.Contains(all, want) {
				t.Errorf("storms are %q, want %q too", all, want)
			}
		}
	})
}

// What a client cannot use it must not even have come to.
func TestUnusableIsSeenAtTheSidecar(t *testing.T) {
	t.Parallel()
	const text = "no credentials"
	for name, test := range map[string]struct {
		asks  bool
		error string
		want  Outcome
	}{
		"never asks":    {error: text, want: Unusable},
		"asks":          {asks: true, error: text, want: Fails},
		"another error": {error: "broken", want: Fails},
		"works":         {asks: true, want: Works},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				r := doubled("double", Container)
				r.client.unusable = map[Path]string{Container: text}
				b := double{answer: func(d *toyDouble, command string) any {
					a := answer{Error: test.error}
					if test.asks {
						if a = d.good(command); test.error != "" {
							a = answer{Error: test.error}
						}
					}
					return a
				}}
				report, err := try(t.Context(), t, newToy(map[string]double{"double": b}), new(strings.Builder), r)
				if err != nil {
					t.Fatal(err)
				}
				if cells := report.Rows[0].Cells; len(cells) != 1 || cells[0].Outcome != test.want {
					t.Errorf("found %+v, want %s alone", cells, test.want)
				}
			})
		})
	}
}

// A client that cannot be run has a row that says so, and the others are tried.
func TestClientThatCannotBeRun(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := newToy(map[string]double{
			"good":    {},
			"garbage": {hello: "Segmentation fault"},
			"other":   {hello: `{"client":"other","version":"3.4.5"}`},
		})
		rows := []*row{doubled("missing", Container), doubled("garbage", Container), doubled("other", MetadataV2), doubled("good", Container)}
		rows[3].client.name = "double"
		var progress strings.Builder
		report, err := try(t.Context(), t, w, &progress, rows...)
		if err != nil {
			t.Fatal(err)
		}
		for i, want := range []string{
			"there is no such program", "Segmentation fault", "version 1.2.3 of other was found, and its driver says that it runs other 3.4.5", "",
		} {
			got := report.Rows[i]
			if !strings.Contains(got.Failed, want) || want == "" && got.Failed != "" {
				t.Errorf("row %d failed with %q, want %q", i, got.Failed, want)
			}
			if want != "" && (len(got.Cells) > 0 || !strings.Contains(progress.String(), want)) {
				t.Errorf("row %d, which failed, has %+v; the user was told:\n%s", i, got.Cells, &progress)
			}
		}
		if n := len(report.Rows[3].Cells); n != len(good) {
			t.Errorf("beside them, %d scenarios were tried", n)
		}
		if unmet := report.unmet(); len(unmet) != 3 || !strings.Contains(unmet[0], "missing, container: could not be run: ") {
			t.Errorf("not as expected is %q", unmet)
		}
	})
}

func TestRunEndsWithWhatItNeeds(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := newToy(map[string]double{"double": {}})
		w.deaf = true
		if _, err := try(t.Context(), t, w, new(strings.Builder), doubled("double", Container)); err == nil || !strings.Contains(err.Error(), "somebody answers") {
			t.Errorf("with a broker that does not go away: %v", err)
		}
	})
}

// Interrupted, it begins nothing more.
func TestInterrupt(t *testing.T) {
	t.Parallel()
	for _, during := range []string{first, sessions, renewal, refused, region, slow, away, back} {
		t.Run(during, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				after := 0
				var progress strings.Builder
				b := double{answer: func(d *toyDouble, command string) any {
					if ctx.Err() != nil {
						after++
					}
					if d.during(command) == during {
						cancel()
					}
					return d.good(command)
				}}
				_, err := try(ctx, t, newToy(map[string]double{"double": b}), &progress, doubled("double", Container))
				if !errors.Is(err, context.Canceled) {
					t.Errorf("it comes to %v", err)
				}
				// One may have been on its way in a scenario beside it.
				if after > 1 {
					t.Errorf("%d commands came after the interrupt; the user was told:\n%s", after, &progress)
				}
			})
		})
	}
}

func TestDriverIsWhatWasFound(t *testing.T) {
	t.Parallel()
	found := installation{version: "1.2.3"}
	for h, ok := range map[hello]bool{
		{"botocore", "1.2.3"}: true, {"botocore-old", "v1.2.3"}: true,
		{"botocore", "1.2.4"}: false, {"ruby", "1.2.3"}: false, {"botocore-old", ""}: false,
	} {
		if err := found.is(client{name: "botocore-old"}, h); (err == nil) != ok {
			t.Errorf("%+v is taken as %v", h, err)
		}
	}
}

func TestEnvironmentOfPaths(t *testing.T) {
	t.Parallel()
	pod := []string{fullURIVariable + "=x", authorizationVariable + "=y", metadataVariable + "=z", "AWS_REGION=" + stack.Region}
	before := slices.Clone(pod)
	for path, want := range map[Path][]string{
		Container:  append(slices.Clone(pod), noMetadata),
		MetadataV2: pod[2:],
		MetadataV1: {pod[2], pod[3], "IMDS_VERSION=1"},
	} {
		if diff := cmp.Diff(want, env(pod, path)); diff != "" {
			t.Errorf("%s (-want +got):\n%s", path, diff)
		}
	}
	if diff := cmp.Diff(before, pod); diff != "" {
		t.Errorf("the pod's own is changed:\n%s", diff)
	}
}

// Clients that take much of a processor take turns while all go on.
func TestHeavyClientsTakeTurns(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex
		now, most := 0, 0
		add := func(n int) {
			mu.Lock()
			defer mu.Unlock()
			now += n
			most = max(most, now)
		}
		heavy := double{answer: func(d *toyDouble, command string) any {
			// By then all have expired, and take no turns any more.
			if _, _, refused := d.get(d.env, value(d.env, authorizationVariable)); refused == nil && d.during(command) == away {
				add(1)
				defer add(-1)
				time.Sleep(time.Second)
			}
			return d.good(command)
		}}
		places := make(chan struct{}, 1)
		var rows []*row
		for _, path := range []Path{Container, MetadataV2, MetadataV1} {
			r := doubled("double", path)
			r.heavy = places
			rows = append(rows, r)
		}
		report, err := try(t.Context(), t, newToy(map[string]double{"double": heavy}), new(strings.Builder), rows...)
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range report.Rows {
			if c, _ := r.cell(away); c.Outcome != Works || c.Calls < 3 {
				t.Errorf("%s: %+v", r.Path, c)
			}
		}
		if most != 1 {
			t.Errorf("%d called at once", most)
		}
	})
}
