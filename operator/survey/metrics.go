package survey

import (
	"bytes"
	"cmp"
	"fmt"
	"math"
	"slices"
	"strings"

	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
)

// Metrics are the samples of one program: name{label="value"} → value. A histogram is name{…,le="bound"} and name_count.
type Metrics map[string]float64

func parseMetrics(text []byte) (Metrics, error) {
	parser := expfmt.NewTextParser(model.UTF8Validation)
	families, err := parser.TextToMetricFamilies(bytes.NewReader(text))
	if err != nil {
		return nil, fmt.Errorf("parsing metrics: %w", err)
	}
	all := make(Metrics)
	for name, family := range families {
		if !strings.HasPrefix(name, "credence_") {
			continue
		}
		for _, m := range family.GetMetric() {
			var labels []string
			for _, l := range m.GetLabel() {
				labels = append(labels, fmt.Sprintf("%s=%q", l.GetName(), l.GetValue()))
			}
			if h := m.GetHistogram(); h != nil {
				for _, b := range h.GetBucket() {
					all[series(name, append(slices.Clip(labels), fmt.Sprintf("le=\"%v\"", b.GetUpperBound())))] = float64(b.GetCumulativeCount())
				}
				all[series(name+"_count", labels)] = float64(h.GetSampleCount())
				continue
			}
			all[series(name, labels)] = m.GetGauge().GetValue() + m.GetCounter().GetValue() + m.GetUntyped().GetValue()
		}
	}
	return all, nil
}

func series(name string, labels []string) string {
	if len(labels) == 0 {
		return name
	}
	slices.Sort(labels)
	return name + "{" + strings.Join(labels, ",") + "}"
}

// Broker returns one metric of a broker, without labels.
func (m Metrics) Broker(name string) (float64, bool) {
	v, ok := m["credence_broker_"+name]
	return v, ok
}

// Sum adds all series of a metric whose labels contain part.
func (m Metrics) Sum(name, part string) (total float64) {
	for key, v := range m {
		if strings.HasPrefix(key, name+"{") && strings.Contains(key, part) {
			total += v
		}
	}
	return total
}

// Within returns the lowest bound of a histogram that a share of all samples of several programs does not exceed, and the
// number of samples. It returns infinity if they exceed the last bound.
func Within(all []Metrics, name string, share float64) (bound, count float64) {
	buckets := make(map[float64]float64)
	for _, m := range all {
		for key, v := range m {
			if _, rest, ok := strings.Cut(key, name+"{"); ok && strings.Contains(key, `action="AssumeRole"`) {
				if _, le, ok := strings.Cut(rest, `le="`); ok {
					var at float64
					if _, err := fmt.Sscanf(strings.TrimSuffix(le, `"}`), "%g", &at); err == nil {
						buckets[at] += v
					}
				}
			}
		}
		count += m.Sum(name+"_count", `action="AssumeRole"`)
	}
	bounds := make([]float64, 0, len(buckets))
	for at := range buckets {
		bounds = append(bounds, at)
	}
	slices.SortFunc(bounds, cmp.Compare[float64])
	for _, at := range bounds {
		if buckets[at] >= share*count {
			return at, count
		}
	}
	return math.Inf(1), count
}
