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

# Commands of this repository are compiled like the tools and the images, so that Go compiles each package once.
GO_RUN  := CGO_ENABLED=0 go run -trimpath
INSTALL := $(GO_RUN) ./integration/tools/install

# The oldest supported minor version of Kubernetes.
LOWEST := 1.30

# "make help" shows the lines with two number signs.
#
## KUBERNETES=1.30      test, e2e, soak, demo: the minor version; the newest by default
## CONTEXT=name         demo: run on your own cluster, of this context of kubectl
## DEMO_ROLE=other      demo: the role of the pod
## KEEP=1               demo: keep the cluster until you press Ctrl-C
## FAILURE=etcd         soak: the failure; all and the siege by default
## FUZZTIME=30s         fuzz: how long each test runs
## SDKS=go-v2,curl      sdks: the clients; all by default
## VERSION=v1.2.3       release: the tag that is checked out
## REGISTRY=host/path   images: push them there, with TAG=name
FAILURE  ?=
FUZZTIME ?= 30s
SDKS     ?=
REGISTRY ?=
TAG      ?=
VERSION  ?=

# For releases: the platforms of the command if not all, and who builds, for the provenance.
PLATFORMS  ?=
BUILDER    ?=
INVOCATION ?=

.PHONY: help
help: ## list the targets and variables
	@awk -F ':.*## ' '/^[a-z0-9]+:.*## / {printf "  make %-10s %s\n", $$1, $$2} \
		/^## / {variables = variables " " substr($$0, 3) "\n"} \
		END {printf "\nVariables, as in \"make test KUBERNETES=1.30\":\n%s", variables}' $(MAKEFILE_LIST)

.PHONY: build
build: ## build the programs into .build/bin
	@mkdir -p .build/bin
	@for p in $(PROGRAMS); do \
		name=credence-$${p#credence}; name=$${name%-}; \
		$(BUILD) -o .build/bin/$$name ./cmd/$$p; \
		echo ".build/bin/$$name  $$(wc -c < .build/bin/$$name) bytes"; \
	done

.PHONY: images
images: ## build the container images into .build/images, without Docker
	@$(GO_RUN) ./integration/images/make -registry '$(REGISTRY)' -tag '$(TAG)'

.PHONY: test
test: ## run the tests that need no nodes, with a real control plane
	@.ci/test

.PHONY: lowest
lowest: ## run those with a control plane on the oldest Kubernetes
	@KUBERNETES=$(LOWEST) .ci/test

.PHONY: e2e
e2e: ## run the tests on a cluster with nodes; as root, on Linux
	@.ci/e2e

.PHONY: soak
soak: ## run the siege at length and failures on nodes, into docs/reliability.md
	@.ci/e2e soak '$(FAILURE)'

.PHONY: check
check: ## run all checks that need no running program, such as lint
	@.ci/check

.PHONY: demo
demo: ## show step by step how a pod gets credentials
	@[ -n "$${CONTEXT:-}" ] || .ci/packages runc=runc iptables=iptables
	@.ci/modules ./integration/demo
	@echo 'compiling the demo, which is slow only the first time'
	@$(GO_RUN) ./integration/demo

.PHONY: chart
chart: ## lint the Helm chart and package it into .build/chart
	@helm=$$($(INSTALL) helm); \
	"$$helm" lint --strict --quiet charts/credence; \
	mkdir -p .build/chart; \
	"$$helm" package charts/credence --destination .build/chart > /dev/null; \
	ls .build/chart/credence-*.tgz

.PHONY: release
release: ## make a release of a clean tag into .build/release
	@$(GO_RUN) ./integration/release/make -version '$(VERSION)' -platforms '$(PLATFORMS)' -builder '$(BUILDER)' -invocation '$(INVOCATION)'

.PHONY: bench
bench: ## measure performance, into .build/bench/bench.json and $BENCH_OUT
	@$(GO_RUN) ./integration/bench

.PHONY: sdks
sdks: ## run unmodified AWS SDKs, and update docs/sdk-compatibility.md
	@.ci/packages /usr/bin/aws=awscli,python3-botocore ruby=ruby,ruby-aws-sdk-core node=nodejs npm=npm curl=curl
	@mkdir -p .build/sdks
	@cd integration/sdks/clients/go && GOWORK=off go build -mod=readonly -o ../../../../.build/sdks/go-clients .
	@cp -R integration/sdks/clients/js .build/sdks/; cd .build/sdks/js; cmp -s package-lock.json installed || \
		{ npm ci && cp package-lock.json installed; } || echo 'sdks: npm could not install the SDKs for JavaScript' >&2
	@$(GO_RUN) ./integration/sdks -only '$(SDKS)'

.PHONY: fuzz
fuzz: ## run each fuzz test
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
clean: ## remove what killed tests left, and .build except .build/soak
	@$(GO_RUN) ./integration/cluster/clean
	@if [ -d .build ]; then find .build -mindepth 1 -maxdepth 1 ! -name soak -exec rm -rf {} +; fi
