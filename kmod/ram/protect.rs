// SPDX-License-Identifier: GPL-2.0

//! How a seal makes an epoch's pages fault when they are written next: in runs, each by one call.
//!
//! ```text
//!   written     ■ ■ ■ · ■ ■ · · · · · · ■ ■ ■ ■ ■ ■
//!   memory     ┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┘ └┄┄┄┄┄     one piece, and another
//!   runs       └─────┬─────┘           └──┬──┴──┬──┘    the gap of one page costs less than another call,
//!   calls        one call              one    one       that of six more (core::cost)
//! ```
//!
//! A run ends where the next page is too far off, has a hot page before it, or would make the run too long; and, once it has a
//! gap, where the next page is elsewhere in physical memory.
//!
//! A call for a run's part in one piece write-protects it, with a flush of the TLB for each page, which may interrupt other
//! processors: the kernel has no other for modules. (`wp_shared_mapping_range()`, where there is one, flushes once, but leaves
//! a written page dirty, and what is dirty the kernel may make writable again without a fault, as `mprotect()` does.) So a
//! long run is taken out of the mappings instead, with one flush for all of it, wherever it is in memory, if all of it was
//! written. Its first write then costs more, and so does a read.

use super::{
    hot::Hot,
    Ram,
    Sealed,
    State, //
};
use crate::{
    abi::{
        cond_resched,
        page::Neighbours, //
    },
    core::{
        cost::Cost,
        dirty, //
    },
    pageset::PageSet, //
};
use kernel::{
    prelude::*,
    time::{
        Instant,
        Monotonic, //
    }, //
};

/// Pages that one call is for at most, so that a seal can be preempted.
const LONGEST: u64 = 512;

/// From so many pages on a run that was written throughout is unmapped. Scattered writes do not make such runs,
/// and the kernel flushes all of a TLB rather than half as many pages of it.
const UNMAPPED: u64 = 64;

/// One call of so many is timed.
const SAMPLE: u32 = 16;

/// Written pages in a row, neighbours in physical memory.
struct Piece<'a> {
    first: u64,
    pages: Neighbours<'a>,
}

impl Piece<'_> {
    /// The page behind its last.
    fn end(&self) -> u64 {
        self.first.wrapping_add(self.pages.count() as u64)
    }

    /// Where it is, as the frame that page 0 would have: pieces of the same can be write-protected by one call.
    fn place(&self) -> u64 {
        (self.pages.pfn as u64).wrapping_sub(self.first)
    }
}

/// Pages near each other that are made to fault together.
pub(super) struct Run<'a> {
    /// Ascending. There is room for [`LONGEST`].
    pieces: KVec<Piece<'a>>,
    /// From here to below `end`.
    first: u64,
    end: u64,
    /// Where the last piece is.
    place: u64,
    /// Whether all of them were written.
    full: bool,
    /// Calls so far that write-protected pages.
    calls: u32,
}

impl<'a> Run<'a> {
    /// An empty one.
    pub(super) fn new() -> Result<Self> {
        Ok(Self {
            pieces: KVec::with_capacity(LONGEST as usize, GFP_KERNEL)?,
            first: 0,
            end: 0,
            place: 0,
            full: true,
            calls: 0,
        })
    }

    /// Whether it is to be unmapped.
    fn is_long(&self) -> bool {
        self.full && self.end - self.first >= UNMAPPED
    }

    /// Whether `next` can be in it, too, with at most `gap` pages before it that were not written.
    fn takes(&self, next: &Piece<'_>, gap: u64, hot: &Hot) -> bool {
        if self.pieces.is_empty() {
            return true;
        }
        let between = next.first - self.end;
        if between > gap || next.end() - self.first > LONGEST {
            return false;
        }
        if between == 0 && self.full {
            return true;
        }
        // A gap would have all of a long run write-protected.
        next.place() == self.place && !self.is_long() && !hot.any(self.end, next.first)
    }

    /// Adds what it [`takes`](Self::takes).
    fn add(&mut self, next: Piece<'a>) {
        if self.pieces.is_empty() {
            (self.first, self.end, self.full) = (next.first, next.first, true);
        }
        self.full &= next.first == self.end;
        (self.end, self.place) = (next.end(), next.place());
        // Cannot fail: there is room for as many as it has pages.
        let _ = self.pieces.push_within_capacity(next);
    }
}

impl Ram {
    /// Write-protects the pages of `sealed` that are not hot, or unmaps them. A page that may be written without a fault, because
    /// somebody holds it for direct access, is copied now and belongs to `open` as well. `state` is held alone.
    pub(super) fn protect<'a>(
        &'a self,
        sealed: &Sealed,
        open: &PageSet,
        run: &mut Run<'a>,
        state: &mut State,
    ) -> Result {
        let State { cost, hot, .. } = state;
        let (gap, mut near) = (cost.gap(), self.near());
        for (base, bits) in sealed.dirty.set.bits(0) {
            for (first, count) in dirty::runs(bits & !hot.bits(base)) {
                let (mut next, end) = (base + first, base + first + count);
                while next < end {
                    let Some(pages) = near.neighbours(next, end - next) else {
                        next += 1;
                        continue;
                    };
                    let piece = Piece { first: next, pages };
                    if !run.takes(&piece, gap, hot) {
                        self.protect_run(sealed, open, run, cost)?;
                    }
                    piece.pages.wait_unlocked();
                    next = piece.end();
                    run.add(piece);
                }
            }
        }
        self.protect_run(sealed, open, run, cost)
    }

    /// The same for those of `run`, which is empty then.
    // Where pages are scattered that is once for each: 13 instructions of some 500 less.
    #[inline(always)]
    fn protect_run(
        &self,
        sealed: &Sealed,
        open: &PageSet,
        run: &mut Run<'_>,
        cost: &mut Cost,
    ) -> Result {
        if run.pieces.is_empty() {
            return Ok(());
        }
        if run.is_long() {
            self.mapping.unmap(run.first, run.end - run.first);
        } else {
            self.write_protect(run, cost)?;
        }
        for Piece { first, pages } in run.pieces.drain_all() {
            let mut from = 0;
            while let Some((n, page)) = pages.next_held(from) {
                let index = first + n as u64;
                open.insert(index, &self.payer)?;
                let lock = page.lock();
                self.keep(sealed, index, true, || Ok(lock.copy()?))?;
                from = n + 1;
            }
        }
        cond_resched();
        Ok(())
    }

    /// Write-protects the pages of `run`, by a call for each piece of memory.
    #[inline(always)]
    fn write_protect(&self, run: &mut Run<'_>, cost: &mut Cost) -> Result {
        let together = |one: &Piece<'_>, other: &Piece<'_>| one.place() == other.place();
        for pieces in run.pieces.chunk_by(together) {
            let ([Piece { first, pages }, ..], Some(last)) = (pieces, pieces.last()) else {
                continue;
            };
            let count = last.end() - first;
            let begin = (run.calls % SAMPLE == 0).then(Instant::<Monotonic>::now);
            self.mapping.write_protect(*first, pages.pfn, count)?;
            if let Some(begin) = begin {
                let ns = begin.elapsed().as_nanos();
                cost.learn(count, u64::try_from(ns).unwrap_or(0));
            }
            run.calls = run.calls.wrapping_add(1);
        }
        Ok(())
    }
}
