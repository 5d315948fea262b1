#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
# Install what has been built, or remove it again, and say what was done and what was not.
#
#   scripts/install.sh [--uninstall]
#
# remusctl goes to $PREFIX/sbin (/usr/local), with its manual pages, completions and systemd units below
# $PREFIX, the plugins of nbdkit and tc to where the installed ones look for them
# (NBDKIT_PLUGIN_DIR=DIR and TC_LIB_DIR=DIR name other places), the module to /lib/modules if it was built for the running
# kernel. With DESTDIR=DIR everything goes below DIR, and the module may be for any kernel.

. "$(dirname "$0")/lib.sh"

PREFIX=${PREFIX:-/usr/local} DESTDIR=${DESTDIR:-}
remove=''
case ${1:-} in
    '') ;;
    --uninstall) remove=1 ;;
    *) die "unknown option '$1': see the head of $0." ;;
esac
[[ $PREFIX == /* ]] || die "PREFIX=$PREFIX is not an absolute path."
DESTDIR=${DESTDIR%/}

# put FILE DIR MODE [NAME]
put() {
    local to=$DESTDIR$2/${4:-${1##*/}}
    # Beside it first: the old one may be in use.
    if ! { mkdir -p "$DESTDIR$2" && install -m "$3" "$1" "$to.new" && mv "$to.new" "$to"; } 2>/dev/null; then
        die "cannot write $to: run it as root, or set DESTDIR=DIR or PREFIX=DIR."
    fi
    say "installed $to"
}

# papers: manual pages and completions, as "FILE DIR", in a directory that is removed at the end.
papers() {
    local share=$PREFIX/share
    made=$(mktemp -d)
    trap 'rm -rf "$made"' EXIT
    "$remusctl" man "$made/man"
    "$remusctl" completions bash >"$made/remusctl"
    "$remusctl" completions zsh >"$made/_remusctl"
    "$remusctl" completions fish >"$made/remusctl.fish"
    for file in "$made"/man/*.8; do put "$file" "$share/man/man8" 644; done
    put "$made/remusctl" "$share/bash-completion/completions" 644
    put "$made/_remusctl" "$share/zsh/site-functions" 644
    put "$made/remusctl.fish" "$share/fish/vendor_completions.d" 644
}

# units: with the path that remusctl is installed at.
units() {
    local unit
    for unit in "$TOP"/packaging/systemd/*.service; do
        sed "s|/usr/local/sbin/|$PREFIX/sbin/|" "$unit" >"$made/${unit##*/}"
        put "$made/${unit##*/}" "$PREFIX/lib/systemd/system" 644
    done
}

# reload: have systemd look at the units, if it runs and they are for this machine.
reload() {
    if [ -z "$DESTDIR" ] && [ -d /run/systemd/system ]; then systemctl daemon-reload; fi
}

# take FILE
take() {
    local from=$DESTDIR$1
    if [ -e "$from" ]; then
        rm "$from" 2>/dev/null || die "cannot remove $from: run it as root."
        say "removed $from"
    fi
}

# tc_directory: the directory that is built into the tc of this machine.
tc_directory() {
    local tc dir
    if [ -n "${TC_LIB_DIR:-}" ]; then
        echo "${TC_LIB_DIR%/}"
        return
    fi
    tc=$(PATH=$PATH:/usr/sbin:/sbin command -v tc) || return 1
    # get_tc_lib() in iproute2's tc/tc_util.c has it as one string, with a slash at its end.
    dir=$(grep -aoE '/[A-Za-z0-9_./+-]*/tc/' "$tc" | head -n 1) || return 1
    echo "${dir%/}"
}

# nbdkit_directory: where the nbdkit of this machine looks for plugins that are named without a path.
nbdkit_directory() {
    local dir
    if [ -n "${NBDKIT_PLUGIN_DIR:-}" ]; then
        echo "${NBDKIT_PLUGIN_DIR%/}"
        return
    fi
    dir=$(nbdkit --dump-config 2>/dev/null | sed -n 's/^plugindir=//p')
    [ -n "$dir" ] || return 1
    echo "$dir"
}

remusctl=$TOP/build/cargo/release/remusctl
nbdkit_plugin=$TOP/build/cargo/release/libremus_nbdkit.so
plugin=$TOP/build/tc/q_remus.so
module=$TOP/build/module/remus_buf.ko
running=$(uname -r)

if [ -n "$remove" ]; then
    take "$PREFIX/sbin/remusctl"
    for file in "$DESTDIR$PREFIX"/share/man/man8/remusctl{,-*}.8; do take "${file#"$DESTDIR"}"; done
    take "$PREFIX/share/bash-completion/completions/remusctl"
    take "$PREFIX/share/zsh/site-functions/_remusctl"
    take "$PREFIX/share/fish/vendor_completions.d/remusctl.fish"
    for file in "$TOP"/packaging/systemd/*.service; do take "$PREFIX/lib/systemd/system/${file##*/}"; done
    reload
    if dir=$(nbdkit_directory); then take "$dir/nbdkit-remus-plugin.so"; fi
    if dir=$(tc_directory); then take "$dir/q_remus.so"; fi
    for file in "$DESTDIR"/lib/modules/*/updates/remus_buf.ko; do
        [ -e "$file" ] || continue
        release=${file#"$DESTDIR"/lib/modules/}
        release=${release%%/*}
        take "/lib/modules/$release/updates/remus_buf.ko"
        [ -n "$DESTDIR" ] || depmod -a "$release"
    done
    [ ! -d /sys/module/remus_buf ] || say "the module is still loaded: 'rmmod remus_buf' when nothing uses it."
    exit 0
fi

if [ -e "$remusctl" ]; then
    put "$remusctl" "$PREFIX/sbin" 755
    papers
    units
    reload
else
    say "remusctl is not installed: build it with 'make ctl'."
fi

if [ ! -e "$nbdkit_plugin" ]; then
    say "the plugin of nbdkit is not installed: build it with 'make ctl'."
elif dir=$(nbdkit_directory); then
    put "$nbdkit_plugin" "$dir" 644 nbdkit-remus-plugin.so
else
    say "the plugin of nbdkit is not installed, and disks cannot be replicated: run 'apt install nbdkit' and this again, or name its directory with NBDKIT_PLUGIN_DIR."
fi

if [ ! -e "$plugin" ]; then
    say "the plugin of tc is not installed: build it with 'make tc'."
elif dir=$(tc_directory); then
    put "$plugin" "$dir" 644
else
    say "the plugin of tc is not installed: there is no tc here to ask for its directory; name it with TC_LIB_DIR=DIR."
fi

if [ ! -e "$module" ]; then
    say "the module is not installed: build it with 'make module KDIR=/lib/modules/$running/build'."
    exit 0
fi
release=$(modinfo -F vermagic "$module" | cut -d ' ' -f 1)
if [ -n "$DESTDIR" ]; then
    put "$module" "/lib/modules/$release/updates" 644
    say "depmod was not run: it is for the machine with kernel $release to do."
elif [ "$release" = "$running" ]; then
    put "$module" "/lib/modules/$release/updates" 644
    depmod -a "$release" || die "depmod failed: the module is installed, but modprobe does not find it."
    say "depmod has been run: the module is loaded when it is needed."
else
    say "the module is not installed: it is for kernel $release, and $running is running; build it with 'make module KDIR=/lib/modules/$running/build'."
fi
