// Package metrics reads the metrics of brokers and webhooks, as their programs write them in the text format of Prometheus.
// It guarantees: a page of any size becomes a limited number of series. It knows no metric's meaning.
package metrics

import (
	"cmp"
	"math"
	"slices"
	"strconv"
	"strings"
	"unique"
)

// prefix starts the names of the metrics of all programs.
const prefix = "credence_"

// maxSeries is how many series of one program are read. Brokers have about 250.
const maxSeries = 2_000

// Values are the values of series, by their name and labels as in the text format.
type Values map[string]float64

// Parse reads the text format as the programs write it: labels in a fixed order, no timestamps. It skips the metrics of
// libraries.
func Parse(text []byte) Values {
	v := Values{}
	for line := range strings.Lines(string(text)) {
		line = strings.TrimRight(line, "\n")
		at := strings.LastIndexByte(line, ' ')
		if at < 0 || !strings.HasPrefix(line, prefix) || len(v) >= maxSeries {
			continue
		}
		if value, err := strconv.ParseFloat(line[at+1:], 64); err == nil {
			v[unique.Make(line[:at]).Value()] = value // The names are the same in each page.
		}
	}
	return v
}

// Label returns the value of one label of a series, "" if it has none.
func Label(series, name string) string {
	for _, before := range []string{"{", ","} {
		if _, rest, found := strings.Cut(series, before+name+`="`); found {
			value, _, _ := strings.Cut(rest, `"`)
			return value
		}
	}
	return ""
}

// Broker returns a metric of a broker that has no labels.
func (v Values) Broker(name string) (value float64, known bool) {
	value, known = v[prefix+"broker_"+name]
	return value, known
}

// Of adds up the series of one metric that have all of these labels, as name="value".
func (v Values) Of(metric string, labels ...string) (total float64) {
	for series, value := range v {
		if has(series, metric, labels) {
			total += value
		}
	}
	return total
}

// By adds up the series of one metric by the value of a label.
func (v Values) By(metric, name string, labels ...string) map[string]float64 {
	all := map[string]float64{}
	for series, value := range v {
		if has(series, metric, labels) {
			all[Label(series, name)] += value
		}
	}
	return all
}

func has(series, metric string, labels []string) bool {
	name, rest, _ := strings.Cut(series, "{")
	return name == metric && !slices.ContainsFunc(labels, func(l string) bool { return !strings.Contains(rest, l) })
}

// bucket is one bucket of a histogram: how many values are at most end.
type bucket struct{ end, count float64 }

func (v Values) buckets(histogram string, labels []string) (all []bucket) {
	for text, count := range v.By(histogram+"_bucket", "le", labels...) {
		if end, err := strconv.ParseFloat(text, 64); err == nil {
			all = append(all, bucket{end, count})
		}
	}
	slices.SortFunc(all, func(a, b bucket) int { return cmp.Compare(a.end, b.end) })
	return all
}

// Quantile returns a quantile of a histogram, as histogram_quantile of Prometheus does: within a bucket, values are assumed
// to be spread evenly. It returns false without values.
func (v Values) Quantile(q float64, histogram string, labels ...string) (float64, bool) {
	all := v.buckets(histogram, labels)
	if len(all) < 2 || all[len(all)-1].count == 0 {
		return 0, false
	}
	want, begin, below := q*all[len(all)-1].count, 0.0, 0.0
	for n, b := range all {
		if b.count >= want {
			if n == len(all)-1 { // Its end is infinite.
				return begin, true
			}
			return begin + (b.end-begin)*(want-below)/max(b.count-below, 1e-9), true
		}
		begin, below = b.end, b.count
	}
	return begin, true
}

// Within returns the lowest end of a bucket that a share of all values of a histogram does not exceed, and the number of
// values. It returns infinity if they exceed the last end.
func (v Values) Within(share float64, histogram string, labels ...string) (end, count float64) {
	count = v.Of(histogram+"_count", labels...)
	for _, b := range v.buckets(histogram, labels) {
		if b.count >= share*count {
			return b.end, count
		}
	}
	return math.Inf(1), count
}

// Sum adds up the values of several programs.
func Sum(all []Values) Values {
	sum := Values{}
	for _, v := range all {
		for series, value := range v {
			sum[series] += value
		}
	}
	return sum
}
