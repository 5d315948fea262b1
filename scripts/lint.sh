#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
# Every linter, warnings as errors. All of them run even if one complains; the exit status says if any did.

. "$(dirname "$0")/lib.sh"

lint_tools
cd "$TOP"
export CARGO_TARGET_DIR=$TOP/build/cargo
bad=()
step() {
    local name=$1
    shift
    say "$name"
    "$@" || bad+=("$name")
}

# Tracked files, and those that would be added.
files() { git -C "$TOP" ls-files -co --exclude-standard -- "$@" | while read -r f; do [ ! -e "$f" ] || echo "$f"; done; }

mapfile -t rust < <(files '*.rs' | grep -v '_generated\.rs$')
# by_first_line PATTERN: files without a suffix whose interpreter matches.
by_first_line() {
    files scripts tests .ci | while read -r f; do
        if [[ -f $f && ${f##*/} != *.* ]] && head -n 1 "$f" | grep -aqE "^#!.*$1"; then echo "$f"; fi
    done
}
mapfile -t shell < <(files '*.sh'; by_first_line '\b(ba|da)?sh\b')
mapfile -t python < <(files '*.py'; by_first_line '\bpython3\b')

# Each tool by its path: cargo and PATH may find the ones of a rustup with another compiler.
# rustfmt follows "mod" lines; the module's files are checked one by one.
step rustfmt "${RUSTC%/*}/rustfmt" --check --edition 2021 --config-path "$TOP/rustfmt.toml" --config skip_children=true "${rust[@]}"
step "clippy, controller" bash -c 'cd ctl && "${RUSTC%/*}/cargo-clippy" clippy --quiet --locked --workspace --all-targets -- -D warnings'
step "clippy, plugin of tc" bash -c 'cd qdisc/tc && CARGO_TARGET_DIR=$TOP/build/tc/cargo "${RUSTC%/*}/cargo-clippy" clippy --quiet --locked --all-targets -- -D warnings'
step "clippy, ram-check" bash -c 'cd tests/ram && CARGO_TARGET_DIR=$TOP/build/ram/cargo "${RUSTC%/*}/cargo-clippy" clippy --quiet --release --locked --all-targets -- -D warnings'
step "clippy, module" bash -c 'scripts/module.sh --lint release >/dev/null'
[ ${#shell[@]} = 0 ] || step shellcheck shellcheck "${shell[@]}"
[ ${#python[@]} = 0 ] || step "python syntax" python3 - "${python[@]}" <<'PY'
import ast, sys
for name in sys.argv[1:]:
    ast.parse(open(name, encoding="utf-8").read(), name)
PY
if [ ${#bad[@]} != 0 ]; then
    die "complaints from: $(printf '%s; ' "${bad[@]}" | sed 's/; $//'). The lines above say where."
fi
say "lint: nothing to complain about"
