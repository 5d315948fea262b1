# SPDX-License-Identifier: GPL-2.0
"""Epochs by hand, with real packets."""
import contextlib
import ctypes
import errno
import glob
import mmap
import os
import random
import select
import socket
import struct
import subprocess
import time

import net
import netlink
from harness import Kid, SEED, Skip, fails, same, scaled, test, true, until
from net import KINDS, Line, Receiver, Sender
from netlink import EGRESS, GUEST, Genl, Rtnl, options
from ram import PAGE, Ram


def each(kinds=KINDS):
    """The same test for several kinds of port."""
    def register(function):
        for kind in kinds:
            def one(stack, kind=kind):
                function(stack, kind)
            one.__name__, one.__module__ = f"{function.__name__}[{kind}]", function.__module__
            test(one)
        return function
    return register


@each()
def several_epochs(stack, kind):
    """Five sealed epochs; nothing leaves early; a commit lets exactly those up to it go, in order."""
    genl = stack.enter_context(Genl())
    line = Line(stack, kind)
    n, sent = 0, {}
    for epoch in range(1, 6):
        sent[epoch] = list(range(n, n + epoch * 3))
        n += epoch * 3
        line.send(*sent[epoch])
        done = genl.seal(line.name)
        size = len(sent[epoch]) * (net.SIZE - (0 if kind == "egress" else 14))
        same((done["epoch"], done["packets"], done["bytes"]), (epoch, len(sent[epoch]), size), "what the seal says")
    sent[6] = [n, n + 1]
    line.send(*sent[6])
    line.receiver.nothing("five epochs are sealed, none is committed")
    view = genl.get(line.name)
    same({k: view[k] for k in ("open-epoch", "committed-epoch", "sealed-epochs", "packets", "dropped", "ports")},
         {"open-epoch": 6, "committed-epoch": 0, "sealed-epochs": 5, "packets": n + 2, "dropped": 0, "ports": 1}, "counters")
    same(view["bytes"], (n + 2) * (net.SIZE - (0 if kind == "egress" else 14)), "bytes held")
    done = genl.commit(line.name, 1)
    same((done["epoch"], done["packets"]), (1, 3), "what the commit says")
    line.receiver.expect(sent[1], "commit 1", settle=0.03)
    genl.commit(line.name, 4)
    line.receiver.expect(sent[2] + sent[3] + sent[4], "commit 4 is cumulative", settle=0.03)
    same(genl.get(line.name)["packets"], len(sent[5] + sent[6]), "held after commit 4")
    for wrong in 1, 4, 6, 7, 1 << 40:
        with fails(errno.EINVAL, errno.EALREADY):
            genl.commit(line.name, wrong)
    line.receiver.nothing("only refused commits")
    genl.commit(line.name, 5)
    line.receiver.expect(sent[5], "commit 5", settle=0.03)
    genl.seal(line.name)
    line.receiver.nothing("a seal")
    genl.commit(line.name, 6)
    line.receiver.expect(sent[6], "commit 6")
    view = genl.get(line.name)
    same((view["packets"], view["bytes"], view["sealed-epochs"], view["committed-epoch"]), (0, 0, 0, 6), "at the end")
    # What is sent now belongs to epoch 7, although every number so far is committed.
    line.send(9999)
    line.receiver.nothing("epoch 7 is open")


@each()
def abort(stack, kind):
    """Aborted epochs' packets leave with the open one, in their order, never with an older one."""
    genl = stack.enter_context(Genl())
    line = Line(stack, kind)
    for epoch in range(1, 5):
        line.send(epoch * 10, epoch * 10 + 1)
        genl.seal(line.name)
    done = genl.abort(line.name, 3)  # and with it 4
    same((done["epoch"], done["packets"]), (3, 4), "what the abort says")
    view = genl.get(line.name)
    same((view["open-epoch"], view["sealed-epochs"], view["packets"]), (5, 2, 8), "after the abort")
    line.receiver.nothing("an abort")
    for gone in 3, 4:
        with fails(errno.EINVAL):
            genl.commit(line.name, gone)
    line.send(50)
    genl.commit(line.name, 2)
    line.receiver.expect([10, 11, 20, 21], "commit 2 after abort 3", settle=0.03)
    same(genl.seal(line.name)["packets"], 5, "what the seal of 3, 4 and 5 says")
    line.send(60)
    genl.seal(line.name)
    line.receiver.nothing("5 and 6 are sealed")
    genl.abort(line.name, 6)
    genl.commit(line.name, 5)
    line.receiver.expect([30, 31, 40, 41, 50], "commit 5 with the aborted ones", settle=0.03)
    genl.seal(line.name)
    genl.commit(line.name, 7)
    line.receiver.expect([60], "commit 7")
    # Abort with nothing older.
    line.send(70)
    genl.seal(line.name)
    genl.abort(line.name, 8)
    line.send(71)
    genl.seal(line.name)
    genl.commit(line.name, 9)
    line.receiver.expect([70, 71], "commit 9", settle=0.03)


@test
def towards_the_guest(stack):
    """With direction guest, what goes to the guest passes at once; what comes from it does not."""
    genl = stack.enter_context(Genl())
    for kind in "guest", "tap":
        line = Line(stack, kind)
        there = Sender(line.device)
        stack.callback(there.close)
        guest = Receiver(line.peer) if kind == "guest" else None
        if guest:
            stack.callback(guest.close)
        line.send(1, 2)
        for n in range(100, 120):
            there.send(n)
        if guest:
            guest.expect(range(100, 120), "towards the guest", settle=0.02)
        else:
            got = []
            until(lambda: got.extend(line.sender.received()) or len(got) >= 20, "towards the guest")
            same(got, list(range(100, 120)), "towards the guest")
        line.receiver.nothing("from the guest")
        same(genl.get(line.name)["packets"], 2, "held")
        same(line.rtnl.qdisc_get(line.device)["qlen"], 0, "queue towards the guest")
    # With direction egress the device's ingress is free.
    line = Line(stack, "egress")
    back = Sender(line.peer)
    stack.callback(back.close)
    host = Receiver(line.device)
    stack.callback(host.close)
    line.send(1)
    back.send(200, 201)
    host.expect([200, 201], "ingress of an egress port")
    line.receiver.nothing("egress")


@test
def two_ports(stack):
    """One domain, ports of every kind: one seal and one commit for all of them."""
    genl = stack.enter_context(Genl())
    lines = [Line(stack, kind, domain="web") for kind in KINDS]
    stranger = Line(stack, "guest")
    for line in lines + [stranger]:
        line.send(1, 2)
    done = genl.seal("web")
    same(done["packets"], 8, "packets in the sealed epoch")
    for line in lines + [stranger]:
        line.send(3)
    same(genl.get("web")["ports"], 4, "ports")
    genl.seal("web")
    genl.commit("web", 1)
    for line in lines:
        line.receiver.expect([1, 2], line.kind, settle=0.02)
    stranger.receiver.nothing("a port of another domain")
    lines[0].remove()
    same(genl.get("web")["ports"], 3, "ports")
    genl.commit("web", 2)
    lines[0].receiver.nothing("the qdisc is gone")
    for line in lines[1:]:
        line.receiver.expect([3], line.kind)
    # A port that joins now gets the epoch that is open now, not the old ones.
    lines[0].add("web")
    lines[0].send(4)
    lines[0].receiver.nothing("epoch 3 is open")
    genl.seal("web")
    genl.commit("web", 3)
    lines[0].receiver.expect([4], "commit 3")
    for line in lines:
        line.remove()
    with fails(errno.ENOENT):
        genl.get("web")


@test
def two_namespaces(stack):
    """Ports of one domain in two network namespaces: one seal and one commit for both, and one may go."""
    genl = stack.enter_context(Genl())
    ns = net.Namespace()
    stack.callback(ns.close)
    genl.new("web")
    for kind in "egress", "guest":
        here = Line(stack, kind, domain="web")
        with ns:
            there = Line(stack, kind, domain="web")
        for line in here, there:
            line.send(1, 2)
        done = genl.seal("web")
        same(done["packets"], 4, "packets in the sealed epoch")
        for line in here, there:
            line.send(3)
        genl.commit("web", done["epoch"])
        for line in here, there:
            line.receiver.expect([1, 2], "commit", settle=0.02)
        with ns:
            there.remove()
        genl.commit("web", genl.seal("web")["epoch"])
        here.receiver.expect([3], "commit")
        there.receiver.nothing("the qdisc is gone")
        here.remove()
    genl.delete("web")


def checksum(data):
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total >> 16) + (total & 0xFFFF)
    return ~(total + (total >> 16)) & 0xFFFF


@test
def ping(stack):
    """Pings through a bridge to a guest: the requests pass, the replies wait for their commit."""
    genl = stack.enter_context(Genl())
    rtnl = stack.enter_context(Rtnl())
    ns = net.Namespace()
    stack.callback(ns.close)
    stack.callback(lambda: [rtnl.delete(n) for n in ("t-vif", "br-tping") if n in rtnl.names()])
    rtnl.veth("t-vif", "t-guest", up=False)
    rtnl.add("br-tping", "bridge")
    rtnl.set("t-vif", master="br-tping", up=True)
    guest_mac = rtnl.mac("t-guest")
    rtnl.set("t-guest", netns=ns.fd)

    def ip(*words):
        subprocess.run(["ip", *words], check=True)
    with ns:
        ip("link", "set", "lo", "up")
        ip("addr", "add", "10.77.0.2/24", "dev", "t-guest")
        ip("link", "set", "t-guest", "up")
    ip("addr", "add", "10.77.0.1/24", "dev", "br-tping")
    # No questions for addresses between the pings: they would wait for a commit, too.
    ip("neigh", "add", "10.77.0.2", "lladdr", guest_mac, "dev", "br-tping", "nud", "permanent")
    host_mac = rtnl.mac("br-tping")
    with ns:
        ip("neigh", "add", "10.77.0.1", "lladdr", host_mac, "dev", "t-guest", "nud", "permanent")
    rtnl.ready("t-vif", "br-tping")
    raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
    stack.callback(raw.close)
    raw.setblocking(False)
    ident = os.getpid() & 0xFFFF

    def send(*numbers):
        for n in numbers:
            body = struct.pack("!BBHHH", 8, 0, 0, ident, n) + b"remus test data."
            body = body[:2] + struct.pack("!H", checksum(body)) + body[4:]
            raw.sendto(body, ("10.77.0.2", 0))

    def answers(seconds):
        out, end = [], time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0 and select.select([raw], [], [], left)[0]:
            data = raw.recv(2048)[20:]
            kind, _, _, who, n = struct.unpack_from("!BBHHH", data)
            if kind == 0 and who == ident:
                out.append(n)
        return out

    def answered(want):
        got = []
        until(lambda: got.extend(answers(0.1)) or len(got) >= len(want), f"answers {want}, got {got}")
        same(got, want, "answers")
    send(1)
    answered([1])  # before there is a remus: the path works
    rtnl.qdisc_add("t-vif", options=options("web", GUEST))
    send(2, 3, 4)
    until(lambda: genl.get("web")["packets"] == 3, "the answers are held")
    same(answers(0.2), [], "before the seal")
    genl.seal("web")
    send(5, 6)
    until(lambda: genl.get("web")["packets"] == 5, "the answers are held")
    same(answers(0.1), [], "before the commit")
    genl.commit("web", 1)
    answered([2, 3, 4])
    same(answers(0.1), [], "epoch 2 is open")
    genl.seal("web")
    genl.commit("web", 2)
    answered([5, 6])


@each(("egress", "guest", "tap"))
def limits(stack, kind):
    """At the limit packets are dropped and counted; what is held stays, and room comes back."""
    genl = stack.enter_context(Genl())
    line = Line(stack, kind, packets=5)

    def send(*numbers):
        for n in numbers:
            with contextlib.suppress(OSError):  # AF_PACKET tells of a drop on egress
                line.send(n)
    send(*range(8))
    view = genl.get(line.name)
    same((view["packets"], view["dropped"]), (5, 3), "held and dropped")
    if kind == "egress":
        got = line.rtnl.qdisc_get(line.device)
        same((got["qlen"], got["drops"], got["backlog"]), (5, 3, 5 * net.SIZE), "tc's statistics")
    genl.seal(line.name)
    send(8)
    same(genl.get(line.name)["dropped"], 4, "a sealed epoch's packets count")
    genl.commit(line.name, 1)
    line.receiver.expect(range(5), "commit 1")
    send(9)
    line.rtnl.qdisc_change(line.device, options=options(packets=0))
    send(10)
    line.rtnl.qdisc_change(line.device, options=options(packets=1000, size=1))
    send(11)
    line.rtnl.qdisc_change(line.device, options=options(size=1 << 20))
    send(12)
    view = genl.get(line.name)
    same((view["packets"], view["dropped"]), (2, 6), "held and dropped after changes")
    # Bytes of memory.
    line.rtnl.qdisc_change(line.device, options=options(size=64 << 10))
    send(*range(100, 400))
    view = genl.get(line.name)
    true(20 < view["packets"] < 290 and view["packets"] + view["dropped"] == 308, f"64 KiB hold {view}")
    genl.seal(line.name)
    genl.commit(line.name, 2)
    held = view["packets"] - 2
    line.receiver.expect([9, 12, *range(100, 100 + held)], "commit 2")
    same(genl.get(line.name)["packets"], 0, "held at the end")
    if kind == "egress":
        got = line.rtnl.qdisc_get(line.device)
        same((got["qlen"], got["backlog"], got["packets"]), (0, 0, 5 + 2 + held), "tc's statistics at the end")


@test
def implicit_domain(stack):
    """It comes with the first qdisc that names it and goes with the last; a created one stays."""
    genl = stack.enter_context(Genl())
    for explicit in False, True:
        if explicit:
            genl.new("web")
        one, two = Line(stack, "guest", domain="web"), Line(stack, "egress", domain="web")
        genl.seal("web")
        same((genl.get("web")["ports"], genl.get("web")["open-epoch"]), (2, 2), "ports and epoch")
        one.remove()
        same((genl.get("web")["ports"], genl.get("web")["open-epoch"]), (1, 2), "ports and epoch")
        two.remove()
        if explicit:
            same((genl.get("web")["ports"], genl.get("web")["open-epoch"]), (0, 2), "the created domain stays")
            genl.delete("web")
        same(genl.dump(), [], "the implicit domain is gone")
    # It starts afresh.
    one.add("web")
    same(genl.get("web")["open-epoch"], 1, "a new domain")
    one.remove()


def gone(stack, kind, how, domain_stays=False):
    """Held packets, of sealed epochs and the open one, are never delivered after `how`."""
    genl = stack.enter_context(Genl())
    genl.new("web")
    line = Line(stack, kind, domain="web")
    for epoch in 1, 2:
        line.send(*range(epoch * 100, epoch * 100 + 40))
        genl.seal("web")
    line.send(*range(300, 340))
    how(line)
    line.receiver.nothing("held packets", 0.05)
    for epoch in 1, 2:
        genl.commit("web", epoch)
    line.receiver.nothing("a commit after they were dropped", 0.05)
    return genl, line


@each()
def qdisc_deleted(stack, kind):
    genl, line = gone(stack, kind, lambda line: line.remove())
    view = genl.get("web")
    same((view["packets"], view["ports"]), (0, 0), "packets and ports")
    line.send(400)
    line.receiver.expect([400], "without a qdisc everything passes")
    genl.delete("web")


@each()
def replaced_by_pfifo(stack, kind):
    genl, line = gone(stack, kind, lambda line: line.rtnl.qdisc_replace(line.device, "pfifo", raw=netlink.attr(2, netlink.u32(100))))
    same(genl.get("web")["ports"], 0, "ports")
    line.send(400)
    line.receiver.expect([400], "pfifo")
    genl.delete("web")


@each()
def replaced_by_remus(stack, kind):
    """Another instance takes over: what the first held is dropped, and there is no gap between them."""
    genl, line = gone(stack, kind, lambda line: line.rtnl.qdisc_replace(
        line.device, handle=0x50000, options=options("web", line.direction)))
    same((genl.get("web")["ports"], genl.get("web")["packets"]), (1, 0), "ports and packets")
    line.send(400)
    line.receiver.nothing("the new instance holds")
    genl.commit("web", genl.seal("web")["epoch"])
    line.receiver.expect([400], "the new instance releases")
    line.remove()
    genl.delete("web")


@each(("egress", "guest"))
def replaced_by_other_direction(stack, kind):
    other = GUEST if kind == "egress" else EGRESS
    genl, line = gone(stack, kind, lambda line: line.rtnl.qdisc_replace(
        line.device, handle=0x50000, options=options("web", other)))
    line.send(400)
    line.receiver.expect([400], "not this port's direction any more")
    line.remove()
    genl.delete("web")


@each()
def device_deleted(stack, kind):
    def how(line):
        line.rtnl.delete(line.device)
        if kind == "tap":
            line.sender.close()
    genl = stack.enter_context(Genl())
    genl.new("web")
    line = Line(stack, kind, domain="web")
    # With an implicit domain on the side.
    other = Line(stack, kind)
    for each_line in line, other:
        each_line.send(1, 2)
        genl.seal(each_line.name)
        each_line.send(3)
    how(line)
    how(other)
    line.receiver.nothing("the device is gone")
    same(genl.get("web")["ports"], 0, "ports")
    with fails(errno.ENOENT):
        genl.get(other.name)
    genl.commit("web", 1)
    line.receiver.nothing("the device is gone")
    genl.delete("web")


@test
def tap_closed(stack):
    """The VMM dies: its tap goes away with it, and what the guest sent last is never delivered."""
    genl = stack.enter_context(Genl())
    line = Line(stack, "tap", domain=None)
    line.send(1, 2, 3)
    genl.seal(line.name)
    line.send(4)
    line.sender.close()
    until(lambda: not genl.dump(), "the implicit domain is gone")
    line.receiver.nothing("the tap is gone")


@each(("egress", "guest", "tap"))
def down_and_up(stack, kind):
    """Down and up again: on egress the held packets are dropped and counted, never sent by themselves."""
    genl = stack.enter_context(Genl())
    line = Line(stack, kind)
    line.send(1, 2)
    genl.seal(line.name)
    line.send(3)
    line.rtnl.set(line.device, up=False)
    line.rtnl.set(line.device, up=True)
    line.receiver.nothing("down and up", 0.05)
    view = genl.get(line.name)
    same(view["packets"] + view["dropped"], 3, f"held or dropped: {view}")
    if kind != "tap":
        line.rtnl.ready(line.device, line.peer)
    line.send(4)
    line.receiver.nothing("epoch 2 is open")
    genl.commit(line.name, 1)
    left = [] if kind == "egress" else [1, 2]
    line.receiver.expect(left, "commit 1", settle=0.03)
    genl.seal(line.name)
    genl.commit(line.name, 2)
    line.receiver.expect([4] if kind == "egress" else [3, 4], "commit 2", settle=0.03)
    if kind == "egress":
        got = line.rtnl.qdisc_get(line.device)
        same((got["qlen"], got["backlog"]), (0, 0), "tc's statistics")


@test
def commit_while_down(stack):
    """A commit while an egress device is down, or its carrier is: nothing breaks, nothing leaks later."""
    genl = stack.enter_context(Genl())
    line = Line(stack, "egress")
    line.send(1, 2)
    genl.seal(line.name)
    # The other end of a veth pair down: no carrier, the queues are stopped.
    line.rtnl.set(line.peer, up=False)
    genl.commit(line.name, 1)
    with contextlib.suppress(OSError):
        line.send(3)
    line.rtnl.set(line.peer, up=True)
    got = line.receiver.settle(0.1)
    true(3 not in got, f"packet 3 of the open epoch got out: {got}")
    line.rtnl.set(line.device, up=False)
    done = genl.seal(line.name)
    genl.commit(line.name, done["epoch"])
    line.rtnl.set(line.device, up=True)
    genl.seal(line.name)
    genl.commit(line.name, done["epoch"] + 1)


@test
def moved_to_namespace(stack):
    """A device that moves to another namespace loses its qdisc, and what it held."""
    genl = stack.enter_context(Genl())
    ns = net.Namespace()
    stack.callback(ns.close)
    for kind in "egress", "guest":
        genl.new("web")
        line = Line(stack, kind, domain="web")
        line.send(1, 2)
        genl.seal("web")
        line.rtnl.set(line.device, netns=ns.fd)
        line.receiver.nothing("the device has moved")
        same(genl.get("web")["ports"], 0, "ports")
        genl.commit("web", 1)
        line.receiver.nothing("the device has moved")
        genl.delete("web")


@each(("egress", "guest"))
def namespace_deleted(stack, kind):
    """A namespace goes, with its devices and what they hold; the domain of the host stays usable."""
    genl = stack.enter_context(Genl())
    genl.new("web")
    for domain in "web", None:
        ns = net.Namespace()
        stack.callback(ns.close)
        with ns, contextlib.ExitStack() as inner:
            line = Line(inner, kind, domain=domain)
            line.send(*range(50))
            genl.seal(line.name)
            line.send(50)
            same(genl.get(line.name)["packets"], 51, "held")
            # Its own clean-up would delete the devices first.
            inner.pop_all()
            line.sender.close()
            line.receiver.close()
            line.rtnl.close()
        ns.close()
        until(lambda: genl.get("web")["ports"] == 0 and len(genl.dump()) == 1, "the namespace is gone")
    genl.commit("web", 1)
    same(genl.get("web")["packets"], 0, "held")
    genl.delete("web")


@each(("egress", "guest", "bridge"))
def release_of_5000(stack, kind):
    """5,000 packets in one commit all arrive, in order: a release does not overrun the next backlog."""
    genl = stack.enter_context(Genl())
    line = Line(stack, kind)
    count = scaled(5000, 60000)
    line.send(*range(count))
    genl.seal(line.name)
    line.send(count)
    same(genl.get(line.name)["packets"], count + 1, "held")
    done = genl.commit(line.name, 1)
    line.receiver.expect(range(count), "released", 60, settle=0.05)
    same(done["packets"], count, "packets that the commit reports")
    same(genl.get(line.name)["packets"], 1, "held")


@test(seconds=1200)
def oracle(stack):
    """Random steps on all kinds of ports at once, against a model that knows nothing of tags."""
    genl = stack.enter_context(Genl())
    rng = random.Random(SEED)
    lines = [Line(stack, kind, domain="web") for kind in KINDS]
    # What each port holds: a list of lists, the sealed epochs in order; the open one.
    sealed, opened = [], [[] for _ in lines]
    number, epoch, committed = 0, 1, 0
    steps = scaled(1500, 30000)
    for step in range(steps):
        where = f"step {step} of seed {SEED}"
        dice = rng.random()
        if dice < 0.62:
            for _ in range(rng.choice((1, 1, 2, 5))):
                i = rng.randrange(len(lines))
                number += 1
                lines[i].send(number)
                opened[i].append(number)
        elif dice < 0.80:
            try:
                done = genl.seal("web")
            except netlink.Refused as error:
                same((error.errno, len(sealed) > 30), (errno.EBUSY, True), where)
            else:
                same((done["epoch"], done["packets"]), (epoch, sum(map(len, opened))), f"{where}: what the seal says")
                sealed.append((epoch, opened))
                epoch, opened = epoch + 1, [[] for _ in lines]
        elif dice < 0.94:
            target = rng.choice(sealed)[0] if sealed and rng.random() < 0.8 else rng.randrange(0, epoch + 3)
            if any(e == target for e, _ in sealed):
                out = [[] for _ in lines]
                while sealed and sealed[0][0] <= target:
                    for all_, new in zip(out, sealed.pop(0)[1]):
                        all_ += new
                done = genl.commit("web", target)
                committed = target
                for line, want in zip(lines, out):
                    line.receiver.expect(want, f"{where}: commit {target}, {line.kind}")
                same(done["packets"], sum(map(len, out)), f"{where}: packets that the commit reports")
            else:
                with fails(errno.EINVAL, errno.EALREADY):
                    genl.commit("web", target)
        else:
            target = rng.choice(sealed)[0] if sealed and rng.random() < 0.8 else rng.randrange(0, epoch + 3)
            if any(e == target for e, _ in sealed):
                done = genl.abort("web", target)
                same(done["packets"], sum(len(p) for e, ports in sealed if e >= target for p in ports), f"{where}: what the abort says")
                while sealed and sealed[-1][0] >= target:
                    opened = [old + new for old, new in zip(sealed.pop()[1], opened)]
            else:
                with fails(errno.EINVAL, errno.EALREADY):
                    genl.abort("web", target)
        for line in lines:
            got = line.receiver.now()
            true(not got, f"{where}: {line.kind} let {got} out")
        if step % 50 == 0:
            view = genl.get("web")
            held = sum(len(p) for _, ports in sealed for p in ports) + sum(map(len, opened))
            same((view["packets"], view["open-epoch"], view["committed-epoch"], view["sealed-epochs"], view["dropped"]),
                 (held, epoch, committed, len(sealed), 0), where)
    for line in lines:
        line.receiver.nothing("at the end")


def flood(device, shared, stop_at):
    """Sends numbered packets as fast as it can; shared[0] is begun, shared[1] is done."""
    os.sched_setaffinity(0, {os.cpu_count() - 1})
    sender = Sender(device)
    cells = (ctypes.c_uint64 * 3).from_buffer(shared)
    n = 0
    while not cells[2] and n < stop_at:
        n += 1
        cells[0] = n
        try:
            sender.send(n)
        except OSError as error:
            if error.errno not in (errno.ENOBUFS, errno.EAGAIN):
                raise
        cells[1] = n
    return n


@each(("egress", "guest", "bridge"))
def late_packets(stack, kind):
    """Packets that race with seals: each is in the epoch in which it was sent, or in a later one."""
    genl = stack.enter_context(Genl())
    line = Line(stack, kind)
    shared = mmap.mmap(-1, 4096)
    cells = (ctypes.c_uint64 * 3).from_buffer(shared)
    source = line.device if kind == "egress" else line.peer
    # A veth pair does not keep the order of what several processors hand it: one sends, one receives.
    stack.callback(os.sched_setaffinity, 0, os.sched_getaffinity(0))
    os.sched_setaffinity(0, {0})
    if kind == "egress":
        for path in glob.glob(f"/sys/class/net/{line.peer}/queues/rx-*/rps_cpus"):
            with open(path, "w") as f:
                f.write("1")
    # Nor does it keep more than so many packets for an ingress that is late.
    with open("/proc/sys/net/core/netdev_max_backlog", "r+") as f:
        old = f.read()
        stack.callback(lambda: open("/proc/sys/net/core/netdev_max_backlog", "w").write(old))
        f.seek(0)
        f.write("100000")
    kid = Kid(flood, source, shared, 60000)
    until(lambda: cells[1] > 200, "the sender has begun")
    marks, got, last, counted, released = [], [], 0, 0, 0
    for _ in range(scaled(100)):
        # Sent for certain before the seal; on its way to an ingress it may still be late.
        before = cells[1] if kind == "egress" else 0
        done = genl.seal(line.name)
        epoch, counted = done["epoch"], counted + done["packets"]
        after = cells[0]   # whatever follows is sent for certain after the seal
        marks.append((epoch, before, after))
        if len(marks) > 2:
            epoch, before, after = marks.pop(0)
            released += genl.commit(line.name, epoch)["packets"]
            end = time.monotonic() + 60
            while len(got) < before and time.monotonic() < end:
                got += line.receiver.now()
            got += line.receiver.now()
            true(len(got) >= before, f"commit {epoch}: packets up to {before} belong to it, {len(got)} came")
            true(len(got) <= after, f"commit {epoch}: packet {len(got)} is out, sent after the seal at {after}")
            true(got[last:] == list(range(last + 1, len(got) + 1)), f"order: {got[last:last + 50]}")
            last = len(got)
    cells[2] = 1
    total = kid.result()
    if kind != "egress":
        until(lambda: genl.get(line.name)["packets"] + released == total, "the last ones have reached the ingress")
    done = genl.seal(line.name)
    same(counted + done["packets"], total, "packets in all sealed epochs")
    genl.commit(line.name, done["epoch"])
    end = time.monotonic() + 60
    while len(got) < total and time.monotonic() < end:
        got += line.receiver.now()
    view = genl.get(line.name)
    same((len(got), view["packets"], view["dropped"]), (total, 0, 0), "all arrive in the end")
    true(total > 200, f"only {total} packets were sent")
    del cells


@test
def leaks(stack):
    """Packets dropped in every way are freed."""
    cache = "/sys/kernel/slab/skbuff_head_cache"
    if not os.path.exists(f"{cache}/shrink"):
        raise Skip("the kernel has no SLUB_DEBUG")

    def active():
        # What is free but kept near, by SLUB for each CPU and by KASAN in its quarantine, is given back first.
        with open(f"{cache}/shrink", "w", encoding="ascii") as f:
            f.write("1")
        with open(f"{cache}/objects", encoding="ascii") as f:
            return int(f.read().split()[0])
    genl = stack.enter_context(Genl())

    def rounds(count):
        for i in range(count):
            for kind in "egress", "guest":
                line = Line(stack, kind, packets=300)
                for n in range(400):
                    with contextlib.suppress(OSError):
                        line.send(n)
                if i % 3 == 0:
                    line.remove()
                elif i % 3 == 1:
                    line.rtnl.set(line.device, up=False)
                else:
                    genl.commit(line.name, genl.seal(line.name)["epoch"])
                line.close()
    rounds(1)
    before = active()
    rounds(3)
    # A freed packet may wait for RCU or for a softirq.
    end = time.monotonic() + 60
    while active() - before > 50 and time.monotonic() < end:
        time.sleep(0.2)
    true(active() - before <= 50, f"packet heads in use: {before} before, {active()} after 2,400 packets")


@test
def large_packets(stack):
    """Segmentation offload, checksum offload, VLAN tags, jumbo: what is held comes out as it went in."""
    genl = stack.enter_context(Genl())
    ns = net.Namespace()
    stack.callback(ns.close)
    rtnl = stack.enter_context(Rtnl())
    rtnl.veth("t-big0", "t-big1", up=False)
    stack.callback(lambda: rtnl.delete("t-big0"))
    rtnl.set("t-big1", netns=ns.fd)

    def ip(*words):
        subprocess.run(["ip", *words], check=True)
    ip("addr", "add", "10.78.0.1/24", "dev", "t-big0")
    ip("link", "set", "t-big0", "up")
    with ns:
        ip("addr", "add", "10.78.0.2/24", "dev", "t-big1")
        ip("link", "set", "t-big1", "up")
        server = socket.create_server(("10.78.0.2", 7000))
    stack.callback(server.close)
    data = random.Random(SEED).randbytes(1 << 20)
    for direction in GUEST, EGRESS:
        rtnl.qdisc_add("t-big0", options=options("web", direction))
        client = socket.socket()
        client.setblocking(False)
        client.connect_ex(("10.78.0.2", 7000))
        server.settimeout(0.01)
        got, sent, end, peer = b"", 0, time.monotonic() + 120, None
        while len(got) < len(data) and time.monotonic() < end:
            genl.commit("web", genl.seal("web")["epoch"])
            if peer is None:
                with contextlib.suppress(OSError):
                    peer, _ = server.accept()
                    peer.setblocking(False)
            else:
                with contextlib.suppress(BlockingIOError):
                    sent += peer.send(data[sent:sent + (1 << 18)])
            with contextlib.suppress(BlockingIOError, OSError):
                got += client.recv(1 << 18)
        true(got == data, f"direction {direction}: {len(got)} of {len(data)} bytes, equal so far: {data.startswith(got)}")
        client.close()
        peer.close()
        rtnl.qdisc_del("t-big0")


@each()
def speaks_while_it_is_copied(stack, kind):
    """keep-passthrough: seals of the memory hold nothing back; the first seal without it holds, at its instant."""
    genl = stack.enter_context(Genl())
    genl.new("web", 1 << 20)
    stack.callback(genl.delete, "web")
    line = Line(stack, kind, add=False)
    line.add("web", passthrough=1)
    # A second port of the domain holds all the while, by epoch.
    held = Line(stack, "guest", domain="web")
    stack.callback(line.remove)
    stack.callback(held.remove)
    with Ram("web") as device, device.map() as memory:
        memory.write(0, bytes(4 * PAGE))
        pages = [4, 1, 1, 1]
        for epoch, want in enumerate(pages, 1):
            line.send(epoch)
            held.send(100 + epoch)
            memory.write(PAGE, bytes([epoch]) * PAGE)
            done = genl.seal("web", full=epoch == 1, keep=True)
            same((done["epoch"], done["dirty-pages"], done["packets"]), (epoch, want, 1), "what the seal says")
            same(device.epoch(epoch)[1], bytes([epoch]) * PAGE, "the snapshot")
            line.receiver.expect([epoch], f"epoch {epoch} passes")
            same(port_of(genl, line).get("passthrough"), True, "passthrough")
        # Folded into the open one, and committed: nothing is held where it passes, nothing leaves where it holds.
        same((genl.abort("web", 4)["packets"], genl.commit("web", 2)["packets"]), (1, 2), "abort 4, commit 2")
        held.receiver.expect([101, 102], "commit 2", settle=0.03)
        line.send(5)
        line.receiver.expect([5], "after a commit")
        # The one that ends it: what comes later is held, though epoch 3 still waits.
        same(genl.seal("web")["epoch"], 5, "the last pass")
        same(port_of(genl, line).get("passthrough"), None, "passthrough")
        line.send(6, 7)
        line.receiver.nothing("protection has begun")
        same(genl.commit("web", 5)["packets"], 2, "what the last pass releases")  # 103 and 104
        held.receiver.expect([103, 104], "commit 5", settle=0.03)
        line.receiver.nothing("6 and 7 were sent after it")
        # Now the flag keeps nothing.
        same(genl.seal("web", keep=True)["packets"], 2, "a port that holds goes on")
        line.send(8)
        line.receiver.nothing("nothing is committed")
        genl.commit("web", 6)
        line.receiver.expect([6, 7], "commit 6", settle=0.03)
        genl.commit("web", genl.seal("web")["epoch"])
        line.receiver.expect([8], "commit 7")
    same((line.receiver.drops(), genl.get("web")["dropped"]), (0, 0), "dropped")


def port_of(genl, line):
    port, = (p for p in genl.ports("web") if p["port"] == line.device)
    return port


def refusal(function):
    try:
        function()
    except netlink.Refused as error:
        return error
    raise AssertionError("it was not refused")


@each()
def let_go_and_hold_again(stack, kind):
    """domain-set with passthrough: all ports let go what they hold, in order; with hold they hold again."""
    genl = stack.enter_context(Genl())
    line = Line(stack, kind, domain="web")
    other = Line(stack, "guest", domain="web")
    count = 200
    line.send(*range(count))
    other.send(1)
    genl.seal("web")
    line.send(count)
    error = refusal(lambda: genl.set("web", passing=True, packets=5))
    same((error.errno, error.bad), (errno.EBUSY, netlink.ATTR["passthrough"]), f"the refusal ({error})")
    true("sealed epochs wait" in error.message, error.message)
    same((genl.get("web")["limit-packets"], genl.get("web")["packets"]), (0, count + 2), "after the refusal")
    line.receiver.nothing("it was refused")
    genl.abort("web", 1)
    same(genl.set("web", passing=True)["packets"], 0, "held after passthrough")
    line.receiver.expect(range(count + 1), "what was held, in order")
    other.receiver.expect([1], "the other port")
    line.send(500)
    line.receiver.expect([500], "it passes")
    # Once more changes nothing, even if epochs are sealed.
    genl.seal("web", keep=True)
    genl.set("web", passing=True)
    line.send(501)
    line.receiver.expect([501], "it passes")
    genl.commit("web", 2)
    genl.set("web", passing=False)
    line.send(502)
    other.send(2)
    line.receiver.nothing("it holds")
    # Not said: it stays.
    genl.set("web", packets=1000)
    line.receiver.nothing("it holds still")
    same([p.get("passthrough") for p in genl.ports("web")], [None, None], "passthrough")
    genl.commit("web", genl.seal("web")["epoch"])
    line.receiver.expect([502], "and commits")
    other.receiver.expect([2], "and commits")
    error = refusal(lambda: genl.call("domain-set", "web", *genl.flags(passthrough=True, hold=True)))
    same((error.errno, error.bad), (errno.EINVAL, netlink.ATTR["hold"]), f"both at once ({error})")
    same(genl.get("web")["dropped"], 0, "dropped")
