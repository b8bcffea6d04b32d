package await_test

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"

	"github.com/credence-iam/credence/integration/await"
)

func TestPoll(t *testing.T) {
	t.Parallel()
	no := errors.New("not yet")
	for name, tc := range map[string]struct {
		results []error // the last one repeats
		want    error
		calls   int // 0: as many as fit in the limit
	}{
		"at once":  {results: []error{nil}, calls: 1},
		"later":    {results: []error{no, no, nil}, calls: 3},
		"never":    {results: []error{no, await.Never{Err: context.Canceled}}, want: context.Canceled, calls: 2},
		"too late": {results: []error{no}, want: no},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				calls := 0
				err := await.Poll(t.Context(), func() error {
					calls++
					return tc.results[min(calls, len(tc.results))-1]
				})
				if !errors.Is(err, tc.want) || tc.calls > 0 && calls != tc.calls {
					t.Errorf("Poll returned %v after %d calls, want %v after %d", err, calls, tc.want, tc.calls)
				}
			})
		})
	}
}
