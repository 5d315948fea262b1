# SPDX-License-Identifier: GPL-2.0
# The two that matter: make demo, make test. `make help` lists the rest.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
# The parts lock what they share; output in order matters more than a minute.
.NOTPARALLEL:

FLAVOUR ?= release
KDIR ?=

# Debian's own Rust, from scripts/lib.sh: the controller shares source with the module.
cargo = . scripts/lib.sh && build_tools && export CARGO_TARGET_DIR="$$TOP/build/cargo" && cd ctl && "$$CARGO"

.PHONY: help kernel module ctl tc install uninstall guest demo test test-kernel test-qdisc-long test-ram-long test-tc test-errors test-disk-takeover test-takeover test-disks bench-qdisc bench-ram bench-replication bench-disk lint check clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' Makefile
	@echo '  Variables: FLAVOUR=release|debug (kernel, module), KDIR=DIR (module, install), RUNS=N (test-takeover, test-disk-takeover, test-disks),'
	@echo '  PREFIX=DIR (install: remusctl below it, default /usr/local), DESTDIR=DIR (install: everything below it),'
	@echo '  DEMO="--memory 512 ..." (demo; see tests/demo/run --help), BENCH="--rounds 1 ..." (bench-replication, bench-disk),'
	@echo '  REMUS_CACHE=DIR (default ~/.cache/remus).'

kernel: ## build the test kernel (FLAVOUR=release|debug) into the cache
	@scripts/kernel.sh $(FLAVOUR)

module: ## build remus_buf.ko (KDIR=DIR: against any other Rust-enabled kernel)
	@scripts/module.sh $(or $(KDIR),$(FLAVOUR))

ctl: ## build remusctl, and the plugin of nbdkit through which it learns what a guest writes to its disks
	@$(cargo) build --release --locked -p remusctl -p remus-nbdkit
	@echo build/cargo/release/remusctl

tc: ## build q_remus.so, with which tc knows the options and statistics of remus
	@scripts/tc.sh

# The module only if a kernel is named, or for the one that it was built for before.
install: ctl tc $(if $(KDIR),module) ## install remusctl (manual pages, completions, units), the plugins of nbdkit and tc, and the module if it is for the running kernel
	@scripts/install.sh

uninstall: ## remove what install has installed
	@scripts/install.sh --uninstall

guest: ## build the guest that the demo protects
	@scripts/guest.sh

demo: ## protect a guest, kill its host, see a client go on
	@scripts/demo.sh $(DEMO)

test: ## everything: lint, host tests, kernel tests, twenty take-overs with disks, ten with connections
	@scripts/test.sh all

test-kernel: ## only the kernel tests, on the debug flavour
	@scripts/test.sh kernel

test-qdisc-long: ## the qdisc against a model, 100,000 steps, and 1,000,000 random netlink messages: an hour or two
	@scripts/test.sh qdisc-long

test-ram-long: ## the RAM device against a full copy of it at each of 2,000 seals: half an hour
	@scripts/test.sh ram-long

test-tc: ## only tc with its plugin, by the kernel's own tdc
	@scripts/test.sh tc

test-errors: ## only what people get wrong, and what they are told
	@scripts/test.sh errors

test-takeover: ## only the take-overs (RUNS=10), and single processes killed
	@RUNS="$(or $(RUNS),10)" scripts/test.sh takeover

test-disk-takeover: ## only the take-overs with disks (RUNS=20): ext4, fio and a ledger in an emulated guest
	@REMUS_TAKEOVERS="$(or $(RUNS),20)" scripts/test.sh disk-takeover

test-disks: ## the same with module and KVM (RUNS=20); not part of test, for its length
	@RUNS="$(or $(RUNS),20)" scripts/test.sh disks

bench-qdisc: ## what holding packets costs, beside sch_plug, ifb and pfifo_fast
	@tests/bench/qdisc/run

bench-ram: ## what tracking and snapshots of memory cost, beside what Linux has
	@tests/bench/ram/run

bench-replication: ## what replication costs and gives, beside plain Remus; take-overs and partitions (hours; BENCH="--rounds 1 ...")
	@tests/bench/replication/run $(BENCH)

bench-disk: ## what replicating a disk costs, beside QEMU's own mirror (BENCH="--rounds 1 ...")
	@tests/bench/disk/run $(BENCH)

lint: ## rustfmt, clippy for module and controller, shellcheck, Python syntax; warnings are errors
	@scripts/lint.sh

check: ## lint and host tests
	@scripts/test.sh check

clean: ## remove build/ (the cache stays: rm -r ~/.cache/remus)
	rm -rf build
