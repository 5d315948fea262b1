# SPDX-License-Identifier: GPL-2.0
"""The RAM device: mappings, exact dirty sets, true snapshots."""
import ctypes
import errno
import mmap
import os
import random
import signal
import socket
import struct
import subprocess
import threading
import time

import harness
import ram
from harness import Kid, SEED, Skip, fails, same, scaled, test, true, until
from machine import Machine, content
from netlink import Genl
from ram import PAGE, Map, Ram, anonymous, check, libc


# The device as a file


@test
def file_operations(stack):
    m = Machine(stack, 8)
    size, fd = 8 * PAGE, m.device.fd
    same(os.lseek(fd, 0, os.SEEK_END), size, "SEEK_END")
    same(os.lseek(fd, -1, os.SEEK_CUR), size - 1, "SEEK_CUR")
    for offset, whence in (-1, os.SEEK_SET), (size + 1, os.SEEK_SET), (1, os.SEEK_END):
        with fails(errno.EINVAL):
            os.lseek(fd, offset, whence)
    same(os.pread(fd, size + 100, 0), bytes(size), "zeros")
    same(os.pread(fd, 10, size), b"", "read at the end")
    same(os.pread(fd, 10, size + 5 * PAGE), b"", "read behind the end")
    same(os.pread(fd, 10, (1 << 62)), b"", "read far behind the end")
    same(m.genl.get("web")["dirty-pages"], 0, "reads dirty nothing")
    # Across pages, unaligned, at the end.
    data = bytes(random.randrange(256) for _ in range(3 * PAGE))
    for at, n in (0, 1), (1, 1), (PAGE - 1, 2), (PAGE - 3, PAGE + 6), (5, 3 * PAGE), (size - 7, 7), (2 * PAGE, PAGE):
        same(os.pwrite(fd, data[:n], at), n, "pwrite")
        m.wrote(at, data[:n])
        same(os.pread(fd, n, at), data[:n], "pread")
        same(m.map.read(at, n), data[:n], "mapping")
    same(os.pwrite(fd, b"12345678", size - 4), 4, "a write that ends at the end is cut")
    m.wrote(size - 4, b"1234")
    for at in size, size + 1, 1 << 62:
        same(os.pwrite(fd, b"", at), 0, "nothing, behind the end")
        try:
            same(os.pwrite(fd, b"1", at), 0, "a write behind the end")
        except OSError as error:
            true(error.errno in (errno.ENOSPC, errno.EFBIG, errno.EINVAL), error)
    same(os.pread(fd, size, 0), b"".join(m.image), "all of it")
    m.check(m.seal())
    # Position moves with read and write.
    os.lseek(fd, PAGE - 2, os.SEEK_SET)
    same(os.write(fd, b"abcd"), 4, "write")
    m.wrote(PAGE - 2, b"abcd")
    same(os.lseek(fd, 0, os.SEEK_CUR), PAGE + 2, "position")
    os.lseek(fd, -4, os.SEEK_CUR)
    same(os.read(fd, 4), b"abcd", "read")
    m.check(m.seal())
    # Bad buffers: an error, and no more than that.
    for call in libc.read, libc.write:
        os.lseek(fd, 0, os.SEEK_SET)
        for address in 0, 1, 1 << 63, (1 << 47) - PAGE:
            same(call(fd, address, 100), -1, "a bad buffer")
            same(ctypes.get_errno(), errno.EFAULT, "a bad buffer")
    half = anonymous(2 * PAGE)
    check(libc.mprotect(half.addr + PAGE, PAGE, 0))
    os.lseek(fd, 4 * PAGE, os.SEEK_SET)
    got = libc.read(fd, half.addr, 2 * PAGE)
    true(got in (PAGE, -1), f"read into half a buffer: {got}")
    half.close()
    # To and from a mapping of itself.
    m.map.write(0, b"q" * PAGE)
    m.wrote(0, b"q" * PAGE)
    os.lseek(fd, 3 * PAGE, os.SEEK_SET)
    same(libc.write(fd, m.map.addr, PAGE), PAGE, "write from a mapping of the device")
    m.wrote(3 * PAGE, m.image[0])
    os.lseek(fd, 3 * PAGE, os.SEEK_SET)
    same(libc.write(fd, m.map.addr + 3 * PAGE, PAGE), PAGE, "write of a page onto itself")
    os.lseek(fd, 0, os.SEEK_SET)
    same(libc.read(fd, m.map.addr + 5 * PAGE, PAGE), PAGE, "read into a mapping of the device")
    m.wrote(5 * PAGE, m.image[0])
    same(os.pread(fd, size, 0), b"".join(m.image), "all of it")
    m.check(m.seal())


@test
def mappings_refused(stack):
    m = Machine(stack, 8)
    fd, size = m.device.fd, 8 * PAGE
    for length, offset in (size + PAGE, 0), (size, PAGE), (PAGE, size), (PAGE, size + PAGE), (PAGE, 1 << 43), (PAGE, (1 << 63) - PAGE):
        with fails(errno.ENXIO, errno.EINVAL, errno.EOVERFLOW):
            Map(fd, length, offset)
    for prot in ram.RW, ram.PROT_READ, ram.PROT_READ | 4:
        with fails(errno.EINVAL, errno.ENODEV, errno.EACCES, errno.EPERM):
            Map(fd, size, prot=prot, flags=ram.MAP_PRIVATE)
    with fails(errno.EINVAL):
        Map(fd, PAGE, 1)
    # Growth, in place, elsewhere, by duplication.
    small = m.device.map(2 * PAGE)
    for old, new, flags in (2 * PAGE, 3 * PAGE, 1), (2 * PAGE, 3 * PAGE, 0), (2 * PAGE, 9 * PAGE, 1), (0, 9 * PAGE, 1), (0, 2 * PAGE, 1):
        got = libc.mremap(small.addr, old, new, flags, None)
        true(got == ram.FAILED, f"mremap {old} -> {new}")
        true(ctypes.get_errno() in (errno.EFAULT, errno.EINVAL, errno.ENOMEM), ctypes.get_errno())
    # Nor is anything taken out of it: MADV_REMOVE punches holes, MADV_FREE is for anonymous memory.
    m.write(PAGE, content(1))
    for advice in 8, 9:
        same(libc.madvise(m.map.addr, size, advice), -1, f"madvise {advice}")
        true(ctypes.get_errno() in (errno.EINVAL, errno.ENODEV, errno.EOPNOTSUPP), f"madvise {advice}: {ctypes.get_errno()}")
    same(m.map.page(1), content(1), "the page")
    for call in lambda: os.ftruncate(fd, 0), lambda: os.posix_fallocate(fd, 0, PAGE):
        with fails(errno.EINVAL, errno.ENODEV, errno.ESPIPE, errno.EOPNOTSUPP, errno.ENOTTY):
            call()
    m.check(m.seal())


@test
def read_only_mapping(stack):
    """A descriptor that is open for reading only maps for reading only; one for writing only does not map."""
    m = Machine(stack, 8)
    with Ram("web", os.O_RDONLY) as reader:
        with fails(errno.EACCES):
            reader.map()
        with fails(errno.EBADF):
            os.pwrite(reader.fd, b"x", 0)
        view = reader.map(prot=ram.PROT_READ)
        with fails(errno.EACCES):
            view.mprotect(ram.RW)
        m.write(5, b"hello")
        same(view.read(5, 5), b"hello", "read-only mapping")
    with Ram("web", os.O_WRONLY) as writer, fails(errno.EBADF, errno.EACCES):
        os.pread(writer.fd, 1, 0)
    m.check(m.seal())


@test
def runs_in_many_mappings(stack):
    """Pages in a row, few and many, written through some of many mappings: each mapping shows them, and none writes unseen."""
    m = Machine(stack, 1024)
    maps = [m.map]

    def everybody(first):
        """Each mapping writes runs of several lengths in each of two epochs: the second time they fault, or count for nothing."""
        for epoch in range(2):
            for n, mapping in enumerate(maps):
                for start, count in (0, 3), (4, 70), (75, 1), (80, 64), (150, 20):
                    for page in range(170 * n + start, 170 * n + start + count):
                        m.write(page * PAGE, content(first + epoch), mapping.write)
            sealed = m.seal()
            m.check(sealed)
            for mapping in maps:
                same([mapping.page(page) for page in range(m.pages)], m.image, "what a mapping shows")
            m.commit(sealed)
    everybody(1)
    with Ram("web", os.O_RDONLY) as reader:
        for _ in range(2):
            view = reader.map(prot=ram.PROT_READ)
            maps.append(m.device.map())
            everybody(10 * len(maps))
            same([view.page(page) for page in range(m.pages)], m.image, "what a mapping for reading shows")
        # A child has them all again.
        wait, go = os.pipe()
        kid = Kid(lambda: (os.read(wait, 1), view.page(0), m.map.page(5))[1:])
        maps.append(m.device.map())
        everybody(100)
        os.write(go, b"x")
        same(kid.result(), (m.image[0], m.image[5]), "what a child sees")
        os.close(wait)
        os.close(go)
    everybody(200)


@test
def runs_in_pieces(stack):
    """Pages in a row whose memory is in pieces: a seal takes long runs out of the mappings, and nothing else."""
    m = Machine(stack, 1024)
    touched = list(range(0, m.pages, 16))
    random.Random(SEED).shuffle(touched)
    for page in touched:
        m.write(page * PAGE, b"x")
    for page in range(m.pages):
        m.write(page * PAGE, content(page))
    m.commit(m.seal())
    for page in range(m.pages):
        m.map.page(page)
    places = {frame - page for page, frame in enumerate(m.map.frames())}
    true(len(places) > m.pages // 32, f"the memory is in {len(places)} pieces")
    # First page, pages. Between a long one and a short one is a single page.
    long, short = ((3, 64), (140, 100), (256, 70), (400, 600)), ((70, 63), (327, 5), (1010, 3))
    for epoch in range(3):
        for start, count in long + short:
            for page in range(start, start + count):
                m.write(page * PAGE, content(10 * epoch + page))
        sealed = m.seal()
        missing = [page for page, frame in enumerate(m.map.frames()) if frame is None]
        same(missing, [page for start, count in long for page in range(start, start + count)], "pages that are not mapped")
        m.check(sealed)
        m.commit(sealed)
        same([m.map.page(page) for page in range(m.pages)], m.image, "what the mapping shows")


@test
def long_term_pins(stack):
    """A long-term pin (io_uring's registered buffers, RDMA) would write behind the tracking: refused."""
    m = Machine(stack, 8)
    params = ctypes.create_string_buffer(120)
    ring = libc.syscall(425, 4, params)
    if ring < 0:
        raise Skip(f"io_uring_setup: {os.strerror(ctypes.get_errno())}")
    stack.callback(os.close, ring)
    m.write(0, b"x")
    plain = anonymous(PAGE)
    for address, want in (plain.addr, 0), (m.map.addr, -1), (m.map.addr + 3 * PAGE, -1):
        iov = struct.pack("=QQ", address, PAGE)
        got = libc.syscall(427, ring, 0, iov, 1)
        same(got, want, f"io_uring_register (errno {ctypes.get_errno()})")
        if not got:
            check(libc.syscall(427, ring, 1, None, 0))
    plain.close()
    m.check(m.seal())


# Dirty tracking


@test
def zero_pages(stack):
    """What was never touched reads as zeros; reading makes no page dirty; a page written with zeros is."""
    m = Machine(stack, 64)
    same(m.map.read(0, 64 * PAGE), bytes(64 * PAGE), "zeros")
    same(m.genl.get("web")["dirty-pages"], 0, "dirty after reading")
    same(m.seal(), 1, "an empty epoch")
    same(m.device.epoch(1), {}, "an empty epoch")
    m.write(7 * PAGE, bytes(10))
    m.check(m.seal())
    # Full: everything resident, at this epoch's content.
    m.commit(2)
    m.write(9 * PAGE, b"nine")
    epoch = m.seal(full=True)
    got = m.device.epoch(epoch)
    same([p for p in got if got[p] != m.image[p]], [], "content of the full epoch")
    true({7, 9} <= set(got), f"pages of the full epoch: {sorted(got)}")
    m.sealed[epoch] = got
    # Copy on write for pages that only the full seal took in.
    for page in range(64):
        m.write(page * PAGE + 100, b"later")
    m.check(epoch)
    m.check(m.seal())
    with fails(errno.EBUSY):
        m.genl.seal("web", full=True)
    m.commit(epoch)
    m.commit(epoch + 1)
    full = m.seal(full=True)
    same(sorted(m.device.epoch(full)), list(range(64)), "all pages are resident now")


@test(seconds=1200)
def exact(stack):
    """Random pages, written in every way there is: the dirty set is the model's, page for page."""
    m = Machine(stack, 512)
    rng = random.Random(SEED)
    second = m.device.map(100 * PAGE, 200 * PAGE)
    other = stack.enter_context(Ram("web"))
    third = other.map()
    mem = os.open("/proc/self/mem", os.O_RDWR)
    stack.callback(os.close, mem)
    source = os.open("/tmp/t-source", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    stack.callback(os.close, source)
    os.write(source, rng.randbytes(64 * PAGE))

    def by_second(at, data):
        at -= 200 * PAGE
        if 0 <= at and at + len(data) <= 100 * PAGE:
            second.write(at, data)
        else:
            third.write(at + 200 * PAGE, data)

    def by_file_read(at, data):
        # read(2) with a mapping as the buffer: the kernel writes.
        os.pwrite(source, data, 0)
        same(libc.pread(source, m.map.addr + at, len(data), 0), len(data), "pread into the mapping")

    def by_vm_writev(at, data):
        buffer = ctypes.create_string_buffer(data, len(data))
        local, remote = struct.pack("=QQ", ctypes.addressof(buffer), len(data)), struct.pack("=QQ", m.map.addr + at, len(data))
        done = libc.syscall(311, os.getpid(), local, ctypes.c_ulong(1), remote, ctypes.c_ulong(1), ctypes.c_ulong(0))
        same(check(done), len(data), "process_vm_writev")

    def by_child(at, data):
        Kid(lambda: m.map.write(at, data)).result()

    def by_stranger(at, data):
        def stranger():
            with Ram("web") as own:
                own.map().write(at, data)
        Kid(stranger).result()

    def by_remap(at, data):
        with Map(other.fd, 512 * PAGE) as fourth:
            fourth.write(at, data)

    cheap = [m.map.write, third.write, by_second, lambda at, d: os.pwrite(m.device.fd, d, at),
             lambda at, d: os.pwrite(other.fd, d, at), by_file_read, by_vm_writev, by_remap,
             lambda at, d: os.pwrite(mem, d, m.map.addr + at), lambda at, d: os.pwrite(mem, d, third.addr + at)]
    for epoch in range(1, scaled(15) + 1):
        for _ in range(rng.randrange(60)):
            at = rng.randrange(512 * PAGE - 1)
            data = rng.randbytes(rng.choice((1, 8, 100, PAGE, 3 * PAGE)))[:512 * PAGE - at]
            m.write(at, data, rng.choice(cheap))
        for how in by_child, by_stranger:
            m.write(rng.randrange(511) * PAGE + 7, b"child", how)
        # Reads through every mapping do not count.
        for _ in range(10):
            page = rng.randrange(512)
            same(rng.choice((m.map, third)).page(page), m.image[page], f"page {page}")
        same(m.genl.get("web")["dirty-pages"], len(m.dirty), "dirty pages in domain-get")
        same(m.seal(), epoch, "epoch")
        m.check(epoch)
        if rng.random() < 0.7:
            m.commit(epoch)
        elif rng.random() < 0.3:
            m.abort(epoch)
    same(os.pread(other.fd, 512 * PAGE, 0), b"".join(m.image), "the whole memory")


@test
def protections(stack):
    """mprotect, madvise, mremap, fork, populate between the writes: none of them loses one."""
    m = Machine(stack, 256)
    moved = m.device.map()
    # More in a row than a seal write-protects one by one.
    row = range(100, 200)

    def change(how):
        if how == "mprotect":
            m.map.mprotect(ram.PROT_READ)
            m.map.mprotect(ram.RW)
        elif how == "mprotect none":
            m.map.mprotect(ram.PROT_NONE)
            m.map.mprotect(ram.RW)
        elif how == "dontneed":
            m.map.madvise(4)
        elif how == "mremap":
            room = anonymous(m.pages * PAGE)
            got = libc.mremap(moved.addr, moved.length, moved.length, 3, room.addr)
            check(got)
            moved.addr = got
        elif how == "populate write":
            check(libc.madvise(m.map.addr + 50 * PAGE, 3 * PAGE, 23))
            m.dirty |= {50, 51, 52}
        elif how == "populate read":
            check(libc.madvise(m.map.addr + 40 * PAGE, 3 * PAGE, 22))
        elif how == "mlock":
            libc.mlock(ctypes.c_void_p(m.map.addr), ctypes.c_size_t(20 * PAGE))
            # mlock of a writable mapping may write-fault; whatever it does, it must be told.
            m.dirty |= {p for p in range(20)} if m.genl.get("web")["dirty-pages"] > len(m.dirty) else set()
            libc.munlock(ctypes.c_void_p(m.map.addr), ctypes.c_size_t(20 * PAGE))
        elif how == "fork":
            Kid(lambda: m.map.write(33 * PAGE, b"child")).result()
            m.wrote(33 * PAGE, b"child")
    for how in "mprotect", "mprotect none", "dontneed", "mremap", "populate write", "populate read", "mlock", "fork":
        for before in False, True:
            for page in range(0, 30, 3):
                m.write(page * PAGE, os.urandom(8))
                m.write(page * PAGE + PAGE, os.urandom(8), moved.write)
            for page in row:
                m.write(page * PAGE, os.urandom(8))
            if before:
                change(how)
            epoch = m.seal()
            if not before:
                change(how)
            for page in range(0, 30, 2):
                m.write(page * PAGE + 8, os.urandom(8))
                m.write(page * PAGE + 3 * PAGE, os.urandom(8), moved.write)
            for page in row:
                m.write(page * PAGE + 8, os.urandom(8), (moved if page % 7 == 0 else m.map).write)
            m.check(epoch)
            m.check(m.seal())
            if how == "mremap":
                # mremap the tail away: shrinking is fine.
                small = m.device.map()
                check(libc.mremap(small.addr, m.pages * PAGE, 10 * PAGE, 0, None))
                small.length = 10 * PAGE
                m.write(3 * PAGE, b"small", small.write)
            m.commit(max(m.sealed))
    # A hole in the middle of a mapping.
    hole = m.device.map()
    hole.write(20 * PAGE, m.map.page(20))
    m.dirty.add(20)
    check(libc.munmap(hole.addr + 10 * PAGE, 5 * PAGE))
    m.check(m.seal())
    m.write(20 * PAGE, b"after", hole.write)
    m.write(2 * PAGE, b"after", hole.write)
    m.check(m.seal())


def loop_device(stack, size):
    """A loop device with `size` random bytes, O_DIRECT."""
    data = random.Random(SEED).randbytes(size)
    with open("/tmp/t-disk", "wb") as f:
        f.write(data)
    try:
        name = subprocess.run(["losetup", "--show", "-f", "/tmp/t-disk"], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        raise Skip(f"no loop device: {error}") from None
    stack.callback(subprocess.run, ["losetup", "-d", name])
    fd = os.open(name, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    stack.callback(os.close, fd)
    return fd, data


@test
def direct_io(stack):
    """A disk that writes into the mapping by itself (O_DIRECT)."""
    m = Machine(stack, 128)
    disk, data = loop_device(stack, 128 * PAGE)
    rng = random.Random(SEED)
    for _ in range(6):
        for _ in range(5):
            n = rng.randrange(1, 12)
            page, at = rng.randrange(128 - n), rng.randrange(128 - n)
            got = libc.pread(disk, m.map.addr + page * PAGE, n * PAGE, at * PAGE)
            same(got, n * PAGE, f"O_DIRECT read (errno {ctypes.get_errno()})")
            m.wrote(page * PAGE, data[at * PAGE:(at + n) * PAGE])
            # Sectors: part of a page.
            same(libc.pread(disk, m.map.addr + 512 * 13, 512, 1024), 512, "a sector")
            m.wrote(512 * 13, data[1024:1536])
        epoch = m.seal()
        m.write(3 * PAGE, os.urandom(100))
        m.check(epoch)
    same(m.map.read(0, 128 * PAGE), b"".join(m.image), "memory")


class SlowDisk:
    """A network block device whose server answers a read when it is told to."""

    def __init__(self, stack, size):
        subprocess.run(["modprobe", "nbd", "max_part=0"], stderr=subprocess.DEVNULL)
        if not os.path.exists("/dev/nbd0"):
            raise Skip("no network block device (CONFIG_BLK_DEV_NBD)")
        self.kernel, self.server = socket.socketpair()
        self.asked, self.answer = threading.Event(), threading.Event()
        self.data = random.Random(SEED).randbytes(size)
        self.answer.set()
        nbd = os.open("/dev/nbd0", os.O_RDWR | os.O_CLOEXEC)
        for request, argument in (0xAB01, 4096), (0xAB07, size // 4096), (0xAB00, self.kernel.fileno()):
            check(libc.ioctl(nbd, request, argument))
        self.threads = [threading.Thread(target=f, daemon=True) for f in (lambda: libc.ioctl(nbd, 0xAB03, 0), self.serve)]
        for t in self.threads:
            t.start()
        self.fd = None
        stack.callback(self.close, nbd)
        until(lambda: int(open("/sys/block/nbd0/size").read()) > 0, "the disk is there")
        self.fd = os.open("/dev/nbd0", os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)

    def serve(self):
        while True:
            request = self.server.recv(28, socket.MSG_WAITALL)
            if len(request) < 28:
                return
            _, kind, handle, at, n = struct.unpack("!II8sQI", request)
            if kind & 0xFFFF == 2:
                return
            self.asked.set()
            self.answer.wait(600)
            self.server.sendall(struct.pack("!II8s", 0x67446698, 0, handle) + (self.data[at:at + n] if kind & 0xFFFF == 0 else b""))

    def close(self, nbd):
        self.answer.set()
        if self.fd is not None:
            os.close(self.fd)
        libc.ioctl(nbd, 0xAB08, 0)  # NBD_DISCONNECT
        self.server.shutdown(socket.SHUT_RDWR)
        for t in self.threads:
            t.join(60)
        libc.ioctl(nbd, 0xAB04, 0)  # NBD_CLEAR_SOCK
        os.close(nbd)
        self.server.close()
        self.kernel.close()


@test
def direct_io_across_seals(stack):
    """A disk's transfer that was under way at a seal: the seal sees the page before it, a later epoch after it."""
    m = Machine(stack, 32)
    disk = SlowDisk(stack, 1 << 20)
    for page in range(32):
        m.write(page * PAGE, content(page))
    m.commit(m.seal())
    # A page that nobody wrote in this epoch, one that is written now, one that never existed before… and a clean start.
    for round_, page in enumerate((3, 4, 5, 6)):
        if round_ % 2:
            m.write(page * PAGE, content(1000 + page))
        disk.asked.clear()
        disk.answer.clear()
        out = []
        reader = threading.Thread(target=lambda: out.append(libc.pread(disk.fd, m.map.addr + page * PAGE, PAGE, (64 + page) * PAGE)))
        reader.start()
        true(disk.asked.wait(60), "the disk was asked")
        # The transfer is under way; it has claimed the page, so it counts as written.
        first = m.genl.seal("web")["epoch"]
        second = m.genl.seal("web")["epoch"]
        before = content(1000 + page) if round_ % 2 else m.image[page]
        disk.answer.set()
        reader.join(60)
        same(out, [PAGE], "O_DIRECT read")
        after = disk.data[(64 + page) * PAGE:(65 + page) * PAGE]
        same(m.map.page(page), after, "the transfer has arrived")
        third = m.genl.seal("web")["epoch"]
        got = [m.device.epoch(e) for e in (first, second, third)]
        for e, pages in zip((first, second), got):
            if page in pages:
                true(pages[page] == before, f"page {page} of epoch {e} is not what it was at its seal: {pages[page][:8].hex()}")
        true(page in got[2], f"the transfer into page {page} is in no epoch after its arrival: {[sorted(g) for g in got]}")
        true(got[2][page] == after, "the third epoch has what has arrived")
        m.image[page], m.dirty = after, set()
        m.commit(third)
    # Claimed between two seals, nothing else in the way: once the pin is gone the page is tracked as ever.
    m.check(m.seal())
    m.check(m.seal())


@test
def two_memories(stack):
    """Domains do not see each other's pages, epochs, or write faults."""
    one, two = Machine(stack, 16, "one"), Machine(stack, 16, "two")
    one.write(0, b"one")
    two.write(PAGE, b"two")
    one.check(one.seal())
    two.write(0, b"two")
    one.write(PAGE, b"one")
    two.check(two.seal())
    one.check(1)
    one.check(one.seal())
    two.check(two.seal())
    same((one.map.read(0, 3), two.map.read(0, 3)), (b"one", b"two"), "memories")


# Snapshots


@test(seconds=1200)
def snapshots(stack):
    """Up to five sealed epochs, read in any order while everything is overwritten, through commits and aborts."""
    m = Machine(stack, 200)
    rng = random.Random(SEED)
    for step in range(scaled(70)):
        where = f"step {step} of seed {SEED}"
        for _ in range(rng.randrange(40)):
            page = rng.randrange(200) if rng.random() < 0.5 else rng.randrange(20)
            if rng.random() < 0.3:
                m.write(page * PAGE, rng.randbytes(PAGE), lambda at, d: os.pwrite(m.device.fd, d, at))
            else:
                m.write(page * PAGE + rng.randrange(PAGE - 8), rng.randbytes(8))
        dice = rng.random()
        try:
            if len(m.sealed) < 5 and dice < 0.5:
                m.seal()
            elif m.sealed and dice < 0.65:
                m.commit(rng.choice(list(m.sealed)))
            elif m.sealed and dice < 0.8:
                m.abort(rng.choice(list(m.sealed)))

            def overwrite():
                # While it is read: behind and before the cursor.
                for _ in range(3):
                    m.write(rng.randrange(200) * PAGE + rng.randrange(PAGE - 8), rng.randbytes(8))
            for epoch in rng.sample(sorted(m.sealed), len(m.sealed)):
                if rng.random() < 0.6:
                    m.check(epoch, rng.choice((1, 3, 64, 500)), overwrite)
            view = m.genl.get("web")
            same((view["dirty-pages"], view["sealed-epochs"]), (len(m.dirty), len(m.sealed)), "counters")
            true(view["snapshot-pages"] <= sum(map(len, m.sealed.values())), f"snapshot pages {view}")
        except AssertionError as error:
            raise AssertionError(f"{where}: {error}") from error
    for epoch in sorted(m.sealed):
        m.check(epoch)
    if m.sealed:
        m.commit(max(m.sealed))
    same(m.genl.get("web")["snapshot-pages"], 0, "copies after the last commit")


@test
def copies_only_where_needed(stack):
    """A page is copied once for a sealed epoch that needs it, not otherwise."""
    m = Machine(stack, 64)
    for page in range(10):
        m.write(page * PAGE, b"1")
    m.seal()
    same(m.genl.get("web")["snapshot-pages"], 0, "nothing was written since the seal")
    for _ in range(3):
        for page in range(5, 15):
            m.write(page * PAGE, b"2")
    same(m.genl.get("web")["snapshot-pages"], 5, "five of the sealed pages were written again")
    m.seal()
    for page in range(64):
        m.write(page * PAGE, b"3")
    # Pages 0-4 for epoch 1, 5-14 for epoch 2; 5-9 have one for epoch 1 already.
    same(m.genl.get("web")["snapshot-pages"], 20, "copies for both epochs")
    for epoch in 1, 2:
        m.check(epoch)
    m.commit(1)
    same(m.genl.get("web")["snapshot-pages"], 10, "those of epoch 1 are gone")
    m.abort(2)
    same(m.genl.get("web")["snapshot-pages"], 0, "those of epoch 2 are gone")
    same(m.genl.get("web")["dirty-pages"], 64, "dirty after the abort")
    m.check(m.seal())


def standby_apply(image, device, epoch):
    for page, data in device.epoch(epoch).items():
        image[page] = data


@test(seconds=1200)
def nothing_lost(stack):
    """Writers that never stop, seals in between: the epochs applied in order give the memory (S2)."""
    without_loss(Machine(stack, 256))


@test(seconds=1200)
def nothing_lost_of_hot_pages(stack):
    m = Machine(stack, 256)
    m.genl.set("web", hot_limit=100 * PAGE)
    without_loss(m)


def without_loss(m):
    pages = m.pages
    shared = mmap.mmap(-1, PAGE)
    counts = (ctypes.c_uint64 * 4).from_buffer(shared)  # how often each writer wrote; whether they are to stop
    rng = random.Random(SEED)

    def writer(who):
        """Each word counts up, so that an old value that comes back shows too."""
        count, mine = 0, random.Random(SEED + who)
        with Ram("web") as device:
            own = device.map() if who != 2 else None
            while not counts[3]:
                count += 1
                counts[who] = count
                at = mine.randrange(pages) * PAGE + who * 64
                data = struct.pack("=Q", count)
                if own:
                    own.write(at, data)
                else:
                    os.pwrite(device.fd, data, at)
    kids = [Kid(writer, who) for who in range(3)]
    standby = {}
    pending = []
    end = time.monotonic() + scaled(6, 60)
    last = {}
    # On a busy machine some are slow: each has its turns, however long that takes.
    while time.monotonic() < end or min(counts[:3]) <= 50:
        dice = rng.random()
        if dice < 0.6 and len(pending) < 5:
            pending.append(m.genl.seal("web")["epoch"])
        elif pending and dice < 0.9:
            # Read twice: a snapshot does not change.
            epoch = pending[0]
            pages_then = m.device.epoch(epoch, rng.choice((7, 64)))
            if rng.random() < 0.3:
                again = m.device.epoch(epoch)
                changed = [p for p in pages_then if again.get(p) != pages_then[p]]
                same((changed, sorted(again) == sorted(pages_then)), ([], True), f"epoch {epoch} read twice")
            standby.update(pages_then)
            for page, data in pages_then.items():
                for who in range(3):
                    value = struct.unpack_from("=Q", data, who * 64)[0]
                    true(value >= last.get((page, who), 0), f"page {page} went back in time")
                    last[page, who] = value
            m.genl.commit("web", epoch)
            pending.pop(0)
        elif len(pending) > 1 and rng.random() < 0.3:
            m.genl.abort("web", pending.pop())
    counts[3] = 1
    for kid in kids:
        kid.result()
    pending.append(m.genl.seal("web")["epoch"])
    for epoch in pending:
        standby_apply(standby, m.device, epoch)
    memory = os.pread(m.device.fd, pages * PAGE, 0)
    wrong = [p for p in range(pages) if memory[p * PAGE:(p + 1) * PAGE] != standby.get(p, bytes(PAGE))]
    same(wrong, [], "pages in which the standby differs")


@test(seconds=1200)
def one_instant(stack):
    """A snapshot is one instant's, even if a writer goes on: word 2 never runs ahead of word 1."""
    pages = 64
    m = Machine(stack, pages)
    shared = mmap.mmap(-1, PAGE)
    cells = (ctypes.c_uint64 * 2).from_buffer(shared)  # how often all was written; whether to stop

    def writer():
        n = 0
        with Ram("web") as device:
            own = device.map()
            first = (ctypes.c_uint64 * (pages * 512)).from_address(own.addr)
            while not cells[1]:
                cells[0] = n
                n += 1
                # In this order: page 1 first, then the others, the last page last.
                for page in range(1, pages):
                    first[page * 512] = n
    kid = Kid(writer)
    image, turns = {}, 0
    while turns < scaled(60) or cells[0] <= 5:
        turns += 1
        time.sleep(0.002)
        epoch = m.genl.seal("web")["epoch"]
        time.sleep(0.002)
        standby_apply(image, m.device, epoch)
        values = [struct.unpack_from("=Q", image.get(p, bytes(8)))[0] for p in range(1, pages)]
        true(values == sorted(values, reverse=True) and values[0] - values[-1] <= 1, f"epoch {epoch}: not one instant: {values}")
        m.genl.commit("web", epoch)
    cells[1] = 1
    kid.result()


# Life and death


@test
def exit_with_epochs(stack):
    """The VMM is killed: mappings and descriptors go, memory and sealed epochs stay for the controller."""
    m = Machine(stack, 64)

    def vmm(ready):
        with Ram("web") as own:
            own.map().write(5 * PAGE, content(55))
            own.map().write(6 * PAGE, content(66))
            os.write(ready, b"x")
            signal.pause()
    read, write = os.pipe()
    kid = Kid(vmm, write)
    same(os.read(read, 1), b"x", "the VMM has written")
    os.close(read)
    os.close(write)
    epoch = m.genl.seal("web")["epoch"]
    kid.kill()
    kid.reap()
    got = m.device.epoch(epoch)
    same({p: c[:8] for p, c in got.items()}, {5: content(55)[:8], 6: content(66)[:8]}, "its pages")
    same(m.map.page(5), content(55), "memory")
    m.genl.commit("web", epoch)
    m.device.close()
    # Nobody has it open; a new process finds it as it was.
    with Ram("web") as again:
        same(os.pread(again.fd, PAGE, 6 * PAGE), content(66), "memory")
        again.map().write(7 * PAGE, b"7")
    m.genl.seal("web")
    with Ram("web") as again:
        same(sorted(again.epoch(2)), [7], "its pages")


@test
def deleted_while_open_elsewhere(stack):
    """The domain goes, its memory stays with the VMM; a new one of the same name is another memory."""
    m = Machine(stack, 16)
    m.write(0, b"old")
    m.seal()
    m.check(1)
    same(m.genl.get("web")["memory-users"], 1, "users")
    m.genl.delete("web")
    # Whoever has it open keeps it; its epochs are gone.
    m.write(0, b"still there")
    m.write(9 * PAGE, b"and works")
    same(m.map.read(0, 11), b"still there", "the old memory")
    with fails(errno.ENOENT):
        m.device.epoch(1)
    m.genl.new("web", 16 * PAGE)
    same(m.genl.get("web")["memory-users"], 0, "users of the new one")
    with Ram("web") as new:
        same(os.pread(new.fd, 3, 0), bytes(3), "a new memory is empty")
        with fails(errno.ENOENT):
            new.epoch(1)


@test(seconds=1200)
def pages_are_freed(stack):
    """Memory, copies and bitmaps go with their epoch and their domain."""
    genl = stack.enter_context(Genl())
    size = 4 << 20
    fill = os.urandom(size)

    def turn():
        genl.new("web", size)
        with Ram("web") as device:
            m = device.map()
            for _ in range(3):
                m.write(0, fill)
                genl.seal("web")
            m.write(0, fill)
            genl.commit("web", 1)
            genl.abort("web", 3)
            device.epoch(2, 100)
        genl.delete("web")
    turn()
    free = harness.memory_free()
    count = scaled(10)
    for _ in range(count):
        turn()
    # KASAN keeps some of what is freed for a while; a page set that leaks is 4 MiB each time.
    until(lambda: free - harness.memory_free() < 28 << 20, f"no memory is gone after {count} domains of {size >> 20} MiB with copies")


@test
def charged(stack):
    """Who touches a page pays for it, who made the domain for what is kept about it: 1 % at most, and copies."""
    top = "/run/cgroup"
    os.makedirs(top, exist_ok=True)
    check(libc.mount(b"none", top.encode(), b"cgroup2", ctypes.c_ulong(0), None))
    stack.callback(libc.umount2, top.encode(), 2)
    with open(f"{top}/cgroup.subtree_control", "w", encoding="ascii") as f:
        f.write("+memory")

    def group(name):
        os.mkdir(f"{top}/{name}")
        stack.callback(os.rmdir, f"{top}/{name}")

        def run(function):
            def inside():
                with open(f"{top}/{name}/cgroup.procs", "w", encoding="ascii") as f:
                    f.write("0")
                return function()
            return Kid(inside).result()

        def used():
            """What the group is charged, once that stays the same: what a process that has ended had goes a moment later."""
            seen = []
            while len(seen) < 10 or len(set(seen[-10:])) > 1:
                libc.syscall(324, 1, 0, 0)  # membarrier: waits for RCU
                time.sleep(0.05)
                with open(f"{top}/{name}/memory.current", encoding="ascii") as f:
                    seen.append(int(f.read()))
            return seen[-1]
        return run, used
    maker, maker_used = group("maker")
    toucher, toucher_used = group("toucher")
    size = 64 << 20

    def write():
        with Ram("web") as device:
            device.map().write(0, b"\x01" * size)
    maker(lambda: Genl().new("web", size) and None)
    before = maker_used(), toucher_used()
    toucher(write)
    after = maker_used(), toucher_used()
    true(size <= after[1] - before[1] < size * 1.05, f"the toucher's: {before[1]} to {after[1]}")
    # A group is charged ahead, 64 pages on each processor.
    ahead = 64 * PAGE * os.cpu_count()
    true(after[0] - before[0] < size / 100 + ahead, f"the maker's: {before[0]} to {after[0]}")
    # Far apart, so that what is kept about them is more than that: a page of bits each, and the way there.
    spots = 500
    maker(lambda: Genl().new("wide", spots << 27) and None)

    def dot():
        with Ram("wide") as device:
            for n in range(spots):
                os.pwrite(device.fd, b"\x01", n << 27)
    early = maker_used()
    toucher(dot)
    paid = maker_used() - early
    true(spots * PAGE - ahead < paid < spots * 4 * PAGE + ahead, f"the maker's, for {spots} pages far apart: {paid}")
    with Genl() as genl:
        genl.delete("wide")
    until(lambda: maker_used() < early + ahead, "what was kept about these is given back")
    after = maker_used(), toucher_used()
    with Genl() as genl:
        epoch = genl.seal("web")["epoch"]
        toucher(write)
        copies = maker_used() - after[0]
        true(size - ahead <= copies < size * 1.01 + (1 << 20), f"the copies: {copies}")
        genl.commit("web", epoch)
        genl.delete("web")
    until(lambda: toucher_used() < before[1] + (1 << 20) and maker_used() < before[0] + (1 << 20), "all is given back")
