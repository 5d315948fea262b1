#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
# Build the test kernel: the newest Linux 7.2.x that Debian has as source, with Rust.
#
#   scripts/kernel.sh release|debug     prints the build directory (a KDIR) on standard output
#
# Builds are kept in the cache, keyed by source version, configuration and toolchain. The source
# version is looked up once; REFRESH=1 looks again.

. "$(dirname "$0")/lib.sh"

SERIES=7.2
flavour=${1:-release}
case $flavour in
    # Guests run it too, with whatever disks; and systemd runs on it.
    release) fragments=(kernel kernel-disks kernel-systemd kernel-tests) compiler= ;;
    # KASAN together with Rust wants clang (init/Kconfig).
    debug) fragments=(kernel kernel-tests kernel-debug) compiler=LLVM=-19 ;;
    *) die "unknown kernel flavour '$flavour': say release or debug." ;;
esac
fragments=("${fragments[@]/%/.config}")
fragments=("${fragments[@]/#/$TOP/scripts/}")

mkdir -p "$CACHE/log" 2>/dev/null || die "cannot create $CACHE: set REMUS_CACHE=DIR to a directory you can write."
# Print the newest unpacked source tree, or nothing.
newest_source() {
    mkdir -p "$CACHE/source"
    find "$CACHE/source" -mindepth 1 -maxdepth 1 -name "linux-$SERIES*" ! -name '*.part' 2>/dev/null | sort -V | tail -n 1
}

fetch_source() {
    local dir=$CACHE/apt version tree deb
    mkdir -p "$dir" "$CACHE/source"
    need_space "$CACHE" 6000 "unpacking and building a kernel"
    debian_sources "$dir/sources.list" trixie-backports testing unstable
    progress "$CACHE/log/source-list.log" "looking for the newest Linux $SERIES source package" apt_private "$dir" apt-get -q update
    version=$(apt_private "$dir" apt-cache madison "linux-source-$SERIES" | awk -F'|' '{ gsub(/ /, "", $2); print $2 }' | sort -V | tail -n 1)
    [ -n "$version" ] || die "no package linux-source-$SERIES in trixie-backports, testing or unstable: build with KDIR=DIR instead, DIR being a Rust-enabled kernel's build directory."
    tree=$CACHE/source/linux-$version
    [ ! -d "$tree" ] || return 0
    rm -rf "$dir/deb" "$tree.part"
    mkdir -p "$dir/deb" "$tree.part"
    progress "$CACHE/log/source-get.log" "downloading linux-source-$SERIES $version" \
        bash -c 'cd "$1" && shift && "$@"' - "$dir/deb" apt-get -q download "linux-source-$SERIES=$version" \
        -o Dir::Etc::sourcelist="$dir/sources.list" -o Dir::Etc::sourceparts="$dir/parts" -o Dir::State::lists="$dir/lists" \
        -o APT::Sandbox::User=root
    deb=$(find "$dir/deb" -name '*.deb')
    progress "$CACHE/log/source-unpack.log" "unpacking it" bash -c '
        set -e
        dpkg-deb --fsys-tarfile "$1" | tar -x -C "$2" --wildcards "./usr/src/*.tar.xz"
        tar -x -f "$2"/usr/src/*.tar.xz -C "$2" --strip-components=1
        rm -rf "$2/usr/src"' - "$deb" "$tree.part"
    mv "$tree.part" "$tree"
    rm -rf "$dir/deb"
}

# locate: set $source, and $out to where its build is or belongs.
locate() {
    source=$(newest_source)
    [ -n "$source" ] || return 1
    local key
    key=$( { basename "$source"; cat "${fragments[@]}"; "$RUSTC" -Vv; gcc --version; clang-19 --version; "$BINDGEN" --version; } | sha256sum | cut -c 1-12)
    out=$CACHE/kernel/$flavour-$key
}

build_tools
# What is there is there, whatever else is being built meanwhile.
if [ -z "${REFRESH:-}" ] && locate && [ -e "$out/.complete" ]; then
    echo "$out"
    exit 0
fi
# One build at a time; a second caller waits and finds it done.
exec 9>"$CACHE/kernel.lock"
flock 9
source=$(newest_source)
if [ -z "$source" ] || [ -n "${REFRESH:-}" ]; then
    fetch_source
fi
locate
if [ ! -e "$out/.complete" ]; then
    need_space "$CACHE" 4000 "building the $flavour kernel"
    rm -rf "$out"
    mkdir -p "$out"
    # What must be said again to make whenever something is built against this kernel.
    flags=(RUSTC="$RUSTC" HOSTRUSTC="$RUSTC" BINDGEN="$BINDGEN" ${compiler:+"$compiler"})
    kmake=(make -C "$source" O="$out" "${flags[@]}" -j"$(nproc)")
    "${kmake[@]}" -s tinyconfig >"$CACHE/log/kernel-$flavour.config.log" 2>&1
    cat "${fragments[@]}" >>"$out/.config"
    "${kmake[@]}" -s olddefconfig >>"$CACHE/log/kernel-$flavour.config.log" 2>&1
    # An option that the kernel silently dropped would make a later failure hard to understand.
    while read -r option; do
        case $option in
            *=n) ! grep -q "^${option%=n}=" "$out/.config" ;;
            *) grep -qxF "$option" "$out/.config" ;;
        esac || die "the kernel does not accept $option: see $CACHE/log/kernel-$flavour.config.log, and 'make rustavailable' if it is CONFIG_RUST."
    done < <(cat "${fragments[@]}" | awk -F= '/^CONFIG/ { last[$1] = $0 } END { for (o in last) print last[o] }')
    progress "$CACHE/log/kernel-$flavour.log" "building $(basename "$source") ($flavour), 5 to 20 minutes" "${kmake[@]}" bzImage modules
    progress "$CACHE/log/kernel-$flavour.modules.log" "collecting its modules" \
        "${kmake[@]}" INSTALL_MOD_PATH="$out/root" modules_install
    printf '%s ' ${compiler:+"$compiler"} >"$out/.complete"
fi
echo "$out"
