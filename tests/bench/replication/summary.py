# SPDX-License-Identifier: GPL-2.0
"""What was measured, as figures with targets."""

import report as spreads

PAGE = 4096
TARGETS = {"bytes_vs_raw": 0.35, "on_output_reply": 0.5, "lost_vs_plain": 0.67, "takeover_after_detection": 500, "old_primary_packets": 0}


def figure(values, target=None, least=False, **more):
    """The median of several rounds' values, and whether that is low enough, or, if the target is the `least`, high enough."""
    values = [v for v in values if v is not None]
    if not values:
        return {"value": None, "min": None, "max": None, "target": target, "met": None} | more
    value = spreads.median(values)
    return {"value": value, "min": round(min(values), 3), "max": round(max(values), 3), "target": target,
            "met": None if target is None else value >= target if least else value <= target} | more


def ratio(one, other):
    return one / other if one is not None and other else None


def dig(tree, *path):
    """What is there, or None."""
    for name in path:
        tree = tree.get(name) if isinstance(tree, dict) else None
    return tree


def density(window):
    """Bytes on the wire for each byte of the pages written."""
    epochs = dig(window, "epochs")
    if not epochs or not epochs["dirty_pages"]:
        return None
    sent = window.get("wire_bytes")
    return ratio(epochs["bytes"] if sent is None else sent, epochs["dirty_pages"] * PAGE)


def lost(at, way, load):
    """What share of the unprotected guest's work is not done in this way."""
    rate = ratio(dig(at, way, load, "work_per_s"), dig(at, "unprotected", load, "work_per_s"))
    return None if rate is None else 1 - rate


def less(at, way, load):
    """What is lost besides the time that QEMU takes to stop the guest, to save its devices and to go on."""
    all_of_it, qemu = lost(at, way, load), dig(at, way, load, "epochs", "paused_qemu")
    return None if None in (all_of_it, qemu) else all_of_it - qemu


def per_epoch(at, way, load):
    """The share of the guest's work that is lost, for each epoch a second."""
    share, rate = lost(at, way, load), dig(at, way, load, "epochs", "per_s")
    return None if share is None or not rate else share / rate


def interval(rounds, ms):
    """All that is known about one interval."""
    ats = [at for r in rounds if (at := dig(r, "intervals", ms))]

    def over(*path):
        return [dig(at, *path) for at in ats]
    out = {"reply_ms": {p: figure(over("remus", "replies", "reply_ms", p)) for p in ("p50", "p99")},
           "unprotected_reply_ms": {p: figure(over("unprotected", "replies", "reply_ms", p)) for p in ("p50", "p99")}}
    for load in "redis", "cpu":
        figures = {"unprotected_per_s": figure(over("unprotected", load, "work_per_s"))}
        for way in "remus", "plain":
            # Of what the guest does when it is not protected, this share is done; a job takes 1 / that as long.
            kept = [None if (share := lost(at, way, load)) is None else 1 - share for at in ats]
            figures |= {f"{way}_done": figure(kept), f"{way}_time": figure([ratio(1, k) for k in kept])}
        shares = [(lost(at, "remus", load), lost(at, "plain", load)) for at in ats]
        # Where plain Remus loses nothing there is nothing to compare with.
        figures["lost_vs_plain"] = figure([ratio(mine, plain) for mine, plain in shares if mine is not None and plain and plain > 0.01],
                                          TARGETS["lost_vs_plain"])
        # What QEMU takes to stop, save and go on is the same for both, however few pages there are: how it would be without.
        for way in "remus", "plain":
            figures |= {f"{way}_{part}": figure(over(way, load, "epochs", part)) for part in ("paused", "paused_qemu")}
        rest = [(less(at, "remus", load), less(at, "plain", load)) for at in ats]
        figures["lost_vs_plain_less_qemu"] = figure([ratio(mine, plain) for mine, plain in rest if mine is not None and plain and plain > 0.01])
        # Where one of the two does not reach the interval, it has fewer epochs, and pauses less often, than it was asked to.
        each = [(per_epoch(at, "remus", load), per_epoch(at, "plain", load)) for at in ats]
        figures["lost_per_epoch_vs_plain"] = figure([ratio(mine, plain) for mine, plain in each if mine is not None and plain])
        out[load] = figures
    for way in "remus", "plain":
        if not any(at.get(way) for at in ats):
            continue
        loads = ("replies", "redis", "cpu") if way == "remus" else ("redis", "cpu")
        out[f"{way}_epochs"] = {load: epochs(ats, way, load) for load in loads}
    return out


def epochs(ats, *path):
    """Of the epochs under one load: how many, where their time goes, and what the controllers take."""
    windows = [w for at in ats if (w := dig(at, *path)) and w.get("epochs")]
    names = sorted({n for w in windows for n, v in w["epochs"]["medians"].items() if v is not None})
    fixed = [sum(dig(w, "epochs", "medians", n) or 0 for n in ("stop_ms", "save_ms", "cont_ms")) for w in windows]
    return {
        "epochs_per_s": figure([w["epochs"]["per_s"] for w in windows]),
        "pause_ms": {p: figure([w["epochs"]["pause_ms"][p] for w in windows]) for p in ("p50", "p99")},
        # QEMU's part of a pause: stopping, saving devices, going on. It is there with no page written.
        "pause_qemu_ms": figure(fixed),
        "medians": {n: figure([dig(w, "epochs", "medians", n) for w in windows]) for n in names},
        "cpu": {n: figure([dig(w, "cpu", n) for w in windows]) for n in ("protect", "standby")},
        "bytes_vs_raw": figure([density(w) for w in windows]),
        "pages": [w["epochs"]["pages"] for w in windows if w["epochs"].get("pages")],
    }


def takeovers(items):
    runs = [i for i in items if "failed" not in i]
    phases = {name: [dig(r, "takeover", f"{name}_ms") for r in runs] for name in ("detect", "load", "resume")}
    phases["first_packet"] = [r.get("first_packet_ms") for r in runs]

    def spread(values):
        return spreads.spread([v for v in values if v is not None], "p50", "p99", "max")
    return {
        "runs": len(items), "good": sum(bool(r.get("good")) for r in runs),
        "lost": sum(r["lost"] for r in runs), "duplicated": sum(r["duplicated"] for r in runs),
        "broken": sum(r["connection"] != "kept" for r in runs),
        "takeover_ms": {name: spread(values) for name, values in phases.items()},
        "after_detection": figure([r.get("after_detection_ms") for r in runs], TARGETS["takeover_after_detection"]),
        "outage_ms": spread([r.get("outage_ms") for r in runs]),
    }  # fmt: skip


def report(items, command, resets):
    """All of it."""
    counted = [i for i in items if not i.get("void")]
    machines = [i for i in items if i["kind"] == "machine"]
    of = {kind: [i for i in counted if i["kind"] == kind] for kind in ("round", "takeover", "partition")}
    rounds = [r for r in of["round"] if r["intervals"]]
    known = sorted({ms for r in rounds for ms in r["intervals"]}, key=int)
    intervals = {ms: interval(rounds, ms) for ms in known}
    hundred = [dig(r, "intervals", "100", "remus") for r in rounds]
    output = [dig(r, "on_output", "replies", "reply_ms", "p50") for r in rounds]
    pairs = zip(output, [dig(w, "replies", "reply_ms", "p50") for w in hundred])
    out = {
        "command": command, "kernel": dig(machines[0], "kernel") if machines else None,
        "accel": dig(machines[0], "accel") if machines else None,
        "host_load": max((m["host_load"] for m in machines), default=0), "host_cpus": max((m["host_cpus"] for m in machines), default=1),
        "rounds": len(rounds), "machine_resets": resets, "not_counted": sum(bool(i.get("void")) for i in items),
        "missing": machines[-1]["missing"] if machines else [],
        "bytes_vs_raw": figure([density(dig(w, "redis")) for w in hundred], TARGETS["bytes_vs_raw"]),
        "bytes_vs_raw_memory_loop": figure([density(dig(w, "memory")) for w in hundred]),
        "memory_loop_epochs": epochs(rounds, "intervals", "100", "remus", "memory"),
        "on_output_reply": figure([ratio(one, hundred_ms) for one, hundred_ms in pairs], TARGETS["on_output_reply"]),
        "on_output_reply_ms": {p: figure([dig(r, "on_output", "replies", "reply_ms", p) for r in rounds]) for p in ("p50", "p99")},
        "on_output_epochs": {load: epochs(rounds, "on_output", load) for load in ("replies", "redis", "cpu")},
        "intervals": intervals,
        "takeovers": takeovers(of["takeover"]) if of["takeover"] else None,
        "partitions": takeovers(of["partition"]) if of["partition"] else None,
        "old_primary_packets": None,
    }  # fmt: skip
    if of["partition"]:
        cut = [r for r in of["partition"] if "failed" not in r]
        spoken = sum(r["frames_after_kill"] for r in cut)
        out["old_primary_packets"] = {"value": spoken, "partitions": len(cut), "target": 0, "met": spoken == 0}
    out["note"] = note(out)
    return out


def note(out):
    """What to keep in mind about the absolute figures."""
    text = ""
    if out["accel"] != "kvm":
        text = "The machine is emulated: compare figures with each other, not with those of other machines."
    if out["host_load"] > out["host_cpus"]:
        text += (f" Other work kept the host busy as well: its load was {out['host_load']:.1f}"
                 f" on {out['host_cpus']} processors at the start.")
    if out.get("missing"):
        text += f" Not measured, as this remusctl has it not: {', '.join(out['missing'])}."
    return text.strip()


def number(value):
    if value is None:
        return "-"
    return f"{value:,.0f}" if value == int(value) or abs(value) >= 100 else f"{value:.{3 if abs(value) < 10 else 1}f}"


def line(name, got, unit=""):
    """Prints a figure."""
    verdict = "" if got["target"] is None else f"target {got['target']:>5}  {'-' if got['met'] is None else 'met' if got['met'] else 'missed'}"
    spread = f"({number(got['min'])} .. {number(got['max'])})"
    print(f"  {name:<52} {number(got['value']):>9} {unit:<5} {spread:<20} {verdict}".rstrip())


def show(out):
    print()
    line("bytes sent / pages written, Redis", out["bytes_vs_raw"])
    line("the same, random blocks written", out["bytes_vs_raw_memory_loop"])
    line("reply on output / reply at 100 ms", out["on_output_reply"])
    for ms, at in out["intervals"].items():
        print(f"  every {ms} ms")
        line("  reply, median", at["reply_ms"]["p50"], "ms")
        line("  reply, p99", at["reply_ms"]["p99"], "ms")
        for load in "redis", "cpu":
            line(f"  {load}: done / unprotected", at[load]["remus_done"])
            line(f"  {load}: the same, plain Remus", at[load]["plain_done"])
            line(f"  {load}: lost / lost by plain Remus", at[load]["lost_vs_plain"])
            line(f"  {load}: the same without stop, save, cont", at[load]["lost_vs_plain_less_qemu"])
            for way, whose in ("remus", ""), ("plain", ", plain Remus"):
                line(f"  {load}: of the time paused{whose}", at[load][f"{way}_paused"])
                line(f"  {load}: of it stop, save, cont{whose}", at[load][f"{way}_paused_qemu"])
            line(f"  {load}: lost for each epoch a second / by plain Remus", at[load]["lost_per_epoch_vs_plain"])
            for way, whose in ("remus", ""), ("plain", ", plain Remus"):
                if of := at.get(f"{way}_epochs", {}).get(load):
                    line(f"  {load}: epochs{whose}", of["epochs_per_s"], "/s")
        of = at.get("remus_epochs", {}).get("redis")
        if of:
            line("  redis: pause, median", of["pause_ms"]["p50"], "ms")
            line("  redis: of that stop, save, cont", of["pause_qemu_ms"], "ms")
            line("  redis: processors, primary", of["cpu"]["protect"])
            line("  redis: processors, standby", of["cpu"]["standby"])
    for kind in "takeovers", "partitions":
        got = out[kind]
        if not got:
            continue
        print(f"  {kind}: {got['good']} of {got['runs']} good; lost {got['lost']}, duplicated {got['duplicated']}, connections broken {got['broken']}")
        for name, values in got["takeover_ms"].items():
            print(f"    {name:<42} {number(values['p50']):>9} ms    (p99 {number(values['p99'])}, max {number(values['max'])})")
        line("  after detection", got["after_detection"], "ms")
    spoken = out["old_primary_packets"]
    if spoken:
        print(f"  frames of a primary that was cut off, after the take-over began: {spoken['value']} in {spoken['partitions']} partitions,"
              f" target 0  {'met' if spoken['met'] else 'missed'}")
    if out["note"]:
        print(f"\n  {out['note']}")
