# SPDX-License-Identifier: GPL-2.0
"""What the qdisc costs, inside a virtual machine of scripts/vm.sh.

          host                                             lan
  egress  e0 ─────────────────────────────────────────────── e1
  guest   g1 ── g0 ── bridge ── l0 ───────────────────────── l1
          (g1 is in a namespace of its own; g0 faces it)

The sender hands 1,000 packets to the kernel with one call (sendmmsg). The receiver's filter lets only
marked packets through, so that hardly anything is spent on receiving, and that the last of a burst says
that all before it were handled.

Everything is pinned to one processor. For `cost` and `instructions` the machine has no other: the time that passed, less
the time that the processor idled, is then what sender, control calls, release and delivery took,
softirqs included.
"""
import contextlib
import ctypes
import gc
import os
import re
import socket
import statistics
import struct
import subprocess
import time

import harness
import net
import netlink
from netlink import EGRESS, GUEST
from ram import check, libc

EPOCH, LOSS, MANY = 1_000, 50_000, 100_000
EPOCHS = 32  # at most, while one sits on a device
FLAG = 18  # where a frame has its mark
FIRST, LAST = 1, 2
BACKLOG = "/proc/sys/net/core/netdev_max_backlog"
BUFFER, RELEASE_ONE = 0, 1  # struct tc_plug_qopt
PASSTHROUGH = 5  # TCA_OPTIONS

libc.sendmmsg.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_uint, ctypes.c_int]


# Packets


class Burst:
    """Packets that leave with one call for each 1,000. The first and the last one are marked."""

    def __init__(self, dst, src, count, numbered=False):
        def frame(n, flag):
            return (dst + src + struct.pack("!HIB", net.PROTO, n, flag)).ljust(net.SIZE, b"\xa5")

        if numbered:
            frames = [frame(n, 0) for n in range(count)]
            which = range(count)
        else:
            frames = [frame(0, 0), frame(0, FIRST), frame(0, LAST)]
            which = [1, *[0] * (count - 2), 2][-count:]
        self.count = count
        self.data = ctypes.create_string_buffer(b"".join(frames))
        base = ctypes.addressof(self.data)
        self.vectors = ctypes.create_string_buffer(
            b"".join(struct.pack("=QQ", base + net.SIZE * i, net.SIZE) for i in range(len(frames))))
        base = ctypes.addressof(self.vectors)
        headers = [struct.pack("=QI4xQQQQi4xI4x", 0, 0, base + 16 * i, 1, 0, 0, 0, 0) for i in range(len(frames))]
        self.headers = ctypes.create_string_buffer(b"".join(headers[i] for i in which))
        self.base = ctypes.addressof(self.headers)

    def send(self, sock):
        fd, at = sock.fileno(), 0
        while at < self.count:
            at += check(libc.sendmmsg(fd, self.base + 64 * at, min(self.count - at, 1000), 0))


class Receiver:
    """Gets the marked packets that a device delivers, or all."""

    def __init__(self, name, everything=False, stamps=False):
        self.sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0)
        if not everything:
            code = b"".join(struct.pack("=HBBI", *i) for i in (
                (0x30, 0, 0, FLAG), (0x15, 1, 0, 0), (0x06, 0, 0, 0xFFFFFFFF), (0x06, 0, 0, 0)))
            code = ctypes.create_string_buffer(code)
            self.sock.setsockopt(socket.SOL_SOCKET, 26, struct.pack("=H6xQ", 4, ctypes.addressof(code)))
        if stamps:
            self.sock.setsockopt(socket.SOL_SOCKET, 35, 1)  # SO_TIMESTAMPNS
        self.sock.setsockopt(socket.SOL_SOCKET, 33, 1 << 28)  # SO_RCVBUFFORCE
        self.sock.setsockopt(socket.SOL_SOCKET, 20, struct.pack("=qq", 60, 0))  # SO_RCVTIMEO
        self.sock.bind((name, net.PROTO))

    def wait(self, flag=LAST):
        while True:
            try:
                data = self.sock.recv(64)
            except BlockingIOError:
                raise RuntimeError("released packets were not delivered within 60 s") from None
            if data[FLAG] == flag:
                return

    def stamp(self):
        """When the first packet of a burst arrived. The last one arrives too."""
        data, extra, *_ = self.sock.recvmsg(64, 64)
        if data[FLAG] != FIRST:
            raise RuntimeError("the first packet is not the first that arrived")
        (_, _, when), = extra
        seconds, ns = struct.unpack("=qq", when)
        self.wait()
        return seconds * 10**9 + ns

    def numbers(self, want, quiet=3):
        """Numbers of the packets that arrive, until there are enough or none has come for a while."""
        out, end = [], time.monotonic() + quiet
        while len(out) < want and time.monotonic() < end:
            try:
                out.append(struct.unpack_from("!I", self.sock.recv(64, socket.MSG_DONTWAIT), 14)[0])
                end = time.monotonic() + quiet
            except BlockingIOError:
                time.sleep(0.02)
        return out

    def drops(self):
        return struct.unpack("II", self.sock.getsockopt(263, 6, 8))[1]

    def close(self):
        self.sock.close()


# Calls


class Timed:
    """A netlink socket whose calls are one send and one recv, with nothing else between two looks at the clock."""

    def __init__(self, sock):
        self.netlink, self.sock = sock, sock.sock
        self.sock.settimeout(None)

    def call(self, message):
        """Returns the reply's payload, and how long it took in ns."""
        begin = time.perf_counter_ns()
        self.sock.send(message)
        reply = self.sock.recv(8192)
        took = time.perf_counter_ns() - begin
        length, kind, *_ = netlink.HEADER.unpack_from(reply)
        if kind == 2:
            code, = struct.unpack_from("=i", reply, netlink.HEADER.size)
            if code:
                raise OSError(-code, os.strerror(-code))
        return reply[netlink.HEADER.size:length], took


# What may sit on a device. Each has install() and remove(), and for an epoch seal() and release(), which make a call that
# is ready and do nothing else, as they count for the cost of a packet. Nor is anything done between two epochs of one that
# is not between two of the other: what follows would find colder caches.


class Plain:
    """Nothing."""

    kind = None

    def __init__(self, bench, line):
        self.bench, self.line = bench, line

    def install(self):
        if self.kind:
            self.bench.rtnl.qdisc_add(self.line.device, self.kind)

    def remove(self):
        if self.kind:
            self.bench.rtnl.qdisc_del(self.line.device)

    def seal(self):
        pass

    def release(self):
        pass


class Pfifo(Plain):
    kind = "pfifo_fast"


class Remus(Plain):
    passthrough = False

    def install(self):
        more = [(PASSTHROUGH, netlink.u8(1))] if self.passthrough else []
        self.bench.rtnl.qdisc_add(self.line.device, options=netlink.options(
            direction=self.line.direction, packets=200_000, size=1 << 30) + more)
        self.domain = netlink.attr(netlink.ATTR["domain"], netlink.text(self.line.device))
        self.seal_message = self.message("epoch-seal")
        self.first, self.replies = self.get()["open-epoch"], []
        self.commits = iter([self.message("epoch-commit", netlink.attr(netlink.ATTR["epoch"], netlink.uint(self.first + n)))
                             for n in range(EPOCHS)])

    def remove(self):
        self.bench.rtnl.qdisc_del(self.line.device)
        done = [netlink.Genl.decode(reply)["epoch"] for reply, _ in self.replies]
        if done != [self.first + n // 2 for n in range(len(done))]:
            raise RuntimeError(f"sealed or committed other epochs than those from {self.first} on: {done}")

    def message(self, command, attrs=b""):
        genl = self.bench.genl.netlink
        payload = struct.pack("=BBH", netlink.CMD[command], 1, 0) + self.domain + attrs
        return genl.message(genl.family, 0, payload)[0]

    def seal(self):
        self.replies.append(self.bench.genl.call(self.seal_message))

    def release(self):
        self.replies.append(self.bench.genl.call(next(self.commits)))

    def times(self):
        """Of the last call: the time it took, and duration-ns."""
        reply, took = self.replies[-1]
        return took, netlink.Genl.decode(reply)["duration-ns"]

    def get(self):
        return netlink.Genl.decode(self.bench.genl.call(self.message("domain-get"))[0])

    def held(self):
        return self.get()["packets"]


class Pass(Remus):
    passthrough = True
    seal, release = Plain.seal, Plain.release


class Plug(Plain):
    @property
    def where(self):
        return self.line.device

    def install(self):
        self.bench.rtnl.qdisc_add(self.where, "plug", raw=self.option(0, 1 << 30))
        rtnl, index = self.bench.timed_rtnl.netlink, socket.if_nametoindex(self.where)
        self.messages = [rtnl.message(36, netlink.ACK, struct.pack("=BxxxiIII", 0, index, 0, netlink.TC_H_ROOT, 0)
                                      + netlink.attr(1, b"plug\0") + self.option(action, 0))[0]
                         for action in (BUFFER, RELEASE_ONE)]

    def remove(self):
        self.bench.rtnl.qdisc_del(self.where)

    @staticmethod
    def option(action, limit):
        return netlink.attr(2, struct.pack("=iI", action, limit))

    def seal(self):
        self.bench.timed_rtnl.call(self.messages[BUFFER])

    def release(self):
        self.bench.timed_rtnl.call(self.messages[RELEASE_ONE])

    def held(self):
        return self.bench.rtnl.qdisc_get(self.where)["qlen"]


class IfbPlug(Plug):
    """What a guest sends can only be plugged after it was redirected to an ifb device."""

    where = "ifb0"

    def install(self):
        self.bench.rtnl.add("ifb0", "ifb")
        super().install()
        device = self.line.device
        for words in f"qdisc add dev {device} ingress", \
                f"filter add dev {device} ingress matchall action mirred egress redirect dev ifb0":
            subprocess.run(["tc", *words.split()], check=True)

    def remove(self):
        subprocess.run(["tc", "qdisc", "del", "dev", self.line.device, "ingress"], check=True)
        self.bench.rtnl.delete("ifb0")


# The machine


class Line:
    """A device that something sits on, what it sees the packets of, and where these go."""

    def __init__(self, device, direction, sender, back, source):
        self.device, self.direction, self.sender, self.back = device, direction, sender, back
        self.addresses = back.getsockname()[4], source
        self.end = back.getsockname()[0]
        self.bursts = {}

    def burst(self, count, numbered=False):
        if (count, numbered) not in self.bursts:
            self.bursts[count, numbered] = Burst(*self.addresses, count, numbered)
        return self.bursts[count, numbered]

    def send(self, count, numbered=False):
        self.burst(count, numbered).send(self.sender)


class Bench:
    def __init__(self, rounds):
        self.rounds, self.figures = rounds, {}
        gc.disable()
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
        for which in "default", "all":
            with open(f"/proc/sys/net/ipv6/conf/{which}/disable_ipv6", "w") as f:
                f.write("1")
        for module in "sch_plug", "ifb", "act_mirred", "cls_matchall", "sch_ingress":
            subprocess.run(["modprobe", module, *(["numifbs=0"] if module == "ifb" else [])], check=True)
        harness.load()
        self.rtnl, self.timed_rtnl, self.genl = netlink.Rtnl(), Timed(netlink.Rtnl()), Timed(netlink.Genl())
        self.guest, self.lan = net.Namespace(), net.Namespace()
        self.rtnl.add("bridge", "bridge")
        for here, there, space in ("e0", "e1", self.lan), ("g0", "g1", self.guest), ("l0", "l1", self.lan):
            self.rtnl.veth(here, there, up=False)
            self.rtnl.set(there, netns=space.fd)
            if here != "e0":
                self.rtnl.set(here, master="bridge")
            self.rtnl.set(here, up=True)
            with space, netlink.Rtnl() as rtnl:
                rtnl.set(there, up=True)
        e0 = net.Sender("e0").sock
        with self.guest:
            g1 = net.Sender("g1").sock
        with self.lan:
            e1, l1 = net.Sender("e1").sock, net.Sender("l1").sock
        self.egress = Line("e0", EGRESS, e0, e1, e0.getsockname()[4])
        self.captured = Line("g0", GUEST, g1, l1, g1.getsockname()[4])
        time.sleep(0.1)

    def receiver(self, line, **how):
        with self.lan:
            return Receiver(line.end, **how)

    @staticmethod
    @contextlib.contextmanager
    def use(queue):
        """The queue is on its device in the body of `with`."""
        queue.install()
        try:
            # The bridge learns where the other end is.
            back = queue.line.back
            back.send(b"\xff" * 6 + back.getsockname()[4] + struct.pack("!H", net.PROTO + 1) + bytes(46))
            yield queue
        finally:
            queue.remove()
            time.sleep(0.05)

    def report(self, name, what, target, values, absolute, unit="ratio", **more):
        figure = {"what": what, "unit": unit, "target": target, **summary(values), "absolute": absolute, **more}
        figure["met"] = figure["value"] <= target
        self.figures[name] = figure
        print(f"  {name}: {figure['value']:.3g}", flush=True)


def summary(values, unit=None):
    out = {"value": statistics.median(values), "min": min(values), "max": max(values), "rounds": len(values), "values": values}
    return {**out, "unit": unit} if unit else out


def pooled(figures):
    """One figure of those that several machines have measured, each in rounds of its own."""
    first = figures[0]
    out = first | summary([v for f in figures for v in f["values"]])
    out["absolute"] = {name: summary([v for f in figures for v in f["absolute"][name]["values"]], got["unit"])
                       for name, got in first["absolute"].items()}
    if "idle_share_max" in first:
        out["idle_share_max"] = max(f["idle_share_max"] for f in figures)
    out["met"] = out["value"] <= out["target"]
    return out


def backlog(packets):
    with open(BACKLOG, "w") as f:
        f.write(str(packets))


def softnet_dropped():
    with open("/proc/net/softnet_stat") as f:
        return sum(int(line.split()[1], 16) for line in f)


def idle_ns():
    """How long the only processor has idled; in steps of 10 ms, and not at all while it does not idle."""
    with open("/proc/stat") as f:
        words = re.search(r"^cpu0 (.*)", f.read(), re.M)[1].split()
    return (int(words[3]) + int(words[4])) * 10**9 // os.sysconf("SC_CLK_TCK")


# Processor time


def packet_costs(bench, variants, installs, epochs=6):
    """ns of processor time for each packet: a list for each variant, one value a round.

    It is that of the round's fastest epoch: what else runs on the host can only add to an epoch. Each variant is
    installed several times in a round, since what memory it happens to get makes some of them faster than others.
    """
    backlog(1_000_000)
    costs, dropped, shares = [[] for _ in variants], softnet_dropped(), []
    line = variants[0].line
    receiver, clock = bench.receiver(line), time.perf_counter_ns
    for turn in range(bench.rounds * installs):
        if turn % installs == 0:
            for fastest in costs:
                fastest.append(float("inf"))
        order = list(zip(variants, costs))
        for queue, fastest in order if turn % 2 else reversed(order):
            with bench.use(queue):
                times = []
                for epoch in range(epochs + 2):
                    if epoch == 2:
                        idle, begin = idle_ns(), clock()
                    start = clock()
                    line.send(EPOCH)
                    queue.seal()
                    queue.release()
                    receiver.wait()
                    times.append(clock() - start)
                whole = clock() - begin
                share = min((idle_ns() - idle) / whole, 1)
            shares.append(share)
            fastest[-1] = min(fastest[-1], min(times[2:]) * (1 - share) / EPOCH)
    receiver.close()
    backlog(1000)
    if softnet_dropped() != dropped:
        raise RuntimeError("packets were lost on the way: the variants did not do the same work")
    return costs, max(shares)


def quotients(one, two):
    return [a / b for a, b in zip(one, two)]


def cost(bench, suffix="", what="processor time", unit="ns/packet", installs=8):
    line, guest = bench.egress, bench.captured

    (remus, plug), idle = packet_costs(bench, [Remus(bench, line), Plug(bench, line)], installs)
    bench.report("egress_vs_plug" + suffix, f"{what} a packet held and released in epochs of 1,000: remus / sch_plug", 1.05,
                 quotients(remus, plug), {"remus": summary(remus, unit), "sch_plug": summary(plug, unit)}, idle_share_max=idle)

    (plain, remus, plug), idle = packet_costs(
        bench, [Plain(bench, guest), Remus(bench, guest), IfbPlug(bench, guest)], installs)
    added = [a - b for a, b in zip(remus, plain)], [a - b for a, b in zip(plug, plain)]
    bench.report("guest_added_vs_ifb_plug" + suffix, f"{what} a packet that capture adds to veth, bridge, veth: "
                 "remus / ifb, mirred and sch_plug", 0.6, quotients(*added),
                 {"remus adds": summary(added[0], unit), "ifb and plug add": summary(added[1], unit),
                  "uncaptured": summary(plain, unit), "remus": summary(remus, unit), "ifb and plug": summary(plug, unit)},
                 idle_share_max=idle)

    (remus, pfifo), idle = packet_costs(bench, [Pass(bench, line), Pfifo(bench, line)], installs)
    bench.report("pass_vs_pfifo" + suffix, f"{what} a packet: remus in passthrough / pfifo_fast", 1.1,
                 quotients(remus, pfifo), {"remus": summary(remus, unit), "pfifo_fast": summary(pfifo, unit)}, idle_share_max=idle)


def instructions(bench):
    """The same in a machine whose clock counts them, for which all memory is alike: vm.sh --count."""
    cost(bench, "_instructions", "instructions", "instructions/packet", installs=1)


# Calls and release


def calls(bench):
    first_packet(bench, "release_first_packet_us", bench.captured, IfbPlug, "behind a bridge, through ifb")
    first_packet(bench, "release_first_packet_us_egress", bench.egress, Plug, "egress")
    call_times(bench, bench.captured, "")
    call_times(bench, bench.egress, "_egress")
    loss(bench)


def first_packet(bench, name, line, plug, where, samples=7):
    backlog(1_000_000)
    receiver = bench.receiver(line, stamps=True)
    variants, took = [Remus(bench, line), plug(bench, line)], [[], []]
    for turn in range(bench.rounds):
        order = list(enumerate(variants))
        for which, queue in order if turn % 2 else reversed(order):
            with bench.use(queue):
                times = []
                for _ in range(samples + 1):
                    line.send(EPOCH)
                    queue.seal()
                    begin = time.clock_gettime_ns(time.CLOCK_REALTIME)
                    queue.release()
                    times.append((receiver.stamp() - begin) / 1000)
                took[which].append(statistics.median(times[1:]))
    receiver.close()
    backlog(1000)
    bench.report(name, f"from the commit call to the first of 1,000 packets at the receiver ({where}): remus / sch_plug", 1.0,
                 quotients(*took), {"remus": summary(took[0], "us"), "sch_plug": summary(took[1], "us")})


def call_times(bench, line, suffix, samples=5):
    backlog(1_000_000)
    receiver = bench.receiver(line)
    few, many = {"seal": [], "commit_call": []}, {"seal": [], "commit_call": []}
    few_ns, many_ns = {"seal": [], "commit_call": []}, {"seal": [], "commit_call": []}

    def once(queue, count):
        """One epoch: (wall time, duration-ns) of its seal and its commit."""
        line.send(count)
        if queue.held() != count:
            raise RuntimeError(f"{queue.held()} packets are held instead of {count}")
        out = []
        for call in queue.seal, queue.release:
            # What was sent before has another effect on caches than on the call: the same ones for all.
            ctypes.memset(scrub, count & 0xFF, len(scrub))
            for _ in range(3):
                queue.get()
            call()
            out.append(queue.times())
        receiver.wait(LAST)
        return out

    scrub = ctypes.create_string_buffer(64 << 20)
    queue = Remus(bench, line)
    for turn in range(bench.rounds):
        with bench.use(queue):
            once(queue, 1)
            for count in (1, MANY) if turn % 2 else (MANY, 1):
                got = [once(queue, count) for _ in range(samples if count == 1 else 1)]
                wall, inside = (few, few_ns) if count == 1 else (many, many_ns)
                for i, name in enumerate(("seal", "commit_call")):
                    wall[name].append(statistics.median(g[i][0] for g in got) / 1000)
                    inside[name].append(statistics.median(g[i][1] for g in got) / 1000)
    receiver.close()
    backlog(1000)
    for name in few:
        bench.report(f"{name}_100k_vs_1{suffix}", f"time of the call with 100,000 packets held / 1 ({line.device})", 1.2,
                     quotients(many[name], few[name]),
                     {"100,000 held": summary(many[name], "us"), "1 held": summary(few[name], "us"),
                      "100,000, duration-ns": summary(many_ns[name], "us"), "1, duration-ns": summary(few_ns[name], "us")})


def loss(bench, rounds=5):
    line = bench.captured
    names, lost = ("remus", "ifb and plug"), ([], [])
    for turn in range(rounds):
        for which, kind in enumerate((Remus, IfbPlug)):
            with bench.use(kind(bench, line)) as queue:
                receiver = bench.receiver(line, everything=True)
                line.send(LOSS, numbered=True)
                if queue.held() != LOSS:
                    raise RuntimeError(f"{names[which]} holds {queue.held()} packets instead of {LOSS}")
                queue.seal()
                queue.release()
                got = receiver.numbers(LOSS)
                if receiver.drops():
                    raise RuntimeError("the receiver's own buffer was too small")
                if got != sorted(set(got)):
                    raise RuntimeError(f"{names[which]}: packets arrived twice or out of order")
                lost[which].append(LOSS - len(got))
                receiver.close()
    with open(BACKLOG) as f:
        limit = int(f.read())
    bench.report("release_loss", "of the 50,000 packets of one released epoch, how many did not arrive behind bridge and veth", 0,
                 lost[0], {name: summary(n, "packets") for name, n in zip(names, lost)}, unit="packets", netdev_max_backlog=limit)
    bench.figures["release_loss"]["value"] = max(lost[0])
    bench.figures["release_loss"]["met"] = max(lost[0]) == 0


PHASES = {"cost": cost, "instructions": instructions, "calls": calls}
