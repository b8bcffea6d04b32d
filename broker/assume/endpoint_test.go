package assume_test

import (
	"context"
	"errors"
	"net"
	"testing"

	"github.com/credence-iam/credence/broker/assume"
)

// TestEndpoint: calls go to the regional endpoint in every partition, also with settings of older SDKs.
func TestEndpoint(t *testing.T) {
	for _, tt := range []struct {
		region string
		env    map[string]string
		want   string
	}{
		{"eu-central-1", nil, "sts.eu-central-1.amazonaws.com:443"},
		{"us-east-1", nil, "sts.us-east-1.amazonaws.com:443"},
		{"us-east-1", map[string]string{"AWS_STS_REGIONAL_ENDPOINTS": "legacy"}, "sts.us-east-1.amazonaws.com:443"},
		{"eu-west-1", map[string]string{"AWS_STS_REGIONAL_ENDPOINTS": "legacy"}, "sts.eu-west-1.amazonaws.com:443"},
		{"me-central-1", nil, "sts.me-central-1.amazonaws.com:443"},
		{"cn-north-1", nil, "sts.cn-north-1.amazonaws.com.cn:443"},
		{"us-gov-west-1", nil, "sts.us-gov-west-1.amazonaws.com:443"},
		{"us-iso-east-1", nil, "sts.us-iso-east-1.c2s.ic.gov:443"},
		{"us-isob-east-1", nil, "sts.us-isob-east-1.sc2s.sgov.gov:443"},
		{"eu-isoe-west-1", nil, "sts.eu-isoe-west-1.cloud.adc-e.uk:443"},
		{"us-isof-south-1", nil, "sts.us-isof-south-1.csp.hci.ic.gov:443"},
		{"eusc-de-east-1", nil, "sts.eusc-de-east-1.amazonaws.eu:443"},
		{"us-east-1", map[string]string{"AWS_USE_FIPS_ENDPOINT": "true"}, "sts-fips.us-east-1.amazonaws.com:443"},
		{"us-gov-east-1", map[string]string{"AWS_USE_FIPS_ENDPOINT": "true"}, "sts.us-gov-east-1.amazonaws.com:443"},
		{"eu-central-1", map[string]string{"AWS_USE_DUALSTACK_ENDPOINT": "true"}, "sts.eu-central-1.api.aws:443"},
		{"eu-central-1", map[string]string{"AWS_ENDPOINT_URL_STS": "https://sts.vpce.example.com"}, "sts.vpce.example.com:443"},
	} {
		t.Run(tt.want, func(t *testing.T) {
			isolate(t, "AKIAEXAMPLE", "own-secret", "")
			for name, value := range tt.env {
				t.Setenv(name, value)
			}
			var dialed []string
			cfg := assume.Config{Region: tt.region, Dial: func(_ context.Context, _, address string) (net.Conn, error) {
				dialed = append(dialed, address)
				return nil, errors.New("this test calls nobody")
			}}
			_, err := newSTS(t, cfg).Credential(t.Context(), grant(t, nil))
			if err == nil || len(dialed) != 1 || dialed[0] != tt.want {
				t.Errorf("with %s, %v, calls go to %v, want %s (%v)", tt.region, tt.env, dialed, tt.want, err)
			}
			// --sts-endpoint overrides the regional endpoint.
			dialed = nil
			if len(tt.env) == 0 {
				cfg.Endpoint = "http://sts.example.com:8080"
				_, _ = newSTS(t, cfg).Credential(t.Context(), grant(t, nil))
				if len(dialed) != 1 || dialed[0] != "sts.example.com:8080" {
					t.Errorf("with --sts-endpoint, calls go to %v", dialed)
				}
			}
		})
	}
}
