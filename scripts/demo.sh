#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
# Build what the demo needs and run it in a virtual machine.
#
#   scripts/demo.sh [OPTION]...      options: see tests/demo/run --help

. "$(dirname "$0")/lib.sh"

runs=1 memory=128 disks='' units=''
for ((i = 1; i <= $#; i++)); do
    next=$((i + 1))
    case ${!i} in
        --help | -h) exec python3 "$TOP/tests/demo/run" --help ;;
        --runs) runs=${!next:-} ;;
        --memory) memory=${!next:-} ;;
        --disks) disks=${!next:-} ;;
        --units) units=yes ;;
    esac
done
[[ $runs =~ ^[1-9][0-9]{0,3}$ ]] || die "--runs takes a number of take-overs from 1 to 9999."
[[ $memory =~ ^[1-9][0-9]{1,4}$ && $memory -ge 96 ]] || die "--memory takes the guest's memory in MiB, at least 96."

run_tools
[ -z "$units" ] || install_packages systemd
KDIR=$("$TOP/scripts/kernel.sh" release)
export KDIR
"$TOP/scripts/module.sh" release >/dev/null
say "building remusctl"
make --no-print-directory -C "$TOP" ctl >&2 || die "remusctl does not build: see the lines above."
guest=$("$TOP/scripts/guest.sh")
say "booting the machine that holds both hosts"
# Both hosts' guests and what is copied on write, besides the system itself; the disks' images are in memory, too.
seconds=120 space=0
[ -z "$disks" ] || seconds=900 space=2048
machine() {
    "$TOP/scripts/vm.sh" --cpus 3 --timeout $((120 + runs * seconds)) --memory $((1536 + 3 * memory + space)) --out "$TOP/build/vm/demo" \
        -- "$TOP/tests/demo/run" --guest "$guest" "$@"
}
rc=0
machine "$@" || rc=$?
# What leave_first_processor in tests/demo/hosts.py keeps away did this: it reset the machine around the guests, or came back to its
# kernel from a guest with a segment base that was the guest's, so that the first instructions after VMRUN faulted.
emulator() { [ "$rc" = 121 ] || { [ "$rc" = 120 ] && grep -aq '^RIP: 0010:__svm_vcpu_run' "$TOP/build/vm/demo/kernel.log"; }; }
if emulator && grep -q 'REMUS_ACCEL=tcg' "$TOP/build/vm/demo/job.sh"; then
    say "NOT COUNTED, once more: the machine that holds both hosts was reset, or came back from a guest with the guest's registers"
    rc=0
    machine "$@" || rc=$?
fi
exit "$rc"
