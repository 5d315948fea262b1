#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
# Run tests and count their cases.
#
#   scripts/test.sh all|check|kernel|tc|errors|disk-takeover|takeover|disks|qdisc-long|ram-long
#
# Cases are counted from what the tests themselves print: cargo's "test result:" lines, and lines
# "ok ..." and "not ok ..." (TAP) of the others. A step that fails without naming a failed case, such
# as lint, counts as one failed case; a step that succeeds without a case counts as none.

. "$(dirname "$0")/lib.sh"

what=${1:-all}
case $what in
    all | check | kernel | tc | errors | disk-takeover | takeover | disks | qdisc-long | ram-long) ;;
    *) die "unknown tests '$what': say all, check, kernel, tc, errors, disk-takeover, takeover, disks, qdisc-long or ram-long." ;;
esac
cd "$TOP"
mkdir -p build/report build/test
passed=0 failed=0 skipped=0 trouble=()

# step NAME COMMAND...
step() {
    local name=$1 log=build/test/${1// /-}.log rc=0 p f s start=$SECONDS
    shift
    say "$name"
    "$@" 2>&1 | tee "$log" || rc=${PIPESTATUS[0]}
    read -r p f s < <(tr -d '\r' <"$log" | awk '
        /^test result: / { for (i = 1; i < NF; i++) { if ($(i+1) ~ /^passed/) p += $i; if ($(i+1) ~ /^failed/) f += $i; if ($(i+1) ~ /^ignored/) s += $i } next }
        /^[ \t]*not ok / { if (/# (TODO|SKIP)/) s++; else f++; next }
        /^[ \t]*ok / { if (/# SKIP/) s++; else p++ }
        END { print p + 0, f + 0, s + 0 }')
    if [ "$rc" != 0 ] && [ "$f" = 0 ]; then f=1; fi
    passed=$((passed + p)) failed=$((failed + f)) skipped=$((skipped + s))
    if [ "$f" != 0 ]; then trouble+=("$name ($log)"); fi
    say "$name: $p passed, $f failed$([ "$s" = 0 ] || echo ", $s skipped") in $((SECONDS - start)) s"
}

host_tests() {
    build_tools
    # Some protect a real QEMU, with its disks.
    qemu_tools
    install_packages nbdkit
    cd ctl
    # What needs a kernel is a step of its own.
    CARGO_TARGET_DIR=$TOP/build/cargo "$CARGO" test --quiet --locked --workspace --no-fail-fast -- --skip linux_guest || return 1
    cd ../qdisc/tc
    CARGO_TARGET_DIR=$TOP/build/tc/cargo "$CARGO" test --quiet --locked --no-fail-fast || return 1
    cd ../../tests/ram
    CARGO_TARGET_DIR=$TOP/build/ram/cargo "$CARGO" test --quiet --release --locked --no-fail-fast
}

# Both hosts in one process, with real QEMUs that emulate a Linux guest, and a model in the module's place.
disk_takeovers() {
    local kernel guest khz words=''
    build_tools
    run_tools
    kernel=$(scripts/kernel.sh release) || return 1
    guest=$(scripts/guest.sh) || return 1
    # See scripts/vm.sh.
    khz=$(scripts/tsc-khz)
    [ -z "$khz" ] || words="tsc_early_khz=$khz setcpuid=tsc_known_freq"
    cd ctl
    REMUS_GUEST_KERNEL=$kernel/arch/x86/boot/bzImage REMUS_GUEST_INITRAMFS=$guest REMUS_GUEST_WORDS=$words \
        CARGO_TARGET_DIR=$TOP/build/cargo "$CARGO" test --quiet --locked --workspace --bin remusctl linux_guest -- --ignored --nocapture
}

if [ "$what" = all ] || [ "$what" = check ]; then
    step "lint" scripts/lint.sh
    step "host tests" host_tests
fi
if [ "$what" = all ] || [ "$what" = kernel ]; then step "kernel tests" tests/kernel/run; fi
# Not part of all: 100,000 steps against the model, 1,000,000 messages.
if [ "$what" = qdisc-long ]; then step "qdisc, long" tests/kernel/run --long oracle. fuzz. netlink.dumps; fi
# Not part of all either: 2,000 epochs against a full copy at each seal, on the release kernel, which is faster.
if [ "$what" = ram-long ]; then step "RAM, long" env REMUS_FLAVOUR=release tests/kernel/run --long check.; fi
if [ "$what" = all ] || [ "$what" = tc ]; then step "tc" tests/tdc/run; fi
if [ "$what" = all ] || [ "$what" = errors ]; then step "errors" tests/errors/run; fi
# After each of REMUS_TAKEOVERS (20): the disks are those of the epoch, byte for byte; the file systems are clean; the ledger has every
# entry that the client was told of; and fio goes on and finds all that it has written.
if [ "$what" = all ] || [ "$what" = disk-takeover ]; then step "take-overs with disks" disk_takeovers; fi
if [ "$what" = all ] || [ "$what" = takeover ]; then
    # The timeout is longer than a busy host keeps an emulated machine from running.
    step "take-overs" scripts/demo.sh --tap --report takeovers --timeout 3000 --runs "${RUNS:-10}"
    # And once the other way afterwards.
    step "protected again" scripts/demo.sh --tap --report back --timeout 3000 --runs 1 --back
    # And once with both controllers as units of a real systemd, with its watchdog and its journal.
    step "units" scripts/demo.sh --tap --report units --timeout 3000 --units
    # One part dies, or the way between the hosts, or nothing: what must be mute stays mute. With a larger guest, and with vhost-net,
    # to see that too.
    step "fail closed" scripts/demo.sh --tap --report fail-closed --timeout 3000 --memory 512 --vhost --runs 5 --kill remusctl,qemu,standby,partition,failover
fi
# Not part of all, for its length: the same with the module, remusctl's processes and KVM.
# A guest with disks, of both formats and on both kinds of device. After each take-over the client's ledger is whole, in Redis and
# on the disk; fio goes on and finds all that it has written; the file systems are clean. After a planned switch the images are
# the same on both hosts, byte for byte. An odd number of ways to die, so that each one meets both orders of the devices.
if [ "$what" = disks ]; then
    step "disks" scripts/demo.sh --tap --report disks --runs "${RUNS:-20}" --disks raw,qcow2 \
        --kill all,failover,qemu,all,standby,partition,remusctl
    # And once the other way afterwards, to images that are there already.
    step "disks, protected again" scripts/demo.sh --tap --report disks-back --runs 1 --back --disks raw
    # The same devices on PCI.
    step "disks on PCI" scripts/demo.sh --tap --report disks-pci --runs 2 --machine q35 --disks raw,raw
fi

[ ${#trouble[@]} = 0 ] || say "failed: ${trouble[*]}"
[ "$skipped" = 0 ] || say "$skipped skipped"
echo "$passed passed, $failed failed" | tee build/test/summary
[ "$failed" = 0 ] || exit 1
