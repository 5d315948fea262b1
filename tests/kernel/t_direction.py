# SPDX-License-Identifier: GPL-2.0
"""Ports among what else a host does to packets: each is held, comes out once and as it went in.

Plain devices, bridges and taps are in t_packets.
"""
import contextlib
import ctypes
import fcntl
import json
import os
import random
import select
import socket
import struct
import subprocess
import time

import net
import netlink
from harness import SEED, Skip, same, setting, test, true, until
from net import PROTO, SIZE, Line, Receiver, Sender, frame
from netlink import EGRESS, GUEST, Genl, Rtnl, attr, options, text, u32
from ram import check, libc
from t_packets import checksum, each


def ip(*words):
    subprocess.run(["ip", *words], check=True)


def modprobe(*names):
    for name in names:
        if subprocess.run(["modprobe", name], stderr=subprocess.DEVNULL, check=False).returncode:
            raise Skip(f"this kernel has no module {name}")


def commit(genl, domain="web"):
    return genl.commit(domain, genl.seal(domain)["epoch"])


@test
def routed(stack):
    """The host forwards, IPv4: from a guest to a network behind it and back."""
    genl, rtnl = stack.enter_context(Genl()), stack.enter_context(Rtnl())
    spaces = []
    for i, (here, there) in enumerate((("t-r0", "t-r0p"), ("t-r1", "t-r1p"))):
        ns = net.Namespace()
        stack.callback(ns.close)
        rtnl.veth(here, there, up=False)
        stack.callback(rtnl.delete, here)
        host_mac, mac = rtnl.mac(here), rtnl.mac(there)
        rtnl.set(there, netns=ns.fd)
        ip("addr", "add", f"10.79.{i}.1/24", "dev", here)
        ip("link", "set", here, "up")
        # No questions for addresses: their answers would wait for a commit, too.
        ip("neigh", "add", f"10.79.{i}.2", "lladdr", mac, "dev", here, "nud", "permanent")
        with ns:
            ip("addr", "add", f"10.79.{i}.2/24", "dev", there)
            ip("link", "set", there, "up")
            ip("neigh", "add", f"10.79.{i}.1", "lladdr", host_mac, "dev", there, "nud", "permanent")
            ip("route", "add", "default", "via", f"10.79.{i}.1")
            sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            sock.bind(("0.0.0.0", 7))
            sock.setblocking(False)
        stack.callback(sock.close)
        spaces.append(sock)
    guest, far = spaces
    setting(stack, "/proc/sys/net/ipv4/ip_forward", 1)

    def got(sock, count=0):
        """So many numbers, and those that follow; a 0 was only to see whether the path works."""
        out, end = [], time.monotonic() + 60
        while len(out) < count and time.monotonic() < end or select.select([sock], [], [], 0.1)[0]:
            with contextlib.suppress(BlockingIOError):
                out += [n for n in [int(sock.recv(100))] if n]
        return out
    for sock, where, other in (guest, "10.79.1.2", far), (far, "10.79.0.2", guest):
        until(lambda: sock.sendto(b"0", (where, 7)) and select.select([other], [], [], 0.1)[0], "the path works")
        same(got(other), [], "nothing else yet")
    for device, direction in ("t-r0", GUEST), ("t-r1", EGRESS):
        rtnl.qdisc_add(device, options=options("web", direction))
        for n in range(1, 6):
            guest.sendto(b"%d" % n, ("10.79.1.2", 7))
            far.sendto(b"%d" % n, ("10.79.0.2", 7))
        same(got(far), [], f"{device}: from the guest")
        same(got(guest, 5), [1, 2, 3, 4, 5], f"{device}: towards the guest")
        until(lambda: genl.get("web")["packets"] == 5, "all of the guest's are held")
        commit(genl)
        same(got(far, 5), [1, 2, 3, 4, 5], f"{device}: committed")
        rtnl.qdisc_del(device)


@test
def macvlan(stack):
    """Another device on top takes what is for it (a receive handler); not before the commit."""
    modprobe("macvlan")
    genl = stack.enter_context(Genl())
    line = Line(stack, "guest", domain="web")
    mac = b"\x02\x00\x00\x00\x00\x77"
    line.rtnl.link(16, netlink.CREATE | netlink.EXCL, up=True, attrs=(
        attr(3, text("t-mv")) + attr(5, u32(socket.if_nametoindex(line.device))) + attr(1, mac)
        + attr(18, attr(1, text("macvlan")) + attr(2, attr(1, u32(4))))))
    stack.callback(lambda: line.rtnl.delete("t-mv") if "t-mv" in line.rtnl.names() else None)
    above = Receiver("t-mv")
    stack.callback(above.close)
    for n in 1, 2, 3:
        line.sender.sock.send(frame(n, dst=mac))
    line.send(4)  # for all: for the device and the one on top
    above.nothing("held below")
    same(commit(genl)["packets"], 4, "packets")
    got = []
    until(lambda: got.extend(above.now()) or len(got) >= 4, "above")
    # What is for all takes another way in macvlan than what is for one.
    same(([n for n in got if n != 4], 4 in got, len(got)), ([1, 2, 3], True, 4), "above")
    # The device below sees all of them.
    same(sorted(line.receiver.gather(4)), [1, 2, 3, 4], "below")
    # And out: through the device, unheld in this direction, with its own hold in the other.
    line.remove()
    line.rtnl.qdisc_add(line.device, options=options("web", EGRESS))
    out, far = Sender("t-mv"), Receiver(line.peer)
    stack.callback(out.close)
    stack.callback(far.close)
    out.send(5, 6)
    far.nothing("held on the way out")
    commit(genl)
    far.expect([5, 6], "out", settle=0.05)


def tagged(n, vlan, size=SIZE):
    plain = frame(n, size)
    return plain[:12] + struct.pack("!HH", 0x8100, vlan) + plain[12:]


@test
def vlans(stack):
    """Tagged packets: for a VLAN device on top, through a bridge, and on the way out."""
    modprobe("8021q")
    genl = stack.enter_context(Genl())
    line = Line(stack, "guest", domain="web")
    rtnl = line.rtnl
    rtnl.link(16, netlink.CREATE | netlink.EXCL, up=True, attrs=(
        attr(3, text("t-vl")) + attr(5, u32(socket.if_nametoindex(line.device)))
        + attr(18, attr(1, text("vlan")) + attr(2, attr(1, struct.pack("=H", 7))))))
    stack.callback(lambda: rtnl.delete("t-vl") if "t-vl" in rtnl.names() else None)
    above = Receiver("t-vl")
    stack.callback(above.close)
    for n, vlan in (1, 7), (2, 8), (3, 7):
        line.sender.sock.send(tagged(n, vlan))
    line.send(4)
    above.nothing("held below")
    same(commit(genl)["packets"], 4, "packets")
    above.expect([1, 3], "VLAN 7", settle=0.05)
    # The device below sees all of them; the stack delivers those with one receiver after those with two.
    same(sorted(line.receiver.gather(4)), [1, 2, 3, 4], "below")
    line.remove()
    # Out of the VLAN device, through an egress port below it, still tagged.
    rtnl.qdisc_add(line.device, options=options("web", EGRESS))
    out = Sender("t-vl")
    stack.callback(out.close)
    wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
    stack.callback(wire.close)
    wire.bind((line.peer, 3))
    wire.setsockopt(263, 8, 1)  # PACKET_AUXDATA

    def tags(count=0):
        """So many, and those that follow."""
        seen = []
        with contextlib.suppress(TimeoutError):
            while True:
                wire.settimeout(60 if len(seen) < count else 0.2)
                data, ancillary, _, address = wire.recvmsg(2000, 200)
                if address[2] == 4 or data[12:14] != struct.pack("!H", PROTO):  # its own, or something else
                    continue
                for level, kind, content in ancillary:
                    if (level, kind) == (263, 8):
                        status, _, _, _, _, tci, _ = struct.unpack_from("=IIIHHHH", content)
                        seen.append((struct.unpack_from("!I", data, 14)[0], tci if status & 0x10 else None))
        return seen
    out.send(5, 6)
    same(tags(), [], "held on the way out")
    commit(genl)
    same(tags(2), [(5, 7), (6, 7)], "numbers and tags on the wire")


@each(("egress", "guest", "bridge"))
def jumbo(stack, kind):
    """Frames of 9,000 bytes, and of every length up to there that matters, byte for byte."""
    genl = stack.enter_context(Genl())
    line = Line(stack, kind, domain="web")
    for name in line.rtnl.names():
        if name.startswith(line.device[:-1]) or name == f"br-{line.device[:-1]}":
            line.rtnl.set(name, mtu=9000)
    rng = random.Random(SEED)
    frames = [frame(n, 18)[:18] + rng.randbytes(size - 18) for n, size in enumerate((60, 61, 1499, 1514, 1515, 4095, 4096, 4097, 8192, 9000, 9014))]
    for data in frames:
        line.sender.sock.send(data)
    line.receiver.nothing("held")
    same(commit(genl)["packets"], len(frames), "packets")
    got, end = [], time.monotonic() + 60
    while len(got) < len(frames) and time.monotonic() < end:
        with contextlib.suppress(BlockingIOError):
            got.append(line.receiver.sock.recv(65536))
    same([len(g) for g in got], [len(f) for f in frames], "lengths")
    true(got == frames, "contents")


@test
def offloads_of_a_tap(stack):
    """What a guest leaves to its device: a checksum to fill in, a large segment to cut up."""
    genl = stack.enter_context(Genl())
    rtnl = stack.enter_context(Rtnl())
    tap = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    stack.callback(os.close, tap)
    fcntl.ioctl(tap, 0x400454CA, struct.pack("16sH22x", b"t-off", 0x0002 | 0x1000 | 0x4000))  # with IFF_VNET_HDR
    ip("addr", "add", "10.80.0.1/24", "dev", "t-off")
    rtnl.set("t-off", up=True)
    ip("neigh", "add", "10.80.0.2", "lladdr", "02:00:00:00:00:02", "dev", "t-off")
    with open("/sys/class/net/t-off/address", encoding="ascii") as f:
        mac = bytes.fromhex(f.read().strip().replace(":", ""))
    rtnl.qdisc_add("t-off", options=options("web", GUEST))
    server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    stack.callback(server.close)
    server.bind(("10.80.0.1", 7))
    with contextlib.suppress(OSError):
        server.setsockopt(17, 104, 0)  # no UDP_GRO: segments come one by one
    data = random.Random(SEED).randbytes(30000)

    def udp(payload, gso):
        total = 28 + len(payload)
        header = struct.pack("!BBHHHBBH4s4s", 0x45, 0, total, 1, 0, 64, 17, 0, bytes((10, 80, 0, 2)), bytes((10, 80, 0, 1)))
        header = header[:10] + struct.pack("!H", checksum(header)) + header[12:]
        pseudo = bytes((10, 80, 0, 2, 10, 80, 0, 1)) + struct.pack("!BBH", 0, 17, 8 + len(payload))
        partial = ~checksum(pseudo) & 0xFFFF
        virtio = struct.pack("=BBHHHH", 1, 5 if gso else 0, 42, gso, 34, 6)  # F_NEEDS_CSUM, GSO_UDP_L4
        return virtio + mac + b"\x02\0\0\0\0\2" + b"\x08\0" + header + struct.pack("!HHHH", 9, 7, 8 + len(payload), partial) + payload
    os.write(tap, udp(b"small", 0))
    os.write(tap, udp(data, 1000))
    segments = [data[i:i + 1000] for i in range(0, len(data), 1000)]
    server.settimeout(0.1)
    try:
        raise AssertionError(f"{server.recv(100)!r} came before the commit")
    except TimeoutError:
        pass
    server.settimeout(60)
    commit(genl)
    same(server.recv(100), b"small", "with its checksum filled in, or known to be needless")
    true([server.recv(2000) for _ in segments] == segments, "segments")
    # A super-packet counts with all the memory that it takes.
    limit = 256 << 10
    genl.set("web", size=limit)
    for _ in range(40):
        os.write(tap, udp(data, 1000))
    view = genl.get("web")
    true(0 < view["packets"] < 40 and len(data) * view["packets"] < view["held-memory"] <= limit, f"40 super-packets: {view}")
    same(view["packets"] + view["dropped"], 40, "held or dropped")
    rtnl.qdisc_del("t-off")


@each(("egress", "guest", "tap"))
def seen_once(stack, kind):
    """tcpdump on the device (AF_PACKET for all protocols) sees each packet once."""
    genl = stack.enter_context(Genl())
    line = Line(stack, kind, domain="web")
    tap = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.htons(3))
    stack.callback(tap.close)
    tap.bind((line.device, 3))
    tap.setblocking(False)

    def seen():
        out = []
        time.sleep(0.05)
        with contextlib.suppress(BlockingIOError):
            while True:
                data = tap.recv(2000)
                if data[12:14] == struct.pack("!H", PROTO):
                    out.append(struct.unpack_from("!I", data, 14)[0])
        return out
    line.send(*range(10))
    before = seen()
    commit(genl)
    line.receiver.expect(range(10), kind)
    after = seen()
    same(before + after, list(range(10)), "what a tap sees, before and after the commit")
    # As they arrive, and as they leave.
    same(after, list(range(10)) if kind == "egress" else [], "what it sees at the commit")


@each(("egress", "guest"))
def filters(stack, kind):
    """Filters of clsact beside it: each packet passes them once, and what they drop is not held."""
    modprobe("sch_ingress", "cls_u32", "act_gact")
    genl = stack.enter_context(Genl())
    line = Line(stack, kind, domain="web")
    side = "egress" if kind == "egress" else "ingress"

    def tc(*words):
        return subprocess.run(["tc", *words], check=True, capture_output=True, text=True).stdout
    tc("qdisc", "add", "dev", line.device, "clsact")
    # The last byte of the number: odd ones are dropped.
    tc("filter", "add", "dev", line.device, side, "pref", "1", "protocol", "all", "u32", "match", "u8", "1", "1", "at", "3", "action", "drop")
    tc("filter", "add", "dev", line.device, side, "pref", "2", "protocol", "all", "u32", "match", "u8", "0", "0", "at", "0", "action", "pass")
    for n in range(10):
        with contextlib.suppress(OSError):
            line.send(n)
    line.receiver.nothing("held")
    same(commit(genl)["packets"], 5, "packets")
    line.receiver.expect(range(0, 10, 2), "what the filter lets pass", settle=0.05)

    def passed(pref):
        shown = json.loads(tc("-s", "-j", "filter", "show", "dev", line.device, side, "pref", pref))
        return [a["stats"]["packets"] for f in shown for a in f.get("options", {}).get("actions", [])]
    same((passed("1"), passed("2")), ([5], [5]), "how often the filters saw a packet")
    tc("qdisc", "del", "dev", line.device, "clsact")
    line.send(11)
    commit(genl)
    line.receiver.expect([11], "without the filter")


def bpf(command, attributes):
    buffer = ctypes.create_string_buffer(attributes.ljust(128, b"\0"), 128)
    return check(libc.syscall(321, command, buffer, 128))


def insn(code, dst=0, src=0, off=0, imm=0):
    return struct.pack("=BBhi", code, dst | src << 4, off, imm)


def xdp_program(verdict):
    """Counts packets in a map, and returns the verdict. Returns the program and the map."""
    array = bpf(0, struct.pack("=IIII", 2, 4, 8, 1))
    code = b"".join((
        insn(0x62, 10, 0, -4, 0), insn(0xBF, 2, 10), insn(0x07, 2, 0, 0, -4),  # key 0 on the stack
        insn(0x18, 1, 1, 0, array), insn(0), insn(0x85, 0, 0, 0, 1),          # map_lookup_elem
        insn(0x15, 0, 0, 2, 0), insn(0xB7, 1, 0, 0, 1), insn(0xDB, 0, 1, 0, 0),
        insn(0xB7, 0, 0, 0, verdict), insn(0x95)))
    text_ = ctypes.create_string_buffer(code)
    licence = ctypes.create_string_buffer(b"GPL")
    program = bpf(5, struct.pack("=IIQQ", 6, len(code) // 8, ctypes.addressof(text_), ctypes.addressof(licence)))
    return program, array


def counted(array):
    key, value = ctypes.create_string_buffer(4), ctypes.create_string_buffer(8)
    bpf(1, struct.pack("=IxxxxQQ", array, ctypes.addressof(key), ctypes.addressof(value)))
    return int.from_bytes(value.raw, "little")


@each(("guest", "tap"))
def xdp(stack, kind):
    """Generic XDP on a guest's device: it sees each packet once, and what it drops is not held."""
    genl = stack.enter_context(Genl())
    line = Line(stack, kind, domain="web")
    for verdict, name in (2, "XDP_PASS"), (1, "XDP_DROP"):
        try:
            program, array = xdp_program(verdict)
        except OSError as error:
            raise Skip(f"no programs for XDP here: {error}") from None
        line.rtnl.link(16, 0, socket.if_nametoindex(line.device), attrs=attr(43 | netlink.NESTED, attr(1, u32(program)) + attr(3, u32(2))))
        line.send(1, 2, 3)
        held = 3 if verdict == 2 else 0
        until(lambda n=held: genl.get("web")["packets"] == n, f"{name}: {held} are held")
        line.receiver.nothing("held")
        commit(genl)
        line.receiver.expect([1, 2, 3][:held], name, settle=0.05)
        same(counted(array), 3, f"{name}: how often it saw a packet")
        line.rtnl.link(16, 0, socket.if_nametoindex(line.device), attrs=attr(43 | netlink.NESTED, attr(1, struct.pack("=i", -1)) + attr(3, u32(2))))
        os.close(program)
        os.close(array)
