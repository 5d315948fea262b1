# SPDX-License-Identifier: GPL-2.0
"""What tc with the plugin shows of messages that no module sends today: an older one's, a newer one's, nonsense."""
import os
import struct
import subprocess
import tempfile

GUEST, EGRESS = 1, 2
# As struct Stats in kmod/core/uapi.rs, module tca.
FIGURES = "open committed sealed held bytes memory hold_last hold_max dropped_limit dropped_memory dropped_discarded".split()
NUMBERS = [7, 5, 1, 12, 1 << 33, 3 << 20, 12_300_000, 4_000_000_000, 1, (1 << 32) + 2, 3]
OPTIONS = [(1, b"web\0"), (2, bytes([GUEST])), (3, struct.pack("=I", 1000)), (4, struct.pack("=Q", 6 << 30)), (5, b"\0")]
TYPED = "domain web direction guest limit 1000p limit 6Gb hold".split()


def attributes(pairs):
    out = b""
    for kind, content in pairs:
        out += struct.pack("=HH", len(content) + 4, kind) + content + b"\0" * (-len(content) % 4)
    return out


def stats(passthrough=0, direction=GUEST):
    return struct.pack(f"={len(FIGURES)}QII", *NUMBERS, passthrough, direction)


def shown(*flags, options=(), xstats=None):
    """What tc makes of an RTM_NEWQDISC."""
    inner = attributes([(1, struct.pack("=QI4x", 0, 0)), *([] if xstats is None else [(4, xstats)])])
    content = attributes([(1, b"remus\0"), (2, attributes(options)), (7, inner)])
    payload = struct.pack("=BxxxiIII", 0, 1, 0x10000, 0xFFFFFFFF, 2) + content
    with tempfile.NamedTemporaryFile() as file:
        file.write(struct.pack("=IHHII", 16 + len(payload), 36, 0, 0, 0) + payload)
        file.flush()
        done = subprocess.run(["tc", *flags, "monitor", "file", file.name], env={**os.environ, "PATH": os.environ["PATH"] + ":/usr/sbin:/sbin"},
                              text=True, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        raise AssertionError(f"tc ends with {done.returncode}: {done.stdout}")
    return done.stdout


def parsed(**message):
    """The same, each word with what follows it; tc's monitor has no JSON."""
    lines = shown("-s", **message).splitlines()
    options = lines[0].split()[8:]
    values = {w: v for line in lines[1:] if line.startswith("  ") for w, v in zip(line.split()[::2], line.split()[1::2])}
    return options, values


def same(got, want):
    if got != want:
        raise AssertionError(f"got {got!r}, want {want!r}")


def words_of_everything():
    text = shown("-s", options=OPTIONS, xstats=stats(passthrough=1, direction=EGRESS))
    for want in ("domain web direction guest limit 1000p limit 6Gb hold ",
                 "\n  mode passing direction egress open 7 sealed 1 committed 5 \n"
                 "  held 12p bytes 8Gb memory 3Mb hold_last 12.3ms hold_max 4s \n"
                 "  dropped_limit 1 dropped_memory 4294967298 dropped_discarded 3 \n"):
        if want not in text:
            raise AssertionError(f"{want!r} is not in {text!r}")


def without_statistics():
    same(parsed(options=OPTIONS), (TYPED, {}))
    same(parsed(options=OPTIONS, xstats=b""), (TYPED, {}))


def of_an_older_module():
    whole = parsed(xstats=stats())[1]
    for known in range(len(FIGURES)):
        options, values = parsed(options=OPTIONS[:2], xstats=stats()[:8 * known + 4])
        same(values, {word: whole[word] for word in FIGURES[:known]})
        same(options, "domain web direction guest".split())


def of_a_newer_module():
    options, values = parsed(options=[(6, b"new"), *OPTIONS, (7, b"\0" * 40)], xstats=stats(direction=3) + b"\xff" * 64)
    same(options, TYPED)
    same(values, {**parsed(xstats=stats())[1], "direction": "unknown"})


def nonsense():
    same(parsed(options=[(1, b"web"), (2, b""), (3, b"\1"), (4, b"\1\2\3\4"), (5, b"")], xstats=b"\1"), ([], {}))


CASES = [words_of_everything, without_statistics, of_an_older_module, of_a_newer_module, nonsense]
