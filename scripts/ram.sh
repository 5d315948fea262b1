#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
# Build ram-check and ram-bench, the independent checker of the RAM device and its benchmark.
#
#   scripts/ram.sh     prints the directory that they are in on standard output

. "$(dirname "$0")/lib.sh"

build_tools
out=$TOP/build/ram
cd "$TOP/tests/ram"
CARGO_TARGET_DIR=$out/cargo "$CARGO" build --quiet --release --locked >&2 ||
    die "ram-check and ram-bench do not build: see the lines above."
# Not over one that runs.
for name in ram-check ram-bench; do
    cp "$out/cargo/release/$name" "$out/.$name"
    mv "$out/.$name" "$out/$name"
done
echo "$out"
