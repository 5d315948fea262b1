# SPDX-License-Identifier: GPL-2.0
"""Random and mutated netlink messages, to the family and to rtnetlink about qdiscs of kind remus; random calls
of the RAM device.

What must hold: no report, no crash, and afterwards everything works and can be taken away. Many messages go into one
datagram, and nobody reads the answers: a few microseconds each.
"""
import contextlib
import ctypes
import errno
import fcntl
import os
import random
import socket
import struct
import time

import harness
import netlink
import ram
from harness import DEBUG, SEED, Kid, same, scaled, test, true
from netlink import ACK, ATTR, CMD, CREATE, DUMP, EXCL, HEADER, NESTED, REPLACE, REQUEST, Genl, Rtnl, attr, text, uint
from net import Line, Sender
from ram import PAGE, Ram, libc

DEVICES = 4
BATCH = 64
NAMES = [b"a\0", b"b\0", b"c\0", b"w\0", b"w" * 31 + b"\0"]


def number(rng):
    dice = rng.random()
    if dice < 0.5:
        return rng.randrange(12)
    if dice < 0.8:
        return rng.choice((0, 1, 4095, 4096, 8192, 65536, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 44, (1 << 63) - 1, 1 << 63, (1 << 64) - 1))
    return rng.getrandbits(rng.choice((8, 16, 32, 48, 64)))


def content(rng, kind, names=netlink.NAMES):
    """Mostly what this attribute should hold."""
    name = names.get(kind)
    dice = rng.random()
    if dice < 0.08:
        return rng.randbytes(rng.choice((0, 1, 2, 3, 4, 5, 7, 8, 9, 31, 32, 33, 64, 300)))
    if name in netlink.TEXTS:
        return rng.choice(NAMES) if dice < 0.9 else rng.choice((b"", b"\0", b"-\0", b"a/b\0", b"a", b"\xff\0", b"a\0b\0"))
    if name in netlink.FLAGS:
        return b""
    return uint(number(rng)) if dice < 0.9 else struct.pack("=Q", number(rng))


def genl_attributes(rng, command):
    """The attributes of a request for the family, as bytes."""
    wanted = {"domain-new": ["domain", "memory", "cow-limit", "cow-policy", "hot-limit"], "epoch-seal": ["domain", "full", "keep-passthrough"], "epoch-commit": ["domain", "epoch"],
              "epoch-abort": ["domain", "epoch"], 
              "domain-set": ["domain", "limit-packets", "limit-bytes", "own", "cow-limit", "cow-policy", "hot-limit", "passthrough", "hold"]}
    kinds = [ATTR[n] for n in wanted.get(command, ["domain"]) if n == "domain" or rng.random() < 0.7]
    if command == "domain-new" and rng.random() < 0.7:
        kinds = kinds[:1]  # memory takes its time
    if rng.random() < 0.15:
        kinds.insert(rng.randrange(len(kinds) + 1), rng.choice((*ATTR.values(), 0, len(ATTR) + 1, len(ATTR) + 2, 255, 0x3FFF, 0xFFFF)))
    if rng.random() < 0.05:
        kinds.append(rng.choice(kinds))
    out = b""
    for kind in kinds:
        data = content(rng, kind)
        if command == "domain-new" and kind == ATTR["memory"] and rng.random() < 0.9:
            data = uint(rng.choice((4096, 8192, 65536)))
        if rng.random() < 0.02:
            kind |= NESTED
        out += attr(kind, data)
    return out


def genl_message(rng, family):
    command = rng.choice(tuple(CMD))
    head = struct.pack("=BBH", CMD[command] if rng.random() < 0.97 else rng.randrange(256),
                       1 if rng.random() < 0.97 else rng.randrange(256), 0 if rng.random() < 0.99 else rng.randrange(1 << 16))
    flags = DUMP if command == "port-get" or rng.random() < 0.02 else 0
    return family, flags, head + genl_attributes(rng, command)


def tc_options(rng):
    out = b""
    for kind, good in ((1, lambda: rng.choice(NAMES)), (2, lambda: struct.pack("B", rng.randrange(4))),
                       (3, lambda: struct.pack("=I", number(rng) & 0xFFFFFFFF)), (4, lambda: struct.pack("=Q", number(rng))),
                       (5, lambda: struct.pack("B", rng.randrange(3)))):
        if rng.random() < 0.4:
            out += attr(kind, good() if rng.random() < 0.93 else rng.randbytes(rng.randrange(12)))
    if rng.random() < 0.05:
        out += attr(rng.randrange(1 << 16), rng.randbytes(rng.randrange(20)))
    return out


def tc_message(rng, devices):
    kind, flags = rng.choice(((36, CREATE | EXCL), (36, CREATE | REPLACE), (36, 0), (36, CREATE), (37, 0), (38, 0), (38, DUMP)))
    index = rng.choice(devices) if rng.random() < 0.98 else rng.getrandbits(31)
    parent = netlink.TC_H_ROOT if rng.random() < 0.9 else rng.choice((0, 0xFFFFFFF1, 0xFFFFFFF2, 0x10001, rng.getrandbits(32)))
    handle = 0 if rng.random() < 0.8 else rng.choice((0x10000, 0x50000, rng.getrandbits(32)))
    payload = struct.pack("=BxxxiIII", 0, index, handle, parent, 0)
    if rng.random() < 0.95:
        payload += attr(1, text("remus") if rng.random() < 0.97 else rng.choice((b"remus", b"pfifo\0", b"remus_\0", b"\0", b"")))
    if rng.random() < 0.8:
        payload += attr(2 | (NESTED if rng.random() < 0.3 else 0), tc_options(rng) if rng.random() < 0.97 else rng.randbytes(rng.randrange(40)))
    return kind, flags, payload


def datagram(rng, make, pool):
    """A batch of messages: new ones, and ones from the pool, with a byte changed in some."""
    out = bytearray()
    for _ in range(BATCH):
        if len(pool) < 3000 or rng.random() < 0.15:
            kind, flags, payload = make(rng)
            message = HEADER.pack(HEADER.size + len(payload), kind, flags | REQUEST | (ACK if rng.random() < 0.1 else 0), 1, 0) + payload
            message += b"\0" * (-len(message) % 4)
            if len(pool) < 3000:
                pool.append(message)
            else:
                pool[rng.randrange(3000)] = message
        else:
            message = rng.choice(pool)
        if rng.random() < 0.25:
            message = bytearray(message)
            # Not the type: this is about remus. The length only now and then: it ends the batch.
            at = rng.randrange(16, len(message)) if rng.random() < 0.98 else rng.choice((0, 1, 6, 7))
            message[at] = rng.choice((0, 1, 0xFF, message[at] ^ (1 << rng.randrange(8)), rng.randrange(256)))
        out += message
    return bytes(out)


def drain(sock):
    """Ends dumps that are in progress; the rest does not matter."""
    with contextlib.suppress(BlockingIOError):
        for _ in range(2000):
            try:
                sock.recv(1 << 15)
            except OSError as error:
                if isinstance(error, BlockingIOError):
                    raise


@test(seconds=1800)
def messages(stack):
    """Tens of thousands of them; 1,000,000 with --long."""
    rng = random.Random(SEED)
    rtnl = stack.enter_context(Rtnl())
    names = [f"t-f{i}" for i in range(DEVICES)]
    stack.callback(lambda: [rtnl.delete(n) for n in names if n in rtnl.names()])
    for name in names:
        if name.endswith("0"):
            rtnl.veth(name, name + "p")
        else:
            rtnl.add(name, "dummy")
    devices = [socket.if_nametoindex(n) for n in names]
    senders = [Sender(n) for n in [*names, "t-f0p"]]
    for s in senders:
        stack.callback(s.close)
    count, done = scaled(10_000 if DEBUG else 40_000, 1_000_000), 0
    start = time.monotonic()
    genls = [Genl() for _ in range(3)]
    tcs = [Rtnl() for _ in range(2)]
    pools = {"genl": [], "tc": []}
    for s in genls + tcs:
        s.sock.setblocking(False)
        s.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    turn, reached = 0, set()
    watch = stack.enter_context(Genl())

    def alive():
        """Domains of which epochs were sealed: not all was refused."""
        return {name for name, epoch in reached if epoch > 1}
    # What the seed has not come to so far comes with more of it.
    while done < count or len(alive()) < 3 and done < 50 * count:
        turn += 1
        # A qdisc that comes or goes waits for a grace period or two: fewer of those.
        if rng.random() < 0.92:
            s = rng.choice(genls)
            batch = datagram(rng, lambda r: genl_message(r, genls[0].family), pools["genl"])
        else:
            s = rng.choice(tcs)
            batch = datagram(rng, lambda r: tc_message(r, devices), pools["tc"])
        with contextlib.suppress(OSError):
            s.sock.send(batch)
        done += BATCH
        if turn % 8 == 0:
            drain(s.sock)
            harness.LOG.keep()
            reached.update((d["domain"], d["open-epoch"]) for d in watch.dump())
            # Packets, so that there is something to hold, release and drop.
            for sender in senders:
                with contextlib.suppress(OSError):
                    sender.send(turn)
        if turn % 200 == 0:
            # What owns a domain, or keeps a dump, comes and goes.
            i = rng.randrange(len(genls))
            genls[i].close()
            genls[i] = Genl()
            genls[i].sock.setblocking(False)
            genls[i].sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    took = time.monotonic() - start
    print(f"# {done} messages in {took:.0f} s, {1e6 * took / done:.0f} us each; seed {SEED}", flush=True)
    for s in genls + tcs:
        s.close()
    genl = stack.enter_context(Genl())
    print(f"# {len(reached)} states of {len({name for name, _ in reached})} domains seen", flush=True)
    true(len(alive()) > 2, f"domains and their open epochs: {sorted(reached)}")
    # All of it can be taken away, also from devices whose number a changed byte made,
    for name in rtnl.names():
        with contextlib.suppress(OSError):
            rtnl.qdisc_del(name)
    for domain in genl.dump():
        same(domain["ports"], 0, f"ports of {domain['domain']}")
        genl.delete(domain["domain"])
    same(genl.dump(), [], "domains")
    # and all works.
    line = Line(stack, "guest", domain="web")
    line.send(1, 2)
    genl.commit("web", genl.seal("web")["epoch"])
    line.receiver.expect([1, 2], "afterwards")
    line.remove()


class RamCalls:
    """Random calls of a RAM device of `pages` pages, by one thread; what they may answer is all that is checked."""

    ANSWERS = {errno.EINVAL, errno.ENOENT, errno.EFAULT, errno.ENOTTY, errno.ENXIO, errno.EACCES, errno.ENOMEM, errno.ESTALE,
               errno.ECANCELED, errno.EOVERFLOW, errno.EBUSY, errno.EALREADY, errno.EPERM, errno.EAGAIN, errno.EIO}

    def __init__(self, rng, pages):
        self.rng, self.pages = rng, pages
        self.genl = Genl()
        self.fd = os.open("/dev/remus/web", os.O_RDWR | os.O_CLOEXEC)
        # With room on both sides: what the kernel is told to write beside the buffer must not hit something else.
        self.buffer = ctypes.create_string_buffer(24 * ram.RECORD)
        self.where = ctypes.addressof(self.buffer) + 8 * ram.RECORD
        self.maps, self.open, self.done, self.refused = [], 1, 0, 0

    def number(self):
        """A number that means something here, or any."""
        return self.rng.choice((self.rng.randrange(self.pages + 2), self.open, self.open - 1, max(0, self.open - 2),
                                ram.END, number(self.rng)))

    def address(self):
        where, large = self.where, [at for at, length, _ in self.maps if length >= 3 * PAGE]
        if large and self.rng.random() < 0.2:
            return self.rng.choice(large) + self.rng.randrange(PAGE)
        return where if self.rng.random() < 0.9 else where + self.rng.randrange(-PAGE, 8 * PAGE) if self.rng.random() < 0.3 else number(self.rng)

    def read(self):
        length = self.rng.choice((8 * ram.RECORD, ram.RECORD, 3 * ram.RECORD, self.rng.randrange(9000)))
        if self.rng.random() < 0.9:
            at = self.where
        else:
            at, length = self.address(), 0 if self.rng.random() < 0.2 else ram.RECORD
        fcntl.ioctl(self.fd, ram.READ, bytearray(ram.READ_STRUCT.pack(
            self.number(), self.number(), self.number(), at % (1 << 64), length, 0, self.rng.choice((0, 0, 1, 2, 1 << 31)),
            self.rng.choice((0, 0, 0, 1)))))

    def bitmap(self):
        arg = bytearray(ram.BITMAP_STRUCT.pack(self.number(), *(self.rng.getrandbits(64) for _ in range(3))))
        fcntl.ioctl(self.fd, ram.BITMAP, arg)
        self.map(*ram.BITMAP_STRUCT.unpack(arg)[1:3])

    def ioctl(self):
        command = self.rng.choice((ram.READ, ram.BITMAP)) ^ (1 << self.rng.randrange(32) if self.rng.random() < 0.8 else 0)
        libc.ioctl(self.fd, command, self.where if self.rng.random() < 0.7 else number(self.rng))

    def map(self, offset=None, length=None):
        if offset is None:
            offset = self.rng.choice((0, self.rng.randrange(self.pages) * PAGE, self.number() % (1 << 51) * PAGE,
                                      (1 << 52) + (self.number() % (1 << 32) << 30)))
            length = self.rng.choice((PAGE, self.pages * PAGE, self.rng.randrange(1, self.pages + 2) * PAGE))
        prot = self.rng.choice((0, 1, 1, 3, 3, 5, 7))
        flags = self.rng.choice((1, 1, 1, 1, 2, 3, 0x8001))
        at = libc.mmap(None, length, prot, flags, self.fd, ctypes.c_long(offset % (1 << 63)))
        if at == ram.FAILED:
            raise OSError(ctypes.get_errno(), "mmap")
        self.maps.append((at, length, prot))
        if prot & 2:
            ctypes.memset(at + self.rng.randrange(length), self.rng.randrange(256), 1)
        elif prot & 1:
            ctypes.string_at(at + self.rng.randrange(length), 1)

    def unmap(self):
        if self.maps:
            at, length, prot = self.maps.pop(self.rng.randrange(len(self.maps)))
            dice = self.rng.random()
            if dice < 0.2:
                libc.madvise(at, length, self.rng.choice((4, 8, 9, 14, 21)))
            elif dice < 0.4:
                libc.mprotect(at, PAGE, self.rng.choice((0, 1, prot)))
            elif dice < 0.5:
                libc.msync(ctypes.c_void_p(at), ctypes.c_size_t(length), 4)
            elif dice < 0.6 and length > PAGE:
                libc.munmap(at + PAGE * self.rng.randrange(length // PAGE), PAGE)
            libc.munmap(at, length)

    def file(self):
        where = self.number() % (1 << 63)
        size = self.rng.choice((0, 1, PAGE, 3 * PAGE + 1))
        if self.rng.random() < 0.5:
            os.pread(self.fd, size, where)
        else:
            os.pwrite(self.fd, self.rng.randbytes(size), where)

    def reopen(self):
        os.close(self.fd)
        self.fd = os.open("/dev/remus/web", os.O_RDWR | os.O_CLOEXEC)

    def epochs(self):
        self.open = self.genl.get("web")["open-epoch"]
        dice = self.rng.random()
        if dice < 0.5:
            self.genl.seal("web", full=self.rng.random() < 0.1)
        elif dice < 0.75:
            self.genl.commit("web", self.open - self.rng.randrange(1, 5) if self.open > 5 else 1)
        elif dice < 0.95:
            self.genl.abort("web", self.open - self.rng.randrange(1, 5) if self.open > 5 else 1)
        else:
            # Without a limit, or with the policy to fail: nobody is there to read for a writer that waits.
            self.genl.set("web", cow_limit=self.rng.choice((0, PAGE, 20 * PAGE)), cow_policy=2, hot_limit=self.rng.choice((0, 7 * PAGE, 1 << 20)))

    def one(self):
        calls = (self.read, self.bitmap, self.ioctl, self.map, self.unmap, self.file, self.epochs, self.reopen)
        call, = self.rng.choices(calls, (30, 8, 8, 8, 12, 20, 8, 1))
        self.done += 1
        try:
            call()
        except OSError as error:
            true(error.errno in self.ANSWERS, f"{call.__name__}: {error}")
            self.refused += 1
        if len(self.maps) > 30:
            self.unmap()

    def close(self):
        while self.maps:
            at, length, _ = self.maps.pop()
            libc.munmap(at, length)
        os.close(self.fd)
        self.genl.close()


@test(seconds=1800)
def ram_calls(stack):
    """Random ioctl, mmap and read calls, by two processes at once."""
    pages = 300
    with Genl() as genl:
        genl.new("web", pages * PAGE)
    stack.callback(lambda: Genl().delete("web"))
    count = scaled(2_500 if DEBUG else 20_000, 500_000)

    def caller(who):
        calls = RamCalls(random.Random(SEED + who), pages)
        while calls.done < count:
            calls.one()
        calls.close()
        return calls.done, calls.refused
    start = time.monotonic()
    results = [kid.result() for kid in [Kid(caller, who) for who in range(2)]]
    took, done = time.monotonic() - start, sum(d for d, _ in results)
    print(f"# {done} calls in {took:.0f} s, refused {sum(r for _, r in results)}; seed {SEED}", flush=True)
    true(all(count / 20 < refused < count * 0.9 for _, refused in results), f"refused: {results}")
    # All works afterwards.
    with Genl() as genl, Ram("web") as device, device.map() as memory:
        genl.set("web", cow_limit=0)
        for said in b"first", b"second":
            # Of a hot page only what has changed is in an epoch.
            memory.write(7 * PAGE, said)
            epoch = genl.seal("web")["epoch"]
        same(device.epoch(epoch)[7][:6], b"second", "afterwards")
