# SPDX-License-Identifier: GPL-2.0
"""The RAM device by system calls: open, mmap, READ."""
import ctypes
import fcntl
import os
import struct

PAGE = 4096
RECORD = PAGE + 8
READ = 3 << 30 | 48 << 16 | ord("R") << 8 | 0x40
BITMAP = 3 << 30 | 32 << 16 | ord("R") << 8 | 0x41
END = (1 << 64) - 1
READ_STRUCT = struct.Struct("=QQQQIIII")
BITMAP_STRUCT = struct.Struct("=QQQQ")
KEEP = 1

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = libc.mremap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
libc.mprotect.argtypes = libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.ioctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p]
libc.read.argtypes = libc.write.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
libc.read.restype = libc.write.restype = ctypes.c_ssize_t
libc.pread.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_long]
libc.pread.restype = ctypes.c_ssize_t
libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
libc.syscall.restype = ctypes.c_long

PROT_READ, PROT_WRITE, PROT_NONE = 1, 2, 0
RW = PROT_READ | PROT_WRITE
MAP_SHARED, MAP_PRIVATE, MAP_ANONYMOUS, MAP_POPULATE = 1, 2, 0x20, 0x8000
FAILED = ctypes.c_void_p(-1).value


def check(result):
    if result == -1 or result == FAILED:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


OPEN = []  # mappings and descriptors that a failed test has left


def close_all():
    for one in list(OPEN):
        try:
            one.close()
        except OSError:
            pass
    OPEN.clear()


class Map:
    """A mapping, accessed through plain loads and stores."""

    def __init__(self, fd, length, offset=0, prot=RW, flags=MAP_SHARED):
        self.length = length
        self.addr = check(libc.mmap(None, length, prot, flags, fd, offset))
        OPEN.append(self)

    def write(self, at, data):
        assert 0 <= at and at + len(data) <= self.length
        ctypes.memmove(self.addr + at, data, len(data))

    def read(self, at, n):
        assert 0 <= at and at + n <= self.length
        return ctypes.string_at(self.addr + at, n)

    def page(self, n):
        return self.read(n * PAGE, PAGE)

    def frames(self):
        """Where its pages are in memory, by number; none for those of which the page table has nothing (pagemap.rst)."""
        with open("/proc/self/pagemap", "rb") as f:
            f.seek(self.addr // PAGE * 8)
            entries = struct.iter_unpack("=Q", f.read(self.length // PAGE * 8))
        return [entry & (1 << 55) - 1 if entry >> 63 else None for entry, in entries]

    def mprotect(self, prot):
        check(libc.mprotect(self.addr, self.length, prot))

    def madvise(self, advice):
        check(libc.madvise(self.addr, self.length, advice))

    def close(self):
        if self.addr:
            addr, self.addr = self.addr, None
            OPEN[:] = [o for o in OPEN if o is not self]
            check(libc.munmap(addr, self.length))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def anonymous(length):
    return Map(-1, length, flags=MAP_PRIVATE | MAP_ANONYMOUS)


class Ram:
    """An open RAM device."""

    def __init__(self, domain, flags=os.O_RDWR):
        self.fd = os.open(f"/dev/remus/{domain}", flags | os.O_CLOEXEC)
        self.maps = []
        OPEN.append(self)

    def close(self):
        OPEN[:] = [o for o in OPEN if o is not self]
        for m in self.maps:
            m.close()
        self.maps = []
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def map(self, length=None, offset=0, prot=RW, flags=MAP_SHARED):
        if length is None:
            length = os.lseek(self.fd, 0, os.SEEK_END) - offset
        m = Map(self.fd, length, offset, prot, flags)
        self.maps.append(m)
        return m

    def call(self, epoch, cursor, buffer, length, end=END, flags=KEEP, reserved=0):
        """One READ: returns the next cursor and the count."""
        arg = bytearray(READ_STRUCT.pack(epoch, cursor, end, buffer, length, 0, flags, reserved))
        fcntl.ioctl(self.fd, READ, arg)
        out = READ_STRUCT.unpack(arg)
        if (out[0], *out[2:5], *out[6:]) != (epoch, end, buffer, length, flags, reserved):
            raise AssertionError(f"READ changed its input: {out}")
        return out[1], out[5]

    def bitmap(self, epoch):
        """Where the hand-off of a sealed epoch is: offset, bytes, and how many pages were written."""
        arg = bytearray(BITMAP_STRUCT.pack(epoch, 0, 0, 0))
        fcntl.ioctl(self.fd, BITMAP, arg)
        out = BITMAP_STRUCT.unpack(arg)
        if out[0] != epoch:
            raise AssertionError(f"BITMAP changed its input: {out}")
        return out[1:]

    def map_bitmap(self, epoch, prot=PROT_READ, flags=MAP_SHARED):
        offset, length, _ = self.bitmap(epoch)
        return self.map(length, offset, prot, flags)

    def records(self, epoch, batch=64, between=None, **how):
        """All records of a sealed epoch: a list of (page, content), in the order of the replies."""
        size = batch * RECORD
        buffer = ctypes.create_string_buffer(size)
        out, cursor = [], 0
        while cursor != END:
            cursor, count = self.call(epoch, cursor, ctypes.addressof(buffer), size, **how)
            if not 0 <= count <= batch or (count == 0 and cursor != END):
                raise AssertionError(f"READ returned {count} records, cursor {cursor}")
            for i in range(count):
                at = i * RECORD
                out.append((int.from_bytes(buffer[at:at + 8], "little"), buffer[at + 8:at + RECORD]))
            if between:
                between()
        return out

    def epoch(self, epoch, batch=64, between=None, **how):
        """A sealed epoch as a dict; the pages have to come in ascending order, each once."""
        records = self.records(epoch, batch, between, **how)
        pages = [p for p, _ in records]
        if pages != sorted(set(pages)):
            raise AssertionError(f"pages of epoch {epoch} out of order: {pages[:50]}")
        return dict(records)
