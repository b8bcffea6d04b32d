package webhook

import (
	"context"
	stdjson "encoding/json"
	"fmt"

	admissionv1 "k8s.io/api/admission/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/credence-iam/credence/broker/credential"
)

var (
	pods         = metav1.GroupVersionResource{Version: "v1", Resource: "pods"}
	podTemplates = metav1.GroupVersionResource{Version: "v1", Resource: "podtemplates"}
)

// maxTemplate is the maximum length of a PodTemplate, in bytes. The check after an installation creates one of 300.
const maxTemplate = 16 << 10

// checkTemplate injects the template of a PodTemplate, which the check after an installation creates in a dry run. Nothing
// runs a PodTemplate, so the namespace need not permit the role.
func (s *Server) checkTemplate(ctx context.Context, request *admissionv1.AdmissionRequest, memory *reservation) (verdict, error) {
	v := verdict{decision: checked}
	if len(request.Object.Raw) > maxTemplate {
		return v, credential.Errorf(credential.ErrInvalid, credential.ReasonPodUnsupported,
			"the PodTemplate is longer than %d bytes; only the check of an installation creates them here", maxTemplate)
	}
	var object struct {
		Template stdjson.RawMessage `json:"template"`
	}
	if err := stdjson.Unmarshal(request.Object.Raw, &object); err != nil {
		return v, fmt.Errorf("decoding a PodTemplate: %w", err)
	}
	var err error
	v.Result, err = s.cfg.Injector.InjectWithin(ctx, object.Template, request.Namespace, func(containers int) error {
		return memory.growBy(ctx, costPerContainer*int64(containers))
	})
	for at := range v.Patch {
		v.Patch[at].Path = "/template" + v.Patch[at].Path
	}
	return v, err
}
