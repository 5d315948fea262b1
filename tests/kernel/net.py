# SPDX-License-Identifier: GPL-2.0
"""Devices and numbered packets."""
import contextlib
import fcntl
import os
import select
import socket
import struct
import time

import netlink
from harness import short
from netlink import EGRESS, GUEST
from ram import check, libc

PROTO = 0x88B5  # for local experiments: no tap sees it as its own, nothing answers
SIZE = 60


def frame(n, size=SIZE, dst=b"\xff" * 6):
    """Packet number n."""
    return (dst + b"\x02\x00\x00\x00\x00\x01" + struct.pack("!HI", PROTO, n)).ljust(size, b"\xa5")


def packet(name):
    sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.htons(PROTO))
    sock.setsockopt(socket.SOL_SOCKET, 33, 1 << 28)  # SO_RCVBUFFORCE
    sock.setsockopt(socket.SOL_SOCKET, 32, 1 << 28)  # SO_SNDBUFFORCE: held packets count for it
    sock.bind((name, PROTO))
    sock.setblocking(False)
    return sock


class Sender:
    """Sends numbered packets out of a device."""

    def __init__(self, name):
        self.sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0)
        self.sock.setsockopt(socket.SOL_SOCKET, 32, 1 << 28)
        self.sock.bind((name, 0))

    def send(self, *numbers, size=SIZE):
        for n in numbers:
            self.sock.send(frame(n, size))

    def close(self):
        self.sock.close()


class TapSender:
    """A tap device, and the guest behind it."""

    def __init__(self, name, flags=0):
        self.fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
        fcntl.ioctl(self.fd, 0x400454CA, struct.pack("16sH22x", name.encode(), 0x0002 | 0x1000 | flags))
        os.set_blocking(self.fd, False)

    def send(self, *numbers, size=SIZE):
        for n in numbers:
            os.write(self.fd, frame(n, size))

    def received(self):
        """Numbers of the packets that reached the guest."""
        out = []
        while True:
            try:
                data = os.read(self.fd, 65536)
            except BlockingIOError:
                return out
            if len(data) >= 18 and data[12:14] == struct.pack("!H", PROTO):
                out.append(struct.unpack_from("!I", data, 14)[0])

    def close(self):
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class Receiver:
    """Sees what a device delivers (not what it taps): what the outside would see."""

    def __init__(self, name):
        self.sock = packet(name)

    def now(self):
        """Numbers of the packets that are there."""
        out = []
        while True:
            try:
                data = self.sock.recv(65536)
            except (BlockingIOError, OSError):
                return out
            if data[12:14] == struct.pack("!H", PROTO):
                out.append(struct.unpack_from("!I", data, 14)[0])

    def settle(self, seconds=0.03):
        """Those that arrive until none has come for a while."""
        out = self.now()
        while select.select([self.sock], [], [], seconds)[0]:
            got = self.now()
            if not got:
                break  # an error on the socket: its device is gone
            out += got
        return out

    def gather(self, count, settle=0.1):
        """So many, and those that follow."""
        out, end = self.now(), time.monotonic() + 60
        while len(out) < count and time.monotonic() < end:
            select.select([self.sock], [], [], 0.2)
            out += self.now()
        return out + self.settle(settle)

    def expect(self, want, what="", seconds=60, settle=0.0):
        """Exactly these numbers arrive, in this order."""
        want, got, end = list(want), self.now(), time.monotonic() + seconds
        while len(got) < len(want) and time.monotonic() < end:
            select.select([self.sock], [], [], 0.2)
            got += self.now()
        if settle:
            got += self.settle(settle)
        if got != want:
            lost, extra = sorted(set(want) - set(got)), sorted(set(got) - set(want))
            raise AssertionError(f"{what}: packets {short(got)}, want {short(want)}; missing {short(lost[:20])}, "
                                 f"unexpected {short(extra[:20])}, dropped by the receiving socket: {self.drops()}")

    def nothing(self, what, settle=0.03):
        got = self.settle(settle)
        if got:
            raise AssertionError(f"{what}: packets {short(got)} got out")

    def drops(self):
        with contextlib.suppress(OSError):
            return struct.unpack("II", self.sock.getsockopt(263, 6, 8))[1]

    def close(self):
        self.sock.close()


class Line:
    """A device with a remus qdisc, a sender whose packets it holds, and a receiver behind it.

    kind: egress (host → device → peer), guest (peer → device, held on the device's ingress), bridge (the
    same, and on through a bridge and another veth pair), tap (guest behind a tap).
    """

    serial = 0

    def __init__(self, stack, kind, domain=None, add=True, **limits):
        Line.serial += 1
        self.kind, me = kind, f"t-{Line.serial % 1000}"
        self.rtnl = netlink.Rtnl()
        stack.callback(self.close)
        self.device, self.peer, self.extra = me + "a", me + "b", []
        self.direction = EGRESS if kind == "egress" else GUEST
        self.sender = self.receiver = self.back = None
        if kind == "tap":
            self.sender = TapSender(self.device)
            self.rtnl.set(self.device, up=True)
            self.receiver = Receiver(self.device)
        else:
            self.rtnl.veth(self.device, self.peer)
            if kind == "egress":
                self.sender, self.receiver = Sender(self.device), Receiver(self.peer)
            elif kind == "guest":
                self.sender, self.receiver = Sender(self.peer), Receiver(self.device)
            elif kind == "bridge":
                bridge, c, d = f"br-{me}", me + "c", me + "d"
                self.rtnl.add(bridge, "bridge")
                self.rtnl.veth(c, d)
                for port in self.device, c:
                    self.rtnl.set(port, master=bridge)
                self.extra = [bridge, c]
                self.sender, self.receiver = Sender(self.peer), Receiver(d)
                self.rtnl.ready(d, bridge, c)
            self.rtnl.ready(self.device, self.peer)
        self.name = domain or self.device
        if add:
            self.add(domain, **limits)

    def add(self, domain=None, **limits):
        self.rtnl.qdisc_add(self.device, options=netlink.options(domain, self.direction, **limits))

    def remove(self):
        self.rtnl.qdisc_del(self.device)

    def send(self, *numbers, size=SIZE):
        self.sender.send(*numbers, size=size)

    def close(self):
        for end in self.sender, self.receiver:
            if end:
                end.close()
        names = self.rtnl.names()
        for name in [self.device, *self.extra]:
            if name in names:
                with contextlib.suppress(OSError):
                    self.rtnl.delete(name)
        self.rtnl.close()


KINDS = "egress", "guest", "bridge", "tap"


class Namespace:
    """A network namespace that lives until it is closed. Sockets made in `with ns:` stay in it."""

    def __init__(self):
        self.outer = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        check(libc.unshare(0x40000000))
        self.fd = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        with contextlib.suppress(OSError), open("/proc/sys/net/ipv6/conf/default/disable_ipv6", "w") as f:
            f.write("1")
        check(libc.setns(self.outer, 0x40000000))

    def __enter__(self):
        check(libc.setns(self.fd, 0x40000000))
        return self

    def __exit__(self, *_):
        check(libc.setns(self.outer, 0x40000000))

    def close(self):
        if self.fd >= 0:
            os.close(self.fd)
            os.close(self.outer)
            self.fd = -1
