# SPDX-License-Identifier: GPL-2.0
"""Everything at once on two processors. What must hold: no report, no crash, no leak; it unloads afterwards."""
import contextlib
import errno
import mmap
import os
import random
import time

import harness
import net
from harness import Kid, SEED, scaled, test, true, until
from netlink import EGRESS, GUEST, Genl, Refused, Rtnl, options
from ram import PAGE, Ram

# What a command may say when another one was faster.
FINE = {errno.ENOENT, errno.EEXIST, errno.EBUSY, errno.EINVAL, errno.EALREADY, errno.ENODEV, errno.ENXIO,
        errno.ENOBUFS, errno.ENETDOWN, errno.EAGAIN, errno.ENOTCONN, errno.EOPNOTSUPP, errno.EIO, errno.EBADF, errno.EPERM}


class Crowd:
    """Processes that each do something over and over until told to stop."""

    def __init__(self, seconds):
        self.stop = mmap.mmap(-1, PAGE)
        self.seconds, self.kids = seconds, {}

    def go(self, function, *args, name=None):
        name = name or function.__name__

        def loop():
            rng, turns = random.Random(SEED + len(self.kids)), 0
            with contextlib.ExitStack() as inner:
                step = function(inner, *args)
                # On a busy machine some are slow: each has its turns, however long that takes.
                while not self.stop[0] or turns < 3:
                    try:
                        step(rng)
                    except OSError as error:
                        if error.errno not in FINE:
                            raise
                    turns += 1
            return turns
        self.kids[name] = Kid(loop)

    def wait(self):
        end = time.monotonic() + self.seconds
        while time.monotonic() < end and all(kid.alive() for kid in self.kids.values()):
            time.sleep(0.05)
        self.stop[0] = 1
        turns = {name: kid.result() for name, kid in self.kids.items()}
        idle = [name for name, n in turns.items() if n < 3]
        true(not idle, f"hardly anything was done by {idle}: {turns}")
        return turns


def epochs(inner, domain):
    genl = inner.enter_context(Genl())

    def step(rng):
        done = genl.seal(domain)["epoch"]
        dice = rng.random()
        if dice < 0.4:
            genl.commit(domain, done)
        elif dice < 0.7:
            genl.commit(domain, max(1, done - rng.randrange(4)))
        elif dice < 0.85:
            genl.abort(domain, max(1, done - rng.randrange(3)))
        else:
            genl.get(domain)
    return step


def sender(inner, device):
    out = net.Sender(device)
    inner.callback(out.close)
    count = [0]

    def step(rng):
        count[0] += 1
        out.send(count[0], size=rng.choice((60, 60, 1400)))
    return step


def adder(inner, device, *choices):
    rtnl = inner.enter_context(Rtnl())

    def step(rng):
        dice = rng.random()
        if dice < 0.35:
            rtnl.qdisc_add(device, options=options(*rng.choice(choices)))
        elif dice < 0.7:
            rtnl.qdisc_del(device)
        elif dice < 0.8:
            rtnl.qdisc_replace(device, handle=rng.randrange(1, 9) << 16, options=options(*rng.choice(choices)))
        elif dice < 0.88:
            rtnl.qdisc_change(device, options=options(packets=rng.randrange(1000)))
        elif dice < 0.94:
            rtnl.qdisc_get(device)
        else:
            rtnl.set(device, up=False)
            rtnl.set(device, up=True)
    return step


def domains(inner, *names):
    genl = inner.enter_context(Genl())

    def step(rng):
        name = rng.choice(names)
        if rng.random() < 0.5:
            genl.new(name, rng.choice((None, 1 << 20, 4 << 20)))
        else:
            genl.delete(name)
        if rng.random() < 0.2:
            genl.dump()
    return step


def writer(inner, *names):
    held = []

    def step(rng):
        if not held or rng.random() < 0.02:
            while held:
                held.pop().close()
            device = Ram(rng.choice(names))
            try:
                device.map()
            except OSError:
                device.close()
                raise
            held.append(device)
            inner.callback(device.close)
        m = held[0].maps[0]
        at = rng.randrange(m.length - 8)
        if rng.random() < 0.8:
            m.write(at, b"w" * 8)
        else:
            os.pwrite(held[0].fd, b"p" * 5000, at)
        if rng.random() < 0.02:
            m.madvise(4)
    return step


def reader(inner, *names):
    genl = inner.enter_context(Genl())

    def step(rng):
        name = rng.choice(names)
        with Ram(name) as device:
            newest = genl.get(name)["open-epoch"]
            for back in 1, 2, 3:
                with contextlib.suppress(OSError):
                    device.records(max(0, newest - back), rng.choice((1, 16)))
    return step


def toucher(inner, device):
    """A device that comes and goes."""
    rtnl = inner.enter_context(Rtnl())

    def step(rng):
        rtnl.veth(device, device + "x")
        with contextlib.suppress(OSError):
            rtnl.qdisc_add(device, options=options("web", rng.choice((GUEST, EGRESS))))
            out = [net.Sender(device), net.Sender(device + "x")]
            for one in out:
                with contextlib.suppress(OSError):
                    one.send(1, 2, 3)
                one.close()
        rtnl.delete(device)
    return step


def settle(genl):
    """Deletes every domain; none may be stuck."""
    def empty():
        for d in genl.dump():
            with contextlib.suppress(Refused):
                genl.delete(d["domain"])
        return not genl.dump()
    until(empty, "every domain can be deleted")


def lines(stack, *kinds):
    return [net.Line(stack, kind, add=False) for kind in kinds]


@test(seconds=1200)
def packets_and_epochs(stack):
    """Floods through ports of one domain, while it seals, commits and aborts."""
    genl = stack.enter_context(Genl())
    genl.new("web", 1 << 20)
    crowd = Crowd(scaled(5, 60))
    used = lines(stack, "egress", "guest", "bridge")
    for line in used:
        line.add("web", packets=2000)
        crowd.go(sender, line.device if line.kind == "egress" else line.peer, name=f"sender {line.kind}")
    for i in 1, 2:
        crowd.go(epochs, "web", name=f"epochs {i}")
    crowd.wait()
    genl.commit("web", genl.seal("web")["epoch"])
    for one in used:
        one.remove()
    settle(genl)


@test(seconds=1200)
def ports_come_and_go(stack):
    """Qdiscs added, replaced, deleted, the device down and up, under a flood and commits."""
    genl = stack.enter_context(Genl())
    crowd = Crowd(scaled(6, 60))
    both = [("web", GUEST), ("web", EGRESS), ("other", GUEST), (None, EGRESS, 50)]
    for line in lines(stack, "egress", "guest"):
        crowd.go(adder, line.device, *both, name=f"adder {line.kind}")
        crowd.go(sender, line.device, name=f"sender {line.kind}")
        crowd.go(sender, line.peer, name=f"sender of the peer {line.kind}")
    crowd.go(epochs, "web")
    crowd.go(toucher, "t-come")
    crowd.go(domains, "web", "other")
    crowd.wait()
    with Rtnl() as rtnl:
        for name in rtnl.names():
            if name.startswith("t-"):
                with contextlib.suppress(OSError):
                    rtnl.qdisc_del(name)
    settle(genl)


@test(seconds=1200)
def memory(stack):
    """Writers, readers, epochs, and domains that come and go."""
    genl = stack.enter_context(Genl())
    genl.new("stays", 2 << 20)
    crowd = Crowd(scaled(6, 60))
    for i in 1, 2:
        crowd.go(writer, "stays", "web", name=f"writer {i}")
    crowd.go(epochs, "stays", name="epochs stays")
    crowd.go(epochs, "web", name="epochs web")
    crowd.go(reader, "stays", "web")
    crowd.go(domains, "web")
    crowd.wait()
    settle(genl)


@test(seconds=1200)
def everything(stack):
    """All of it."""
    genl = stack.enter_context(Genl())
    genl.new("stays", 2 << 20)
    crowd = Crowd(scaled(6, 120))
    line, = lines(stack, "bridge")
    line.add("stays", packets=500)
    crowd.go(sender, line.peer)
    other, = lines(stack, "egress")
    crowd.go(adder, other.device, ("stays", GUEST), ("stays", EGRESS), ("web", EGRESS))
    crowd.go(sender, other.device, name="sender egress")
    crowd.go(writer, "stays", "web")
    crowd.go(reader, "stays", "web")
    crowd.go(epochs, "stays", name="epochs stays")
    crowd.go(epochs, "web", name="epochs web")
    crowd.go(domains, "web", "more")
    crowd.wait()
    for one in line, other:
        with contextlib.suppress(OSError):
            one.remove()
    settle(genl)


@test(seconds=1200)
def deleted_and_made_again(stack):
    """A domain is deleted, and made again at once, while its last port still drops what it held."""
    genl = stack.enter_context(Genl())
    line, = lines(stack, "guest")
    for _ in range(scaled(2)):
        genl.new("web", 1 << 20)
        line.add("web")
        for n in range(8000):
            line.send(n)
        kid = Kid(line.remove)
        while True:
            try:
                genl.delete("web")
                break
            except Refused as error:
                true(error.errno == errno.EBUSY, error)
        genl.new("web", 1 << 20)
        with Ram("web") as device:
            device.map().write(0, b"new")
        kid.result()
        genl.delete("web")


@test(seconds=1200)
def killed(stack):
    """The processes of a protected machine die in the middle of what they do."""
    genl = stack.enter_context(Genl())
    genl.new("web", 1 << 20)
    line, = lines(stack, "guest")
    line.add("web")

    def busy(function, *args):
        with contextlib.ExitStack() as inner:
            step, rng = function(inner, *args), random.Random(os.getpid())
            while True:
                with contextlib.suppress(OSError):
                    step(rng)
    for turn in range(scaled(12)):
        kids = [Kid(busy, *what) for what in ((epochs, "web"), (writer, "web"), (reader, "web"), (sender, line.peer))]
        time.sleep(0.1 + 0.03 * turn)
        for kid in kids:
            kid.kill()
        for kid in kids:
            kid.reap()
        genl.seal("web")
    line.remove()
    settle(genl)


@test(loaded=False, seconds=1200)
def load_and_unload(stack):
    """Unloading while others try to use it."""
    crowd = Crowd(scaled(5, 60))
    line, = lines(stack, "egress")

    def loader(inner):
        def step(rng):
            if rng.random() < 0.5:
                harness.load()
            else:
                harness.unload()
        return step

    def user(inner):
        def step(rng):
            with Genl() as genl:
                genl.new("web", 1 << 20)
                genl.seal("web")
                with contextlib.suppress(OSError), Ram("web") as device:
                    device.map().write(0, b"x")
                with contextlib.suppress(OSError):
                    genl.delete("web")
        return step

    def qdiscs(inner):
        rtnl = inner.enter_context(Rtnl())

        def step(rng):
            with contextlib.suppress(OSError):
                rtnl.qdisc_add(line.device, options=options(None, GUEST))
            rtnl.qdisc_del(line.device)
        return step
    crowd.go(loader)
    crowd.go(user)
    crowd.go(qdiscs)
    crowd.go(sender, line.device)
    try:
        crowd.wait()
    finally:
        with contextlib.suppress(OSError):
            line.remove()
        if harness.is_loaded():
            harness.unload(wait=5)
