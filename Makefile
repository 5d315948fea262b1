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

.PHONY: help kernel module ctl guest demo test test-kernel test-errors test-takeover lint check clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' Makefile
	@echo '  Variables: FLAVOUR=release|debug (kernel, module), KDIR=DIR (module), RUNS=N (test-takeover),'
	@echo '  DEMO="--memory 512 ..." (demo; see tests/demo/run --help), REMUS_CACHE=DIR (default ~/.cache/remus).'

kernel: ## build the test kernel (FLAVOUR=release|debug) into the cache
	@scripts/kernel.sh $(FLAVOUR)

module: ## build remus_buf.ko (KDIR=DIR: against any other Rust-enabled kernel)
	@scripts/module.sh $(or $(KDIR),$(FLAVOUR))

ctl: ## build remusctl
	@$(cargo) build --release --locked
	@echo build/cargo/release/remusctl

guest: ## build the guest that the demo protects
	@scripts/guest.sh

demo: ## protect a guest, kill its host, see a client go on
	@scripts/demo.sh $(DEMO)

test: ## everything: lint, host tests, kernel tests, ten take-overs
	@scripts/test.sh all

test-kernel: ## only the kernel tests, on the debug flavour
	@scripts/test.sh kernel

test-errors: ## only what people get wrong, and what they are told
	@scripts/test.sh errors

test-takeover: ## only the take-overs (RUNS=10), and single processes killed
	@RUNS="$(or $(RUNS),10)" scripts/test.sh takeover

lint: ## rustfmt, clippy for module and controller, shellcheck, Python syntax; warnings are errors
	@scripts/lint.sh

check: ## lint and host tests
	@scripts/test.sh check

clean: ## remove build/ (the cache stays: rm -r ~/.cache/remus)
	rm -rf build
