# SPDX-License-Identifier: GPL-2.0
"""Measures, in the virtual machine: fio in one guest whose disk is replicated in one way after the other."""

import concurrent.futures
import contextlib
import glob
import json
import os
import secrets
import socket
import time

import measure
import report
from hosts import BETA_IP, Failed, listens, tell

NBD_PORT = 10809
FILE = "/data/load"
FILE_MIB = 64
# What fio does; the file is there before, so that no file system's metadata is measured.
LOADS = {
    "seq_write": "--rw=write --bs=1m",
    "rand_write": "--rw=randwrite --bs=4k --fdatasync=1",
    "seq_read": "--rw=read --bs=1m",
}
FIO = f"/bin/fio --name=load --filename={FILE} --size={FILE_MIB}m --direct=1 --ioengine=psync --clocksource=clock_gettime --output-format=json"
# The mirror with TLS is as safe from others on the network as the protected guest's disk, and the guest protected without keys
# as unsafe as the mirror without. With an epoch every so often pauses hardly count.
WAYS = "unprotected", "protected", "mirror", "mirror_tls", "protected_plain", "protected_seldom"
SELDOM_MS = 2000
# What the guest's kernel has done with its disk, and which field counts sectors (Documentation/block/stat.rst).
STAT, SECTOR = "cat /sys/block/vda/stat", 512
FIELD = {"seq_write": 6, "rand_write": 6, "seq_read": 2}
BLOCK = 4096


class Qmp:
    """QEMU's monitor for programs. One client at a time, so not while the guest is protected."""

    def __init__(self, path):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(120)
        self.socket.connect(path)
        self.file = self.socket.makefile("r", encoding="utf-8")
        self.next()
        self.ask("qmp_capabilities")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.close()

    def next(self):
        try:
            line = self.file.readline()
        except OSError as e:
            raise Failed(f"QEMU's QMP: {e}") from e
        if not line:
            raise Failed("QEMU has closed its QMP socket")
        return json.loads(line)

    def ask(self, command, **arguments):
        self.socket.sendall(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        while "event" in (answer := self.next()):
            pass
        if "error" in answer:
            raise Failed(f"QEMU refuses {command}: {answer['error']['desc']}")
        return answer["return"]


class Rounds(measure.Bench):
    """One guest with one disk, and what is measured in it."""

    def __init__(self, number, options, measured=None):
        super().__init__(number, options, measured or {way: {} for way in WAYS}, "bench/disk")
        self.number = number

    def begin(self):
        self.add_disks(["raw"], 0, verify=False)
        self.start_guest()
        self.guest_up()
        self.genl.set("web", passing=True)
        self.ask_guest(f"{FIO} {LOADS['seq_write']}", 300)
        self.start_standby()

    def window(self, kind):
        """What fio achieves with a load for a while, by this host's clock, and what the others do meanwhile.

        The guest's own clock, and so fio's, stands still while the guest does.
        """
        seconds, watched = self.options.seconds, ("qemu", *(n for n in ("protect", "standby") if "protect" in self.processes))
        known = len(self.secondary.read())
        # It begins, and is ended, outside of what counts.
        command = f"{FIO} {LOADS[kind]} --time_based --runtime=3600 || true"
        with concurrent.futures.ThreadPoolExecutor(1) as thread:
            asked = thread.submit(self.ask_guest, command, 240 + 2 * seconds)
            try:
                idle = self.progress(kind)[1]
                while self.progress(kind)[1] < idle + 2**16 and not asked.done():
                    self.watch(0.2, *watched)
                begin, done, spent = *self.progress(kind), self.busy()
                self.watch(seconds, *watched)
                end, more, used = *self.progress(kind), self.busy()
                if asked.done():
                    raise Failed(f"fio ended before it was told to: {asked.result()[-300:]}")
            finally:
                with contextlib.suppress(Failed):
                    self.ask_guest("/bin/busybox killall -INT fio", 60)
            said = asked.result()
        job = json.loads(said[said.index("{"):said.rindex("}") + 1])["jobs"][0]
        if job["error"]:
            raise Failed(f"fio failed: {os.strerror(job['error'])}")
        out = {"seconds": round(end - begin, 3), "bytes_per_s": round((more - done) / (end - begin))}
        unit = (more - done) / (BLOCK if kind == "rand_write" else 2**20)
        out["cpu_ms"] = {name: round((now - spent.get(name, 0)) * 1000 / unit, 3) for name, now in used.items()}
        if kind == "rand_write":
            out["iops"] = round(out["bytes_per_s"] / BLOCK, 2)
            # As much longer as all of it took by this clock.
            slower = job["write"]["bw_bytes"] / out["bytes_per_s"]
            out["fsync_ms"] = round(job["sync"]["lat_ns"]["mean"] * slower / 1e6, 4)
        if "protect" in self.processes:
            epochs = [e for e in self.epochs() if begin <= e["t_ms"] / 1000 - time.time() + time.monotonic() <= end]
            if epochs:
                out["epochs"] = report.spread([e["pause_ms"] for e in epochs], "p50", "max") | {
                    "count": len(epochs), "paused": round(sum(e["pause_ms"] for e in epochs) / 1000 / (end - begin), 4)}
            applied = [e["disks_ms"] for e in self.secondary.read()[known:] if e.get("disks_ms") is not None]
            out["apply_ms"] = report.spread(applied, "p50", "p99", "max") | {"epochs": len(applied)}
        tell(f"{kind}: {out['bytes_per_s'] / 1e6:.2f} MB/s" + (f", fdatasync in {out['fsync_ms']:.2f} ms" if "fsync_ms" in out else ""))
        return out

    def progress(self, kind):
        """When the guest was asked, and how many bytes of a kind its disk had done."""
        return time.monotonic(), int(self.ask_guest(STAT, 60).split()[FIELD[kind]]) * SECTOR

    def busy(self):
        """Processor seconds so far of those who have to do with the disk."""
        found = {name: self.processes[name].pid for name in ("qemu", "protect", "standby") if name in self.processes}
        for path in glob.glob("/proc/[0-9]*/comm"):
            # Of protect, or the mirror's.
            with contextlib.suppress(OSError), open(path, encoding="ascii", errors="replace") as file:
                if file.read() == "nbdkit\n":
                    found["nbdkit"] = path.split("/")[2]
        return {name: measure.busy(pid) for name, pid in found.items()}

    def mirror(self, out, tls=False):
        """QEMU's own mirror of the disk, each write on both hosts before the guest hears of it, and no epochs."""
        loads = [kind for kind in LOADS if kind not in out]
        if not loads:
            return
        image = f"{self.disks.directory}/mirror.raw"
        self.disks.create(image, "raw")
        how, far = [], {}
        if tls:
            # The names are QEMU's.
            with open(f"{self.disks.directory}/keys.psk", "w", encoding="ascii") as file:
                file.write(f"qemu:{secrets.token_hex(32)}\n")
            how, far = ["--tls=require", f"--tls-psk={self.disks.directory}/keys.psk"], {"tls-creds": "tls"}
        server = self.start("nbdkit", ["nbdkit", "--foreground", "--ipaddr", BETA_IP, "--port", str(NBD_PORT), *how, "file", image], "beta")
        self.wait_for("nbdkit's start", lambda: listens(server.pid, NBD_PORT), 60, "nbdkit")
        tell("mirror by QEMU" + (" with TLS" if tls else ""))
        with Qmp(f"{self.sockets}/web.qmp") as qmp:
            if tls:
                qmp.ask("object-add", **{"qom-type": "tls-creds-psk", "id": "tls", "endpoint": "client", "dir": self.disks.directory})
            qmp.ask("blockdev-add", **{"driver": "nbd", "node-name": "far", **far,
                                       "server": {"type": "inet", "host": BETA_IP, "port": str(NBD_PORT)}})
            qmp.ask("blockdev-mirror", **{"job-id": "far", "device": "disk0", "target": "far", "sync": "full",
                                          "copy-mode": "write-blocking"})
            job = lambda: qmp.ask("query-block-jobs")[0]  # noqa: E731
            self.wait_for("the mirror", lambda: (j := job())["ready"] and j.get("actively-synced"), 120, "qemu", "nbdkit")
            for kind in loads:
                out[kind] = self.window(kind)
            # A write that is under way while the job ends may corrupt the memory of QEMU 10.
            qmp.ask("stop")
            qmp.ask("block-job-cancel", device="far", force=True)
            self.wait_for("the end of the mirror", lambda: not qmp.ask("query-block-jobs"), 60, "qemu")
            qmp.ask("cont")
            qmp.ask("blockdev-del", **{"node-name": "far"})
            if tls:
                qmp.ask("object-del", id="tls")
        self.processes.pop("nbdkit").terminate()
        server.wait(30)
        os.remove(image)

    def unprotected(self, out):
        for kind in LOADS:
            if kind not in out:
                out[kind] = self.window(kind)

    def protected(self, out, interval, plain=False):
        """Memory and disk replicated, in epochs."""
        if all(kind in out for kind in LOADS):
            return
        if plain:
            self.restart_standby(plain=True)
        self.session(("-i", str(interval)), LOADS, out)
        if plain:
            self.restart_standby(plain=False)

    def round(self):
        """Each way once; which comes first changes from round to round."""
        self.begin()
        interval = self.options.interval
        turns = {
            "unprotected": lambda: self.unprotected(self.out["unprotected"]),
            "protected": lambda: self.protected(self.out["protected"], interval),
            "mirror": lambda: self.mirror(self.out["mirror"]),
            "mirror_tls": lambda: self.mirror(self.out["mirror_tls"], tls=True),
            "protected_plain": lambda: self.protected(self.out["protected_plain"], interval, plain=True),
            "protected_seldom": lambda: self.protected(self.out["protected_seldom"], SELDOM_MS),
        }
        for turn in range(len(WAYS)):
            turns[WAYS[(turn + self.number) % len(WAYS)]]()
        return self.out
