# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash
# Shared by the scripts: where things are kept, how they speak, how they install what is missing.

set -euo pipefail

TOP=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# The one place outside the tree that anything is written to.
CACHE=${REMUS_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/remus}
export TOP CACHE

# The kernel, the module and the controller are all built by Debian's own Rust: what is linked to a
# kernel must come from the rustc that built the kernel.
RUSTC=/usr/bin/rustc
CARGO=/usr/bin/cargo
BINDGEN_VERSION=0.72.1
BINDGEN=$CACHE/cargo-$BINDGEN_VERSION/bin/bindgen
export RUSTC CARGO BINDGEN

say() { printf '==> %s\n' "$*" >&2; }
die() { printf 'error: %s\n' "$*" >&2; exit 1; }

# need_root WHAT: installing packages is the only step that cannot do without.
need_root() {
    [ "$(id -u)" = 0 ] || die "$1 needs root: run it again as root (for example with sudo)."
}

# need_space DIR MIB WHAT
need_space() {
    mkdir -p "$1" || die "cannot create $1: choose another cache with REMUS_CACHE=DIR."
    local free
    free=$(df --output=avail -m "$1" | tail -n 1)
    [ "$free" -ge "$2" ] ||
        die "$3 needs $2 MiB in $1 and there are $((free)): free some, or set REMUS_CACHE=DIR to a larger disk."
}

# progress LOG MESSAGE COMMAND...: run quietly, say what goes on, show the log's end if it fails.
progress() {
    local log=$1 message=$2 start=$SECONDS pid rc=0
    shift 2
    say "$message (log: $log)"
    "$@" >"$log" 2>&1 &
    pid=$!
    while kill -0 "$pid" 2>/dev/null; do
        if [ -t 2 ]; then
            printf '\r    %4d s  %-100.100s' $((SECONDS - start)) "$(tail -n 1 "$log" | tr -d '\r\t')" >&2
            sleep 1
        else
            sleep 1
            (((SECONDS - start) % 60 != 0)) ||
                printf '    %4d s  %.100s\n' $((SECONDS - start)) "$(tail -n 1 "$log")" >&2
        fi
    done
    wait "$pid" || rc=$?
    if [ -t 2 ]; then printf "\r\033[K" >&2; fi
    if [ "$rc" != 0 ]; then
        tail -n 25 "$log" >&2
        die "$message: failed after $((SECONDS - start)) s; the whole log is $log."
    fi
    say "$message: done in $((SECONDS - start)) s"
}

# debian_sources FILE SUITE...: apt lines for other suites, from the archive this machine already uses.
debian_sources() {
    local file=$1 uri
    shift
    uri=$(apt-get indextargets --format '$(REPO_URI)|$(RELEASE)|$(CREATED_BY)' 2>/dev/null |
        awk -F'|' '$2 == "bookworm" && $3 == "Packages" { print $1; exit }')
    [ -n "$uri" ] || die "this machine's apt has no Debian bookworm archive: add one to /etc/apt/sources.list and run apt-get update."
    for suite in "$@"; do
        echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $uri $suite main"
    done >"$file"
}

# apt_private DIR COMMAND...: run an apt command that sees only DIR/sources.list; the machine's own
# apt configuration stays as it is.
apt_private() {
    local dir=$1
    shift
    mkdir -p "$dir/lists/partial" "$dir/parts"
    "$@" -o Dir::Etc::sourcelist="$dir/sources.list" -o Dir::Etc::sourceparts="$dir/parts" \
        -o Dir::State::lists="$dir/lists" -o Dir::Cache::pkgcache= -o Dir::Cache::srcpkgcache= \
        -o Acquire::Languages=none -o Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false
}

# install_packages PACKAGE...: only what is not there yet.
install_packages() {
    local missing=() p
    for p in "$@"; do
        dpkg-query -W -f '${Status}' "$p" 2>/dev/null | grep -q 'ok installed' || missing+=("$p")
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    need_root "installing ${missing[*]}"
    mkdir -p "$CACHE/log"
    # One installation at a time; an old package list is refreshed first.
    exec 8>"$CACHE/apt.lock"
    flock 8
    progress "$CACHE/log/apt.log" "installing ${missing[*]}" \
        bash -c 'apt-get -q update && DEBIAN_FRONTEND=noninteractive apt-get -q install -y --no-install-recommends "$@"' - "${missing[@]}"
    exec 8>&-
}

# What builds the kernel, the module and the controller.
build_tools() {
    install_packages rustc-web cargo-web rust-web-src rust-web-clippy rustfmt-web \
        clang-19 libclang-19-dev lld-19 llvm-19 gcc make flex bison bc libelf-dev libssl-dev libc6-dev \
        kmod cpio xz-utils python3 busybox-static
    [ -x "$BINDGEN" ] && return 0
    need_space "$CACHE" 1000 "building bindgen"
    mkdir -p "$CACHE/log"
    progress "$CACHE/log/bindgen.log" "building bindgen $BINDGEN_VERSION" env CARGO_TARGET_DIR="$CACHE/bindgen-build" \
        "$CARGO" install --quiet --locked --root "$CACHE/cargo-$BINDGEN_VERSION" --version "$BINDGEN_VERSION" bindgen-cli
    rm -rf "$CACHE/bindgen-build"
}
