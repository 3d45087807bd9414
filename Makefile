# SPDX-License-Identifier: Apache-2.0
# `make help` lists the targets: what stands behind ## is their description.

export CGO_ENABLED := 0
GO       ?= go
BIN      := bin
DIST     := dist
# The release is the one of debian/changelog. A tree from git that is not that release's tag is a version before it.
RELEASE  := $(shell sed -n '1s/.*(\([^-)]*\).*/\1/p' debian/changelog)
VERSION  := $(shell packaging/version $(RELEASE))
GOLDFLAGS := -s -w
GOBUILD   = $(GO) build -trimpath $(GOBUILDFLAGS) -ldflags '$(GOLDFLAGS) -X main.version=$(VERSION)'

# Where install puts things.
PREFIX     := /usr
BINDIR     := $(PREFIX)/bin
SBINDIR    := $(PREFIX)/sbin
LIBDIR     := $(PREFIX)/lib
UNITDIR    := $(LIBDIR)/systemd/system
DATADIR    := $(PREFIX)/share
SYSCONFDIR := /etc
ZSHDIR     := zsh/vendor-completions

.DEFAULT_GOAL := help
.PHONY: help build man install demo test test-vm test-vm-all soak bench bench-vm scale streams fuzz lint dist deb deb-forky rpm clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

build: ## build the programs into bin/
	$(GOBUILD) -o $(BIN)/ ./cmd/...

man: ## the manual pages into bin/man/
	packaging/man/build $(BIN)/man

I   = install -D -m 0644 -t $(DESTDIR)
install: build man ## everything into DESTDIR, as packages have it
	install -D -t $(DESTDIR)$(BINDIR) $(BIN)/transfused $(BIN)/transfuse-host $(BIN)/transfusectl
	install -d $(DESTDIR)$(SBINDIR) $(DESTDIR)$(LIBDIR)/systemd/system-generators $(DESTDIR)$(SYSCONFDIR)/transfuse
	ln -sfr $(DESTDIR)$(BINDIR)/transfusectl $(DESTDIR)$(SBINDIR)/mount.transfuse
	ln -sfr $(DESTDIR)$(BINDIR)/transfusectl $(DESTDIR)$(SBINDIR)/mount.fuse.transfuse
	ln -sfr $(DESTDIR)$(BINDIR)/transfused $(DESTDIR)$(LIBDIR)/systemd/system-generators/transfused-generator
	$I$(UNITDIR) systemd/*.socket systemd/*.service
	install -D -m 0644 systemd/transfused.tmpfiles $(DESTDIR)$(LIBDIR)/tmpfiles.d/transfused.conf
	install -D -m 0644 systemd/transfuse-host.tmpfiles $(DESTDIR)$(LIBDIR)/tmpfiles.d/transfuse-host.conf
	install -D -m 0644 systemd/transfused.preset $(DESTDIR)$(LIBDIR)/systemd/system-preset/80-transfused.preset
	$I$(LIBDIR)/systemd/catalog systemd/transfused.catalog
	$I$(DATADIR)/dbus-1/system.d packaging/dbus/*.conf
	$I$(DATADIR)/dbus-1/system-services packaging/dbus/*.service
	$I$(DATADIR)/polkit-1/actions packaging/dbus/*.policy
	for s in 1 5 7 8; do $I$(DATADIR)/man/man$$s $(BIN)/man/*.$$s || exit; done
	ln -sf mount.transfuse.8 $(DESTDIR)$(DATADIR)/man/man8/mount.fuse.transfuse.8
	install -d $(DESTDIR)$(DATADIR)/bash-completion/completions $(DESTDIR)$(DATADIR)/$(ZSHDIR) $(DESTDIR)$(DATADIR)/fish/vendor_completions.d
	$(BIN)/transfusectl completion bash >$(DESTDIR)$(DATADIR)/bash-completion/completions/transfusectl
	$(BIN)/transfusectl completion zsh >$(DESTDIR)$(DATADIR)/$(ZSHDIR)/_transfusectl
	$(BIN)/transfusectl completion fish >$(DESTDIR)$(DATADIR)/fish/vendor_completions.d/transfusectl.fish

demo: build ## export, mount and use a directory here, no VM needed; DIR=/some/dir leaves that one mounted until Ctrl-C
	@.ci/deps fuse3
	@packaging/demo $(BIN) $(DIR)

test: lint ## unit tests, fuzz corpora, hostile peers, and the POSIX suites on real mounts
	@.ci/deps fuse3 acl attr gcc libc6-dev git rsync vim dbus-daemon systemd man-db
	$(GO) test -timeout 15m ./...

test-vm: ## mounts over real virtio-vsock, in a Debian VM (built and cached first); two to five minutes
	@.ci/deps debootstrap e2fsprogs util-linux debian-archive-keyring git
	$(GO) test -tags vm -count 1 -timeout 60m -parallel 4 -v $(VMTESTS) ./service/vmtest

test-vm-all: VMTESTS = -run ''
test-vm-all: test-vm ## and the packages with systemd 257 and 252, and the caches beside virtiofsd; half an hour
VMTESTS ?= -run '^TestVM$$'

SOAK ?= 5m
soak: ## host and guests change one tree at random in six modes, SOAK (5m) each, with the race detector
	@.ci/deps fuse3 gcc libc6-dev
	TRANSFUSED_SOAK=$(SOAK) TRANSFUSED_RACE=1 $(GO) test -count 1 -timeout 0 -v -run '^TestSoak$$' ./service/e2e

bench: ## time transfused, bindfs, sshfs, go-fuse and a floor in C side by side on one tree, and judge it
	@.ci/deps fuse3 bindfs sshfs openssh-sftp-server gcc libc6-dev git
	$(GO) run ./service/bench -check

bench-vm: ## time a mount in the VM beside virtiofs and the guest's disk: tables, and dist/bench-vm.md and .json; ten minutes
	@.ci/deps debootstrap e2fsprogs util-linux debian-archive-keyring git
	unshare --mount $(GO) test -tags vm -count 1 -timeout 30m -v -run '^TestBench$$' ./service/vmtest -report $(abspath $(DIST)) -check

SCALE ?= 1000000
scale: ## what guests, mounts, files and SCALE (1000000) inodes cost, and how fair the host is to a guest beside one that floods
	@.ci/deps fuse3 util-linux
	TRANSFUSED_SCALE=$(SCALE) $(GO) test -count 1 -timeout 0 -v -run '^Test(Scale|Fair)$$' ./service/e2e

STREAMS ?= 20s
streams: ## how long a getattr takes beside large data, over 1, 2 and 4 streams, STREAMS (20s) each
	@.ci/deps fuse3
	TRANSFUSED_STREAMS=$(STREAMS) $(GO) test -count 1 -timeout 0 -v -run '^TestBesideLargeData$$' ./service/e2e

FUZZTIME ?= 30s
fuzz: ## run each fuzz target for FUZZTIME (30s)
	@set -e; for dir in $$(grep -rl --include='*_test.go' '^func Fuzz' service | xargs -n1 dirname | sort -u); do \
		for f in $$(grep -rhoE --include='*_test.go' '^func Fuzz[A-Za-z0-9]+' $$dir | cut -d' ' -f2); do \
			echo "== $$dir $$f"; $(GO) test -run '^$$' -fuzz "^$$f\$$" -fuzztime $(FUZZTIME) ./$$dir; \
		done; done

lint: ## gofmt, go vet, shellcheck
	@fmt=$$(gofmt -l cmd service packaging systemd); test -z "$$fmt" || { echo "gofmt -w $$fmt"; exit 1; }
	$(GO) vet ./... && $(GO) vet -tags vm ./...
	@.ci/deps shellcheck git
	@# SC2115: a variable that is empty is an error in all of them.
	shellcheck -S warning -e SC2115 $$(git ls-files | xargs grep -lE '^#!/(bin/sh|usr/bin/env bash)')

dist: ## the source with its modules, to build from offline: dist/transfused-VERSION.tar.xz
	packaging/dist $(VERSION) $(DIST)

deb: dist ## Debian packages into dist/, checked by lintian
	@.ci/deps debhelper dpkg-dev lintian
	packaging/deb $(VERSION) $(DIST)

deb-forky: dist ## the same in a root of Debian forky, with its own Go and all build dependencies (minutes)
	@.ci/deps debootstrap debian-archive-keyring
	packaging/deb-forky $(VERSION) $(DIST)

rpm: dist ## rpm packages into dist/, checked
	@.ci/deps rpm
	packaging/rpm/build $(VERSION) $(DIST)

clean: ## remove what build made
	rm -rf $(BIN) $(DIST)
