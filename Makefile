# The targets need only Go, make and git. integration/tools builds other tools from pinned versions, into a cache outside
# the checkout, when a target first needs them. The race detector also needs a C compiler. Clusters with nodes also need
# Linux, root, runc and iptables. "make help" lists the targets.

SHELL         := bash
.SHELLFLAGS   := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS     += --no-print-directory

# Programs are static. The tag omits gRPC's tracing pages. These import html/template, whose reflection prevents the
# linker from dropping unused code: a quarter of the sidecar's size. Programs take their version from the build
# information that Go records.
PROGRAMS := broker credence sidecar webhook
BUILD    := CGO_ENABLED=0 go build -trimpath -tags grpcnotrace -ldflags '-s -w'

# Which clients "make sdks" runs, with commas; all by default.
SDKS ?=

# How long "make fuzz" runs each fuzz test.
FUZZTIME ?= 30s

# Commands of this repository are compiled like the tools and the images, so that Go compiles each package once.
GO_RUN  := CGO_ENABLED=0 go run -trimpath
INSTALL := $(GO_RUN) ./integration/tools/install

# The minor version of Kubernetes for test, e2e, soak and demo, such as 1.30; the newest by default. LOWEST is the oldest
# supported one.
export KUBERNETES ?=
LOWEST := 1.30

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

# The registry to push images to, and their tag: see "go run ./integration/images/make -help".
REGISTRY ?=
TAG      ?=

.PHONY: images
images: ## build the container images into .build/images, without Docker; REGISTRY=host/path TAG=name
	@go run ./integration/images/make -registry '$(REGISTRY)' -tag '$(TAG)'

.PHONY: test
test: ## run all tests except the long ones, on a real control plane; KUBERNETES=1.30 runs those that need one, on that version
	@.ci/test

.PHONY: lowest
lowest: ## run the tests that need a control plane on the oldest supported Kubernetes
	@KUBERNETES=$(LOWEST) .ci/test

.PHONY: e2e
e2e: ## run the end-to-end tests on a cluster with nodes; needs root, on Linux
	@.ci/e2e

# The names of the failures that "make soak" makes happen, as a regular expression; all and the siege by default.
FAILURE ?=

.PHONY: soak
soak: ## run the siege at length, and failures on a cluster with nodes, into docs/reliability.md; FAILURE=etcd runs one; needs root, on Linux
	@.ci/e2e soak '$(FAILURE)'

.PHONY: check
check: ## check format, lint, generated code, go.mod, the chart, commit subjects, wire compatibility and known vulnerabilities
	@.ci/check

.PHONY: demo
demo: ## show step by step how a pod gets credentials; DEMO_ROLE=name chooses the role, KEEP=1 keeps the cluster, CONTEXT=name uses yours
	@[ -n '$(CONTEXT)' ] || .ci/packages runc=runc iptables=iptables
	@.ci/modules ./integration/demo
	@echo 'compiling the demo, which is slow only the first time'
	@CONTEXT='$(CONTEXT)' $(GO_RUN) ./integration/demo

.PHONY: chart
chart: ## lint the Helm chart and package it into .build/chart
	@helm=$$($(INSTALL) helm); \
	"$$helm" lint --strict --quiet charts/credence; \
	mkdir -p .build/chart; \
	"$$helm" package charts/credence --destination .build/chart > /dev/null; \
	ls .build/chart/credence-*.tgz

# The version to release, the platforms of the command if not all, and who builds, for the provenance.
VERSION    ?=
PLATFORMS  ?=
BUILDER    ?=
INVOCATION ?=

.PHONY: release
release: ## make all that a release has from the clean tag that is checked out, into .build/release; VERSION=v1.2.3
	@go run ./integration/release/make -version '$(VERSION)' -platforms '$(PLATFORMS)' -builder '$(BUILDER)' -invocation '$(INVOCATION)'

.PHONY: bench
bench: ## measure performance against the goals, into .build/bench/bench.json and $BENCH_OUT
	@go run ./integration/bench

.PHONY: sdks
sdks: ## run unmodified AWS SDKs against sidecar and broker, and write docs/sdk-compatibility.md; SDKS=go-v2,curl runs some
	@.ci/packages /usr/bin/aws=awscli,python3-botocore ruby=ruby,ruby-aws-sdk-core node=nodejs npm=npm curl=curl
	@mkdir -p .build/sdks
	@cd integration/sdks/clients/go && GOWORK=off go build -mod=readonly -o ../../../../.build/sdks/go-clients .
	@cp -R integration/sdks/clients/js .build/sdks/; cd .build/sdks/js; cmp -s package-lock.json installed || \
		{ npm ci && cp package-lock.json installed; } || echo 'sdks: npm could not install the SDKs for JavaScript' >&2
	@go run ./integration/sdks -only '$(SDKS)'

.PHONY: fuzz
fuzz: ## run each fuzz test for FUZZTIME (30s)
	@found=$$(grep -rEo --include='*_test.go' '^func Fuzz[A-Za-z0-9_]*' . | sort || true); \
	if [ -z "$$found" ]; then echo 'fuzz: found no fuzz test' >&2; exit 1; fi; \
	while IFS=: read -r file func; do \
		name=$${func#func }; echo "== $$name in $$(dirname "$$file") for $(FUZZTIME)"; \
		go test -run '^$$' -fuzz "^$$name\$$" -fuzztime $(FUZZTIME) "$$(dirname "$$file")"; \
	done <<< "$$found"

.PHONY: generate
generate: ## generate code from its sources
	@.ci/generate .

.PHONY: clean
clean: ## remove what killed tests left, and .build except results of soak
	@go run ./integration/cluster/clean
	@if [ -d .build ]; then find .build -mindepth 1 -maxdepth 1 ! -name soak -exec rm -rf {} +; fi
