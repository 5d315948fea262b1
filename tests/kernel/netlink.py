# SPDX-License-Identifier: GPL-2.0
"""A small netlink client, independent of remusctl: generic netlink and rtnetlink by hand.

Attributes are lists of (type, bytes) so that a test can send any nonsense; replies are dicts.
"""
import errno
import itertools
import os
import select
import socket
import struct
import time

NETLINK_ROUTE, NETLINK_GENERIC, SOL_NETLINK = 0, 16, 270
NETLINK_ADD_MEMBERSHIP, NETLINK_CAP_ACK, NETLINK_EXT_ACK, NETLINK_GET_STRICT_CHK = 1, 10, 11, 12
REQUEST, MULTI, ACK = 1, 2, 4
ROOT, MATCH, DUMP = 0x100, 0x200, 0x300
REPLACE, EXCL, CREATE = 0x100, 0x200, 0x400
NESTED = 0x8000
HEADER = struct.Struct("=IHHII")

# docs/netlink/remus.yaml, once more.
CMD = {n: i + 1 for i, n in enumerate(
    "domain-new domain-del domain-get epoch-seal epoch-commit epoch-abort domain-set port-get discard".split())}
EVENTS = {n: i + 1 + len(CMD) for i, n in enumerate(
    "output-pending buffer-high overflow controller-gone domain-gone cow-wait cow-abort".split())}
EVENT_NAMES = {i: n for n, i in EVENTS.items()}
ATTR = {n: i + 1 for i, n in enumerate(
    "domain memory device epoch open-epoch committed-epoch sealed-epochs packets bytes dropped "
    "dirty-pages resident-pages snapshot-pages ports duration-ns full port ifindex direction passthrough "
    "limit-packets limit-bytes held-memory dropped-limit dropped-memory dropped-discarded hold-last-ns "
    "hold-max-ns own owner orphaned cow-limit cow-policy cow-peak cow-copies cow-waits memory-users "
    "keep-passthrough hold hot-limit hot-pages".split())}
NAMES = {i: n for n, i in ATTR.items()}
TEXTS, FLAGS = ("domain", "device", "port"), ("full", "passthrough", "own", "orphaned", "keep-passthrough", "hold")
TCA_DOMAIN, TCA_DIRECTION, TCA_LIMIT_PACKETS, TCA_LIMIT_BYTES, TCA_PASSTHROUGH = 1, 2, 3, 4, 5
XSTATS = struct.Struct("=11Q2I")  # tca::Stats
XSTATS_NAMES = ("open-epoch committed-epoch sealed-epochs packets bytes held-memory hold-last-ns hold-max-ns "
                "dropped-limit dropped-memory dropped-discarded passthrough direction").split()
GUEST, EGRESS = 1, 2
TC_H_ROOT = 0xFFFFFFFF


def attr(kind, data=b""):
    """One attribute, padded."""
    head = struct.pack("=HH", len(data) + 4, kind)
    return head + data + b"\0" * (-len(data) % 4)


def nest(kind, attrs):
    return attr(kind, b"".join(attr(k, d) for k, d in attrs))


def u8(n):
    return struct.pack("=B", n)


def u32(n):
    return struct.pack("=I", n)


def u64(n):
    return struct.pack("=Q", n)


def uint(n):
    return u32(n) if n < 1 << 32 else u64(n)


def text(s):
    return (s if isinstance(s, bytes) else s.encode()) + b"\0"


def number(data):
    return int.from_bytes(data, "little")


def attributes(data):
    """All attributes in `data`: a list of (type, content)."""
    out, at = [], 0
    while at + 4 <= len(data):
        length, kind = struct.unpack_from("=HH", data, at)
        if length < 4:
            break
        out.append((kind & 0x3FFF, data[at + 4:at + length]))
        at += (length + 3) & ~3
    return out


class Refused(OSError):
    """An error reply: errno, the extack sentence, the type of the bad attribute and of a missing one."""

    def __init__(self, code, message, bad, missing):
        super().__init__(code, message or os.strerror(code))
        self.message, self.bad, self.missing = message, bad, missing

    def __str__(self):
        return f"{errno.errorcode.get(self.errno, self.errno)} {self.message!r} bad={self.bad} missing={self.missing}"


class Socket:
    """A netlink socket; one request at a time."""

    def __init__(self, protocol, port=0, chunk=1 << 18):
        # What a recv takes at most; the kernel makes the messages of a dump as large, up to 32 KiB.
        self.chunk = chunk
        self.sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
        self.sock.bind((port, 0))
        self.sock.settimeout(60)
        for option in NETLINK_EXT_ACK, NETLINK_CAP_ACK, NETLINK_GET_STRICT_CHK:
            self.sock.setsockopt(SOL_NETLINK, option, 1)
        self.seq = itertools.count(1)

    def close(self):
        self.sock.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def message(self, kind, flags, payload):
        seq = next(self.seq)
        return HEADER.pack(HEADER.size + len(payload), kind, flags | REQUEST, seq, 0) + payload, seq

    def request(self, kind, flags, payload):
        """Sends a request, returns the payloads of its replies, or raises Refused."""
        message, seq = self.message(kind, flags | ACK, payload)
        self.sock.send(message)
        return self.replies(message, seq)

    def replies(self, message, seq, between=lambda: None):
        """`between` is called before each datagram."""
        out = []
        while True:
            between()
            data, at = self.sock.recv(self.chunk), 0
            while at + HEADER.size <= len(data):
                length, kind, flags, number_, _ = HEADER.unpack_from(data, at)
                payload = data[at + HEADER.size:at + length]
                at += (length + 3) & ~3
                if number_ != seq:
                    continue
                if kind in (2, 3):
                    code, = struct.unpack_from("=i", payload)
                    if code:
                        raise self.refused(code, flags, payload, message, kind)
                    return out
                out.append(payload)

    @staticmethod
    def refused(code, flags, payload, message, kind):
        said = bad = missing = None
        if flags & 0x200:
            skip = 4 if kind == 3 else 4 + HEADER.size
            if kind == 2 and not flags & 0x100:
                # Not capped: the whole request comes back.
                skip = 4 + (struct.unpack_from("=I", payload, 4)[0] + 3 & ~3)
            for k, d in attributes(payload[skip:]):
                if k == 1:
                    said = d.rstrip(b"\0").decode(errors="replace")
                elif k == 2:
                    offset = number(d)
                    bad = struct.unpack_from("=HH", message, offset)[1] & 0x3FFF
                elif k == 5:
                    missing = number(d)
        return Refused(-code, said, bad, missing)


class Genl(Socket):
    """The family `remus`."""

    def __init__(self, family="remus", **more):
        super().__init__(NETLINK_GENERIC, **more)
        try:
            reply, = self.request(16, 0, struct.pack("=BBH", 3, 1, 0) + attr(2, text(family)))
        except OSError:
            self.close()
            raise
        self.info = dict(attributes(reply[4:]))
        self.family = struct.unpack("=H", self.info[1])[0]

    def raw(self, cmd, attrs=(), flags=0, version=1, reserved=0, tail=b""):
        payload = struct.pack("=BBH", cmd, version, reserved)
        payload += b"".join(attr(k, d) for k, d in attrs) + tail
        return [self.decode(r) for r in self.request(self.family, flags, payload)]

    def dump_slowly(self, cmd, between, attrs=()):
        """A dump, with a call before each piece."""
        payload = struct.pack("=BBH", CMD[cmd], 1, 0) + b"".join(attr(k, d) for k, d in attrs)
        message, seq = self.message(self.family, ACK | DUMP, payload)
        self.sock.send(message)
        return [self.decode(r) for r in self.replies(message, seq, between)]

    @staticmethod
    def decode(reply):
        out = {}
        for kind, data in attributes(reply[4:]):
            name = NAMES.get(kind, kind)
            if name in out:
                raise AssertionError(f"attribute {name} twice")
            if name in TEXTS:
                if data[-1:] != b"\0":
                    raise AssertionError(f"{name} is not NUL-terminated")
                out[name] = data[:-1].decode()
            elif name in FLAGS:
                if data:
                    raise AssertionError(f"{name} has {len(data)} bytes")
                out[name] = True
            else:
                if len(data) not in (4, 8):
                    raise AssertionError(f"{name} has {len(data)} bytes")
                out[name] = number(data)
        return out

    def call(self, cmd, domain, *attrs):
        replies = self.raw(CMD[cmd], [(1, text(domain)), *attrs])
        return replies[0] if replies else None

    @staticmethod
    def numbers(**named):
        """Attributes that were given, `cow_limit` for `cow-limit`."""
        return [(ATTR[n.replace("_", "-")], uint(v)) for n, v in named.items() if v is not None]

    @staticmethod
    def flags(**named):
        """Flags that are true."""
        return [(ATTR[n.replace("_", "-")], b"") for n, v in named.items() if v]

    def new(self, domain, memory=None, **more):
        return self.call("domain-new", domain, *self.numbers(memory=memory, **more))

    def delete(self, domain):
        return self.call("domain-del", domain)

    def get(self, domain):
        return self.call("domain-get", domain)

    def dump(self):
        return self.raw(CMD["domain-get"], flags=DUMP)

    def seal(self, domain, full=False, keep=False):
        return self.call("epoch-seal", domain, *self.flags(full=full, keep_passthrough=keep))

    def commit(self, domain, epoch):
        return self.call("epoch-commit", domain, (4, uint(epoch)))

    def abort(self, domain, epoch):
        return self.call("epoch-abort", domain, (4, uint(epoch)))

    def set(self, domain, packets=None, size=None, own=False, passing=None, **more):
        attrs = self.numbers(limit_packets=packets, limit_bytes=size, **more)
        return self.call("domain-set", domain, *attrs, *self.flags(own=own, passthrough=passing is True, hold=passing is False))

    def discard(self, domain):
        return self.call("discard", domain)

    def ports(self, domain=None):
        """All ports, or those of a domain."""
        return self.raw(CMD["port-get"], [] if domain is None else [(1, text(domain))], flags=DUMP)

    def port(self, domain):
        """The only port of a domain."""
        port, = self.ports(domain)
        return port

    @property
    def group(self):
        """Number of the multicast group `events`."""
        for _, nested in attributes(self.info[7]):
            group = dict(attributes(nested))
            if group[1] == b"events\0":
                return number(group[2])
        raise AssertionError("there is no multicast group events")


class Listener:
    """A socket that receives events, and nothing else."""

    def __init__(self):
        self.genl = Genl()
        self.sock = self.genl.sock
        self.genl.sock.setsockopt(SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, self.genl.group)
        self.sock.settimeout(0)
        self.lost, self.got = 0, []

    def now(self):
        """The events that have come so far: pairs of a name and its attributes. ENOBUFS is counted in `lost`."""
        while True:
            try:
                data, at = self.sock.recv(1 << 18), 0
            except BlockingIOError:
                return self.got
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                self.lost += 1
                continue
            while at + HEADER.size <= len(data):
                length, kind, _, seq, port = HEADER.unpack_from(data, at)
                if kind != self.genl.family or seq or port:
                    raise AssertionError(f"an event of family {kind}, sequence number {seq}, port {port}")
                command, version, reserved = struct.unpack_from("=BBH", data, at + HEADER.size)
                if version != 1 or reserved:
                    raise AssertionError(f"an event of version {version}, reserved {reserved}")
                payload = data[at + HEADER.size:at + length]
                self.got.append((EVENT_NAMES[command], Genl.decode(payload)))
                at += (length + 3) & ~3

    def take(self, *names, domain=None, seconds=60, settle=0.1):
        """Exactly these events come, in any order (they are sent from several places). Returns them, in that order."""
        end = time.monotonic() + seconds
        while len(self.now()) < len(names) and time.monotonic() < end:
            select.select([self.sock], [], [], 0.05)
        time.sleep(settle)
        got, self.got = self.now(), []
        if sorted(n for n, _ in got) != sorted(names):
            raise AssertionError(f"{len(got)} events {str(got)[:600]}, want {str(names)[:100]}")
        wrong = [e for e in got if domain is not None and e[1]["domain"] != domain]
        if wrong:
            raise AssertionError(f"events {wrong} are not of domain {domain}")
        return [next(attrs for n, attrs in got if n == name) for name in names]

    def close(self):
        self.genl.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class Rtnl(Socket):
    """Links and queue disciplines."""

    def __init__(self):
        super().__init__(NETLINK_ROUTE)

    def link(self, kind, flags, index=0, up=None, attrs=b""):
        change = 1 if up is not None else 0
        return self.request(kind, flags, struct.pack("=BxHiII", 0, 0, index, 1 if up else 0, change) + attrs)

    def add(self, name, kind, data=b"", up=True):
        info = attr(1, text(kind)) + (attr(2, data) if data else b"")
        self.link(16, CREATE | EXCL, up=up, attrs=attr(3, text(name)) + attr(18, info))

    def veth(self, one, two, up=True):
        peer = struct.pack("=BxHiII", 0, 0, 0, 0, 0) + attr(3, text(two))
        self.add(one, "veth", attr(1, peer), None)
        for name in (one, two) if up else ():
            self.set(name, up=True)

    def set(self, name, up=None, master=None, netns=None, mtu=None, txqueuelen=None, rename=None):
        attrs = b""
        if master is not None:
            attrs += attr(10, u32(socket.if_nametoindex(master) if master else 0))
        if netns is not None:
            attrs += attr(28, u32(netns))
        if mtu is not None:
            attrs += attr(4, u32(mtu))
        if txqueuelen is not None:
            attrs += attr(13, u32(txqueuelen))
        if rename is not None:
            attrs += attr(3, text(rename))
        self.link(16, 0, socket.if_nametoindex(name), up, attrs)

    def delete(self, name):
        self.link(17, 0, socket.if_nametoindex(name))

    def get(self, name):
        """A link's attributes."""
        reply, = self.request(18, 0, struct.pack("=BxHiII", 0, 0, socket.if_nametoindex(name), 0, 0))
        return dict(attributes(reply[16:]))

    def ready(self, *names):
        """Waits until packets go through these links: the kernel gets them going a moment after they, and what is behind
        them, are up."""
        for name in names:
            end = time.monotonic() + 60
            while not self.goes(name):
                if time.monotonic() > end:
                    raise AssertionError(f"{name} did not get going")
                time.sleep(0.005)

    def goes(self, name):
        got = self.get(name)
        info = dict(attributes(got.get(18, b"")))
        if info.get(4) == b"bridge\0" and dict(attributes(info[5]))[1] != b"\x03":
            return False  # a port that does not forward yet
        return got[16] == b"\x06"

    def mac(self, name):
        """A link's address, in words."""
        return ":".join(f"{b:02x}" for b in self.get(name)[1])

    def names(self):
        return [n for _, n in socket.if_nameindex()]

    def qdisc(self, command, flags, name, kind="remus", options=None, parent=TC_H_ROOT, handle=0, raw=b""):
        index = name if isinstance(name, int) else socket.if_nametoindex(name)
        payload = struct.pack("=BxxxiIII", 0, index, handle, parent, 0)
        if kind is not None:
            payload += attr(1, text(kind))
        if options is not None:
            payload += nest(2, options)
        return self.request(command, flags, payload + raw)

    def qdisc_add(self, name, kind="remus", options=None, **more):
        return self.qdisc(36, CREATE | EXCL, name, kind, options, **more)

    def qdisc_replace(self, name, kind="remus", options=None, **more):
        return self.qdisc(36, CREATE | REPLACE, name, kind, options, **more)

    def qdisc_change(self, name, kind="remus", options=None, **more):
        return self.qdisc(36, 0, name, kind, options, **more)

    def qdisc_del(self, name, kind=None, **more):
        return self.qdisc(37, 0, name, kind, **more)

    def qdisc_get(self, name):
        """The root qdisc: kind, options, queue length, backlog, drops, packets, bytes, what a remus qdisc says of
        itself (xstats); None if it is no qdisc."""
        index = socket.if_nametoindex(name)
        for reply in self.request(38, DUMP, struct.pack("=BxxxiIII", 0, index, 0, 0, 0)):
            _, at, handle, parent, _ = struct.unpack_from("=BxxxiIII", reply)
            if at != index or parent != TC_H_ROOT:
                continue
            got = dict(attributes(reply[20:]))
            out = {"kind": got[1].rstrip(b"\0").decode(), "handle": handle}
            out["options"] = dict(attributes(got.get(2, b"")))
            stats = dict(attributes(got.get(7, b"")))
            if 3 in stats:
                out["qlen"], out["backlog"], out["drops"] = struct.unpack_from("=III", stats[3])
            if 1 in stats:
                out["bytes"], out["packets"] = struct.unpack_from("=QI", stats[1])
            if 4 in stats and out["kind"] == "remus":
                out["xstats"] = dict(zip(XSTATS_NAMES, XSTATS.unpack(stats[4])))
            return out
        return None


def options(domain=None, direction=None, packets=None, size=None, passthrough=None):
    """TCA_OPTIONS of a remus qdisc."""
    out = []
    if domain is not None:
        out.append((TCA_DOMAIN, text(domain)))
    if direction is not None:
        out.append((TCA_DIRECTION, u8(direction)))
    if packets is not None:
        out.append((TCA_LIMIT_PACKETS, u32(packets)))
    if size is not None:
        out.append((TCA_LIMIT_BYTES, u64(size)))
    if passthrough is not None:
        out.append((TCA_PASSTHROUGH, u8(passthrough)))
    return out
