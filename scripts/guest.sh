#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
# Build the guest that the demo protects: busybox and Debian's redis-server in an initramfs.
#
#   scripts/guest.sh      prints the initramfs on standard output
#
# Boot it with the release kernel and "remus.ip=ADDRESS/LENGTH" on its command line.

. "$(dirname "$0")/lib.sh"

[ "${1:-}" != --help ] || { sed -n '3,/^$/s/^# \{0,1\}//p' "$0"; exit 0; }
install_packages busybox-static cpio
redis=$(redis_root)
busybox=$(command -v busybox)
server=$redis/usr/bin/redis-check-rdb

key=$(cat "$busybox" "$server" "$TOP/scripts/guest-init" "$0" | sha256sum | cut -c 1-12)
out=$TOP/build/guest/initramfs-$key.cpio.gz
if [ ! -s "$out" ]; then
    mkdir -p "$TOP/build/guest"
    tree=$(mktemp -d)
    trap 'rm -rf "$tree"' EXIT
    mkdir -p "$tree/bin" "$tree/usr/bin" "$tree/lib64" "$tree/lib"
    cp "$busybox" "$tree/bin/busybox"
    for tool in sh cat ls ip ping ps; do ln -s busybox "$tree/bin/$tool"; done
    cp "$TOP/scripts/guest-init" "$tree/init"
    cp "$server" "$tree/usr/bin/redis-server"
    # Debian's own loader says which libraries it would take; none may come from the host.
    loader=$(find "$redis/" -name ld-linux-x86-64.so.2 ! -type l | head -n 1)
    libraries=$(find "$redis/" -name '*.so.*' -printf '%h\n' | sort -u | paste -sd :)
    "$loader" --library-path "$libraries" --list "$server" | awk '$2 == "=>" { print $3 }' >"$tree.list"
    ! grep -v "^$redis/" "$tree.list" >&2 || die "redis-server needs the libraries above and Debian's packages lack them."
    while read -r library; do cp -L "$library" "$tree/lib/"; done <"$tree.list"
    rm -f "$tree.list"
    cp "$loader" "$tree/lib64/ld-linux-x86-64.so.2"
    (cd "$tree" && find . | sort | cpio --quiet -o -H newc --reproducible) | gzip -6 >"$out.part"
    mv "$out.part" "$out"
    find "$TOP/build/guest" -name 'initramfs-*.cpio.gz' ! -path "$out" -delete
fi
echo "$out"
