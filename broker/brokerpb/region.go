package brokerpb

import "regexp"

var regionForm = regexp.MustCompile(`^[a-z0-9-]{0,64}$`)

// ValidRegion reports whether the region field of a response may have this value: up to 64 lower-case letters, digits
// and hyphens. The broker and the sidecar both check it, because the region enters logs and responses to other programs.
func ValidRegion(region string) bool { return regionForm.MatchString(region) }
