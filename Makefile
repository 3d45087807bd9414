# SPDX-License-Identifier: Apache-2.0
# `make help` lists the targets: what stands behind ## is their description.

export CGO_ENABLED := 0
GO      ?= go
BIN     := bin
VERSION := $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
LDFLAGS := -s -w -X main.version=$(VERSION)

.DEFAULT_GOAL := help
.PHONY: help build demo test test-vm bench fuzz lint clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

build: ## build the programs into bin/
	$(GO) build -trimpath -ldflags '$(LDFLAGS)' -o $(BIN)/ ./cmd/...

demo: build ## export, mount and use a directory here, no VM needed; DIR=/some/dir leaves that one mounted until Ctrl-C
	@.ci/deps fuse3
	@packaging/demo $(BIN) $(DIR)

test: lint ## unit tests, fuzz corpora, hostile peers, and the POSIX suites on real mounts
	@.ci/deps fuse3 acl attr git dbus-daemon
	$(GO) test -timeout 10m ./...

test-vm: ## the same and more over real virtio-vsock, in a Debian VM (built and cached first)
	@.ci/deps debootstrap e2fsprogs util-linux debian-archive-keyring
	$(GO) test -tags vm -count 1 -timeout 30m -v ./service/vmtest

bench: ## time transfused, bindfs and sshfs side by side on one tree
	@.ci/deps fuse3 bindfs sshfs openssh-sftp-server git
	$(GO) run ./service/bench -check

FUZZTIME ?= 30s
fuzz: ## run each fuzz target for FUZZTIME (30s)
	@set -e; for dir in $$(grep -rl --include='*_test.go' '^func Fuzz' service | xargs -n1 dirname | sort -u); do \
		for f in $$(grep -rhoE --include='*_test.go' '^func Fuzz[A-Za-z0-9]+' $$dir | cut -d' ' -f2); do \
			echo "== $$dir $$f"; $(GO) test -run '^$$' -fuzz "^$$f\$$" -fuzztime $(FUZZTIME) ./$$dir; \
		done; done

lint: ## gofmt, go vet
	@fmt=$$(gofmt -l cmd service); test -z "$$fmt" || { echo "gofmt -w $$fmt"; exit 1; }
	$(GO) vet ./... && $(GO) vet -tags vm ./...

clean: ## remove what build made
	rm -rf $(BIN) dist
