#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
# Build fio, which writes the guest's disks and verifies what it reads, from Debian's source: one static
# program. Debian's own wants Ceph's and Gluster's libraries, which are larger than the guest.
#
#   scripts/fio.sh      prints the program on standard output

. "$(dirname "$0")/lib.sh"

[ "${1:-}" != --help ] || { sed -n '3,/^$/s/^# \{0,1\}//p' "$0"; exit 0; }
dir=$CACHE/fio
get_source() {
    cd "$dir" && apt_private "$dir" apt-get -q source --download-only -o APT::Sandbox::User=root fio
}
# One build at a time; a second caller waits and finds it done.
mkdir -p "$CACHE/log"
exec 9>"$CACHE/fio.lock"
flock 9
if [ ! -x "$dir/fio" ]; then
    install_packages gcc make libc6-dev
    need_space "$CACHE" 300 "building fio"
    rm -rf "$dir"
    mkdir -p "$dir/source"
    debian_sources "$dir/sources.list" bookworm
    sed -i 's/^deb /deb-src /' "$dir/sources.list"
    progress "$CACHE/log/fio-list.log" "looking for fio's source package" apt_private "$dir" apt-get -q update
    progress "$CACHE/log/fio-get.log" "downloading fio's source" get_source
    tar -x -f "$dir"/fio_*.orig.tar.gz -C "$dir/source" --strip-components=1
    # Not for this machine's processor: the guest has another.
    # shellcheck disable=SC2016  # for the inner shell
    progress "$CACHE/log/fio.log" "building fio" bash -c '
        cd "$1" && ./configure --build-static --disable-native && make -j"$(nproc)" fio && strip fio' - "$dir/source"
    mv "$dir/source/fio" "$dir/fio.part"
    rm -rf "$dir/source" "$dir/lists"
    mv "$dir/fio.part" "$dir/fio"
fi
echo "$dir/fio"
