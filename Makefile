# Everything here needs Go, make and git, and nothing else: other tools are built from pinned versions by
# integration/tools, into a cache outside the checkout, the first time they are needed. The race detector
# wants a C compiler too, and clusters with nodes want Linux, root, runc and iptables. "make help" lists the targets.

SHELL         := bash
.SHELLFLAGS   := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS     += --no-print-directory

# Programs are static. The tag leaves out gRPC's tracing pages, and with them html/template and the
# reflection that keeps the linker from dropping what is not used: a quarter of the sidecar's size. What is
# said of the version comes from the build information that Go records.
PROGRAMS := broker credence sidecar webhook
BUILD    := CGO_ENABLED=0 go build -trimpath -tags grpcnotrace -ldflags '-s -w'

# How long "make fuzz" gives to each fuzz test.
FUZZTIME ?= 30s

INSTALL := go run ./integration/tools/install

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: build
build: ## build the programs into .build/bin
	@mkdir -p .build/bin
	@for p in $(PROGRAMS); do \
		name=credence-$${p#credence}; name=$${name%-}; \
		$(BUILD) -o .build/bin/$$name ./cmd/$$p; \
		echo ".build/bin/$$name  $$(wc -c < .build/bin/$$name) bytes"; \
	done

# Where images are to be pushed, and how they are tagged: see "go run ./integration/images/make -help".
REGISTRY ?=
TAG      ?=

.PHONY: images
images: ## build the container images into .build/images, without Docker; REGISTRY=host/path TAG=name
	@go run ./integration/images/make -registry '$(REGISTRY)' -tag '$(TAG)'

.PHONY: test
test: ## all tests but the long ones, on a real control plane, with the race detector where gcc is there
	@.ci/test

.PHONY: e2e
e2e: ## end-to-end tests on a cluster with nodes; needs root, on Linux
	@.ci/e2e

.PHONY: soak
soak: ## the long end-to-end tests, with results in .build/soak; needs root, on Linux
	@.ci/e2e soak

.PHONY: check
check: ## formatting, vet, lint, generated code, go.mod, wire compatibility, known vulnerabilities
	@.ci/check

.PHONY: demo
demo: ## the whole path, told step by step; DEMO_ROLE=name chooses the role, KEEP=1 keeps the cluster
	@.ci/packages runc=runc iptables=iptables
	@go run ./integration/demo

.PHONY: chart
chart: ## lint the Helm chart, and package it into .build/chart
	@helm=$$($(INSTALL) helm); \
	"$$helm" lint --strict --quiet charts/credence; \
	mkdir -p .build/chart; \
	"$$helm" package charts/credence --destination .build/chart > /dev/null; \
	ls .build/chart/credence-*.tgz

.PHONY: bench
bench: ## measure against the goals, into .build/bench/bench.json and $BENCH_OUT
	@go run ./integration/bench

.PHONY: sdks
sdks: ## run AWS SDKs, as they are, against sidecar and broker; writes docs/sdk-compatibility.md
	@.ci/packages /usr/bin/aws=awscli,python3-botocore ruby=ruby,ruby-aws-sdk-core node=nodejs npm=npm curl=curl
	@go run ./integration/sdks

.PHONY: fuzz
fuzz: ## run each fuzz test for FUZZTIME (30s)
	@found=$$(grep -rEo --include='*_test.go' '^func Fuzz[A-Za-z0-9_]*' . | sort || true); \
	if [ -z "$$found" ]; then echo 'fuzz: no fuzz test was found' >&2; exit 1; fi; \
	while IFS=: read -r file func; do \
		name=$${func#func }; echo "== $$name in $$(dirname "$$file") for $(FUZZTIME)"; \
		go test -run '^$$' -fuzz "^$$name\$$" -fuzztime $(FUZZTIME) "$$(dirname "$$file")"; \
	done <<< "$$found"

.PHONY: generate
generate: ## make the generated code anew from its sources
	@.ci/generate .

.PHONY: clean
clean: ## end what killed tests left running, and remove .build but for results of soak
	@go run ./integration/cluster/clean
	@if [ -d .build ]; then find .build -mindepth 1 -maxdepth 1 ! -name soak -exec rm -rf {} +; fi
