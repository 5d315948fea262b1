# SPDX-License-Identifier: GPL-2.0
"""Wrong input: each a clear error, and nothing changed."""
import contextlib
import errno
import mmap
import os
import pickle
import random
import signal
import socket
import struct
import time

import harness
import net
import netlink
import ram
from harness import Kid, Skip, same, scaled, test, true, until
from netlink import ATTR, CMD, EGRESS, GUEST, Listener, Refused, Rtnl, attr, options, text, u8, u32, u64, uint

DOMAIN, MEMORY, EPOCH, FULL = (ATTR[n] for n in ("domain", "memory", "epoch", "full"))
KEEP, PASSTHROUGH, HOLD = (ATTR[n] for n in ("keep-passthrough", "passthrough", "hold"))
PACKETS, BYTES, OWN = (ATTR[n] for n in ("limit-packets", "limit-bytes", "own"))
# What each command accepts besides the name.
COW = {ATTR["cow-limit"], ATTR["cow-policy"], ATTR["hot-limit"]}
ACCEPTS = {"domain-new": {MEMORY} | COW, "epoch-seal": {FULL, KEEP}, "epoch-commit": {EPOCH}, "epoch-abort": {EPOCH},
           "domain-set": {PACKETS, BYTES, OWN, PASSTHROUGH, HOLD} | COW}


def send(genl, command, attrs, **more):
    """Sends a command; port-get knows only the dump."""
    return genl.raw(CMD[command], attrs, flags=netlink.DUMP if command == "port-get" else 0, **more)


def sentence(error):
    message = error.message or ""
    true(len(message.strip()) >= 8, f"no sentence in the extended acknowledgement: {error}")
    true(message.isprintable(), f"odd characters in {message!r}")


def refused(function, *codes, bad=None, missing=None, message=True, state=None):
    """`function` is refused in all the ways that count; `state` is the same before and after."""
    before = state() if state else None
    try:
        reply = function()
    except Refused as error:
        true(error.errno in codes, f"{error} instead of {[errno.errorcode[c] for c in codes]}")
        if message:
            sentence(error)
        if bad is not None:
            same(error.bad, bad, f"offending attribute ({error})")
        if missing is not None:
            same(error.missing, missing, f"missing attribute ({error})")
    else:
        raise AssertionError(f"no error, but {reply}, instead of {[errno.errorcode[c] for c in codes]}")
    if state:
        same(state(), before, "something has changed")


def fixture(stack):
    """A domain in the middle of its life: 1, 2 committed, 3 aborted, 4 and 5 sealed, 6 open."""
    genl = stack.enter_context(netlink.Genl())
    genl.new("web", 1 << 20)
    stack.callback(genl.delete, "web")
    with ram.Ram("web") as device:
        m = device.map()
        for n in range(1, 6):
            m.write(n * 4096, b"%d" % n)
            genl.seal("web")
            if n == 2:
                genl.commit("web", 2)
            if n == 3:
                genl.abort("web", 3)
        m.write(6 * 4096, b"6")
    return genl


@test
def names(stack):
    genl = fixture(stack)
    for command in CMD:
        more = [(EPOCH, uint(4))] if command in ("epoch-commit", "epoch-abort") else []

        def call(name):
            return lambda: send(genl, command, [(DOMAIN, name), *more])
        if command != "port-get":
            refused(lambda: send(genl, command, more), errno.EINVAL, missing=DOMAIN, state=genl.dump)
        for name in (b"\0", b"-web\0", b".web\0", b"_web\0", b"we b\0", b"we/b\0", b"../web\0", b"w\xc3\xa9b\0", b"we\x07b\0",
                     b"web\n\0", b"w:b\0", b"\xff\0"):
            refused(call(name), errno.EINVAL, bad=DOMAIN, state=genl.dump)
        for name in (b"", b"web", b"w" * 32 + b"\0", b"w" * 31 + b"x", b"w" * 200 + b"\0", b"w" * 4000, b"w" * 30000):
            refused(call(name), errno.EINVAL, errno.ERANGE, bad=DOMAIN, state=genl.dump)
        if command != "domain-new":
            refused(call(b"nobody\0"), errno.ENOENT, bad=DOMAIN, state=genl.dump)
            refused(call(b"WEB\0"), errno.ENOENT, bad=DOMAIN, state=genl.dump)
            refused(call(b"we\0"), errno.ENOENT, bad=DOMAIN, state=genl.dump)
    # Names that are fine: the longest, the shortest, all marks.
    for name in "w" * 31, "0", "Z", "a..b--c__", "9.9":
        same(genl.new(name)["domain"], name, "name")
        genl.delete(name)


@test
def uints(stack):
    """Numbers of a wrong length, in every command that takes one."""
    genl = fixture(stack)
    for command, number in (("domain-new", MEMORY), ("epoch-commit", EPOCH), ("epoch-abort", EPOCH),
                            ("domain-set", PACKETS), ("domain-set", BYTES)):
        name = b"new\0" if command == "domain-new" else b"web\0"
        for length in 0, 1, 2, 3, 5, 6, 7, 9, 12, 16, 1000:
            data = (b"\4" + b"\0" * 1000)[:length]
            refused(lambda: genl.raw(CMD[command], [(DOMAIN, name), (number, data)]),
                    errno.EINVAL, errno.ERANGE, bad=number, state=genl.dump)
    # Four and eight bytes are the same number.
    same(genl.raw(CMD["epoch-commit"], [(DOMAIN, b"web\0"), (EPOCH, u32(4))])[0]["epoch"], 4, "u32")
    same(genl.raw(CMD["epoch-commit"], [(DOMAIN, b"web\0"), (EPOCH, u64(5))])[0]["epoch"], 5, "u64")


@test
def attributes(stack):
    """Unknown attributes, those of other commands, trailing bytes, broken lengths."""
    genl = fixture(stack)
    for command in CMD:
        base = [(DOMAIN, b"other\0" if command == "domain-new" else b"web\0")]
        if EPOCH in ACCEPTS.get(command, ()):
            base.append((EPOCH, u32(4)))
        for kind in ATTR.values():
            if kind == DOMAIN or kind in ACCEPTS.get(command, ()):
                continue
            name = netlink.NAMES[kind]
            data = b"" if name in netlink.FLAGS else b"web\0" if name in netlink.TEXTS else u32(4)
            refused(lambda: send(genl, command, base + [(kind, data)]), errno.EINVAL, bad=kind, state=genl.dump)
        for kind in 0, max(ATTR.values()) + 1, max(ATTR.values()) + 2, 100, 0x3FFF:
            refused(lambda: send(genl, command, base + [(kind, u32(1))]), errno.EINVAL, state=genl.dump)
        refused(lambda: send(genl, command, base, tail=b"\1\2\3"), errno.EINVAL, state=genl.dump)
        refused(lambda: send(genl, command, base, tail=struct.pack("=HH", 3, 2)), errno.EINVAL, state=genl.dump)
        refused(lambda: send(genl, command, base, tail=struct.pack("=HH", 200, 4) + u32(1)), errno.EINVAL, state=genl.dump)
        # NLA_F_NESTED on a plain attribute.
        refused(lambda: send(genl, command, [(DOMAIN | netlink.NESTED, base[0][1])] + base[1:]), errno.EINVAL, bad=DOMAIN, state=genl.dump)
        # Reserved bits of the generic header.
        refused(lambda: send(genl, command, base, reserved=1), errno.EINVAL, message=False, state=genl.dump)
    # What a domain without memory cannot have; and no policy has this number.
    for command, name in ("domain-new", b"other\0"), ("domain-set", b"bare\0"):
        if command == "domain-set":
            genl.new("bare")
        for kind in sorted(COW):
            refused(lambda: send(genl, command, [(DOMAIN, name), (kind, u32(1))]), errno.EINVAL, bad=kind, state=genl.dump)
    genl.delete("bare")
    refused(lambda: genl.new("other", 4096, cow_policy=3), errno.EINVAL, bad=ATTR["cow-policy"], state=genl.dump)
    # A flag has no content.
    for command, flag in (("epoch-seal", FULL), ("epoch-seal", KEEP), ("domain-set", OWN), ("domain-set", PASSTHROUGH),
                          ("domain-set", HOLD)):
        refused(lambda: genl.raw(CMD[command], [(DOMAIN, b"web\0"), (flag, u32(1))]), errno.EINVAL, errno.ERANGE, bad=flag, state=genl.dump)
    for command in "epoch-commit", "epoch-abort":
        refused(lambda: genl.raw(CMD[command], [(DOMAIN, b"web\0")]), errno.EINVAL, missing=EPOCH, state=genl.dump)
    # No commands, events, and what can only be dumped.
    for number in 0, *netlink.EVENTS.values(), max(netlink.EVENTS.values()) + 1, 100, 255, CMD["port-get"]:
        refused(lambda: genl.raw(number, [(DOMAIN, b"web\0")]), errno.EOPNOTSUPP, message=False, state=genl.dump)
    # A dump of what cannot be dumped.
    for command in set(CMD) - {"domain-get", "port-get"}:
        refused(lambda: genl.raw(CMD[command], [(DOMAIN, b"web\0")], flags=netlink.DUMP), errno.EOPNOTSUPP, message=False, state=genl.dump)
    # A message that ends inside its header.
    for length in 0, 1, 3:
        refused(lambda: genl.request(genl.family, 0, b"\1\1\0"[:length]), errno.EINVAL, message=False, state=genl.dump)
    # The last of two equal attributes counts, or it is refused; never both.
    both = [(DOMAIN, b"web\0"), (EPOCH, u32(999)), (EPOCH, u32(4))]
    same(genl.raw(CMD["epoch-commit"], both)[0]["epoch"], 4, "the last one counts")


@test
def epochs(stack):
    """1, 2 committed, 3 aborted, 4 and 5 sealed, 6 open."""
    genl = fixture(stack)
    state = genl.dump
    for command in genl.commit, genl.abort:
        refused(lambda: command("web", 0), errno.EINVAL, bad=EPOCH, state=state)
        for n in 1, 2:
            refused(lambda: command("web", n), errno.EALREADY, bad=EPOCH, state=state)
        refused(lambda: command("web", 3), errno.EINVAL, bad=EPOCH, state=state)
        refused(lambda: command("web", 6), errno.EINVAL, bad=EPOCH, state=state)
        for n in 7, 8, 1 << 31, (1 << 32) - 1, 1 << 32, (1 << 32) + 4, 1 << 63, (1 << 64) - 1:
            refused(lambda: command("web", n), errno.EINVAL, bad=EPOCH, state=state)
    refused(lambda: genl.seal("web", full=True), errno.EBUSY, state=state)
    genl.commit("web", 4)
    refused(lambda: genl.commit("web", 4), errno.EALREADY, bad=EPOCH, state=state)
    refused(lambda: genl.abort("web", 4), errno.EALREADY, bad=EPOCH, state=state)
    genl.abort("web", 5)
    refused(lambda: genl.commit("web", 5), errno.EINVAL, bad=EPOCH, state=state)
    refused(lambda: genl.abort("web", 5), errno.EINVAL, bad=EPOCH, state=state)
    same((genl.get("web")["open-epoch"], genl.get("web")["sealed-epochs"]), (6, 0), "open and sealed")


@test
def gaps(stack):
    """More aborts between sealed epochs than are remembered: refused, and curable."""
    genl = stack.enter_context(netlink.Genl())
    genl.new("web", 1 << 20)
    stack.callback(genl.delete, "web")
    try:
        for i in range(100):
            genl.seal("web")
            n = genl.seal("web")["epoch"]
            genl.abort("web", n)
    except Refused as error:
        same(error.errno, errno.EBUSY, "too many gaps")
        sentence(error)
        refused(lambda: genl.seal("web"), errno.EBUSY, state=genl.dump)
        view = genl.get("web")
        for n in range(view["committed-epoch"] + 1, view["open-epoch"]):
            try:
                genl.commit("web", n)
                break
            except Refused:
                pass
        genl.seal("web")
    same(genl.get("web")["sealed-epochs"] > 0, True, "sealed epochs")
    # Everything in one commit.
    genl.commit("web", genl.seal("web")["epoch"])
    view = genl.get("web")
    same((view["sealed-epochs"], view["committed-epoch"]), (0, view["open-epoch"] - 1), "all committed")


@test(seconds=1200)
def memory_sizes(stack):
    genl = stack.enter_context(netlink.Genl())
    state = genl.dump
    for size in 0, 1, 4095, 4097, (1 << 20) + 1, (1 << 44) - 1:
        refused(lambda: genl.new("web", size), errno.EINVAL, bad=MEMORY, state=state)
    for size in (1 << 44) + 4096, 1 << 45, 1 << 63, (1 << 64) - 4096:
        refused(lambda: genl.new("web", size), errno.E2BIG, bad=MEMORY, state=state)
    for size in (1 << 44) + 1, (1 << 64) - 1:
        refused(lambda: genl.new("web", size), errno.E2BIG, errno.EINVAL, bad=MEMORY, state=state)
    same(os.path.exists("/dev/remus/web"), False, "no device is left")
    with open("/proc/meminfo") as f:
        host = int(f.readline().split()[1]) * 1024
    for size in 4096, host // 2 // 4096 * 4096, 1 << 36, 1 << 40, 1 << 44:
        same(genl.new("web", size)["memory"], size, "memory")
        with ram.Ram("web") as device:
            same(os.lseek(device.fd, 0, os.SEEK_END), size, "size")
            device.map(4096, size - 4096).write(0, b"end")
        same(genl.seal("web")["dirty-pages"], 1, "dirty pages")
        with ram.Ram("web") as device:
            same({p: c[:4] for p, c in device.epoch(1).items()}, {size // 4096 - 1: b"end\0"}, "the last page")
        genl.delete("web")


@test
def duplicates(stack):
    genl = fixture(stack)
    refused(lambda: genl.new("web"), errno.EEXIST, bad=DOMAIN, state=genl.dump)
    refused(lambda: genl.new("web", 1 << 20), errno.EEXIST, bad=DOMAIN, state=genl.dump)
    # Wrong size and taken name at once: still nothing changes.
    refused(lambda: genl.new("web", 5), errno.EINVAL, errno.EEXIST, state=genl.dump)
    # The name of a domain that a qdisc made.
    line = net.Line(stack, "guest")
    refused(lambda: genl.new(line.name), errno.EEXIST, bad=DOMAIN, state=genl.dump)


@test
def delete_in_use(stack):
    genl = stack.enter_context(netlink.Genl())
    genl.new("web", 1 << 20)
    line = net.Line(stack, "guest", domain="web")
    refused(lambda: genl.delete("web"), errno.EBUSY, bad=DOMAIN, state=genl.dump)
    line.send(1, 2)
    refused(lambda: genl.delete("web"), errno.EBUSY, bad=DOMAIN, state=genl.dump)
    line.remove()
    line.receiver.nothing("the qdisc was deleted")
    with ram.Ram("web") as device:
        m = device.map()
        m.write(0, b"x")
        os.close(device.fd)
        device.fd = -1
        same(genl.get("web")["memory-users"], 1, "users")
        genl.delete("web")  # whoever has its memory keeps it
        m.write(1, b"y")
        same(m.read(0, 2), b"xy", "its memory")
    refused(lambda: genl.get("web"), errno.ENOENT, bad=DOMAIN)
    refused(lambda: genl.delete("web"), errno.ENOENT, bad=DOMAIN)


@test
def unprivileged(stack):
    """Without CAP_NET_ADMIN nothing works, whoever opened the socket."""
    genl = fixture(stack)

    def nobody():
        os.setgroups([])
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)
        own, out = netlink.Genl(), []
        for sock in own, genl:
            for command in CMD:
                more = [(EPOCH, u32(4))] if command in ("epoch-commit", "epoch-abort") else []
                try:
                    send(sock, command, [(DOMAIN, b"mine\0" if command == "domain-new" else b"web\0"), *more])
                    out.append((command, 0))
                except Refused as error:
                    out.append((command, error.errno))
            try:
                sock.dump()
                out.append(("dump", 0))
            except Refused as error:
                out.append(("dump", error.errno))
        try:
            Listener().close()
            out.append(("listen", 0))
        except OSError as error:
            out.append(("listen", error.errno))
        try:
            os.close(os.open("/dev/remus/web", os.O_RDWR))
            out.append(("open", 0))
        except OSError as error:
            out.append(("open", error.errno))
        return out
    before = genl.dump()
    got = Kid(nobody).result()
    wrong = [g for g in got if g[1] not in (errno.EPERM, errno.EACCES)]
    same(wrong, [], "what nobody may do")
    same(genl.dump(), before, "something has changed")


@test
def user_namespace(stack):
    """Root of a container has no say over the host's domains, not by a qdisc either."""
    def container():
        from ram import check, libc
        try:
            check(libc.unshare(0x10000000 | 0x40000000))
        except OSError as error:
            return error.errno
        with Rtnl() as rtnl:
            rtnl.veth("t-u0", "t-u1")
            try:
                rtnl.qdisc_add("t-u0")
                return "added"
            except Refused as error:
                sentence(error)
                same(error.errno, errno.EPERM, "qdisc add in a container")
        try:
            netlink.Genl().new("mine")
            return "domain"
        except Refused as error:
            same(error.errno, errno.EPERM, "domain-new in a container")
        return 0
    got = Kid(container).result()
    if got == errno.EINVAL:
        raise Skip("this kernel has no user namespaces (CONFIG_USER_NS)")
    same(got, 0, "a container's root")


@test
def dumps(stack):
    """0, 1 and many domains: each once, complete, whatever the reader does in between."""
    genl = stack.enter_context(netlink.Genl())
    same(genl.dump(), [], "none")
    genl.new("one", 1 << 20)
    same(genl.dump(), [genl.get("one")], "one")
    genl.delete("one")
    # With memory, so that each takes many bytes: several messages.
    count = scaled(200)
    for i in range(count):
        genl.new(f"d{i}", 4096 if i % 2 else None)
    got = genl.dump()
    same(sorted(d["domain"] for d in got), sorted(f"d{i}" for i in range(count)), "names")
    same([d for d in got if (d.get("memory") == 4096) != (int(d["domain"][1:]) % 2 == 1)], [], "memory")
    same(genl.get("d7"), next(d for d in got if d["domain"] == "d7"), "get and dump agree")
    # A reader that never comes back for the rest.
    idle = netlink.Genl()
    message, _ = idle.message(idle.family, netlink.DUMP, struct.pack("=BBH", CMD["domain-get"], 1, 0))
    idle.sock.send(message)
    idle.sock.recv(100)
    # Deleted under a dump in progress.
    for i in range(0, count, 2):
        genl.delete(f"d{i}")
    idle.close()
    same(sorted(d["domain"] for d in genl.dump()), sorted(f"d{i}" for i in range(1, count, 2)), "the rest")
    for i in range(1, count, 2):
        genl.delete(f"d{i}")
    same(genl.dump(), [], "none again")


@test
def replies(stack):
    """Every command's reply has the fields that the specification promises."""
    genl = stack.enter_context(netlink.Genl())
    domain = {"domain", "open-epoch", "committed-epoch", "sealed-epochs", "packets", "bytes", "dropped", "ports",
              "held-memory", "limit-packets", "limit-bytes"}
    memory = {"memory", "device", "dirty-pages", "resident-pages", "snapshot-pages", "cow-limit", "cow-policy",
              "cow-peak", "cow-copies", "cow-waits", "memory-users", "hot-limit", "hot-pages"}
    done = {"domain", "epoch", "packets", "bytes", "dirty-pages", "duration-ns"}
    same(set(genl.new("plain")), domain, "domain-new")
    same(set(genl.new("web", 1 << 20)), domain | memory, "domain-new with memory")
    same(genl.get("web"), {"domain": "web", "open-epoch": 1, "committed-epoch": 0, "sealed-epochs": 0, "packets": 0,
                           "bytes": 0, "dropped": 0, "ports": 0, "held-memory": 0, "limit-packets": 0,
                           "limit-bytes": 0, "memory": 1 << 20, "device": "remus/web",
                           "dirty-pages": 0, "resident-pages": 0, "snapshot-pages": 0, "cow-limit": 0, "cow-policy": 1,
                           "cow-peak": 0, "cow-copies": 0, "cow-waits": 0, "memory-users": 0, "hot-limit": 0, "hot-pages": 0}, "a new domain")
    for name in "plain", "web":
        for reply in genl.seal(name), genl.seal(name), genl.commit(name, 1), genl.abort(name, 2), genl.discard(name):
            same(set(reply), done, "reply")
            true(0 < reply["duration-ns"] < 30e9, f"duration {reply['duration-ns']}")
        same(set(genl.set(name)) - memory, domain, "domain-set")
        same(set(genl.set(name, own=True)) - memory, domain | {"owner"}, "domain-set with own")
        same(genl.delete(name), None, "domain-del")
    same(netlink.number(genl.info[3]), 1, "version of the family")


def qdisc_state(rtnl, genl, name):
    return lambda: ([d for d in genl.dump()], rtnl.qdisc_get(name))


@test
def qdisc_options(stack):
    """Wrong options of the qdisc: an error with a sentence, no qdisc, no domain."""
    genl = stack.enter_context(netlink.Genl())
    line = net.Line(stack, "guest", add=False)
    rtnl, name = line.rtnl, line.device
    state = qdisc_state(rtnl, genl, name)

    def add(opts):
        return lambda: rtnl.qdisc_add(name, options=opts)
    for opts, bad in [
        ([(1, b"")], 1), ([(1, b"\0")], 1), ([(1, b"web")], 1), ([(1, b"a/b\0")], 1), ([(1, b"w" * 32 + b"\0")], 1),
        ([(2, u8(0))], 2), ([(2, u8(3))], 2), ([(2, u8(255))], 2), ([(2, b"")], 2), ([(2, u32(1))], 2),
        ([(3, b"")], 3), ([(3, u8(1))], 3), ([(3, u64(1))], 3), ([(4, u32(1))], 4), ([(4, b"\1" * 9)], 4),
        ([(5, u32(1))], 5), ([(5, b"")], 5), ([(5, u8(2))], 5), ([(5, u8(255))], 5),
        ([(6, u32(1))], None), ([(0, u32(1))], None), ([(200, b"")], None),
        ([(1, text("fine")), (2, u8(9))], 2), ([(1, text("fine")), (6, b"")], None),
    ]:
        refused(add(opts), errno.EINVAL, errno.ERANGE, bad=bad, state=state)
    # Not attributes at all.
    refused(lambda: rtnl.qdisc_add(name, raw=attr(2, b"\1\2\3")), errno.EINVAL, state=state)
    refused(lambda: rtnl.qdisc_add(name, raw=attr(2, struct.pack("=HH", 99, 1))), errno.EINVAL, state=state)
    refused(lambda: rtnl.qdisc_add(name, raw=attr(2, b"plug" * 8)), errno.EINVAL, state=state)
    same(harness.module_users(), 0, "users of the module after refused qdiscs")
    # Empty options are as good as none.
    rtnl.qdisc_add(name, options=[])
    same(rtnl.qdisc_get(name)["kind"], "remus", "kind")


@test
def qdisc_change(stack):
    """Limits can change; domain and direction cannot; the same ones may be repeated."""
    genl = stack.enter_context(netlink.Genl())
    for kind in "guest", "egress":
        line = net.Line(stack, kind, domain="web", packets=10)
        rtnl, name = line.rtnl, line.device
        state = qdisc_state(rtnl, genl, name)
        other = EGRESS if kind == "guest" else GUEST
        line.send(1, 2, 3)
        for opts in options("other"), options(direction=other), options("other", other, 5), options("web", other), [(1, b"\0")], [(9, b"")], [(3, b"x")]:
            refused(lambda: rtnl.qdisc_change(name, options=opts), errno.EOPNOTSUPP, errno.EINVAL, errno.ERANGE, state=state)
        rtnl.qdisc_change(name, options=options("web", line.direction, 4, 1 << 20))
        want = {1: b"web\0", 2: u8(line.direction), 3: u32(4), 4: u64(1 << 20), 5: u8(0)}
        same(rtnl.qdisc_get(name)["options"], want, "options after the change")
        # A replace of the same kind without a handle is a change too; what is not said stays.
        rtnl.qdisc_replace(name, options=options(packets=5))
        want[3] = u32(5)
        same(rtnl.qdisc_get(name)["options"], want, "options after the replacement")
        same(genl.get("web")["packets"], 3, "packets held across the change")
        genl.commit("web", genl.seal("web")["epoch"])
        line.receiver.expect([1, 2, 3], kind)
        line.remove()


@test
def qdisc_not_root(stack):
    """Only as the root of a device; elsewhere refused, nothing left."""
    genl = stack.enter_context(netlink.Genl())
    line = net.Line(stack, "egress", add=False)
    rtnl, name = line.rtnl, line.device
    state = qdisc_state(rtnl, genl, name)
    for parent in 0xFFFFFFF1, 0xFFFFFFF2:  # ingress, clsact
        refused(lambda: rtnl.qdisc_add(name, parent=parent), errno.EINVAL, errno.EOPNOTSUPP, errno.ENOENT, state=state)
    os.system("modprobe sch_prio 2>/dev/null")
    try:
        rtnl.qdisc_add(name, "prio", parent=netlink.TC_H_ROOT, handle=0x10000,
                       raw=attr(2, struct.pack("=i16s", 3, bytes([1, 2, 2, 2, 1, 2, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1]))))
    except Refused as error:
        raise Skip(f"no qdisc prio here: {error}") from None
    refused(lambda: rtnl.qdisc_add(name, parent=0x10001), errno.EOPNOTSUPP, state=state)
    refused(lambda: rtnl.qdisc_replace(name, parent=0x10001, options=options("web")), errno.EOPNOTSUPP, state=state)
    same(harness.module_users(), 0, "users of the module")
    rtnl.qdisc_del(name)


@test
def qdisc_defaults(stack):
    """Without options: the domain has the device's name, direction by the kind of device, roomy limits."""
    genl = stack.enter_context(netlink.Genl())
    for kind, want in ("tap", GUEST), ("egress", EGRESS):
        line = net.Line(stack, kind, add=False)
        line.rtnl.qdisc_add(line.device)
        got = line.rtnl.qdisc_get(line.device)["options"]
        same(got[1], text(line.device), "domain")
        same(got[2], u8(want), f"direction of {kind}")
        true(netlink.number(got[3]) >= 1000 and netlink.number(got[4]) >= 1 << 20, f"limits {got}")
        same(genl.get(line.device)["ports"], 1, "ports")
        line.remove()
        refused(lambda: genl.get(line.device), errno.ENOENT, bad=DOMAIN)
    # A device whose name cannot be a domain's needs one given.
    rtnl = line.rtnl
    rtnl.add("t-x@1", "dummy")
    stack.callback(rtnl.delete, "t-x@1")
    refused(lambda: rtnl.qdisc_add("t-x@1"), errno.EINVAL, state=genl.dump)
    rtnl.qdisc_add("t-x@1", options=options("web"))
    same(genl.get("web")["ports"], 1, "ports")
    rtnl.qdisc_del("t-x@1")


@test
def full_receive_buffer(stack):
    """A client that does not read its replies hurts only itself."""
    genl = stack.enter_context(netlink.Genl())
    genl.new("web")
    lazy = netlink.Genl()
    lazy.sock.setblocking(False)
    message, _ = lazy.message(lazy.family, netlink.ACK, struct.pack("=BBH", CMD["domain-get"], 1, 0) + attr(1, b"web\0"))
    for _ in range(1000):
        try:
            lazy.sock.send(message)
        except OSError:
            break
    same(genl.get("web")["domain"], "web", "another client")
    lazy.close()
    genl.delete("web")


class Stranger:
    """Another process with a socket of its own. Its methods are those of Genl, and raise what they raise there."""

    def __init__(self, stack, **more):
        self.here, there = socket.socketpair()
        self.kid = Kid(self.serve, there, more)
        there.close()
        stack.callback(self.here.close)

    def serve(self, there, more):
        self.here.close()
        with netlink.Genl(**more) as genl:
            while request := there.recv(1 << 16):
                name, args, kwargs = pickle.loads(request)
                try:
                    answer = (True, getattr(genl, name)(*args, **kwargs))
                except Refused as error:
                    answer = (False, (error.errno, error.message, error.bad, error.missing))
                there.send(pickle.dumps(answer))

    def __getattr__(self, name):
        def call(*args, **kwargs):
            self.here.send(pickle.dumps((name, args, kwargs)))
            done, answer = pickle.loads(self.here.recv(1 << 18))
            if not done:
                raise Refused(*answer)
            return answer
        return call

    def end(self):
        self.here.close()
        self.kid.reap()


def owned(view, process):
    same((view.get("owner"), view.get("orphaned")), (process, None), "owner")


@test
def owner(stack):
    """What a process owns no other changes until its socket is closed. Then all is held, and anybody may act."""
    genl = fixture(stack)
    stranger = Stranger(stack)
    line = net.Line(stack, "guest", domain="web")
    ear = stack.enter_context(Listener())
    line.send(1, 2)
    ear.take("output-pending")
    own = netlink.Genl()
    owned(own.set("web", own=True), os.getpid())
    for what in (lambda: stranger.set("web", packets=5), lambda: stranger.set("web", size=5), lambda: stranger.set("web", own=True),
                 lambda: stranger.set("web"), lambda: stranger.set("web", passing=True), lambda: stranger.set("web", passing=False), lambda: stranger.seal("web"), lambda: stranger.seal("web", full=True), lambda: stranger.seal("web", keep=True),
                 lambda: stranger.commit("web", 4), lambda: stranger.abort("web", 4), lambda: stranger.discard("web"),
                 lambda: stranger.delete("web")):
        refused(what, errno.EBUSY, state=lambda: (genl.dump(), genl.ports()))
    # Another domain is not concerned, nor is looking.
    stranger.new("other")
    stranger.seal("other")
    stranger.delete("other")
    same(stranger.port("web")["packets"], 2, "held")
    owned(stranger.get("web"), os.getpid())
    # The owner may do all of it, and become the owner again; by another socket, too.
    owned(own.set("web", own=True, packets=100), os.getpid())
    same(own.commit("web", 5)["packets"], 0, "commit 5")
    same(genl.seal("web")["packets"], 2, "seal 6")
    own.abort("web", 6)
    own.seal("web")
    line.send(3)
    ear.take("output-pending", "domain-gone")  # of epoch 8; of the other domain
    # Another socket of the owner's is not what is waited for.
    netlink.Genl().close()
    ear.take()
    before = genl.get("web")
    own.close()
    same(ear.take("controller-gone")[0], {"domain": "web", "open-epoch": 8, "packets": 3, "dropped": 0,
                                           "held-memory": before["held-memory"]}, "what controller-gone says")
    before.pop("owner")
    same(genl.get("web"), {**before, "orphaned": True}, "nothing else has changed")
    line.receiver.nothing("the owner is gone")
    same(stranger.commit("web", 7)["packets"], 2, "anybody may commit")
    line.receiver.expect([1, 2], "commit 7")
    line.receiver.nothing("epoch 8 is open", 0.05)
    owned(stranger.set("web", own=True), stranger.kid.pid)
    refused(lambda: genl.seal("web"), errno.EBUSY)
    # The socket that is closed last is that of the last one who asked.
    line.remove()
    stranger.end()
    ear.take("controller-gone")


@test
def owner_runs_on_alone(stack):
    """The owner may let the ports pass, and hold again, which to `tc` and to others is refused."""
    genl = stack.enter_context(netlink.Genl())
    line = net.Line(stack, "guest", domain="web")
    stranger = Stranger(stack)
    line.send(1, 2)
    own = netlink.Genl()
    own.set("web", own=True)
    own.seal("web")
    state = lambda: (genl.dump(), genl.ports())  # noqa: E731
    for passing in True, False:
        refused(lambda: stranger.set("web", passing=passing), errno.EBUSY, bad=DOMAIN, state=state)
    refused(lambda: own.set("web", passing=True), errno.EBUSY, bad=PASSTHROUGH, state=state)
    own.abort("web", 1)
    refused(lambda: line.rtnl.qdisc_change(line.device, options=options(passthrough=1)), errno.EBUSY, state=state)
    line.receiver.nothing("all of it was refused")
    own.set("web", passing=True)
    line.receiver.expect([1, 2], "the owner let it go")
    refused(lambda: stranger.set("web", passing=False), errno.EBUSY, bad=DOMAIN, state=state)
    line.send(3)
    line.receiver.expect([3], "it passes")
    own.set("web", passing=False)
    line.send(4)
    line.receiver.nothing("the owner holds again")
    # What the owner let pass goes on passing when it has gone.
    own.set("web", passing=True)
    own.close()
    line.receiver.expect([4], "passing again")
    until(lambda: "orphaned" in genl.get("web"), "the domain is orphaned")
    line.send(5)
    line.receiver.expect([5], "orphaned, as it was told")
    same(stranger.set("web", passing=False)["packets"], 0, "anybody may now")
    line.send(6)
    line.receiver.nothing("held")
    # One request for both.
    owned(stranger.set("web", own=True, passing=True), stranger.kid.pid)
    line.receiver.expect([6], "owned and passing")


@test
def owner_moves_to_another_socket(stack):
    """The socket that asked last is the one that counts."""
    genl = stack.enter_context(netlink.Genl())
    ear = stack.enter_context(Listener())
    genl.new("web")
    first, second = netlink.Genl(), netlink.Genl()
    first.set("web", own=True)
    second.set("web", own=True)
    first.close()
    ear.take()
    owned(genl.get("web"), os.getpid())
    second.close()
    ear.take("controller-gone")
    # A domain made again is nobody's.
    own = netlink.Genl()
    own.set("web", own=True)
    own.delete("web")
    genl.new("web")
    own.close()
    ear.take("domain-gone")
    same({"owner", "orphaned"} & set(genl.get("web")), set(), "another domain of that name")
    # One socket may own many.
    genl.new("other")
    own = netlink.Genl()
    for name in "web", "other":
        own.set(name, own=True)
    own.close()
    ear.take("controller-gone", "controller-gone")
    for name in "web", "other":
        genl.delete(name)


@test
def owner_killed(stack):
    """kill -9 of the owner while epochs wait; also when a child still has its socket."""
    genl = stack.enter_context(netlink.Genl())
    ear = stack.enter_context(Listener())

    def controller(write, child=False):
        with netlink.Genl() as mine:
            mine.set("web", own=True)
            mine.seal("web")
            pid = os.fork() if child else 0
            os.write(write, struct.pack("i", pid))
            if child and pid:
                return
            while True:
                signal.pause()
    for kind in "guest", "egress":
        line = net.Line(stack, kind, domain="web")
        line.send(1, 2)
        read, write = os.pipe()
        kid = Kid(controller, write)
        os.read(read, 4)
        owned(genl.get("web"), kid.pid)
        line.send(3)
        ear.take("output-pending", "output-pending")
        refused(lambda: genl.commit("web", 1), errno.EBUSY)
        kid.kill()
        kid.reap()
        ear.take("controller-gone", domain="web")
        view = genl.get("web")
        same((view["packets"], view["sealed-epochs"], view.get("orphaned"), view.get("owner")), (3, 1, True, None), "all is held")
        line.receiver.nothing("the owner was killed", 0.05)
        # The process has ended, its socket is open.
        kid = Kid(controller, write, True)
        child, = {struct.unpack("i", os.read(read, 4))[0] for _ in range(2)} - {0}
        try:
            kid.reap()
            ear.take()
            refused(lambda: genl.commit("web", 1), errno.EBUSY)
        finally:
            os.kill(child, signal.SIGKILL)
        ear.take("controller-gone", domain="web")
        genl.commit("web", genl.seal("web")["epoch"])
        line.receiver.expect([1, 2, 3], "committed by somebody else")
        line.remove()
        ear.take("domain-gone", domain="web")
        os.close(read)
        os.close(write)


@test
def owner_in_another_namespace(stack):
    """A socket is not mistaken for one with the same number in another network namespace."""
    genl = stack.enter_context(netlink.Genl())
    ns = net.Namespace()
    stack.callback(ns.close)
    with ns:
        own = netlink.Genl(port=4242)
        ear = stack.enter_context(Listener())
    twin = Stranger(stack, port=4242)
    genl.new("web")
    owned(own.set("web", own=True), os.getpid())
    refused(lambda: twin.seal("web"), errno.EBUSY, state=genl.dump)
    twin.end()
    own.seal("web")
    ear.take()
    owned(genl.get("web"), os.getpid())
    own.close()
    ear.take("controller-gone", domain="web")  # a listener hears of the host's domains from there, too
    same(genl.get("web").get("orphaned"), True, "orphaned")
    genl.delete("web")
    ear.take("domain-gone", domain="web")


@test
def foreign_listener(stack):
    """Root of a container hears nothing of the host's domains."""
    def container(ready, go):
        try:
            ram.check(ram.libc.unshare(0x10000000 | 0x40000000))
        except OSError as error:
            os.write(ready, b"x")
            return error.errno
        try:
            ear = Listener()
        except OSError:
            ear = None
        os.write(ready, b"x")
        os.read(go, 1)
        time.sleep(0.2)
        return ear.now() if ear else []
    (r1, w1), (r2, w2) = os.pipe(), os.pipe()
    kid = Kid(container, w1, r2)
    os.read(r1, 1)
    line = net.Line(stack, "guest", domain="web")
    line.send(1)
    line.remove()
    os.write(w2, b"x")
    got = kid.result()
    if got == errno.EINVAL:
        raise Skip("this kernel has no user namespaces (CONFIG_USER_NS)")
    same(got, [], "what a container hears")


@test
def events(stack):
    """Each event at most once an epoch, with what the domain holds; also by the limits of the domain."""
    genl = stack.enter_context(netlink.Genl())
    ear = stack.enter_context(Listener())
    for kind, whose in ("guest", "port"), ("egress", "port"), ("guest", "domain"), ("egress", "domain"):
        line = net.Line(stack, kind, domain="web", **({"packets": 10} if whose == "port" else {}))
        if whose == "domain":
            genl.set("web", packets=10)

        def send(*numbers):
            for n in numbers:
                with contextlib.suppress(OSError):  # AF_PACKET tells of a drop on egress
                    line.send(n)
        ear.take()
        send(1)
        event, = ear.take("output-pending", domain="web")
        same((event["open-epoch"], event["packets"], event["dropped"]), (1, 1, 0), "output-pending")
        same(event["held-memory"], genl.get("web")["held-memory"], "held-memory")
        send(2, 3, 4)
        ear.take()
        send(*range(5, 11))
        event, = ear.take("buffer-high")
        true(5 <= event["packets"] <= 10 and event["open-epoch"] == 1, f"buffer-high {event}")
        send(11, 12, 13)
        event, = ear.take("overflow")
        true(event["packets"] == 10 and 1 <= event["dropped"] <= 3, f"overflow {event}")
        send(14)
        genl.seal("web")
        ear.take()
        send(15, 16)
        same(ear.take("overflow")[0]["open-epoch"], 2, "epoch of the overflow")
        genl.commit("web", 1)
        line.receiver.expect(range(1, 11), kind)
        send(17, 18)
        same(ear.take("output-pending")[0]["open-epoch"], 2, "epoch of output-pending")
        genl.seal("web")
        genl.seal("web")
        ear.take()
        send(19)
        same(ear.take("output-pending")[0]["open-epoch"], 4, "epoch of output-pending")
        genl.discard("web")
        send(20)
        ear.take()
        same(genl.get("web")["dropped"], 4 + 2 + 3, "dropped")
        line.remove()
        same(ear.take("domain-gone"), [{"domain": "web"}], "domain-gone")
    genl.new("web")
    ear.take()
    genl.delete("web")
    ear.take("domain-gone", domain="web")
    # A device that goes takes its domain along.
    line = net.Line(stack, "guest")
    line.rtnl.delete(line.device)
    ear.take("domain-gone", domain=line.name)


@test
def listener_that_does_not_read(stack):
    """It loses events, and nobody else anything: not the commands, not the packets, not another listener."""
    genl = stack.enter_context(netlink.Genl())
    line = net.Line(stack, "guest", domain="web")
    ear = stack.enter_context(Listener())
    ear.sock.setsockopt(socket.SOL_SOCKET, 33, 1 << 24)  # SO_RCVBUFFORCE

    deaf = [stack.enter_context(Listener()) for _ in range(4)]
    for d in deaf:
        d.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    count = scaled(200)
    for epoch in range(1, count + 1):
        line.send(epoch)
        # Once in a while in no hurry, so that there are as many events: what is due twice before it is sent is sent once.
        if epoch % 4 == 0:
            until(lambda: any(e["open-epoch"] == epoch for _, e in ear.now()[-1:]), f"the event of epoch {epoch}")
        same(genl.seal("web")["packets"], 1, "packets sealed")
        genl.commit("web", epoch)
    line.receiver.expect(range(1, count + 1), "all arrive")
    # What is sent is of one epoch each.
    heard = [e["open-epoch"] for _, e in ear.now()]
    same((ear.lost, len(heard), heard), (0, len(set(heard)), sorted(heard)), "what a listener hears that reads: lost, epochs")
    for d in deaf:
        d.now()
        true(d.lost and len(d.got) < len(heard), f"{len(d.got)} events, ENOBUFS {d.lost} times")


@test
def ports(stack):
    """What port-get says of each port; of one domain or all."""
    genl = stack.enter_context(netlink.Genl())
    same((genl.ports(), genl.raw(CMD["port-get"], flags=netlink.DUMP)), ([], []), "none")
    one = net.Line(stack, "guest", domain="web", packets=7, size=1 << 20)
    two = net.Line(stack, "egress", domain="web")
    three = net.Line(stack, "tap")
    always = {"domain", "port", "ifindex", "direction", "open-epoch", "committed-epoch", "sealed-epochs", "packets",
              "bytes", "held-memory", "limit-packets", "limit-bytes", "dropped", "dropped-limit", "dropped-memory",
              "dropped-discarded", "hold-last-ns", "hold-max-ns"}
    one.send(1, 2)
    genl.seal("web")
    one.send(3)
    two.send(1)
    got = genl.ports()
    same([p["port"] for p in got], [one.device, two.device, three.device], "ports, in the order of their coming")
    same([set(p) ^ always for p in got], [set()] * 3, "attributes")
    same([p["domain"] for p in got], ["web", "web", three.device], "domains")
    same([p["direction"] for p in got], [GUEST, EGRESS, GUEST], "directions")
    same([p["ifindex"] for p in got], [socket.if_nametoindex(p["port"]) for p in got], "ifindex")
    same([(p["packets"], p["bytes"]) for p in got], [(3, 3 * (net.SIZE - 14)), (1, net.SIZE), (0, 0)], "packets and bytes")
    same([(p["open-epoch"], p["committed-epoch"], p["sealed-epochs"]) for p in got], [(2, 0, 1), (2, 0, 1), (1, 0, 0)], "epochs")
    same((got[0]["limit-packets"], got[0]["limit-bytes"]), (7, 1 << 20), "limits")
    true(got[0]["held-memory"] > got[0]["bytes"] and got[2]["held-memory"] == 0, "held memory")
    same(sum(p["held-memory"] for p in got[:2]), genl.get("web")["held-memory"], "held memory of the domain")
    same(genl.ports("web"), got[:2], "of one domain")
    same(genl.ports(three.device), got[2:], "of the other")
    # tc shows the same.
    for port, line in zip(got, (one, two, three)):
        stats = line.rtnl.qdisc_get(line.device)["xstats"]
        same(stats.pop("passthrough"), 0, "passthrough")
        same({n: port[n] for n in stats}, stats, f"xstats of {line.kind}")
    # A device that is renamed is called as it is called now.
    one.rtnl.set(one.device, up=False)
    one.rtnl.set(one.device, rename="t-renamed")
    same(genl.ports("web")[0]["port"], "t-renamed", "renamed")
    one.device = "t-renamed"
    # One in another namespace, by its name and index there.
    ns = net.Namespace()
    stack.callback(ns.close)
    with ns, contextlib.ExitStack() as inner:
        there = net.Line(inner, "guest", domain="there")
        same((genl.port("there")["port"], genl.port("there")["ifindex"]),
             (there.device, socket.if_nametoindex(there.device)), "a port in another namespace")
    genl.new("empty")
    same(genl.ports("empty"), [], "a domain without ports")
    genl.delete("empty")


@test
def drops_by_cause(stack):
    """dropped is the sum of its causes; a domain remembers what was dropped by ports that are gone."""
    genl = stack.enter_context(netlink.Genl())
    genl.new("web")
    total = 0
    for kind in "guest", "egress":
        line = net.Line(stack, kind, domain="web", packets=5)
        for n in range(8):
            with contextlib.suppress(OSError):
                line.send(n)
        port = genl.port("web")
        same((port["dropped"], port["dropped-limit"], port["dropped-memory"], port["dropped-discarded"]), (3, 3, 0, 0), "beyond the limit")
        genl.seal("web")
        same(genl.discard("web")["packets"], 5, "discarded")
        port = genl.port("web")
        same((port["dropped"], port["dropped-limit"], port["dropped-discarded"]), (8, 3, 5), "discarded")
        line.send(10, 11)
        if kind == "egress":
            # As a device goes down, its queue is emptied.
            line.rtnl.set(line.device, up=False)
            same(genl.port("web")["dropped-discarded"], 7, "down")
        total += 10
        line.remove()
        same((genl.get("web")["dropped"], genl.get("web")["packets"], genl.get("web")["held-memory"]), (total, 0, 0), "of the domain")
    genl.delete("web")


@test
def hold_times(stack):
    """From the first packet's arrival to the commit."""
    genl = stack.enter_context(netlink.Genl())
    for kind in "guest", "egress":
        line = net.Line(stack, kind, domain="web")
        same((genl.port("web")["hold-last-ns"], genl.port("web")["hold-max-ns"]), (0, 0), "at first")
        start = time.monotonic_ns()
        line.send(1)
        time.sleep(0.1)
        line.send(2)
        genl.seal("web")
        genl.commit("web", 1)
        end = time.monotonic_ns()
        port = genl.port("web")
        true(100_000_000 <= port["hold-last-ns"] <= end - start, f"held {port['hold-last-ns']} ns within {end - start}")
        same(port["hold-max-ns"], port["hold-last-ns"], "longest")
        longest = port["hold-max-ns"]
        start = time.monotonic_ns()
        line.send(3)
        genl.commit("web", genl.seal("web")["epoch"])
        end = time.monotonic_ns()
        port = genl.port("web")
        true(0 < port["hold-last-ns"] <= end - start, f"held {port['hold-last-ns']} ns within {end - start}")
        same(port["hold-max-ns"], max(longest, port["hold-last-ns"]), "longest")
        # An empty epoch has no such time.
        genl.commit("web", genl.seal("web")["epoch"])
        same(genl.port("web")["hold-last-ns"], port["hold-last-ns"], "after an empty epoch")
        line.remove()


@test
def domain_limits(stack):
    """Limits over all ports of a domain: packets and memory; 0 is none."""
    genl = stack.enter_context(netlink.Genl())
    one, two = net.Line(stack, "guest", domain="web"), net.Line(stack, "egress", domain="web")

    def send(line, *numbers):
        for n in numbers:
            with contextlib.suppress(OSError):
                line.send(n)
    same((genl.get("web")["limit-packets"], genl.get("web")["limit-bytes"]), (0, 0), "none at first")
    same(genl.set("web", packets=5)["limit-packets"], 5, "reply")
    send(one, 1, 2, 3)
    send(two, 4, 5, 6)
    send(one, 7)
    same([(p["packets"], p["dropped-limit"]) for p in genl.ports("web")], [(3, 1), (2, 1)], "five for both")
    genl.seal("web")
    send(one, 8)
    same(genl.get("web")["packets"], 5, "sealed epochs count, too")
    genl.commit("web", 1)
    one.receiver.expect([1, 2, 3], "guest")
    two.receiver.expect([4, 5], "egress")
    harness.until(lambda: genl.get("web")["held-memory"] == 0, "all are handed on")
    send(two, *range(10, 20))
    same(genl.get("web")["packets"], 5, "room again")
    # What is held stays when a limit is lowered.
    genl.set("web", packets=2)
    send(one, 20)
    same(genl.get("web")["packets"], 5, "a lower limit")
    genl.set("web", packets=0)
    send(one, *range(21, 121))
    same(genl.get("web")["packets"], 105, "no limit")
    genl.discard("web")
    # Memory.
    genl.set("web", size=64 << 10)
    for i in range(200):
        send(one, i)
        send(two, i)
    view = genl.get("web")
    true(view["packets"] > 20 and (32 << 10) < view["held-memory"] <= (64 << 10), f"64 KiB hold {view}")
    same(view["packets"] + sum(p["dropped"] for p in genl.ports("web")), 400 + 2 + 5 + 1 + 105 + 1, "all are held or dropped")
    # Only what is said changes.
    same(genl.set("web", packets=9)["limit-bytes"], 64 << 10, "limit-bytes")
    for value in 1, (1 << 32) - 1, 1 << 32, (1 << 63) - 1:
        view = genl.set("web", packets=value, size=value)
        same((view["limit-packets"], view["limit-bytes"]), (value, value), "as it was said")
    for value in 1 << 63, (1 << 64) - 1:
        for number, name in (PACKETS, "limit-packets"), (BYTES, "limit-bytes"):
            before = genl.get("web")
            try:
                reply = genl.raw(CMD["domain-set"], [(DOMAIN, b"web\0"), (number, u64(value))])
                same(reply[0][name], value, "what is accepted is so")
            except Refused as error:
                sentence(error)
                same(genl.get("web"), before, "refused")


@test
def discard(stack):
    """What is not committed is thrown away; epochs stay, and what is committed leaves."""
    genl = stack.enter_context(netlink.Genl())
    for kind in net.KINDS:
        line = net.Line(stack, kind, domain="web")
        for epoch in range(1, 4):
            line.send(epoch * 10, epoch * 10 + 1)
            genl.seal("web")
        line.send(40)
        genl.commit("web", 1)
        before = genl.get("web")
        done = genl.discard("web")
        same((done["packets"], done["bytes"]), (5, before["bytes"]), f"what it says, {kind}")
        line.receiver.expect([10, 11], "what was committed", settle=0.05)
        until(lambda: genl.get("web")["held-memory"] == 0, "what was committed is handed on")
        view = genl.get("web")
        same({k: view[k] for k in ("open-epoch", "committed-epoch", "sealed-epochs", "packets", "bytes", "dropped", "held-memory")},
             {"open-epoch": 4, "committed-epoch": 1, "sealed-epochs": 2, "packets": 0, "bytes": 0, "dropped": 5, "held-memory": 0}, kind)
        if kind == "egress":
            got = line.rtnl.qdisc_get(line.device)
            same((got["qlen"], got["backlog"], got["drops"]), (0, 0, 5), "tc's statistics")
        same(genl.discard("web")["packets"], 0, "nothing is left")
        line.send(41)
        same(genl.commit("web", 2)["packets"], 0, "commit 2")
        same(genl.abort("web", 3)["packets"], 0, "abort 3")
        line.receiver.nothing("epoch 4 is open")
        same(genl.seal("web")["packets"], 1, "seal 4")
        genl.commit("web", 4)
        line.receiver.expect([41], "epoch 4", settle=0.03)
        line.remove()


@test
def passthrough(stack):
    """All passes until the next seal; then nothing. A change releases what the open epoch holds, in order."""
    genl = stack.enter_context(netlink.Genl())
    for kind in net.KINDS:
        line = net.Line(stack, kind, add=False)
        rtnl, name = line.rtnl, line.device
        rtnl.qdisc_add(name, options=options("web", line.direction, passthrough=1))
        same((rtnl.qdisc_get(name)["options"][5], genl.port("web").get("passthrough")), (u8(1), True), "shown")
        line.send(*range(50))
        line.receiver.expect(range(50), f"passes, {kind}")
        same(genl.seal("web")["packets"], 0, "nothing was held")
        same((rtnl.qdisc_get(name)["options"][5], genl.port("web").get("passthrough")), (u8(0), None), "over with the seal")
        line.send(50, 51)
        line.receiver.nothing("it holds now")
        # Not while epochs wait, and not over an owner's head.
        def state():
            return genl.dump(), genl.ports(), rtnl.qdisc_get(name)
        refused(lambda: rtnl.qdisc_change(name, options=options(passthrough=1)), errno.EBUSY, state=state)
        refused(lambda: rtnl.qdisc_replace(name, options=options(passthrough=1, packets=9)), errno.EBUSY, state=state)
        genl.commit("web", 1)
        own = netlink.Genl()
        own.set("web", own=True)
        refused(lambda: rtnl.qdisc_change(name, options=options(passthrough=1)), errno.EBUSY, state=state)
        own.close()
        line.receiver.nothing("refused")
        rtnl.qdisc_change(name, options=options(passthrough=1))
        line.send(52, 53)
        line.receiver.expect([50, 51, 52, 53], "released and passing")
        until(lambda: genl.get("web")["held-memory"] == 0, "all is handed on")
        view = genl.get("web")
        same((view["packets"], view["held-memory"], view["dropped"]), (0, 0, 0), "nothing is held")
        rtnl.qdisc_change(name, options=options(packets=1000))
        same(genl.port("web").get("passthrough"), True, "what is not said stays")
        rtnl.qdisc_change(name, options=options(passthrough=0))
        line.send(54)
        line.receiver.nothing("it holds from now on")
        # Ports are independent until the seal.
        if kind == "guest":
            other = net.Line(stack, "egress", add=False)
            other.rtnl.qdisc_add(other.device, options=options("web", EGRESS, passthrough=1))
            other.send(1)
            other.receiver.expect([1], "the other passes")
            genl.commit("web", genl.seal("web")["epoch"])
            other.send(2)
            other.receiver.nothing("sealed")
            other.remove()
        else:
            genl.commit("web", genl.seal("web")["epoch"])
        line.receiver.expect([54], "committed")
        line.remove()


def stable(got, want, all_of):
    """Of `all_of`, exactly `want` came, each once."""
    seen = [n for n in got if n in all_of]
    same(sorted(seen), sorted(want), "those that were there all the time")


@test(seconds=1200)
def dumps_meanwhile(stack):
    """Domains and ports that exist during all of a dump are in it once, whatever comes and goes."""
    genl = stack.enter_context(netlink.Genl(chunk=4096))  # in many pieces
    other = stack.enter_context(netlink.Genl())
    rng = random.Random(harness.SEED)
    rtnl = stack.enter_context(Rtnl())
    names = [f"t-p{i}" for i in range(40)]
    stack.callback(lambda: [rtnl.delete(n) for n in names if n in rtnl.names()])
    for i, name in enumerate(names):
        rtnl.add(name, "dummy")
        if i % 2 == 0:
            rtnl.qdisc_add(name, options=options(f"p{i % 8}"))
        genl.new(f"s{i}")
    come, there = {f"c{i}" for i in range(40)}, set()
    ports = set()

    def between():
        for _ in range(rng.choice((0, 1, 1, 3, 20))):
            if rng.random() < 0.5:
                name = rng.choice(sorted(come))
                if name in there:
                    other.delete(name)
                else:
                    other.new(name)
                there.symmetric_difference_update({name})
            else:
                i = rng.randrange(1, 40, 2)
                if i in ports:
                    rtnl.qdisc_del(names[i])
                else:
                    rtnl.qdisc_add(names[i], options=options(f"p{rng.randrange(12)}"))
                ports.symmetric_difference_update({i})
    for _ in range(scaled(60)):
        got = [d["domain"] for d in genl.dump_slowly("domain-get", between)]
        stable(got, [f"s{i}" for i in range(40)], {f"s{i}" for i in range(40)})
        got = [p["port"] for p in genl.dump_slowly("port-get", between)]
        stable(got, names[::2], set(names[::2]))
        got = genl.dump_slowly("port-get", between, [(DOMAIN, b"p4\0")])
        stable([p["port"] for p in got], names[4::8], set(names[::2]))
        same({p["domain"] for p in got}, {"p4"}, "of one domain")
    # The same with another process that does it as fast as it can.
    stop = mmap.mmap(-1, 4096)

    def churn():
        mine = netlink.Genl()
        while not stop[0]:
            for i in range(20):
                with contextlib.suppress(Refused):
                    mine.new(f"x{i}")
            for i in range(20):
                with contextlib.suppress(Refused):
                    mine.delete(f"x{i}")
    kid = Kid(churn)
    for _ in range(scaled(60)):
        stable([d["domain"] for d in genl.dump_slowly("domain-get", lambda: None)], [f"s{i}" for i in range(40)], {f"s{i}" for i in range(40)})
    stop[0] = 1
    kid.result()
    for name in [f"s{i}" for i in range(40)] + sorted(there):
        genl.delete(name)
