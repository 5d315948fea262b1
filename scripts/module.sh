#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
# Build remus_buf.ko out of tree, and leave the source tree as it is.
#
#   scripts/module.sh [--lint] release|debug|KDIR     prints the module's path on standard output
#
# KDIR is the build directory of a Rust-enabled kernel, as /lib/modules/VERSION/build. --lint runs
# clippy and takes every warning for an error.

. "$(dirname "$0")/lib.sh"

lint='' name=''
if [ "${1:-}" = --lint ]; then
    lint=-lint
    shift
fi
case ${1:-release} in
    release) name=module ;;
    debug) name=module-debug ;;
esac
if [ -n "$name" ]; then
    kdir=$("$TOP/scripts/kernel.sh" "${1:-release}")
else
    name=module-kdir
    kdir=$(cd "$1" 2>/dev/null && pwd) || die "there is no kernel build directory $1: install your kernel's headers package, or run 'make module' without KDIR= for the test kernel."
fi
# A kernel named by KDIR= builds into build/module all the same: the person asked for that one.
[ "$name" != module-kdir ] || name=module
out=$TOP/build/$name$lint

[ -f "$kdir/Makefile" ] || die "$kdir is no kernel build directory (no Makefile): name one with KDIR=, as /lib/modules/VERSION/build."
config=$kdir/include/config/auto.conf
[ -f "$config" ] || config=$kdir/.config
grep -qx CONFIG_RUST=y "$config" 2>/dev/null ||
    die "the kernel in $kdir was built without Rust (CONFIG_RUST): boot one that has it, or run 'make module' without KDIR= for the test kernel."
[ -e "$kdir/rust/libkernel.rmeta" ] ||
    die "$kdir lacks rust/libkernel.rmeta: its headers package leaves Rust out, so take the full build directory of that kernel."

build_tools
flags=()
if [ -e "$kdir/.complete" ]; then
    mapfile -t flags < <(kernel_flags "$kdir")
else
    # Somebody else's kernel wants the rustc that built it, which is its business to find.
    flags=("BINDGEN=$BINDGEN")
fi
if [ -n "$lint" ]; then flags+=(CLIPPY=1 CLIPPY_DRIVER="${RUSTC%/*}/clippy-driver" KRUSTFLAGS=-Dwarnings KCFLAGS=-Werror); fi

mkdir -p "$out"
exec 9>"$out.lock"
flock 9
# Other output than the path goes to standard error.
make -C "$kdir" M="$TOP" MO="$out" "${flags[@]}" --no-print-directory -j"$(nproc)" modules >&2 ||
    die "the module does not build against $kdir: see the lines above."
echo "$out/remus_buf.ko"
