#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
# Build q_remus.so, which teaches iproute2's tc the queue discipline remus.
#
#   scripts/tc.sh     prints the plugin's path on standard output

. "$(dirname "$0")/lib.sh"

build_tools
out=$TOP/build/tc
cd "$TOP/qdisc/tc"
CARGO_TARGET_DIR=$out/cargo "$CARGO" build --quiet --release --locked >&2 ||
    die "the plugin does not build: see the lines above."
# Not over the old one, which a tc may have open.
cp "$out/cargo/release/libq_remus.so" "$out/.q_remus.so"
mv "$out/.q_remus.so" "$out/q_remus.so"
echo "$out/q_remus.so"
