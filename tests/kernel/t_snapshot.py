# SPDX-License-Identifier: GPL-2.0
"""Sealed epochs: READ, the hand-off of the bitmap, copy on write and its limit, memories of any size."""
import ctypes
import errno
import mmap
import os
import random
import struct
import time

import harness
import ram
from harness import Kid, SEED, fails, same, scaled, test, true, until
from machine import Machine, content
from netlink import Genl, Listener
from ram import END, PAGE, RECORD, Map, Ram, anonymous, check, libc


# READ


@test
def read_errors(stack):
    m = Machine(stack, 64)
    for page in range(0, 64, 2):
        m.write(page * PAGE, content(page))
    m.seal()
    m.write(0, b"open")
    fd = m.device.fd
    buffer = anonymous(8 * RECORD + PAGE)
    stack.callback(buffer.close)

    def read(epoch=1, cursor=0, address=buffer.addr, length=8 * RECORD):
        return m.device.call(epoch, cursor, address, length)
    for epoch in 0, 2, 3, 1 << 32, (1 << 64) - 1:
        with fails(errno.ENOENT):
            read(epoch)
    for length in 0, 1, PAGE, RECORD - 1:
        with fails(errno.EINVAL):
            read(length=length)
    for address in 0, 1, 1 << 63, (1 << 64) - 8, 0xFFFFFFFF80000000, (1 << 47) - PAGE:
        with fails(errno.EFAULT):
            read(address=address)
    # A buffer whose end is missing, or read-only.
    gap = anonymous(4 * PAGE)
    check(libc.mprotect(gap.addr + 2 * PAGE, 2 * PAGE, ram.PROT_READ))
    same(read(address=gap.addr, length=4 * PAGE - 100), (1, 1), "what fits before the buffer's end")
    with fails(errno.EFAULT):
        read(cursor=1, address=gap.addr + RECORD, length=3 * PAGE - 200)
    with fails(errno.EFAULT):
        read(address=gap.addr + 2 * PAGE, length=RECORD)
    gap.close()
    # The structure itself.
    for address in 0, 1, 1 << 63, (1 << 64) - 8, (1 << 47) - 16:
        same(libc.ioctl(fd, ram.READ, address), -1, "a bad structure")
        same(ctypes.get_errno(), errno.EFAULT, f"structure at {address:#x}")
    half = anonymous(2 * PAGE)
    check(libc.mprotect(half.addr + PAGE, PAGE, 0))
    ctypes.memmove(half.addr + PAGE - 24, struct.pack("=QQQ", 1, 0, buffer.addr), 24)
    same((libc.ioctl(fd, ram.READ, half.addr + PAGE - 24), ctypes.get_errno()), (-1, errno.EFAULT), "half a structure")
    half.mprotect(ram.PROT_READ)
    half.close()
    readonly = anonymous(PAGE)
    ctypes.memmove(readonly.addr, ram.READ_STRUCT.pack(1, 0, END, buffer.addr, 8 * RECORD, 0, 0, 0), 48)
    readonly.mprotect(ram.PROT_READ)
    same((libc.ioctl(fd, ram.READ, readonly.addr), ctypes.get_errno()), (-1, errno.EFAULT), "a structure that cannot be written")
    readonly.close()
    # Other calls.
    for command in 0x1234, ram.READ + 2, ram.READ ^ (1 << 16), ram.READ & ~(3 << 30), 0xFFFFFFFF, 0x5401:
        same((libc.ioctl(fd, command, buffer.addr), ctypes.get_errno()), (-1, errno.ENOTTY), f"ioctl {command:#x}")
    # Cursors: in the middle, at the end, behind it, far behind it.
    for cursor, want in (0, 0), (1, 2), (62, 62), (63, None), (64, None), (1 << 40, None), (1 << 63, None), (END, None):
        after, count = read(cursor=cursor)
        if want is None:
            same((after, count), (END, 0), f"cursor {cursor}")
        else:
            same(int.from_bytes(buffer.read(0, 8), "little"), want, f"first page from cursor {cursor}")
            same(buffer.read(8, PAGE), content(want), "its content")
    # A batch that ends with the last page says that it was the last.
    same(read(cursor=48), (END, 8), "the last batch")
    # Not a byte more than the room for whole records is touched.
    buffer.write(0, b"\x5a" * buffer.length)
    same(read(length=2 * RECORD + 4000)[1], 2, "records in the room for two and a bit")
    same(buffer.read(2 * RECORD, 6 * RECORD), b"\x5a" * (6 * RECORD), "what follows the records")
    # The largest length there is, an unaligned buffer.
    big = anonymous(40 * RECORD)
    same(m.device.call(1, 0, big.addr + 3, 40 * RECORD - 3), (END, 32), "an unaligned buffer")
    same(big.read(3 + 8, PAGE), content(0), "its content")
    same(m.device.call(1, 0, big.addr, 0xFFFFFFFF), (END, 32), "a length of 4 GiB")
    big.close()
    m.sealed[1][0] = content(0)
    m.check(1)
    m.commit(1)
    with fails(errno.ENOENT):
        read()


@test
def read_into_itself(stack):
    """The buffer is a mapping of the device: the kernel's writes to it are writes like any other."""
    m = Machine(stack, 64)
    for page in range(8):
        m.write(page * PAGE, content(page))
    m.seal()
    before = dict(m.sealed[1])
    # Over pages of this very epoch, before they were read, and over others.
    at = 2 * PAGE + 40
    after, count = m.device.call(1, 0, m.map.addr + at, 8 * RECORD)
    same((after, count), (END, 8), "READ")
    expected = b"".join(struct.pack("=Q", p) + before[p] for p in range(8))
    same(m.map.read(at, 8 * RECORD), expected, "what was read")
    m.wrote(at, expected)
    m.check(1)
    m.check(m.seal())


@test
def read_while_committed(stack):
    """The epoch goes away while it is read: an error, or what it was."""
    m = Machine(stack, 256)
    for turn in range(scaled(8)):
        for page in range(256):
            m.write(page * PAGE, content(turn * 1000 + page))
        epoch = m.seal()
        done = []

        def reader():
            try:
                with Ram("web") as own:
                    return [(p, c[:8]) for p, c in own.records(epoch, 5)]
            except OSError as error:
                return error.errno
        kids = [Kid(reader) for _ in range(2)]
        time.sleep(0.01 * turn)
        (m.commit if turn % 2 else m.abort)(epoch)
        for kid in kids:
            got = kid.result()
            if got != errno.ENOENT:
                same([g for g in got if g[1] != content(turn * 1000 + g[0])[:8]], [], "what was read")
                done.append(len(got))
        if m.dirty:
            m.check(m.seal())


# Hand-off


def members(view, bits):
    """The pages in a mapped bitmap of so many bits."""
    words = struct.unpack(f"={view.length // 8}Q", view.read(0, view.length))
    found = [w * 64 + b for w, word in enumerate(words) if word for b in range(64) if word >> b & 1]
    true(all(page < bits for page in found), f"bits behind the end: {found[-5:]}")
    return found


@test
def bitmaps(stack):
    """The bitmap of a sealed epoch: exact, stable, several at once, also after commit and abort."""
    pages = 3 * 32768 + 5  # three leaves and a bit
    m = Machine(stack, 64)
    m.device.close()
    m.genl.delete("web")
    m.genl.new("web", pages * PAGE)
    with Ram("web") as device:
        with fails(errno.ENOENT):
            device.bitmap(1)
        memory = device.map()
        rng = random.Random(SEED)
        want = {}
        for epoch in range(1, 5):
            chosen = {rng.randrange(pages) for _ in range(50)} | {0, 63, 64, 32767, 32768, pages - 1}
            if epoch == 2:
                chosen = {32768 + 7}  # elsewhere there is nothing, nor a leaf
            for page in chosen:
                memory.write(page * PAGE + 8, struct.pack("=Q", epoch))
            m.genl.seal("web")
            want[epoch] = sorted(chosen)
        views = {}
        for epoch, chosen in want.items():
            offset, length, count = device.bitmap(epoch)
            same((length, count), (4 * PAGE, len(chosen)), f"bitmap of epoch {epoch}")
            views[epoch] = device.map_bitmap(epoch)
            same(members(views[epoch], pages), chosen, f"pages of epoch {epoch}")
            same(sorted(device.epoch(epoch)), chosen, f"pages read of epoch {epoch}")
        # Parts of it; not more than it, not writable, not private, not executable at will.
        part = device.map(PAGE, device.bitmap(1)[0] + PAGE, ram.PROT_READ)
        same(members(part, 32768), [p - 32768 for p in want[1] if p // 32768 == 1], "the second page of the bitmap")
        offset, length, _ = device.bitmap(3)
        for at, size in (offset, length + PAGE), (offset + PAGE, length), (offset + length, PAGE), (offset + (1 << 29), PAGE):
            with fails(errno.ENXIO, errno.EINVAL):
                device.map(size, at, ram.PROT_READ)
        with fails(errno.EACCES):
            device.map(length, offset, ram.RW)
        with fails(errno.EINVAL):
            device.map(length, offset, ram.PROT_READ, ram.MAP_PRIVATE)
        with fails(errno.EACCES):
            views[1].mprotect(ram.RW)
        same(libc.mremap(part.addr, PAGE, 2 * PAGE, 1, None), ram.FAILED, "growth")
        # What is written now, committed, aborted, changes none of them.
        for page in range(100, 200):
            memory.write(page * PAGE, b"later")
        m.genl.commit("web", 2)
        m.genl.abort("web", 4)
        for epoch, chosen in want.items():
            same(members(views[epoch], pages), chosen, f"pages of epoch {epoch} afterwards")
        for epoch in 1, 2, 4:
            with fails(errno.ENOENT):
                device.bitmap(epoch)
            with fails(errno.ENXIO):
                device.map(PAGE, views_offset(epoch), ram.PROT_READ)
        same(members(device.map_bitmap(3), pages), want[3], "epoch 3, mapped again")
        # A copy of the mapping, in a child and by a split, has its own reference.
        Kid(lambda: same(members(views[2], pages), want[2], "in a child")).result()
        check(libc.munmap(views[2].addr + PAGE, PAGE))
        same(ctypes.string_at(views[2].addr + 2 * PAGE, 8), bytes(8), "what is left of it")
        check(libc.munmap(views[2].addr + 2 * PAGE, 2 * PAGE))
        views[2].length = PAGE
        # The aborted epoch is in the next one.
        epoch = m.genl.seal("web")["epoch"]
        same(members(device.map_bitmap(epoch), pages), sorted(set(want[4]) | set(range(100, 200))), "after the abort")
        # They outlive the domain.
        m.genl.delete("web")
        for epoch in 1, 3, 4:
            same(members(views[epoch], pages), want[epoch], f"pages of epoch {epoch} after the domain")


def views_offset(epoch):
    return (1 << 52) + epoch * (1 << 30)


@test
def read_ranges(stack):
    """READ by ranges and once only: what was read out is not copied, and is gone when it is written."""
    m = Machine(stack, 64)
    for page in range(40):
        m.write(page * PAGE, content(page))
    m.seal()
    buffer = anonymous(64 * RECORD)
    stack.callback(buffer.close)

    def read(cursor, end, flags=0, length=64 * RECORD):
        after, count = m.device.call(1, cursor, buffer.addr, length, end, flags)
        return after, [int.from_bytes(buffer.read(i * RECORD, 8), "little") for i in range(count)]
    same(read(10, 10), (END, []), "an empty range")
    same(read(10, 9), (END, []), "a range the wrong way round")
    same(read(10, 14, ram.KEEP), (END, [10, 11, 12, 13]), "a range")
    same(read(10, 14, ram.KEEP, 2 * RECORD), (12, [10, 11]), "part of a range")
    same(read(38, 64, ram.KEEP), (END, [38, 39]), "the end")
    for flags, reserved in (2, 0), (1 << 31, 0), (0, 1):
        with fails(errno.EINVAL):
            m.device.call(1, 0, buffer.addr, buffer.length, END, flags, reserved)
    # Read out, 10 to 19; then 5 to 24 are written.
    same(read(10, 20)[1], list(range(10, 20)), "read out")
    same(read(10, 20)[1], list(range(10, 20)), "and again, while nothing was written")
    for page in range(5, 25):
        m.write(page * PAGE, b"later")
    same(m.genl.get("web")["snapshot-pages"], 10, "copies of what was not read out")
    same(read(0, 10), (END, list(range(10))), "what was not read out")
    for page in 10, 19:
        with fails(errno.ESTALE):
            read(page, page + 1)
    same(read(8, 20), (10, [8, 9]), "up to what is gone")
    m.sealed[1] = {p: c for p, c in m.sealed[1].items() if not 10 <= p < 20}
    for page in range(20, 40):
        same(read(page, page + 1, ram.KEEP)[1], [page], "one")
        same(buffer.read(8, PAGE), m.sealed[1][page], f"page {page}")
    # It is all in the next epoch after an abort.
    m.genl.abort("web", 1)
    same(sorted(m.device.epoch(m.genl.seal("web")["epoch"])), list(range(40)), "after the abort")


@test(seconds=1200)
def read_by_threads(stack):
    """Several threads read ranges of one epoch while writers go on: each record is the sealed content."""
    pages = 512
    m = Machine(stack, pages)
    for turn in range(scaled(4)):
        for page in range(pages):
            m.write(page * PAGE, content(turn * 1000 + page))
        epoch = m.seal()
        stop = mmap.mmap(-1, PAGE)

        def writer(who):
            own, mine = m.map, random.Random(SEED + who)
            while not stop[0]:
                own.write(mine.randrange(pages) * PAGE, b"later")

        def reader(first, end):
            buffer, cursor, got = ctypes.create_string_buffer(7 * RECORD), first, []
            with Ram("web") as own:
                while cursor != END:
                    cursor, count = own.call(epoch, cursor, ctypes.addressof(buffer), 7 * RECORD, end, 0)
                    for i in range(count):
                        page = int.from_bytes(buffer[i * RECORD:i * RECORD + 8], "little")
                        got.append(page)
                        if buffer[i * RECORD + 8:(i + 1) * RECORD] != content(turn * 1000 + page):
                            raise AssertionError(f"page {page} is not as it was")
            return got
        writers = [Kid(writer, who) for who in range(2)]
        readers = [Kid(reader, n * pages // 4, (n + 1) * pages // 4) for n in range(4)]
        same(sum((kid.result() for kid in readers), []), list(range(pages)), "pages read")
        stop[0] = 1
        for kid in writers:
            kid.result()
        m.genl.commit("web", epoch)
        m.dirty = set(range(pages))


# Copies


@test
def cow_settings(stack):
    genl = stack.enter_context(Genl())
    genl.new("plain")
    with fails(errno.EINVAL):
        genl.set("plain", cow_limit=PAGE)
    with fails(errno.EINVAL):
        genl.new("none", cow_limit=PAGE)
    genl.new("web", 1 << 20, cow_limit=5 * PAGE + 1, cow_policy=2)
    view = genl.get("web")
    same((view["cow-limit"], view["cow-policy"]), (6 * PAGE, 2), "as created")
    for policy in 0, 3, 1 << 40:
        with fails(errno.EINVAL):
            genl.set("web", cow_policy=policy)
        with fails(errno.EINVAL):
            genl.new("other", PAGE, cow_policy=policy)
    genl.set("web", cow_policy=1)
    same(genl.set("web", cow_limit=(1 << 64) - 1)["cow-limit"], (1 << 64) - 1, "the largest number")
    view = genl.set("web", cow_limit=0)
    same((view["cow-limit"], view["cow-policy"]), (0, 1), "as set")
    for name in "plain", "web":
        genl.delete(name)


@test
def cow_throttle(stack):
    """At the limit a writer waits: until its page is read out, its epoch ends, the limit goes, or it is killed."""
    m = Machine(stack, 64)
    events = stack.enter_context(Listener())

    def writer(page, ready):
        with Ram("web") as own:
            view = own.map()
            os.write(ready, b"x")
            view.write(page * PAGE, b"new")

    def start(page):
        read, write = os.pipe()
        kid = Kid(writer, page, write)
        same(os.read(read, 1), b"x", "ready")
        os.close(read)
        os.close(write)
        return kid

    def waits(kid):
        return kid.alive()
    for page in range(20):
        m.write(page * PAGE, content(page))
    m.genl.set("web", cow_limit=3 * PAGE)
    epoch = m.seal()
    for page in range(3):
        m.write(page * PAGE, b"new")
    same(m.genl.get("web")["snapshot-pages"], 3, "copies")
    m.write(30 * PAGE, b"not in the epoch")
    m.write(0, b"copied already")
    kids = [start(page) for page in (5, 6, 7, 8)]
    until(lambda: m.genl.get("web")["cow-waits"] >= 3, "they wait")
    time.sleep(0.2)
    same([waits(kid) for kid in kids], [True] * 4, "they wait")
    with Ram("web") as own:
        own.epoch(epoch, flags=ram.KEEP)
        same([waits(kid) for kid in kids], [True] * 4, "looking does not help")
        buffer = ctypes.create_string_buffer(RECORD)
        own.call(epoch, 5, ctypes.addressof(buffer), RECORD, 6, 0)
    kids[0].result()
    same([waits(kid) for kid in kids[1:]], [True] * 3, "the others still wait")
    kids[1].kill()
    kids[1].reap()
    m.genl.set("web", cow_limit=4 * PAGE)
    until(lambda: not all(waits(kid) for kid in kids[2:]), "room for one")
    time.sleep(0.3)
    same(sorted(waits(kid) for kid in kids[2:]), [False, True], "room for one only")
    view = m.genl.get("web")
    same((view["snapshot-pages"], view["cow-peak"]), (4, 4), "copies, and most at once")
    events.take("cow-wait")  # once an epoch
    m.genl.commit("web", epoch)
    for kid in kids[2:]:
        kid.result()
    same(sorted(m.device.epoch(m.genl.seal("web")["epoch"])), [0, 1, 2, 5, 7, 8, 30], "the next epoch")
    same(m.genl.get("web")["snapshot-pages"], 0, "copies")


@test
def cow_fail(stack):
    """With the policy fail the writer goes on, and the epoch is aborted."""
    m = Machine(stack, 64)
    events = stack.enter_context(Listener())
    m.genl.set("web", cow_limit=2 * PAGE, cow_policy=2)
    first = []
    for turn in range(3):
        for page in range(10):
            m.write(page * PAGE, content(turn * 100 + page))
        if turn < 2:
            first.append(m.genl.seal("web")["epoch"])
            m.device.epoch(first[-1], flags=0)  # read out: no copies are needed
    same(m.genl.get("web")["snapshot-pages"], 0, "copies")
    lost = m.genl.seal("web")["epoch"]
    later = None
    for page in range(2):
        m.write(page * PAGE, b"new")
    later = m.genl.seal("web")["epoch"]
    m.write(5 * PAGE, b"no room")

    def gone():
        view = m.genl.get("web")
        return view["sealed-epochs"] == 2 and view
    view = until(gone, "the abort")
    same((view["open-epoch"], view["snapshot-pages"]), (later + 1, 0), "after the abort")
    for epoch in lost, later:
        with fails(errno.ENOENT):
            m.device.epoch(epoch)
    with fails(errno.EINVAL):
        m.genl.commit("web", lost)
    m.genl.commit("web", first[-1])
    events.take("cow-abort", domain="web")
    got = m.device.epoch(m.genl.seal("web")["epoch"])
    same(sorted(got), list(range(10)), "all of it is in the next epoch")
    same((got[0][:3], got[5][:7], got[7]), (b"new", b"no room", content(207)), "as it is now")


@test
def huge(stack):
    """Terabytes of address space: what is kept is in proportion to what is used."""
    genl = stack.enter_context(Genl())
    free = harness.memory_free()
    size = 16 << 40
    genl.new("huge", size)
    with Ram("huge") as device:
        far = [0, 1 << 30, (1 << 40) - PAGE, (5 << 40) + 3 * PAGE, size - PAGE]
        with Map(device.fd, size) as memory:
            for at in far:
                memory.write(at, b"here")
            epoch = genl.seal("huge")["epoch"]
            same(sorted(device.epoch(epoch)), [at // PAGE for at in far], "pages")
            same(device.bitmap(epoch)[1:], (size // PAGE // 8, len(far)), "the bitmap")
            for at in far:
                with device.map(PAGE, device.bitmap(epoch)[0] + at // PAGE // 32768 * PAGE, ram.PROT_READ) as view:
                    same(members(view, 32768), [at // PAGE % 32768], f"the bitmap for {at:#x}")
                    view.close()
            genl.abort("huge", epoch)
            same(genl.seal("huge", full=True)["dirty-pages"], len(far), "a full seal")
        true(free - harness.memory_free() < 16 << 20, "memory in use")
    genl.delete("huge")
    with fails(errno.E2BIG):
        genl.new("huge", size + PAGE)
    genl.new("one", PAGE)
    with Ram("one") as device, Map(device.fd, PAGE) as memory:
        memory.write(PAGE - 1, b"x")
        same(list(device.epoch(genl.seal("one")["epoch"]).items()), [(0, bytes(PAGE - 1) + b"x")], "a memory of one page")
    genl.delete("one")
