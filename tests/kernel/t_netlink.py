# SPDX-License-Identifier: GPL-2.0
"""Wrong input: each a clear error, and nothing changed."""
import errno
import os
import struct

import harness
import net
import netlink
import ram
from harness import Kid, Skip, same, scaled, test, true
from netlink import ATTR, CMD, EGRESS, GUEST, Refused, Rtnl, attr, options, text, u8, u32, u64, uint

DOMAIN, MEMORY, DEVICE, EPOCH, FULL = (ATTR[n] for n in ("domain", "memory", "device", "epoch", "full"))


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
        number, more = CMD[command], []
        if command in ("epoch-commit", "epoch-abort"):
            more = [(EPOCH, uint(4))]

        def call(name):
            return lambda: genl.raw(number, [(DOMAIN, name), *more])
        refused(lambda: genl.raw(number, more), errno.EINVAL, missing=DOMAIN, state=genl.dump)
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
    for command, number in ("domain-new", MEMORY), ("epoch-commit", EPOCH), ("epoch-abort", EPOCH):
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
    allowed = {"domain-new": {MEMORY}, "epoch-seal": {FULL}, "epoch-commit": {EPOCH}, "epoch-abort": {EPOCH}}
    for command, number in CMD.items():
        base = [(DOMAIN, b"other\0" if command == "domain-new" else b"web\0")]
        if EPOCH in allowed.get(command, ()):
            base.append((EPOCH, u32(4)))
        for kind in ATTR.values():
            if kind == DOMAIN or kind in allowed.get(command, ()):
                continue
            data = b"" if kind == FULL else b"web\0" if kind == DEVICE else u32(4)
            refused(lambda: genl.raw(number, base + [(kind, data)]), errno.EINVAL, bad=kind, state=genl.dump)
        for kind in 0, 17, 18, 100, 0x3FFF:
            refused(lambda: genl.raw(number, base + [(kind, u32(1))]), errno.EINVAL, state=genl.dump)
        refused(lambda: genl.raw(number, base, tail=b"\1\2\3"), errno.EINVAL, state=genl.dump)
        refused(lambda: genl.raw(number, base, tail=struct.pack("=HH", 3, 2)), errno.EINVAL, state=genl.dump)
        refused(lambda: genl.raw(number, base, tail=struct.pack("=HH", 200, 17) + u32(1)), errno.EINVAL, state=genl.dump)
        # NLA_F_NESTED on a plain attribute.
        refused(lambda: genl.raw(number, [(DOMAIN | netlink.NESTED, base[0][1])] + base[1:]), errno.EINVAL, bad=DOMAIN, state=genl.dump)
        # Reserved bits of the generic header.
        refused(lambda: genl.raw(number, base, reserved=1), errno.EINVAL, message=False, state=genl.dump)
    # A flag has no content.
    refused(lambda: genl.raw(CMD["epoch-seal"], [(DOMAIN, b"web\0"), (FULL, u32(1))]), errno.EINVAL, errno.ERANGE, bad=FULL, state=genl.dump)
    for command in "epoch-commit", "epoch-abort":
        refused(lambda: genl.raw(CMD[command], [(DOMAIN, b"web\0")]), errno.EINVAL, missing=EPOCH, state=genl.dump)
    for number in 0, 7, 8, 100, 255:
        refused(lambda: genl.raw(number, [(DOMAIN, b"web\0")]), errno.EOPNOTSUPP, message=False, state=genl.dump)
    # A dump of what cannot be dumped.
    refused(lambda: genl.raw(CMD["domain-del"], [(DOMAIN, b"web\0")], flags=netlink.DUMP), errno.EOPNOTSUPP, message=False, state=genl.dump)
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


@test(seconds=240)
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
    for size in 1 << 36, 1 << 40, 1 << 44:
        if size > host:
            refused(lambda: genl.new("web", size), errno.ENOMEM, bad=MEMORY, state=state)
            same(os.path.exists("/dev/remus/web"), False, "no device is left")
    for size in 4096, host // 2 // 4096 * 4096:
        same(genl.new("web", size)["memory"], size, "memory")
        with ram.Ram("web") as device:
            same(os.lseek(device.fd, 0, os.SEEK_END), size, "size")
            device.map(4096, size - 4096).write(0, b"end")
        same(genl.seal("web")["dirty-pages"], 1, "dirty pages")
        with ram.Ram("web") as device:
            same({p: c[:4] for p, c in device.epoch(1).items()}, {size // 4096 - 1: b"end\0"}, "the last page")
        genl.delete("web")


@test(seconds=240)
def more_memory_than_there_is(stack):
    """Sizes whose bookkeeping alone exceeds the machine: an error, nobody is killed for it."""
    with open("/proc/meminfo") as f:
        fits = int(f.readline().split()[1]) // 4 * 4096

    def attempt():
        made = []
        with netlink.Genl() as genl:
            try:
                for i in range(8):
                    try:
                        genl.new(f"huge{i}", 1 << 44)
                    except Refused as error:
                        sentence(error)
                        # This machine may have refused the size itself: what fits, many times.
                        genl.new(f"huge{i}", fits)
                    made.append(f"huge{i}")
                result = "all fit"
            except Refused as error:
                sentence(error)
                result = error.errno
            for name in made:
                genl.delete(name)
        return result
    genl = stack.enter_context(netlink.Genl())
    result = Kid(attempt).result()
    same(result in (errno.ENOMEM, "all fit"), True, f"result {result}")
    same(genl.dump(), [], "domains")


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
        refused(lambda: genl.delete("web"), errno.EBUSY, bad=DOMAIN, state=genl.dump)
        m = device.map()
        m.write(0, b"x")
        os.close(device.fd)
        device.fd = -1
        refused(lambda: genl.delete("web"), errno.EBUSY, bad=DOMAIN, state=genl.dump)
    genl.delete("web")
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
            for command, number in CMD.items():
                more = [(EPOCH, u32(4))] if command in ("epoch-commit", "epoch-abort") else []
                try:
                    sock.raw(number, [(DOMAIN, b"web\0" if number > 1 else b"mine\0"), *more])
                    out.append((command, 0))
                except Refused as error:
                    out.append((command, error.errno))
            try:
                sock.dump()
                out.append(("dump", 0))
            except Refused as error:
                out.append(("dump", error.errno))
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
    domain = {"domain", "open-epoch", "committed-epoch", "sealed-epochs", "packets", "bytes", "dropped", "ports"}
    memory = {"memory", "device", "dirty-pages", "resident-pages", "snapshot-pages"}
    done = {"domain", "epoch", "packets", "bytes", "dirty-pages", "duration-ns"}
    same(set(genl.new("plain")), domain, "domain-new")
    same(set(genl.new("web", 1 << 20)), domain | memory, "domain-new with memory")
    same(genl.get("web"), {"domain": "web", "open-epoch": 1, "committed-epoch": 0, "sealed-epochs": 0, "packets": 0,
                           "bytes": 0, "dropped": 0, "ports": 0, "memory": 1 << 20, "device": "remus/web",
                           "dirty-pages": 0, "resident-pages": 0, "snapshot-pages": 0}, "a new domain")
    for name in "plain", "web":
        for reply in genl.seal(name), genl.seal(name), genl.commit(name, 1), genl.abort(name, 2):
            same(set(reply), done, "reply")
            true(0 < reply["duration-ns"] < 30e9, f"duration {reply['duration-ns']}")
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
        ([(5, u32(1))], None), ([(0, u32(1))], None), ([(200, b"")], None),
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
        want = {1: b"web\0", 2: u8(line.direction), 3: u32(4), 4: u64(1 << 20)}
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
