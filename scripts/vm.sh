#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
# Boot a test kernel in QEMU and run a command in it, with the host's files.
#
#   scripts/vm.sh [OPTION]... -- COMMAND [ARGUMENT]...
#
#     --kernel release|debug   flavour of the test kernel (release); KDIR=DIR names another build
#     --timeout SECONDS        end it after that long (300)
#     --memory MIB             (2048)
#     --cpus N                 (2)
#     --out DIR                where kernel.log goes (build/vm/<name of the command>)
#     --append WORDS           more words for the kernel's command line
#     --count                  emulate it, on one thread, and have its clock count instructions, 1 ns each:
#                              whatever else the host does then makes no difference to what is measured in it
#
# The command's output and exit status become this script's; besides, 120 is a kernel panic, 121 a
# machine that ended without the command's status, 124 a timeout, 125 a machine that did not start.
# In the machine everything is writable, but only build/ of this tree reaches the host. The command
# finds its modules in /lib/modules, and REMUS_ACCEL, REMUS_FLAVOUR and REMUS_KERNEL in its environment.

. "$(dirname "$0")/lib.sh"

flavour=release timeout=300 memory=2048 cpus=2 out='' append='' count=
while [ $# -gt 0 ]; do
    case $1 in
        --kernel) flavour=${2:?} && shift 2 ;;
        --timeout) timeout=${2:?} && shift 2 ;;
        --memory) memory=${2:?} && shift 2 ;;
        --cpus) cpus=${2:?} && shift 2 ;;
        --out) out=${2:?} && shift 2 ;;
        --append) append=${2:?} && shift 2 ;;
        --count) count=yes && shift ;;
        --help | -h) sed -n '3,/^$/s/^# \{0,1\}//p' "$0" && exit 0 ;;
        --) shift && break ;;
        *) (die "unknown option '$1': see $0 --help.") || exit 125 ;;
    esac
done
fail() { printf 'error: %s\n' "$*" >&2; exit 125; }
[ $# -gt 0 ] || fail "no command given: $0 [OPTION]... -- COMMAND."
[[ $timeout =~ ^[1-9][0-9]*$ && $memory =~ ^[1-9][0-9]*$ && $cpus =~ ^[1-9][0-9]*$ ]] ||
    fail "--timeout, --memory and --cpus take whole numbers above 0."

(run_tools) || exit 125
kernel=${KDIR:-$("$TOP/scripts/kernel.sh" "$flavour")} || exit 125
bzimage=$kernel/arch/x86/boot/bzImage
[ -s "$bzimage" ] || fail "there is no kernel at $bzimage: run 'make kernel FLAVOUR=$flavour'."
busybox=$(command -v busybox)

# One directory for each machine that runs now.
mkdir -p "$TOP/build"
base=${out:-$TOP/build/vm/$(basename -- "$1")} n=1
out=$base
while mkdir -p "$out" && exec 7>"$out/lock" && ! flock -n 7; do
    n=$((n + 1))
    out=$base-$n
done
out=$(cd "$out" && pwd)
rm -f "$out/status" "$out/kernel.log"

initramfs=$CACHE/vm/init-$(cat "$busybox" "$TOP/scripts/vm-init" | sha256sum | cut -c 1-12).cpio
if [ ! -s "$initramfs" ]; then
    tree=$(mktemp -d)
    mkdir -p "$tree/bin" "$CACHE/vm"
    cp "$busybox" "$tree/bin/busybox"
    cp "$TOP/scripts/vm-init" "$tree/init"
    (cd "$tree" && find . | cpio --quiet -o -H newc) >"$initramfs.$$"
    mv "$initramfs.$$" "$initramfs"
    rm -rf "$tree"
fi

words="console=ttyS0 loglevel=7 panic=-1 oops=panic no_timer_check tsc=reliable random.trust_cpu=on"

# /dev/kvm may exist and yet crawl or lack nesting: boot something by it, once each time the host boots.
probe_accel() {
    local answer
    answer=$CACHE/vm/accel-$(cat /proc/sys/kernel/random/boot_id)
    exec 6>"$CACHE/vm/accel.lock"
    flock 6
    if [ ! -s "$answer" ]; then
        rm -f "$CACHE"/vm/accel-*
        if [ -r /dev/kvm ] && [ -w /dev/kvm ] &&
            timeout -k 2 10 qemu-system-x86_64 -accel kvm -cpu host -m 512 -nodefaults -no-user-config -display none -no-reboot \
                -kernel "$bzimage" -initrd "$initramfs" -append "$words remus.probe=1" -serial stdio </dev/null 2>&1 |
            grep -a 'remus-probe-ok' >/dev/null; then
            echo kvm >"$answer"
        else
            echo tcg >"$answer"
        fi
    fi
    exec 6>&-
    cat "$answer"
}
threads=multi counting=()
if [ -n "$count" ]; then
    REMUS_ACCEL=tcg threads=single counting=(-icount 'shift=0,sleep=off')
fi
accel=${REMUS_ACCEL:-$(probe_accel)}
case $accel in
    kvm) accelerate=(-accel kvm -cpu host) ;;
    *)
        accelerate=(-accel "tcg,thread=$threads" -cpu 'max,+svm,la57=off' "${counting[@]}")
        # An emulated CPU cannot tell the rate of its TSC, so the kernel measures it at boot, on a busy host 80
        # times wrong, and again, better, a second later. KVM keeps the first figure; where it is more than
        # 250 ppm below the second, it gives a nested guest a TSC without which its timers never fire
        # (set_tsc_khz in arch/x86/kvm/x86.c). So tell it, and have it believe that.
        khz=$("$TOP/scripts/tsc-khz")
        [ -z "$khz" ] || append="tsc_early_khz=$khz setcpuid=tsc_known_freq $append"
        ;;
esac

columns='' rows=''
if [ -t 1 ]; then
    read -r rows columns < <(stty size <&1 2>/dev/null || echo 24 80) || true
    device=(-device 'virtconsole,chardev=out')
else
    device=(-device 'virtserialport,chardev=out,name=out')
fi
{
    printf 'REMUS_TOP=%q\nREMUS_KERNEL=%q\nREMUS_ROWS=%q\nREMUS_COLUMNS=%q\n' "$TOP" "$kernel" "$rows" "$columns"
} >"$out/environment"
{
    printf 'export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=%q LANG=C.UTF-8 TERM=%q\n' "$HOME" "${TERM:-dumb}"
    printf 'export REMUS_VM=1 REMUS_CACHE=%q REMUS_KERNEL=%q REMUS_FLAVOUR=%q REMUS_ACCEL=%q\n' "$CACHE" "$kernel" "$flavour" "$accel"
    printf 'export REMUS_HOST_LOAD=%q REMUS_HOST_CPUS=%q\n' "$(cut -d ' ' -f 1 /proc/loadavg)" "$(nproc)"
    printf 'cd %q 2>/dev/null || cd %q\n' "$PWD" "$TOP"
    printf '%q ' "$@"
} >"$out/job.sh"
# An emptied /tmp must not hide the tree or the cache.
case $TOP/:$CACHE/:$kernel/:$PWD/ in
    /tmp/* | *:/tmp/*) append="$append remus.keeptmp" ;;
esac

# QEMU reads nothing, but its end of input must never come: it would close the output with it.
mkfifo "$out/input.$$"
exec 5<>"$out/input.$$"
rm -f "$out/input.$$"

share=security_model=none,multidevs=remap
qemu='' interrupted=''
# shellcheck disable=SC2317,SC2329  # called by trap
interrupt() {
    interrupted=1
    [ -z "$qemu" ] || kill "$qemu" 2>/dev/null || true
}
trap interrupt INT TERM HUP
start=$SECONDS
timeout --foreground -k 5 "$timeout" qemu-system-x86_64 -name remus-vm -machine q35 "${accelerate[@]}" \
    -smp "$cpus" -m "$memory" -nodefaults -no-user-config -display none -no-reboot \
    -kernel "$bzimage" -initrd "$initramfs" -append "$words $append" \
    -serial "file:$out/kernel.log" \
    -chardev stdio,id=out,signal=off -device virtio-serial-pci "${device[@]}" \
    -virtfs "local,path=/,mount_tag=root,readonly=on,$share" \
    -virtfs "local,path=$TOP/build,mount_tag=build,$share" \
    -virtfs "local,path=$out,mount_tag=out,$share" \
    -device virtio-rng-pci <&5 2>"$out/qemu.log" 7>&- &
qemu=$!
rc=0
wait "$qemu" || rc=$?
# A trapped signal ends the first wait early.
if [ -n "$interrupted" ]; then wait "$qemu" 2>/dev/null || true; fi
trap - INT TERM HUP

if [ -n "$interrupted" ]; then
    echo "error: interrupted; the virtual machine was ended." >&2
    exit 130
elif [ -s "$out/status" ]; then
    exit "$(cat "$out/status")"
elif [ "$rc" = 124 ] || [ "$rc" = 137 ]; then
    echo "error: the virtual machine did not finish within $timeout s and was ended; its kernel log is $out/kernel.log." >&2
    exit 124
elif grep -aq 'Kernel panic' "$out/kernel.log" 2>/dev/null; then
    grep -a -B 25 -m 1 'Kernel panic' "$out/kernel.log" | tr -d '\r' >&2
    echo "error: the kernel in the virtual machine panicked after $((SECONDS - start)) s; its log is $out/kernel.log." >&2
    exit 120
elif [ "$rc" != 0 ]; then
    cat "$out/qemu.log" >&2
    fail "QEMU did not start (exit status $rc): see the lines above."
fi
tail -n 5 "$out/kernel.log" >&2 || true
echo "error: the virtual machine was reset with no word from its kernel; its log is $out/kernel.log." >&2
exit 121
