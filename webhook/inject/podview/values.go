package podview

import (
	"bytes"
	"fmt"
	"regexp"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
)

// Environment has names and values of variables, and the field of the pod that a value comes from. A variable with
// another source has a ValueFrom without a FieldRef. The rest is not decoded, because a [resource.Quantity], such as the
// divisor of a resourceFieldRef, can take minutes to decode.
type Environment []corev1.EnvVar

// UnmarshalJSON implements the interface of encoding/json.
func (e *Environment) UnmarshalJSON(raw []byte) error {
	var view List[struct {
		Name      string `json:"name"`
		Value     string `json:"value"`
		ValueFrom *struct {
			FieldRef *struct {
				FieldPath string `json:"fieldPath"`
			} `json:"fieldRef"`
		} `json:"valueFrom"`
	}]
	if err := view.UnmarshalJSON(raw); err != nil {
		return err
	}
	*e = nil
	if view == nil {
		return nil
	}
	*e = make(Environment, len(view))
	for at, v := range view {
		(*e)[at] = corev1.EnvVar{Name: v.Name, Value: v.Value}
		if v.ValueFrom != nil {
			(*e)[at].ValueFrom = &corev1.EnvVarSource{}
			if ref := v.ValueFrom.FieldRef; ref != nil {
				(*e)[at].ValueFrom.FieldRef = &corev1.ObjectFieldSelector{FieldPath: ref.FieldPath}
			}
		}
	}
	return nil
}

// Quantity is an amount that is cheap to compare: comparing 1e99999999 with 1 takes [resource.Quantity] a minute.
type Quantity struct{ resource.Quantity }

// Limits of quantities. Those of Kubernetes are 2^63-1 and nine decimal places.
const (
	maxQuantity       = 64 // characters
	maxExponentDigits = 2
)

var exponentForm = regexp.MustCompile(`^[-+]?[0-9.]+[eE][-+]?([0-9]+)$`)

// UnmarshalJSON implements the interface of encoding/json.
func (q *Quantity) UnmarshalJSON(raw []byte) error {
	// resource.Quantity ignores spaces around the number.
	exponent := exponentForm.FindSubmatch(bytes.TrimSpace(bytes.Trim(raw[:min(len(raw), maxQuantity)], `"`)))
	if len(raw) > maxQuantity || exponent != nil && len(exponent[1]) > maxExponentDigits {
		return fmt.Errorf("quantity %.30s has more than %d characters or an exponent of more than %d digits; shorten it", raw, maxQuantity, maxExponentDigits)
	}
	return q.Quantity.UnmarshalJSON(raw)
}
