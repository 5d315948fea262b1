# SPDX-License-Identifier: GPL-2.0
"""The n-th allocation of a call fails, for every n: an error and nothing changed, or success."""
import contextlib
import ctypes
import errno
import os

import harness
import net
import ram
from harness import LONG, Skip, same, test, true, until
from netlink import Genl, Refused
from ram import PAGE, RECORD, Ram, anonymous, libc

DEBUGFS = "/sys/kernel/debug"


class Faults:
    """Makes the n-th allocation of this thread fail."""

    def __init__(self, stack):
        if not os.path.exists("/proc/thread-self/fail-nth"):
            raise Skip("no fault injection in this kernel (the debug kernel has it)")
        old = {}
        for kind in "failslab", "fail_page_alloc":
            for name, value in ("verbose", "0"), ("ignore-gfp-wait", "N"), ("ignore-gfp-highmem", "N"), ("min-order", "0"):
                path = f"{DEBUGFS}/{kind}/{name}"
                with contextlib.suppress(OSError):
                    with open(path) as f:
                        old[path] = f.read().strip()
                    with open(path, "w") as f:
                        f.write(value)

        def restore():
            for path, value in old.items():
                with contextlib.suppress(OSError), open(path, "w") as f:
                    f.write(value)
        stack.callback(restore)
        self.fd = os.open("/proc/thread-self/fail-nth", os.O_RDWR)
        stack.callback(os.close, self.fd)
        stack.callback(self.off)

    def off(self):
        os.pwrite(self.fd, b"0", 0)

    @contextlib.contextmanager
    def failing(self, n):
        """The n-th allocation in the body fails; `hit` says whether there was one."""
        outcome = []
        os.pwrite(self.fd, b"%d" % n, 0)
        try:
            yield outcome
        finally:
            left = int(os.pread(self.fd, 16, 0).split(b"\0")[0] or b"0")
            self.off()
            outcome.append(left == 0)


def lost(error):
    """The acknowledgement itself could not be made: whether the command was done is unknown."""
    return isinstance(error, OSError) and not isinstance(error, Refused) and error.errno == errno.ENOBUFS


EXPECTED = (errno.ENOMEM, errno.ENOBUFS, errno.EAGAIN, errno.EFAULT, errno.EINTR)


def each_failure(faults, call, before=None, after=None, most=400):
    """Calls `call` with its first, second, … allocation failing, until none fails. `before` sets up;
    `after` gets the result, or the error. Returns how many failed."""
    quiet, errors = 0, 0
    for n in range(1, most):
        if before:
            before()
        result = error = None
        with faults.failing(n) as hit:
            try:
                result = call()
            except OSError as e:
                error = e
        if error is not None:
            true(error.errno in EXPECTED, f"allocation {n} fails: {error!r}")
            errors += 1
        try:
            if after:
                after(result, error)
        except AssertionError as e:
            raise AssertionError(f"allocation {n} failed{'' if error is None else f' ({error!r})'}: {e}") from e
        quiet = 0 if hit[0] else quiet + 1
        if quiet > 2:
            return errors
    raise AssertionError(f"more than {most} allocations in one call")


@test
def domain_new(stack):
    faults = Faults(stack)
    genl = stack.enter_context(Genl())
    for memory in None, 64 << 20:
        def after(result, error):
            domains = [d["domain"] for d in genl.dump()]
            if lost(error):
                if domains:
                    genl.delete("web")
            elif error is None:
                same(domains, ["web"], "domains")
                genl.delete("web")
            else:
                same(domains, [], "domains after the error")
                same(os.path.exists("/dev/remus/web"), False, "device after the error")
        errors = each_failure(faults, lambda: genl.new("web", memory), None, after)
        true(errors > 2, f"only {errors} failures")


@test(seconds=1200)
def qdisc_add(stack):
    faults = Faults(stack)
    genl = stack.enter_context(Genl())
    for kind in "egress", "guest":
        for domain in None, "web":
            if domain and not genl.dump():
                genl.new("web")
            line = net.Line(stack, kind, add=False)

            def domains():
                # What a port dropped stays counted when it is gone.
                return [{**d, "dropped": 0} for d in genl.dump()]
            state = domains()

            def after(result, error):
                qdisc = line.rtnl.qdisc_get(line.device)
                there = bool(qdisc) and qdisc["kind"] == "remus"
                if not lost(error):
                    same(there, error is None, "the qdisc is there")
                if there:
                    line.send(1)
                    line.receiver.nothing("held", 0.0)
                    same(genl.get(domain or line.device)["packets"], 1, "held")
                    line.remove()
                same(domains(), state, "domains")
                line.send(2)
                line.receiver.expect([2], "without a qdisc")
            errors = each_failure(faults, lambda: line.add(domain), None, after)
            true(errors > 2, f"only {errors} failures")
    genl.delete("web")


@test(seconds=1200)
def epoch_commands(stack):
    """Seal, commit and abort, of memory and packets."""
    commands(stack, 0)


@test(seconds=1200)
def epoch_commands_with_hot_pages(stack):
    """A seal that fails may have counted some of them already."""
    commands(stack, 64 * PAGE)


def commands(stack, hot_limit):
    faults = Faults(stack)
    genl = stack.enter_context(Genl())
    genl.new("web", 64 * PAGE, hot_limit=hot_limit)
    stack.callback(lambda: until(lambda: gone(genl), "the domain is deleted"))
    line = net.Line(stack, "guest", domain="web")
    device = stack.enter_context(Ram("web"))
    m = device.map()
    number = [0]
    image = {}

    def write():
        number[0] += 1
        for page in range(0, 64, 3):
            data = b"%d" % (number[0] * 100 + page)
            m.write(page * PAGE, data)
            image[page] = data
        line.send(number[0])

    pending = []

    def check_view(view):
        got = genl.get("web")
        keys = ["open-epoch", "sealed-epochs", "committed-epoch", "packets", *(() if hot_limit else ("dirty-pages",))]
        same({k: got[k] for k in keys}, {k: view[k] for k in keys}, "changed by a refused command")
    view = {}

    def before_seal():
        write()
        view.update(genl.get("web"))

    def not_done(error):
        """Has to be done again, as it was refused; or unknown, and then it is looked up."""
        if lost(error):
            got = genl.get("web")
            return all(got[k] == view[k] for k in ("open-epoch", "sealed-epochs", "committed-epoch"))
        if error is not None:
            check_view(view)
        return error is not None

    def after_seal(done, error):
        if not_done(error):
            done = genl.seal("web")
        elif error:
            done = {"epoch": view["open-epoch"]}
        pages = device.epoch(done["epoch"])
        same(sorted(pages), list(range(0, 64, 3)), "pages")
        same([p for p in pages if not pages[p].startswith(image[p] + b"\0")], [], "content")
        genl.commit("web", done["epoch"])
        line.receiver.expect([number[0]], "released")
    errors = each_failure(faults, lambda: genl.seal("web"), before_seal, after_seal)
    true(errors > 2, f"only {errors} failures of seal")

    def before_commit():
        write()
        pending[:] = [genl.seal("web")["epoch"]]
        # Written again, so that there is a copy.
        m.write(0, b"again")
        view.update(genl.get("web"))

    def after_commit(done, error):
        if not_done(error):
            genl.commit("web", pending[0])
        line.receiver.expect([number[0]], "released")
    errors = each_failure(faults, lambda: genl.commit("web", pending[0]), before_commit, after_commit)
    true(errors > 0, "no failure of commit")

    def after_abort(done, error):
        if not_done(error):
            genl.abort("web", pending[0])
        same(genl.get("web")["dirty-pages"], 22, "dirty after the abort")
        genl.commit("web", genl.seal("web")["epoch"])
        line.receiver.expect([number[0]], "released")
    errors = each_failure(faults, lambda: genl.abort("web", pending[0]), before_commit, after_abort)
    true(errors > 0, "no failure of abort")
    # Full seal.
    view.clear()

    def before_full():
        view.update(genl.get("web"))

    def after_full(done, error):
        if not_done(error):
            done = genl.seal("web", full=True)
        elif error:
            done = {"epoch": view["open-epoch"], "dirty-pages": 22}
        same(done["dirty-pages"], 22, "a full seal's pages")
        genl.commit("web", done["epoch"])
    each_failure(faults, lambda: genl.seal("web", full=True), before_full, after_full)
    line.remove()


def gone(genl):
    try:
        genl.delete("web")
    except Refused as error:
        return error.errno == errno.ENOENT
    return True


@test(seconds=1200)
def write_faults(stack):
    """Page faults and pwrite: a write either is in the dirty set, with the snapshot kept, or did not happen."""
    faults = Faults(stack)
    genl = stack.enter_context(Genl())
    source = os.open("/tmp/t-source", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    stack.callback(os.close, source)
    os.pwrite(source, b"new!" * (2 * PAGE // 4), 0)
    serial = [0]
    for how in "mapping", "pwrite", "read(2) into the mapping", "first touch", "map":
        genl.new("web", 64 * PAGE)
        device = Ram("web")
        stack.callback(device.close)
        m = device.map()
        page = [0]
        epoch = [0]

        def before():
            page[0] = (page[0] + 1) % 60
            if how != "first touch":
                m.write(page[0] * PAGE, b"old!" * (2 * PAGE // 4))
            epoch[0] = genl.seal("web")["epoch"]

        def call():
            at = page[0] * PAGE
            data = b"new!" * (2 * PAGE // 4)
            if how == "pwrite":
                return os.pwrite(device.fd, data, at)
            if how == "read(2) into the mapping":
                got = libc.pread(source, m.addr + at, 2 * PAGE, 0)
                if got < 0:
                    raise OSError(ctypes.get_errno(), "pread")
                return got
            if how == "map":
                with ram.Map(device.fd, 64 * PAGE) as own:
                    own.write(at, data)
                return len(data)
            m.write(at, data)
            return len(data)

        def after(result, error):
            got = device.epoch(epoch[0])
            if how != "first touch":
                same([p for p in got if got[p] != b"old!" * (PAGE // 4)], [], "the snapshot")
                same(sorted(got), [page[0], page[0] + 1], "the snapshot's pages")
            done = genl.seal("web")
            now = device.epoch(done["epoch"])
            new = [p for p in range(64) if b"new!" in m.page(p)]
            same([p for p in new if p not in now], [], "written, and in no dirty set")
            if error is None and result == 2 * PAGE:
                same([now[p] == b"new!" * (PAGE // 4) for p in (page[0], page[0] + 1)], [True, True], "the write")
            genl.commit("web", done["epoch"])
            for p in new:
                m.write(p * PAGE, bytes(PAGE))
            genl.commit("web", genl.seal("web")["epoch"])
            if how == "first touch":
                # A memory of which nothing exists yet.
                device.close()
                genl.delete("web")
                genl.new("web", 64 * PAGE)
                device.__init__("web")
                m.__dict__.update(device.map().__dict__)
                device.maps = [m]
        each_failure(faults, call, before, after)
        device.close()
        until(lambda: gone(genl), "the domain is deleted")


@test(seconds=1200)
def read_sealed(stack):
    faults = Faults(stack)
    genl = stack.enter_context(Genl())
    genl.new("web", 64 * PAGE)
    with Ram("web") as device:
        m = device.map()
        for page in range(20):
            m.write(page * PAGE, b"%02d" % page)
        genl.seal("web")
        for page in range(0, 20, 2):
            m.write(page * PAGE, b"xx")
        want = {p: b"%02d" % p for p in range(20)}

        def call():
            buffer = anonymous(32 * RECORD)  # fresh, so that it faults too
            try:
                return device.call(1, 0, buffer.addr, 32 * RECORD)
            finally:
                buffer.close()

        def after(result, error):
            if error is None:
                # What was written to the buffer before the failure is told.
                cursor, count = result
                true(result == (ram.END, 20) or 0 < count < 20 and cursor == count, f"READ: {result}")
            same({p: c[:2] for p, c in device.epoch(1).items()}, want, "the epoch afterwards")
        each_failure(faults, call, None, after)

        def open_and_map():
            with Ram("web") as own:
                return own.map().read(0, 2)

        def after_open(result, error):
            if error is None:
                same(result, b"xx", "memory")
        errors = each_failure(faults, open_and_map, None, after_open)
        true(errors > 1, f"only {errors} failures of open and mmap")
    until(lambda: gone(genl), "the domain is deleted, so no open is left over")


@test(seconds=1200)
def packets(stack):
    """A packet for which there is no memory is dropped, or held; it is never let through."""
    faults = Faults(stack)
    genl = stack.enter_context(Genl())
    for kind in "egress", "guest", "tap":
        line = net.Line(stack, kind)
        number = [0]

        def call():
            number[0] += 1
            line.send(number[0])

        def after(result, error):
            line.receiver.nothing("allocation failed", 0.0)
        each_failure(faults, call, None, after)
        # While it is released: what was held arrives, in order, but for what there was no memory for.
        held = genl.get(line.name)["packets"]
        epoch = genl.seal(line.name)["epoch"]
        with faults.failing(1), contextlib.suppress(OSError):
            genl.commit(line.name, epoch)
        with contextlib.suppress(OSError):
            genl.commit(line.name, epoch)
        got = line.receiver.gather(held - 3)
        true(got == sorted(got) and len(got) >= held - 3, f"{len(got)} of {held} arrived: {got[:20]}")
        same(genl.get(line.name)["packets"], 0, "held")


@test(loaded=False, seconds=1200)
def load_module(stack):
    """Loading: it is loaded, or there is no trace of it."""
    faults = Faults(stack)
    most, seen = 25 if not LONG else 1000, 0
    # The kernel's own loader allocates hundreds of times before the module's init: look at the end.
    low, high = 1, 5000

    def attempt(n):
        error = None
        with faults.failing(n) as hit:
            try:
                harness.load()
            except OSError as e:
                error = e
        if error is None:
            true(harness.is_loaded(), "loaded")
            with Genl() as genl:
                same(genl.dump(), [], "domains")
            harness.unload(wait=5)
        else:
            true(error.errno in (*EXPECTED, errno.EEXIST, errno.EINVAL, errno.ENOENT, errno.ENOEXEC), error)
            with contextlib.suppress(Refused):
                Genl().close()
                raise AssertionError("the family is there after the error")
        true(not harness.is_loaded(), "no module is left")
        return hit[0]
    while high - low > 1:
        middle = (low + high) // 2
        if attempt(middle):
            low = middle
        else:
            high = middle
    for n in range(max(1, low - most), low + 2):
        seen += attempt(n)
    true(seen > 5, f"only {seen} failures")
