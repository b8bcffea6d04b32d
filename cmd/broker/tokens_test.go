package main

import (
	"flag"
	"io"
	"strings"
	"testing"
	"time"
)

func TestMaxTokenLife(t *testing.T) {
	for _, tt := range []struct {
		args []string
		want time.Duration // 0: refused
	}{
		{nil, 25 * time.Hour},
		{[]string{"--max-token-life=2h"}, 2 * time.Hour},
		{[]string{"--max-token-life=1h59m"}, 0},
		{[]string{"--max-token-life=0"}, 0},
		{[]string{"--max-token-life=-25h"}, 0},
	} {
		f := flag.NewFlagSet("broker", flag.ContinueOnError)
		f.SetOutput(io.Discard)
		parse := flags(f)
		if err := f.Parse(tt.args); err != nil {
			t.Fatal(err)
		}
		o, err := parse(f.Args())
		switch {
		case tt.want == 0 && (err == nil || !strings.Contains(err.Error(), "--max-token-life")):
			t.Errorf("%q: %v", tt.args, err)
		case tt.want != 0 && (err != nil || o.maxTokenLife != tt.want):
			t.Errorf("%q is %s (%v), want %s", tt.args, o.maxTokenLife, err, tt.want)
		}
	}
}
