#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
# Build the guest that the demo protects: busybox, Debian's redis-server and e2fsprogs, and fio in an initramfs.
#
#   scripts/guest.sh      prints the initramfs on standard output
#
# Boot it with the release kernel and "remus.ip=ADDRESS/LENGTH" on its command line; more words for that in guest-init.

. "$(dirname "$0")/lib.sh"

[ "${1:-}" != --help ] || { sed -n '3,/^$/s/^# \{0,1\}//p' "$0"; exit 0; }
install_packages busybox-static cpio
root=$(guest_root)
fio=$("$TOP/scripts/fio.sh")
busybox=$(command -v busybox)
programs=("$root/usr/bin/redis-check-rdb" "$root/sbin/mke2fs" "$root/sbin/e2fsck")

key=$(cat "$busybox" "${programs[@]}" "$fio" "$TOP/scripts/guest-init" "$TOP/scripts/guest-disk" "$0" | sha256sum | cut -c 1-12)
out=$TOP/build/guest/initramfs-$key.cpio.gz
if [ ! -s "$out" ]; then
    mkdir -p "$TOP/build/guest"
    tree=$(mktemp -d)
    trap 'rm -rf "$tree"' EXIT
    mkdir -p "$tree/bin" "$tree/sbin" "$tree/usr/bin" "$tree/lib64" "$tree/lib"
    cp "$busybox" "$tree/bin/busybox"
    for tool in sh cat ls ip ping ps; do ln -s busybox "$tree/bin/$tool"; done
    cp "$TOP/scripts/guest-init" "$tree/init"
    cp "$TOP/scripts/guest-disk" "$tree/bin/disk"
    cp "$fio" "$tree/bin/fio"
    cp "${programs[0]}" "$tree/usr/bin/redis-server"
    cp "${programs[1]}" "$tree/sbin/mkfs.ext4"
    cp "${programs[2]}" "$tree/sbin/e2fsck"
    # Debian's own loader says which libraries they would take; none may come from the host.
    loader=$(find "$root/" -name ld-linux-x86-64.so.2 ! -type l | head -n 1)
    libraries=$(find "$root/" -name '*.so.*' -printf '%h\n' | sort -u | paste -sd :)
    for program in "${programs[@]}"; do
        "$loader" --library-path "$libraries" --list "$program" | awk '$2 == "=>" { print $3 }'
    done | sort -u >"$tree.list"
    ! grep -v "^$root/" "$tree.list" >&2 || die "the guest's programs need the libraries above and Debian's packages lack them."
    while read -r library; do cp -L "$library" "$tree/lib/"; done <"$tree.list"
    rm -f "$tree.list"
    cp "$loader" "$tree/lib64/ld-linux-x86-64.so.2"
    (cd "$tree" && find . | sort | cpio --quiet -o -H newc --reproducible) | gzip -6 >"$out.part"
    mv "$out.part" "$out"
    find "$TOP/build/guest" -name 'initramfs-*.cpio.gz' ! -path "$out" -delete
fi
echo "$out"
