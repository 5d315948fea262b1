# SPDX-License-Identifier: GPL-2.0
"""A domain with memory, and a model of what its epochs hold."""
import contextlib
import struct

import ram
from harness import Kid, same, true
from netlink import Genl, Refused
from ram import PAGE, Ram


class Machine:
    """A domain with memory: netlink, the device, and what each epoch must contain."""

    def __init__(self, stack, pages=256, name="web"):
        self.name, self.pages = name, pages
        self.genl = stack.enter_context(Genl())
        self.genl.new(name, pages * PAGE)
        stack.callback(self.end)
        self.device = Ram(name)
        self.map = self.device.map()
        self.image = [bytes(PAGE)] * pages      # what the memory holds now
        self.dirty = set()                      # written in the open epoch
        self.sealed = {}                        # epoch: {page: content at the seal}

    def end(self):
        # Whatever has failed, the memory is let go.
        for kid in Kid.all:
            kid.kill()
        ram.close_all()
        with contextlib.suppress(Refused):
            self.genl.delete(self.name)

    def wrote(self, at, data):
        """The model of a write."""
        while data:
            page, offset = divmod(at, PAGE)
            part = data[:PAGE - offset]
            old = self.image[page]
            self.image[page] = old[:offset] + part + old[offset + len(part):]
            self.dirty.add(page)
            at, data = at + len(part), data[len(part):]

    def write(self, at, data, how=None):
        (how or self.map.write)(at, data)
        self.wrote(at, data)

    def seal(self, full=False):
        done = self.genl.seal(self.name, full)
        if full:
            resident = {p for p in range(self.pages) if self.image[p] != bytes(PAGE)}
            true(done["dirty-pages"] >= len(resident), "a full seal has every resident page")
        else:
            same(done["dirty-pages"], len(self.dirty), f"dirty pages of epoch {done['epoch']}")
        self.sealed[done["epoch"]] = {p: self.image[p] for p in self.dirty}
        self.dirty = set()
        return done["epoch"]

    def commit(self, epoch):
        self.genl.commit(self.name, epoch)
        for e in [e for e in self.sealed if e <= epoch]:
            del self.sealed[e]

    def abort(self, epoch):
        self.genl.abort(self.name, epoch)
        for e in [e for e in self.sealed if e >= epoch]:
            self.dirty |= set(self.sealed.pop(e))

    def check(self, epoch, batch=64, between=None):
        """What READ says of a sealed epoch, page for page, byte for byte."""
        got, want = self.device.epoch(epoch, batch, between), self.sealed[epoch]
        same(sorted(got), sorted(want), f"pages of epoch {epoch}")
        for page in want:
            if got[page] != want[page]:
                at = next(i for i in range(PAGE) if got[page][i] != want[page][i])
                raise AssertionError(f"epoch {epoch}, page {page} differs from byte {at} on: "
                                     f"{got[page][at:at + 16].hex()} instead of {want[page][at:at + 16].hex()}")


def content(n):
    return struct.pack("=Q", n) * (PAGE // 8)
