# SPDX-License-Identifier: GPL-2.0
"""Numbered packets that race with seals, commits, aborts and discards, against a model; and sch_plug beside it.

The model knows nothing of tags or states. It counts: the sender's packets are 1, 2, 3 …, and the end of each epoch
is the number of its last packet. A seal says how many packets its epoch has; that must lie between what was
certainly sent before the seal and what was sent, at most, when it was over. Where the sender stands still, the two
are the same number.
"""
import ctypes
import glob
import mmap
import os
import random
import struct
import time

import net
import netlink
from harness import SEED, Kid, Skip, same, scaled, setting, short, test, true, until
from net import Line, Sender
from netlink import EGRESS, Genl, Rtnl, options

BEGUN, DONE, ALLOWED, STOP = range(4)


def numbered(device, shared):
    """Sends packet after packet on a processor of its own, as far as it is allowed to."""
    os.sched_setaffinity(0, {os.cpu_count() - 1})
    sender = Sender(device)
    cells = (ctypes.c_uint64 * 4).from_buffer(shared)
    n = 0
    while not cells[STOP]:
        if n == cells[ALLOWED]:
            time.sleep(0)
            continue
        n += 1
        cells[BEGUN] = n
        sender.send(n)
        cells[DONE] = n
    return n


class Oracle:
    """What must come out, and what may be held."""

    def __init__(self, line, cells, genl):
        self.line, self.cells, self.genl = line, cells, genl
        self.ends = {}        # sealed epoch: its last packet
        self.start = 0        # packets up to here are committed or thrown away
        self.want = []        # committed, in order: (first, last)
        self.allowed = 0      # how many packets are committed
        self.came = 0         # how many of them have come
        self.place = 0        # the one expected next: (index in want, offset)
        self.offset = 0
        self.epoch = 1
        self.committed = 0
        self.dropped = 0

    def before(self):
        """What was certainly sent. On its way to an ingress a packet may still be late."""
        return self.cells[DONE] if self.line.kind == "egress" else 0

    def quiet(self):
        """Has the sender stand still, with all its packets where they belong. Returns their number."""
        until(lambda: self.cells[DONE] == self.cells[ALLOWED], "the sender stands still", 60)
        total = self.cells[DONE]
        until(lambda: self.genl.get("web")["packets"] == total - self.start, "all its packets are held", 60)
        return total

    def look(self, where):
        """Takes what has come: exactly what was committed, in order, nothing else."""
        for n in self.line.receiver.now():
            if self.place == len(self.want):
                raise AssertionError(f"{where}: packet {n} came early, after {self.came} of {self.allowed}")
            first, last = self.want[self.place]
            if n != first + self.offset:
                raise AssertionError(f"{where}: packet {n} came instead of {first + self.offset}; committed is {self.want[-3:]}")
            self.came += 1
            self.offset += 1
            if n == last:
                self.place, self.offset = self.place + 1, 0

    def wait(self, where):
        """All that is committed has come."""
        end = time.monotonic() + 60
        while self.came < self.allowed:
            self.look(where)
            if time.monotonic() > end:
                raise AssertionError(f"{where}: {self.came} of {self.allowed} committed packets have come, {self.want[-3:]}; "
                                     f"the receiver lost {self.line.receiver.drops()}")

    def seal(self, where, quiet):
        begin = max([self.start, *self.ends.values()])
        low = max(begin, self.quiet() if quiet else self.before())
        done = self.genl.seal("web")
        high = self.cells[BEGUN]
        same(done["epoch"], self.epoch, f"{where}: epoch")
        end = begin + done["packets"]
        true(low <= end <= high, f"{where}: epoch {self.epoch} ends with packet {end}, not within {low} and {high}")
        self.ends[self.epoch] = end
        self.epoch += 1

    def commit(self, where, epoch):
        done = self.genl.commit("web", epoch)
        end = self.ends[epoch]
        same(done["packets"], end - self.start, f"{where}: packets that commit {epoch} reports")
        if end > self.start:
            self.want.append((self.start + 1, end))
            self.allowed += end - self.start
        self.start, self.committed = end, epoch
        self.ends = {e: last for e, last in self.ends.items() if e > epoch}

    def abort(self, where, epoch):
        done = self.genl.abort("web", epoch)
        before = max([self.start, *(last for e, last in self.ends.items() if e < epoch)])
        same(done["packets"], max(self.ends.values()) - before, f"{where}: packets that abort {epoch} reports")
        self.ends = {e: last for e, last in self.ends.items() if e < epoch}

    def discard(self, where, quiet):
        low = max(self.start, self.quiet() if quiet else self.before(), *self.ends.values())
        done = self.genl.discard("web")
        high = self.cells[BEGUN]
        end = self.start + done["packets"]
        true(low <= end <= high, f"{where}: thrown away up to packet {end}, not within {low} and {high}")
        self.dropped += done["packets"]
        self.start = end
        self.ends = dict.fromkeys(self.ends, end)

    def check(self, where):
        """What the domain says of itself, while the sender stands still."""
        total = self.quiet()
        view = self.genl.get("web")
        same((view["packets"], view["open-epoch"], view["committed-epoch"], view["sealed-epochs"], view["dropped"]),
             (total - self.start, self.epoch, self.committed, len(self.ends), self.dropped), f"{where}: what domain-get says")


def one_processor(stack, device):
    """A veth pair does not keep the order of what several processors hand it: one sends, one receives. Nor does it
    keep more than so many packets for an ingress that is late."""
    stack.callback(os.sched_setaffinity, 0, os.sched_getaffinity(0))
    os.sched_setaffinity(0, {0})
    for path in glob.glob(f"/sys/class/net/{device}/queues/rx-*/rps_cpus"):
        with open(path, "w", encoding="ascii") as f:
            f.write("1")
    setting(stack, "/proc/sys/net/core/netdev_max_backlog", 100000)


def sequences(stack, kind):
    """Random steps, up to eight epochs outstanding, the sender running all the time but for the steps that say so."""
    genl = stack.enter_context(Genl())
    # Ports without packets, sealed before and after the one that matters: a packet has longer to come in between.
    rtnl = stack.enter_context(Rtnl())

    def idle(*names):
        for name in names:
            rtnl.add(name, "dummy")
            stack.callback(rtnl.delete, name)
            rtnl.qdisc_add(name, options=options("web", EGRESS))
    idle(*(f"t-i{i}" for i in range(8)))
    line = Line(stack, kind, domain="web")
    idle(*(f"t-i{i}" for i in range(8, 16)))
    shared = mmap.mmap(-1, 4096)
    cells = (ctypes.c_uint64 * 4).from_buffer(shared)
    one_processor(stack, line.peer if kind == "egress" else "none")
    kid = Kid(numbered, line.device if kind == "egress" else line.peer, shared)
    oracle, rng = Oracle(line, cells, genl), random.Random(SEED)
    steps = scaled(2000, 100000) // 2  # both directions together
    tally = dict.fromkeys(("seal", "commit", "abort", "discard", "quiet"), 0)
    for step in range(steps):
        where = f"step {step} of seed {SEED}"
        if cells[ALLOWED] - oracle.start < 5000:
            cells[ALLOWED] += rng.choice((0, 1, 3, 10, 40, 80))
        quiet = rng.random() < 0.1
        dice = rng.random()
        if dice < 0.02:
            what = "discard"
            oracle.discard(where, quiet)
        elif dice < 0.12 and oracle.ends:
            what = "abort"
            oracle.abort(where, rng.choice(sorted(oracle.ends)))
        elif dice < 0.5 and oracle.ends or len(oracle.ends) >= 8:
            what = "commit"
            oracle.commit(where, rng.choice(sorted(oracle.ends)))
            if quiet:
                oracle.wait(where)
        else:
            what = "seal"
            oracle.seal(where, quiet)
        tally[what] += 1
        tally["quiet"] += quiet
        oracle.look(where)
        if step % 100 == 99:
            oracle.check(where)
            oracle.wait(where)
    oracle.check("at the end")
    oracle.wait("at the end")
    line.receiver.nothing("nothing else")
    cells[STOP] = 1
    total = kid.result()
    same((oracle.came, line.receiver.drops()), (oracle.allowed, 0), "all that was committed came")
    print(f"# {kind}: {steps} steps {tally}, {total} packets, {oracle.allowed} committed, {oracle.dropped} thrown away", flush=True)
    line.remove()
    del cells, oracle


@test(seconds=1200)
def egress(stack):
    sequences(stack, "egress")


@test(seconds=1200)
def guest(stack):
    sequences(stack, "guest")


PLUG_BUFFER, PLUG_RELEASE_ONE = 0, 1


@test
def two_epochs_beside_sch_plug(stack):
    """Epochs of 1, 10 and 5 packets, two of them sealed, one released: 1 packet leaves. What sch_plug does."""
    def run(seal, release, line, least):
        line.send(1)
        seal()
        line.send(*range(2, 12))
        seal()
        line.send(*range(12, 17))
        release()
        return line.receiver.gather(least)
    genl = stack.enter_context(Genl())
    for kind in net.KINDS:
        line = Line(stack, kind, domain="web")
        got = run(lambda: genl.seal("web"), lambda: genl.commit("web", 1), line, 1)
        same(got, [1], f"remus, {kind}")
        genl.commit("web", 2)
        line.receiver.expect(range(2, 12), f"remus, {kind}", settle=0.05)
        line.remove()
    line = Line(stack, "egress", add=False)

    def plug(action):
        return lambda: line.rtnl.qdisc_change(line.device, "plug", raw=netlink.attr(2, struct.pack("=iI", action, 0)))
    os.system("modprobe sch_plug 2>/dev/null")
    try:
        line.rtnl.qdisc_add(line.device, "plug", raw=netlink.attr(2, struct.pack("=iI", 3, 1 << 20)))
    except OSError as error:
        raise Skip(f"no sch_plug here: {error}") from error
    got = run(plug(PLUG_BUFFER), plug(PLUG_RELEASE_ONE), line, 2)
    early = [n for n in got if n > 1]
    print(f"# with epochs of 1, 10 and 5 packets and the first one released: remus 1 packet, sch_plug {len(got)}, "
          f"{len(early)} of them too early", flush=True)
    line.rtnl.qdisc_del(line.device)
    # What docs/qdisc.md says of it.
    true(got[:1] == [1] and early, f"sch_plug let {short(got)} go")
