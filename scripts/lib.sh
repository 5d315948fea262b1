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
    mkdir -p "$1" 2>/dev/null || die "cannot create $1: choose another cache with REMUS_CACHE=DIR."
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

# install_packages PACKAGE...: only what is not there yet, and never at the price of another package.
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
        bash -c 'apt-get -q update && DEBIAN_FRONTEND=noninteractive apt-get -q install -y --no-install-recommends --no-remove "$@"' - "${missing[@]}"
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

# qemu_tools: QEMU 8 or newer. Debian 12's own 7.2 panics inner guests with some CPU models and
# conflicts with the qemu-utils of bookworm-backports, so backports come first.
qemu_tools() {
    local version dir=$CACHE/apt-qemu
    version=$(dpkg-query -W -f '${Version}' qemu-system-x86 2>/dev/null || true)
    if command -v qemu-img >/dev/null; then
        if [ -n "$version" ] && dpkg --compare-versions "$version" ge 1:8; then return 0; fi
        if command -v qemu-system-x86_64 >/dev/null && [ -z "$version" ]; then return 0; fi
    fi
    need_root "installing qemu-system-x86 and qemu-utils"
    need_space "$CACHE" 500 "installing QEMU"
    mkdir -p "$CACHE/log" "$dir"
    exec 8>"$CACHE/apt.lock"
    flock 8
    debian_sources "$dir/sources.list" bookworm bookworm-updates bookworm-backports
    # Not into grep -q: it would end apt-cache by SIGPIPE, and pipefail takes that for a failure.
    if apt_private "$dir" apt-get -q update >"$CACHE/log/qemu-list.log" 2>&1 &&
        [[ $(apt_private "$dir" apt-cache madison qemu-system-x86) == *bookworm-backports* ]]; then
        progress "$CACHE/log/qemu.log" "installing QEMU from bookworm-backports" \
            apt_private "$dir" env DEBIAN_FRONTEND=noninteractive apt-get -q install -y --no-install-recommends --no-remove \
            -t bookworm-backports qemu-system-x86 qemu-utils
        exec 8>&-
    else
        say "bookworm-backports cannot be reached (log: $CACHE/log/qemu-list.log): taking Debian 12's QEMU 7.2."
        exec 8>&-
        install_packages qemu-system-x86 qemu-utils
    fi
}

# What the tests and the demo run with, inside the virtual machine too (it sees the host's files).
run_tools() {
    install_packages busybox-static iproute2 iputils-ping nbdkit python3 kmod cpio e2fsprogs
    qemu_tools
}

# What the kernel's own tdc wants besides.
tdc_tools() {
    run_tools
    install_packages ethtool python3-pyroute2
}

lint_tools() {
    build_tools
    install_packages shellcheck
}

# with_libraries PACKAGE...: prints these Debian packages and the libraries that they need, one a line.
with_libraries() {
    local known=() found=("$@")
    while [ ${#found[@]} -gt 0 ]; do
        known+=("${found[@]}")
        mapfile -t found < <(apt-cache depends "${found[@]}" | sed -nE 's/^[ |]*(Pre)?Depends: (lib[a-z0-9.+-]*)$/\2/p' |
            sort -u | grep -vxF -f <(printf '%s\n' "${known[@]}"))
    done
    printf '%s\n' "${known[@]}"
}

# debian_root NAME PACKAGE...: prints a directory holding these Debian packages and the libraries that they
# need. Nothing is installed, so no service starts and nothing is left behind on the host.
debian_root() {
    local root=$CACHE/$1 work=$CACHE/$1.part packages
    shift
    # What was asked for last time may be less.
    if [ "$(cat "$root/.complete" 2>/dev/null)" != "$*" ]; then
        mkdir -p "$CACHE/log"
        exec 8>"$CACHE/apt.lock"
        flock 8
        rm -rf "$work" "$root"
        mkdir -p "$work/deb"
        if ! apt-cache show "$@" >/dev/null 2>&1; then
            need_root "refreshing apt's package list"
            progress "$CACHE/log/debian-list.log" "refreshing apt's package list" apt-get -q update
        fi
        mapfile -t packages < <(with_libraries "$@")
        # shellcheck disable=SC2016  # for the inner shell
        progress "$CACHE/log/debian.log" "downloading Debian's $*" bash -c '
            set -e
            cd "$1/deb"; shift
            apt-get -q download -o APT::Sandbox::User=root "$@" || { apt-get -q update && apt-get -q download -o APT::Sandbox::User=root "$@"; }
            for deb in *.deb; do dpkg-deb -x "$deb" ..; done' - "$work" "${packages[@]}"
        rm -rf "$work/deb"
        echo "$*" >"$work/.complete"
        mv "$work" "$root"
        exec 8>&-
    fi
    echo "$root"
}

# guest_root: what the guest is made of, and what its load is made with on the hosts.
guest_root() { debian_root guest redis-tools e2fsprogs; }

# kernel_flags KDIR: what must be said to make whenever something is built against KDIR, a word a line.
kernel_flags() {
    printf "%s\n" "RUSTC=$RUSTC" "HOSTRUSTC=$RUSTC" "CLIPPY_DRIVER=${RUSTC%/*}/clippy-driver" "BINDGEN=$BINDGEN"
    if [ -s "$1/.complete" ]; then tr -s ' ' '\n' <"$1/.complete" | grep . || true; fi
}
