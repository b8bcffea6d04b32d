package inject

import "k8s.io/apimachinery/pkg/api/validation"

const (
	// maxAnnotations is the maximum length of all annotations together, in bytes: that of Kubernetes, which checks it
	// after admission.
	maxAnnotations = validation.TotalAnnotationSizeLimitB
	// maxWarnings is the maximum number of warnings that inject composes for one pod; it counts the others. The API server
	// passes on 4,096 characters.
	maxWarnings = 64
)
