// SPDX-License-Identifier: GPL-2.0

//! How a seal makes an epoch's pages fault when they are written next: in runs, each by one call.
//!
//! ```text
//!   written     ■ ■ ■ · ■ ■ · · · · · · ■ ■      pages of one piece of physical memory
//!   runs       └─────┬─────┘           └─┬─┘     the gap of one page costs less than another call,
//!                one call            one call    that of six more (core::cost)
//! ```
//!
//! A run ends where the next page is too far off, is elsewhere in physical memory, has a hot page before it, or would make
//! the run too long.
//!
//! The call for a run write-protects it, with a flush of the TLB for each page, which may interrupt other processors: the
//! kernel has no other for modules. (`wp_shared_mapping_range()`, where there is one, flushes once, but leaves a written page dirty,
//! and what is dirty the kernel may make writable again without a fault, as `mprotect()` does.) So a long run is taken out
//! of the mappings instead, with one flush for all of it, if all of it was written. Its first write then costs more, and so
//! does a read.

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

/// Pages that one call is for.
pub(super) struct Run<'a> {
    /// The written ones, ascending, and the first one's number of each piece. There is room for [`LONGEST`].
    pieces: KVec<(u64, Neighbours<'a>)>,
    /// From here to below `end`, which begins at frame `pfn`.
    first: u64,
    end: u64,
    pfn: usize,
    /// Whether all of them were written.
    full: bool,
    /// Runs so far.
    calls: u32,
}

impl<'a> Run<'a> {
    /// An empty one.
    pub(super) fn new() -> Result<Self> {
        Ok(Self {
            pieces: KVec::with_capacity(LONGEST as usize, GFP_KERNEL)?,
            first: 0,
            end: 0,
            pfn: 0,
            full: true,
            calls: 0,
        })
    }

    /// Whether `pages`, from number `first` on, can be in it, too, with at most `gap` others before them.
    fn takes(&self, first: u64, pages: &Neighbours<'_>, gap: u64, hot: &Hot) -> bool {
        if self.pieces.is_empty() {
            return true;
        }
        let offset = first - self.first;
        first - self.end <= gap
            && offset + pages.count() as u64 <= LONGEST
            && pages.pfn == self.pfn + offset as usize
            && !hot.any(self.end, first)
    }

    /// Adds pages that it [`takes`](Self::takes).
    fn add(&mut self, first: u64, pages: Neighbours<'a>) {
        if self.pieces.is_empty() {
            (self.first, self.end, self.pfn, self.full) = (first, first, pages.pfn, true);
        }
        self.full &= first == self.end;
        self.end = first + pages.count() as u64;
        // Cannot fail: there is room for as many as it has pages.
        let _ = self.pieces.push_within_capacity((first, pages));
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
                    if !run.takes(next, &pages, gap, hot) {
                        self.protect_run(sealed, open, run, cost)?;
                    }
                    pages.wait_unlocked();
                    let after = next + pages.count() as u64;
                    run.add(next, pages);
                    next = after;
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
        let count = run.end - run.first;
        if run.full && count >= UNMAPPED {
            self.mapping.unmap(run.first, count);
        } else {
            let begin = (run.calls % SAMPLE == 0).then(Instant::<Monotonic>::now);
            self.mapping.write_protect(run.first, run.pfn, count)?;
            if let Some(begin) = begin {
                let ns = begin.elapsed().as_nanos();
                cost.learn(count, u64::try_from(ns).unwrap_or(0));
            }
        }
        run.calls = run.calls.wrapping_add(1);
        for (first, pages) in run.pieces.drain_all() {
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
}
