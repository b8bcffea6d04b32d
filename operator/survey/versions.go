package survey

import (
	"maps"
	"path"
	"slices"
	"strconv"
	"strings"
)

// imageName returns the last component of an image's repository.
func imageName(image string) string {
	name, _, _ := strings.Cut(path.Base(image), "@")
	name, _, _ = strings.Cut(name, ":")
	return name
}

// Tag returns the tag of an image, or its digest.
func Tag(image string) string {
	image, digest, _ := strings.Cut(image, "@")
	if _, tag, ok := strings.Cut(path.Base(image), ":"); ok {
		return tag
	}
	return digest[:min(len(digest), 19)]
}

// Minor returns the minor version of v1.29.3 or 1.29.
func Minor(version string) (int, bool) {
	parts := strings.SplitN(strings.TrimPrefix(version, "v"), ".", 3)
	if len(parts) < 2 || parts[0] != "1" {
		return 0, false
	}
	minor, err := strconv.Atoi(strings.TrimRight(parts[1], "+"))
	return minor, err == nil
}

// MinorsApart returns how many minor versions two releases are apart, 0 if one of them is not a release, and 1000 if their
// major versions differ.
func MinorsApart(a, b string) int {
	majorA, minorA, okA := release(a)
	majorB, minorB, okB := release(b)
	switch {
	case !okA || !okB:
		return 0
	case majorA != majorB:
		return 1000
	}
	return max(minorA-minorB, minorB-minorA)
}

// release returns the major and the minor version of a release such as v0.4.1.
func release(version string) (major, minor int, ok bool) {
	version, _, _ = strings.Cut(version, "-")
	parts := strings.Split(strings.TrimPrefix(version, "v"), ".")
	if len(parts) != 3 || version == parts[0] {
		return 0, 0, false
	}
	major, err := strconv.Atoi(parts[0])
	minor, err2 := strconv.Atoi(parts[1])
	_, err3 := strconv.Atoi(parts[2])
	return major, minor, err == nil && err2 == nil && err3 == nil
}

// Sorted returns the members of a set.
func Sorted(set map[string]bool) []string { return slices.Sorted(maps.Keys(set)) }
