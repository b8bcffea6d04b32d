package policy_test

import (
	"context"
	"fmt"

	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/policy"
)

// A pod gets the role that its annotation names, if its namespace has opted in and permits the role.
func Example() {
	keys, err := policy.NewKeys("iam.amazonaws.com")
	if err != nil {
		panic(err)
	}
	base, err := credential.ParseRoleBase("arn:aws:iam::123456789012:role/")
	if err != nil {
		panic(err)
	}
	rules, err := policy.New(policy.Config{Keys: keys, Base: base})
	if err != nil {
		panic(err)
	}
	namespace := policy.Namespace{
		Name:        "shop",
		Labels:      map[string]string{"iam.amazonaws.com/inject": "enabled"},
		Annotations: map[string]string{"iam.amazonaws.com/permitted": ".*:role/cart-.*"},
	}
	for _, role := range []string{"cart-reader", "admin"} {
		pod := policy.Pod{Namespace: "shop", Name: "cart", Request: keys.Request(map[string]string{"iam.amazonaws.com/role": role})}
		grant, err := rules.Decide(context.Background(), pod, namespace)
		fmt.Printf("%s: %q %q\n", role, grant.Role(), credential.ReasonOf(err))
	}
	// Output:
	// cart-reader: "arn:aws:iam::123456789012:role/cart-reader" ""
	// admin: "" "ROLE_NOT_PERMITTED"
}
