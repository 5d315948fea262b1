# SPDX-License-Identifier: GPL-2.0
"""Hot pages: not write-protected, but compared at each seal."""
import os
import random

from harness import SEED, fails, same, scaled, test, true
from machine import Machine, content
from netlink import Genl
from ram import PAGE, Ram

IDLE = 32  # seals at which a page is the same before it is cold


class Hot(Machine):
    """A machine with hot pages. What it must seal is what has changed since the last seal; it may seal more."""

    def __init__(self, stack, pages=64, limit=1000, **more):
        super().__init__(stack, pages, **more)
        self.genl.set(self.name, hot_limit=limit * PAGE)
        self.before = list(self.image)          # at the last seal
        self.carried = set()                    # of aborted epochs
        self.must = {}                          # epoch: pages
        self.number = 0

    def hot(self):
        return self.genl.get(self.name)["hot-pages"]

    def touch(self, *pages):
        """Writes something else into these pages. Returns how many of them had a fault, which is what puts a page into
        the open epoch's set before the seal."""
        self.number += 1
        before = self.genl.get(self.name)["dirty-pages"]
        for page in pages:
            self.write(page * PAGE, b"%016d" % self.number)
        return self.genl.get(self.name)["dirty-pages"] - before

    def seal(self, full=False):
        done = self.genl.seal(self.name, full)
        must = {p for p in range(self.pages) if self.image[p] != self.before[p]} | self.carried
        if full:
            must |= {p for p in range(self.pages) if self.image[p] != bytes(PAGE)}
        self.before, self.carried, self.dirty = list(self.image), set(), set()
        self.must[done["epoch"]], self.sealed[done["epoch"]] = must, dict(enumerate(self.image))
        self.last = done["dirty-pages"]
        return done["epoch"]

    def abort(self, epoch):
        self.genl.abort(self.name, epoch)
        for e in [e for e in self.sealed if e >= epoch]:
            self.carried |= self.must.pop(e)
            del self.sealed[e]

    def check(self, epoch, batch=64, between=None):
        got, was = self.device.epoch(epoch, batch, between), self.sealed[epoch]
        same(sorted(self.must[epoch] - set(got)), [], f"pages that epoch {epoch} lacks")
        same([p for p in got if got[p] != was[p]], [], f"pages of epoch {epoch} that are not as they were at its seal")
        return set(got)

    def warm(self, *pages):
        """Makes pages hot."""
        for _ in range(2):
            self.touch(*pages)
            self.commit(self.seal())


@test
def not_unless_asked_for(stack):
    m = Machine(stack, 8)
    for n in range(5):
        m.write(3 * PAGE, content(n))
        m.check(m.seal())
        m.commit(n + 1)
    same({k: m.genl.get("web")[k] for k in ("hot-pages", "hot-limit")}, {"hot-pages": 0, "hot-limit": 0}, "by default")
    m.genl.new("plain")
    with fails(22):
        m.genl.set("plain", hot_limit=PAGE)
    with fails(22):
        m.genl.new("none", hot_limit=PAGE)
    m.genl.delete("plain")
    m.genl.new("made", 8 * PAGE, hot_limit=3 * PAGE - 1)
    same(m.genl.get("made")["hot-limit"], 2 * PAGE, "whole pages")
    same(m.genl.set("made", hot_limit=(1 << 64) - 1)["hot-limit"], ((1 << 64) - 1) // PAGE * PAGE, "the largest number")
    m.genl.delete("made")


@test
def hot_and_cold(stack):
    m = Hot(stack)
    m.touch(3)
    m.check(m.seal())
    same((m.hot(), m.touch(3)), (0, 1), "written in one epoch, and a fault in the next")
    m.check(m.seal())
    same(m.hot(), 1, "written in two")
    m.commit(2)
    # A write costs no fault, and is there; several epochs wait, each with what it saw.
    for _ in range(4):
        same(m.touch(3), 0, "faults of a hot page")
        m.seal()
        same(m.last, 1, "pages in an epoch that wrote one")
    m.touch(3)
    for epoch in list(m.sealed):
        same(m.check(epoch), {3}, f"epoch {epoch}")
    m.commit(max(m.sealed))
    m.commit(m.seal())
    # Not written, or written with what it was.
    for how in "not written", "the same again":
        if how != "not written":
            m.map.write(3 * PAGE, m.map.page(3))
        same(m.check(m.seal()), set(), how)
        m.commit(max(m.sealed))
    # One page is cold again, the other is written all the time.
    m.warm(9)
    same(m.hot(), 2, "hot pages")
    sets = []
    for _ in range(IDLE):
        m.touch(9)
        sets.append(m.check(m.seal()))
        m.commit(max(m.sealed))
    same((m.hot(), [s for s in sets if 3 in s]), (1, [{3, 9}]), "the page that was not written is in one epoch more, and cold")
    same((m.touch(3), m.touch(9)), (1, 0), "faults of the cold page and of the hot one")
    same(m.check(m.seal()), {3, 9}, "both are seen")


@test
def hot_snapshot(stack):
    """What is written after the seal is not in the snapshot, however often that is read."""
    m = Hot(stack)
    m.warm(*range(10))
    for _ in range(3):
        m.touch(*range(0, 10, 2), 20)
        epoch = m.seal()
        m.touch(*range(10))
        same(m.check(epoch), m.must[epoch], "no page that has not changed")
        later = m.seal()
        m.touch(*range(5))
        for e in epoch, later, epoch:
            m.check(e)
        m.commit(epoch)
        m.check(later)
        m.commit(later)
    same(m.genl.get("web")["snapshot-pages"], 0, "copies that are left")


@test
def hot_abort(stack):
    """An aborted epoch's pages are in the next one, changed since or not."""
    m = Hot(stack)
    m.warm(1, 2, 3)
    m.touch(1, 2)
    m.seal()
    m.touch(3)
    second = m.seal()
    m.abort(second)
    same(m.check(m.seal()), {3}, "after the abort of one")
    m.abort(min(m.sealed))
    same(m.check(m.seal()), {1, 2, 3}, "after the abort of all")
    m.touch(2)
    m.abort(max(m.sealed))
    m.touch(3)
    epoch = m.seal()
    m.touch(1, 2, 3)
    same(m.check(epoch), {1, 2, 3}, "and written since")


@test
def hot_full(stack):
    m = Hot(stack)
    m.touch(*range(20))
    m.commit(m.seal())
    m.warm(*range(0, 20, 2))
    epoch = m.seal(full=True)
    m.touch(*range(20))
    true(m.check(epoch) >= set(range(20)), "a full seal has them all, as they were")
    m.commit(epoch)
    # It does not say that a page was written.
    same(m.hot(), 10, "hot pages")
    m.commit(m.seal())
    same(m.hot(), 10, "hot pages, an epoch later")


@test
def hot_limits(stack):
    m = Hot(stack, limit=6)
    m.warm(*range(10))
    same(m.hot(), 6, "no more than the limit")
    m.warm(*range(10))
    same(m.hot(), 6, "nor later")
    m.touch(0)
    m.genl.set("web", hot_limit=2 * PAGE)
    epoch = m.seal()
    m.touch(*range(10))
    same((m.hot(), len(m.check(epoch))), (2, 5), "what is too much becomes cold, and is in the epoch")
    m.genl.set("web", hot_limit=0)
    m.check(m.seal())
    same(m.hot(), 0, "none any more")
    same(m.touch(*range(10)), 10, "faults")
    m.commit(max(m.sealed))
    # Their content counts as a copy as long as an epoch waits: where there is no room for it they are cold.
    m.genl.set("web", hot_limit=100 * PAGE, cow_limit=4 * PAGE)
    m.commit(m.seal())
    m.warm(*range(10))
    true(0 < m.hot() <= 4, f"{m.hot()} hot pages with room for 4 copies")
    m.touch(*range(4))
    m.seal()
    m.touch(*range(3))
    m.seal()
    true(m.genl.get("web")["snapshot-pages"] <= 4, "copies beyond the limit")
    for epoch in list(m.sealed):
        m.check(epoch)


@test(seconds=1200)
def hot_at_random(stack):
    """Writes by every way, seals, commits, aborts, and limits that change."""
    pages = 128
    m, rng = Hot(stack, pages, limit=24), random.Random(SEED)
    other, most = m.device.map(), 0
    for _ in range(scaled(400, 20_000)):
        dice = rng.random()
        if dice < 0.6 or not m.sealed:
            # Some pages more than others.
            for _ in range(rng.randrange(20)):
                page = rng.randrange(10) if rng.random() < 0.7 else rng.randrange(pages)
                data = rng.randbytes(rng.randrange(1, 100)) if rng.random() < 0.9 else m.image[page][:50]
                at = page * PAGE + rng.randrange(PAGE - len(data))
                m.write(at, data, rng.choice((None, other.write, lambda at, data: os.pwrite(m.device.fd, data, at))))
            if len(m.sealed) < 5:
                m.seal(full=not m.sealed and rng.random() < 0.05)
        elif dice < 0.75:
            m.check(rng.choice(list(m.sealed)), rng.choice((3, 64)))
        elif dice < 0.9:
            m.commit(rng.choice(list(m.sealed)))
        elif dice < 0.97:
            m.abort(rng.choice(list(m.sealed)))
        else:
            m.genl.set("web", hot_limit=rng.choice((0, 5, 24, 1000)) * PAGE, cow_limit=0)
        most = max(most, m.hot())
    true(most > 10, f"at most {most} pages were hot")
    for epoch in list(m.sealed):
        m.check(epoch)


@test
def hot_until_the_end(stack):
    """The domain goes with hot pages, and with epochs outstanding."""
    with Genl() as genl:
        for _ in range(3):
            genl.new("gone", 64 * PAGE, hot_limit=1 << 20)
            with Ram("gone") as device, device.map() as memory:
                for n in range(4):
                    memory.write(0, b"%d" % n * 3 * PAGE)
                    genl.seal("gone")
                true(genl.get("gone")["hot-pages"] > 0, "hot pages")
                genl.delete("gone")
                memory.write(0, b"still there")
