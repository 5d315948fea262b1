# SPDX-License-Identifier: GPL-2.0
"""Measures, in the virtual machine: one guest, protected in one way after the other, under one load after the other."""

import glob
import json
import os
import re
import select
import signal
import subprocess
import sys
import time

import netlink
import report
from hosts import BETA_IP, GUEST_IP, PORT, Failed, Hosts, knows, listens, sh, tail, tell

HERE = os.path.dirname(os.path.abspath(__file__))
TICK = os.sysconf("SC_CLK_TCK")
INTERVALS = 25, 50, 100, 200
HOT_LIMIT = "16M"
PLAIN = "--copy-in-pause", "--depth", "1", "--raw"
# The command of Redis that counts as a unit of work of a load.
WORK = {"redis": "set", "cpu": "eval", "memory": "eval"}
# A load counts once so much of it was done: its connections stand, and all that it sends at once is on its way.
# It counts as it is if that takes too long.
STRIDE = {"redis": 20_000, "cpu": 64, "memory": 8, "replies": 3}
STRIDE_LIMIT_S = 60
# For an answer of the guest, which may have much to do before.
PATIENCE_S = 120
# So many replies make a median, and the window longer if need be.
REPLIES = 30


def missing(*flags):
    """What this remusctl cannot do yet, of these options of protect."""
    return [flag for flag in flags if flag.startswith("--") and not knows("protect", flag)]


def busy(pid):
    """Processor seconds of a process so far, user and system."""
    with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
        words = file.read().rsplit(")", 1)[1].split()
    return (int(words[11]) + int(words[12])) / TICK


def redis_benchmark():
    """Debian's, with the libraries it was made for."""
    root = f"{os.environ['REMUS_CACHE']}/guest"
    loader, = {os.path.realpath(p) for p in glob.glob(f"{root}/lib/*/ld-linux-x86-64.so.2")}
    found = glob.glob(f"{root}/lib/**/*.so.*", recursive=True) + glob.glob(f"{root}/usr/lib/**/*.so.*", recursive=True)
    return [loader, "--library-path", ":".join(sorted({os.path.dirname(p) for p in found})), f"{root}/usr/bin/redis-benchmark"]


class Bench(Hosts):
    """One guest, and what is measured with it."""

    def __init__(self, number, options, measured=None, logs="bench/replication"):
        super().__init__(f"bench-{number}", options, f"{logs}/round-{number}")
        self.genl = netlink.Genl()
        self.sessions = 0
        # What was measured so far, maybe with a guest that the emulated processor has reset then.
        self.out = measured or {"intervals": {}}

    def begin(self):
        self.start_guest()
        self.guest_up()
        self.genl.set("web", passing=True)
        self.counter = subprocess.Popen(  # pylint: disable=consider-using-with
            ["ip", "netns", "exec", "client", sys.executable, f"{HERE}/load.py", "count", GUEST_IP],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
        self.processes["counter"] = self.counter
        done = sh(sys.executable, f"{HERE}/load.py", "cpu", GUEST_IP, namespace="client")
        self.loops = done.stdout.strip()
        tell(f"guest: {self.loops} loops of a script are a unit of computing")
        self.start_standby()

    def calls(self):
        """How often which command was called, and when that was."""
        self.counter.stdin.write("\n")
        answered = select.select([self.counter.stdout], [], [], PATIENCE_S)[0]
        line = self.counter.stdout.readline() if answered else ""
        if not line:
            raise Failed("the guest has stopped answering")
        return json.loads(line)

    def load(self, kind):
        """Starts a load."""
        if kind == "redis":
            # Replies are held for an epoch, and the guest is to be the limit all the same: so many requests at once as it
            # answers in several of the longest, and on each connection no more than TCP sends without an answer.
            command = [*redis_benchmark(), "-h", GUEST_IP, "-p", "6379", "-c", "80", "-P", "120", "-t", "set", "-d", "64",
                       "-r", "20000", "-n", "1000000000", "-q"]
        else:
            more = {"cpu": [self.loops], "replies": [self.path("replies")]}.get(kind, [])
            command = [sys.executable, f"{HERE}/load.py", kind, GUEST_IP, *more]
        return self.start(f"load-{kind}", command, "client")

    def done(self, kind):
        """How much of a load is done so far."""
        return self.calls()["calls"].get(WORK[kind], 0) if kind in WORK else len(self.replies())

    def replies(self):
        """Replies of the load with this name: time (Unix, s), latency (ms)."""
        try:
            with open(self.path("replies"), encoding="ascii") as file:
                return [[float(w) for w in line.split()] for line in file if line.endswith("\n")]
        except FileNotFoundError:
            return []

    def window(self, kind):
        """What a load achieves, and what protecting it takes, for a while."""
        o = self.options
        name = f"load-{kind}"
        protected = "protect" in self.processes
        controllers = [n for n in ("protect", "standby") if n in self.processes and protected]
        if os.path.exists(self.path("replies")):
            os.remove(self.path("replies"))
        before = self.done(kind)
        self.load(kind)
        watched = (name, "qemu", *controllers)
        begun = time.monotonic()
        while not (stride := self.done(kind) >= before + STRIDE[kind]) and time.monotonic() < begun + STRIDE_LIMIT_S:
            # Asking costs the guest something.
            self.watch(1, *watched)
        # The answer may take its time: all else is looked at after it, and before the next.
        first = self.calls() if kind in WORK else None
        used = {n: busy(self.processes[n].pid) for n in controllers}
        wire = self.wire() if protected else None
        begin, t_begin = time.time(), time.monotonic()
        self.watch(o.seconds, *watched)
        while kind == "replies" and len(self.replies()) < REPLIES and time.monotonic() < t_begin + 4 * o.seconds:
            self.watch(0.5, *watched)
        end, span = time.time(), time.monotonic() - t_begin
        out = {"seconds": round(span, 3), "stride": stride}
        if protected:
            sent = self.wire()
            out["cpu"] = {n: round((busy(self.processes[n].pid) - used[n]) / span, 4) for n in controllers}
            out["wire_bytes"] = None if None in (wire, sent) else sent - wire
        if first:
            last = self.calls()
            work = [c["calls"].get(WORK[kind], 0) for c in (first, last)]
            out["work_per_s"] = (work[1] - work[0]) / (last["t"] - first["t"])
        self.processes[name].terminate()
        self.processes.pop(name).wait(30)
        if kind == "replies":
            times = [latency for t, latency in self.replies() if begin <= t <= end]
            out["reply_ms"] = report.spread(times, "p50", "p99") | {"replies": len(times)}
        if protected:
            out["epochs"] = self.digest([e for e in self.epochs() if begin * 1000 <= e["t_ms"] <= end * 1000], span)
        return out

    @staticmethod
    def digest(epochs, span):
        """What the trace says of epochs."""
        def middle(name):
            return report.median([e[name] for e in epochs if e.get(name) is not None])
        out = {
            "count": len(epochs), "per_s": round(len(epochs) / span, 2),
            "bytes": sum(e["bytes"] for e in epochs), "dirty_pages": sum(e["dirty_pages"] for e in epochs),
            "pause_ms": report.spread([e["pause_ms"] for e in epochs], "p50", "p99", "max"),
            # Of the time: the guest paused; and of that, what QEMU takes to stop it, to save its devices and to go on.
            "paused": round(sum(e["pause_ms"] for e in epochs) / span / 1000, 4),
            "paused_qemu": round(sum(e[k] or 0 for e in epochs for k in ("stop_ms", "save_ms", "cont_ms")) / span / 1000, 4),
            "medians": {k: middle(k) for k in ("interval_ms", "stop_ms", "seal_ms", "copy_ms", "save_ms", "cont_ms", "commit_lag_ms",
                                               "read_ms", "encode_ms", "send_ms", "dirty_pages")},
        }  # fmt: skip
        for kind in ("zero", "unchanged", "delta", "packed", "lz4", "raw"):
            if any(kind in e for e in epochs):
                out.setdefault("pages", {})[kind] = sum(e.get(kind) or 0 for e in epochs)
        return out

    def wire(self):
        """Bytes that the primary has sent to the standby, as TCP counts them."""
        said = sh("ss", "-tinHO", "dst", f"{BETA_IP}:{PORT}", namespace="alpha", check=False).stdout
        sent = re.findall(r"\bbytes_sent:(\d+)", said)
        return sum(map(int, sent)) if sent else None

    def standby_ready(self):
        """Waits until the standby has a machine for the next session."""
        known = lambda: sum(e.get("event") == "standby-ready" for e in self.secondary.read())  # noqa: E731
        self.wait_for("the standby's next machine", lambda: known() > self.sessions and listens(self.processes["standby"].pid, PORT), 120,
                      "standby")

    def restart_standby(self, plain):
        """Has another standby wait, with keys or without."""
        self.standby_ready()
        standby = self.processes.pop("standby")
        standby.terminate()
        standby.wait(60)
        self.plain = plain
        # It will have a machine, too.
        self.sessions += 1
        self.start_standby()

    def session(self, how, loads, out):
        """Protects the guest in one way, and measures it under these loads; what is measured is in `out` at once."""
        loads = [kind for kind in loads if kind not in out]
        if not loads:
            return
        self.standby_ready()
        tell(f"protect {' '.join(how)}")
        self.start_protect(*how)
        self.sessions += 1
        # The first copy is over; its memory has to settle.
        self.watch(2, "protect", "standby", "qemu")
        for kind in loads:
            out[kind] = self.window(kind)
        protect = self.processes.pop("protect")
        protect.send_signal(signal.SIGTERM)
        try:
            code = protect.wait(60)
        except subprocess.TimeoutExpired:
            protect.kill()
            raise Failed("remusctl protect did not end when asked to") from None
        if code:
            raise Failed(f"remusctl protect ended with {code}: {tail(f'{self.logs}/protect.log', 2)}")
        if self.genl.get("web")["sealed-epochs"]:
            self.ctl("alpha", "abort", "web")
        self.genl.set("web", passing=True)

    def was_reset(self):
        """Whether the guest has ended by itself, as it does when the emulated processor resets it."""
        if os.environ.get("REMUS_ACCEL") == "kvm" or "qemu" not in self.processes:
            return False
        try:
            # remusctl may know before the process has ended.
            return self.processes["qemu"].wait(5) == 0
        except subprocess.TimeoutExpired:
            return False

    def round(self):
        """Each interval once: not protected, protected, and as plain Remus did it."""
        o, out = self.options, self.out
        self.begin()
        for interval in o.intervals:
            kinds = ("replies", "redis", "cpu")
            got = out["intervals"].setdefault(str(interval), {"unprotected": {}, "remus": {}, "plain": {}})
            for kind in kinds:
                if kind not in got["unprotected"]:
                    got["unprotected"][kind] = self.window(kind)
            self.session(("-i", str(interval)), (*kinds, *(("memory",) if interval == 100 else ())), got["remus"])
            if not missing(*PLAIN):
                # It write-protects every page.
                self.ctl("alpha", "domain", "set", "web", "--hot-limit", "0")
                self.session(("-i", str(interval), *PLAIN), ("redis", "cpu"), got["plain"])
                self.ctl("alpha", "domain", "set", "web", "--hot-limit", HOT_LIMIT)
        out.setdefault("on_output", {})
        if not missing("--on-output"):
            self.session(("--on-output",), ("replies", "redis", "cpu"), out["on_output"])
        return out
