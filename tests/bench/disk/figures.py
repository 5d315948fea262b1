# SPDX-License-Identifier: GPL-2.0
"""What was measured with a disk, as figures with targets."""

import summary
from summary import dig, line, note, ratio

# At least.
TARGETS = {"vs_sync_mirror": 0.9, "read_ratio": 0.95}
# What is protected, and the mirror that is as safe from others on the network.
PAIRS = {"protected_plain": "mirror", "protected": "mirror_tls", "protected_seldom": "mirror_tls"}
# Whose processor time is counted.
PARTS = "qemu", "nbdkit", "protect", "standby"
# Of the path alone: ways; what is protected, and which mirror it is compared with; loads, how they are named, and their rates.
ALONE = "unprotected", "mirror", "mirror_tls", "protected_plain", "protected"
BESIDE = ("protected_plain", "mirror"), ("protected", "mirror"), ("protected", "mirror_tls")
WRITES = {"seq_write": ("writes in sequence", "bytes_per_s"), "scattered": ("scattered writes with flush", "iops")}
LOADS = {load: name for load, (name, _) in WRITES.items()} | {"seq_read": "reads in sequence"}


def figure(values, target=None):
    """The median of several rounds' values, and whether that is high enough."""
    return summary.figure(values, target, least=True, rounds=sum(v is not None for v in values))


def report(items, command, resets):
    """All of it."""
    machines = [i for i in items if i["kind"] == "machine"]
    rounds = [i for i in items if i["kind"] == "round" and not i.get("void")]

    def of(way, *path):
        return [dig(r, way, *path) for r in rounds]

    def ratios(one, other, *path):
        return [ratio(mine, theirs) for mine, theirs in zip(of(one, *path), of(other, *path))]

    def beside(one, other, target=None):
        return {"seq_write": figure(ratios(one, other, "seq_write", "bytes_per_s"), target),
                "rand_write": figure(ratios(one, other, "rand_write", "iops"), target)}

    applied = of("protected", "rand_write", "apply_ms", "p50")
    out = {
        "command": command, "kernel": dig(machines[0], "kernel"), "accel": dig(machines[0], "accel"),
        "host_load": max(m["host_load"] for m in machines), "host_cpus": max(m["host_cpus"] for m in machines),
        "rounds": len(rounds), "machine_resets": resets, "not_counted": sum(bool(i.get("void")) for i in items),
        "seq_write_ratio": figure(ratios("protected", "unprotected", "seq_write", "bytes_per_s")),
        "rand_write_ratio": figure(ratios("protected", "unprotected", "rand_write", "iops")),
        # How many times as long.
        "fsync_latency_ratio": figure(ratios("protected", "unprotected", "rand_write", "fsync_ms")),
        "read_ratio": figure(ratios("protected", "unprotected", "seq_read", "bytes_per_s"), TARGETS["read_ratio"]),
        "vs_sync_mirror": beside("protected", "mirror", TARGETS["vs_sync_mirror"]),
        # Neither of both, or both, encrypted.
        "like_for_like": {one: beside(one, other) for one, other in PAIRS.items()},
        "read_ratios": {way: figure(ratios(way, "unprotected", "seq_read", "bytes_per_s")) for way in PAIRS},
        "apply_ms": {"seq_write": figure(of("protected", "seq_write", "apply_ms", "p50")), "rand_write": figure(applied)},
        "absolute": {
            way: {
                "seq_write_mb_per_s": figure([v and v / 1e6 for v in of(way, "seq_write", "bytes_per_s")]),
                "rand_write_iops": figure(of(way, "rand_write", "iops")),
                "fsync_ms": figure(of(way, "rand_write", "fsync_ms")),
                # Of the time, how much the guest stood still, as remusctl says.
                "paused": {kind: figure(of(way, kind, "epochs", "paused")) for kind in ("seq_write", "rand_write", "seq_read")},
                "seq_read_mb_per_s": figure([v and v / 1e6 for v in of(way, "seq_read", "bytes_per_s")]),
                # For a MiB, and for a write at random.
                "cpu_ms": {
                    kind: {name: figure(of(way, kind, "cpu_ms", name)) for name in PARTS if any(of(way, kind, "cpu_ms", name))}
                    for kind in ("seq_write", "rand_write", "seq_read")
                },
            }
            for way in ("unprotected", "mirror", "mirror_tls", *PAIRS)
        },
    }  # fmt: skip
    out["note"] = note(out)
    return out


def show(out):
    print()
    line("writes in sequence / unprotected", out["seq_write_ratio"])
    line("writes at random with fdatasync / unprotected", out["rand_write_ratio"])
    line("fdatasync takes / unprotected", out["fsync_latency_ratio"])
    line("reads in sequence / unprotected", out["read_ratio"])
    line("writes in sequence / QEMU's mirror", out["vs_sync_mirror"]["seq_write"])
    line("writes at random / QEMU's mirror", out["vs_sync_mirror"]["rand_write"])
    for one, other in PAIRS.items():
        line(f"writes in sequence, {one} / {other}", out["like_for_like"][one]["seq_write"])
        line(f"writes at random, {one} / {other}", out["like_for_like"][one]["rand_write"])
        line(f"reads in sequence, {one} / unprotected", out["read_ratios"][one])
    line("standby writes an epoch's changes, in sequence", out["apply_ms"]["seq_write"], "ms")
    line("standby writes an epoch's changes, at random", out["apply_ms"]["rand_write"], "ms")
    for way, got in out["absolute"].items():
        print(f"  {way}")
        line("  writes in sequence", got["seq_write_mb_per_s"], "MB/s")
        line("  writes at random", got["rand_write_iops"], "/s")
        line("  fdatasync", got["fsync_ms"], "ms")
        line("  reads in sequence", got["seq_read_mb_per_s"], "MB/s")
        for kind, share in got["paused"].items():
            if share["value"] is not None:
                line(f"  of the time paused, {kind}", share)
        for kind, what in ("seq_write", "a MiB written"), ("rand_write", "a write at random"), ("seq_read", "a MiB read"):
            for name, spent in got["cpu_ms"][kind].items():
                line(f"  processor time of {name}, {what}", spent, "ms")
    if out["note"]:
        print(f"\n  {out['note']}")


def native(measured, command):
    """The disks' path alone, on this host's processor."""
    rounds = measured["rounds"]

    def of(way, *path):
        return [dig(r, way, *path) for r in rounds]

    def beside(one, other, load, rate, target=None):
        return figure([ratio(mine, theirs) for mine, theirs in zip(of(one, load, rate), of(other, load, rate))], target)

    def against(one, other, target=None):
        return {load: beside(one, other, load, rate, target) for load, (_, rate) in WRITES.items()}

    def mb_per_s(name, load, rate="bytes_per_s"):
        return figure([v and v / 1e6 for v in of(name, load, rate)])

    def way(name):
        out = {"cpu_ms": {load: {part: figure(of(name, load, "cpu_ms", part)) for part in ("qemu", "nbdkit", "controllers")
                                 if any(of(name, load, "cpu_ms", part))} for load in WRITES}}
        out["seq_write_mb_per_s"] = mb_per_s(name, "seq_write")
        # Until the standby's images had all of it.
        out["applied_mb_per_s"] = mb_per_s(name, "seq_write", "settled_bytes_per_s")
        out["scattered_per_s"] = figure(of(name, "scattered", "iops"))
        out["seq_read_mb_per_s"] = mb_per_s(name, "seq_read")
        out["pause_ms"] = {load: figure(of(name, load, "pause_ms")) for load in LOADS}
        return out

    target = TARGETS["vs_sync_mirror"]
    return measured["host"] | {
        "command": command, "rounds": len(rounds),
        "vs_sync_mirror": {f"{one} / {other}": against(one, other, target) for one, other in BESIDE},
        "vs_unprotected": {name: against(name, "unprotected") for name in ALONE[1:]},
        "read_ratios": {name: beside(name, "unprotected", "seq_read", "bytes_per_s", TARGETS["read_ratio"]) for name in ALONE[3:]},
        "absolute": {name: way(name) for name in ALONE},
    }  # fmt: skip


def show_native(out):
    has = [flag for flag, there in out["flags"].items() if there]
    print(f"\n  the path alone: {out['cpus']} processors ({', '.join(has) or 'neither aes nor sse4_2'}), load {out.get('load')}, images on {out['filesystem']}")
    for pair, got in out["vs_sync_mirror"].items():
        for load, (name, _) in WRITES.items():
            line(f"{name}, {pair}", got[load])
    for name, got in out["read_ratios"].items():
        line(f"reads in sequence, {name} / unprotected", got)
    for name, got in out["vs_unprotected"].items():
        for load, (what, _) in WRITES.items():
            line(f"{what}, {name} / unprotected", got[load])
    for name, got in out["absolute"].items():
        print(f"  {name}")
        line("  writes in sequence", got["seq_write_mb_per_s"], "MB/s")
        if name.startswith("protected"):
            line("  writes in sequence, until the standby has all", got["applied_mb_per_s"], "MB/s")
        line("  scattered writes with flush", got["scattered_per_s"], "/s")
        line("  reads in sequence", got["seq_read_mb_per_s"], "MB/s")
        for load, what in LOADS.items():
            if got["pause_ms"][load]["value"] is not None:
                line(f"  pause, {what}", got["pause_ms"][load], "ms")
        for load, what in ("seq_write", "a MiB in sequence"), ("scattered", "a scattered write"):
            for part, spent in got["cpu_ms"][load].items():
                line(f"  processor time of {part}, {what}", spent, "ms")
