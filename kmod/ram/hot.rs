// SPDX-License-Identifier: GPL-2.0

//! Hot pages: those that one epoch after the other writes.
//!
//! The first write of a page in an epoch faults, and for a guest it ends its turn on the processor. Of a page that
//! nearly every epoch writes, it is cheaper to look at each seal whether its content is another: it stays
//! writable, what it was at the last seal is kept, and what it is now goes to the sealed epoch at once if that differs.
//!
//! ```text
//!            written in two epochs, one after the other
//!     cold ─────────────────────────────────────────────▶ hot
//!          ◀─────────────────────────────────────────────
//!            the same for some seals, or no room for its content
//! ```
//!
//! - A hot page is in a sealed epoch's set if its content changed, and the epoch has a copy of it from the start. So no
//!   reader ever looks at the page itself.
//! - It is not in the open set, unless something put it there: an abort, or a write fault in a new mapping.
//! - One that becomes cold is in the epoch that is sealed, and treated like all pages of it: write-protected, and asked
//!   for who holds it.
//!
//! The guest, and whatever else writes its memory, has to stand still during a seal: of what it writes meanwhile to a hot
//! page the sealed epoch may have a part. Nothing of it is lost: the next epoch has it.

use super::{
    Bitmap,
    Ram,
    Sealed, //
};
use crate::abi::page::Page;
use kernel::{
    prelude::*,
    sync::Arc, //
};

/// A page that is the same at so many seals, one after the other, becomes cold.
const IDLE: u8 = 32;
/// Pages that become hot in one seal at most, each of which is copied in it.
const HEATED: u64 = 256;

/// A hot page.
pub(super) struct HotPage {
    index: u64,
    /// Its content at the last seal.
    seen: Page,
    /// At so many seals it was the same.
    idle: u8,
}

/// The hot pages of a memory.
pub(super) struct Hot {
    /// Ascending.
    pages: KVec<HotPage>,
    /// What the last epoch has written.
    last: Option<Arc<Bitmap>>,
}

impl Hot {
    pub(super) fn new() -> Self {
        Self {
            pages: KVec::new(),
            last: None,
        }
    }

    pub(super) fn count(&self) -> u64 {
        self.pages.len() as u64
    }

    /// Whether there is one from `from` to below `to`.
    pub(super) fn any(&self, from: u64, to: u64) -> bool {
        let at = self.pages.partition_point(|page| page.index < from);
        self.pages.get(at).is_some_and(|page| page.index < to)
    }

    fn contains(&self, index: u64) -> bool {
        self.any(index, index + 1)
    }

    /// The bits of those that are hot of 64 pages from `first` on.
    pub(super) fn bits(&self, first: u64) -> u64 {
        if self.pages.is_empty() {
            return 0;
        }
        let at = self.pages.partition_point(|page| page.index < first);
        let from = self.pages.iter().skip(at);
        let there = from.map(|page| page.index - first).take_while(|n| *n < 64);
        there.fold(0, |bits, n| bits | 1 << n)
    }

    /// Adds pages, ascending, none of which is hot. None of them is, after an error.
    fn add(&mut self, heated: KVec<HotPage>) -> Result {
        if heated.is_empty() {
            return Ok(());
        }
        let len = self.pages.len() + heated.len();
        let mut both = KVec::with_capacity(len, GFP_KERNEL)?;
        let old = core::mem::take(&mut self.pages);
        let (mut old, mut new) = (old.into_iter().peekable(), heated.into_iter().peekable());
        loop {
            let older = match (old.peek(), new.peek()) {
                (Some(a), Some(b)) => a.index < b.index,
                (a, _) => a.is_some(),
            };
            let Some(page) = (if older { old.next() } else { new.next() }) else {
                break;
            };
            // Cannot fail: there is room.
            let _ = both.push_within_capacity(page);
        }
        self.pages = both;
        Ok(())
    }

    /// An epoch was sealed; `watched`, if pages may become hot by what it has written.
    pub(super) fn sealed(&mut self, dirty: &Arc<Bitmap>, watched: bool) {
        self.last = watched.then(|| dirty.clone());
    }
}

impl Ram {
    /// Puts the hot pages that have changed into `sealed`, all of them if it is `full`. At most `limit` stay hot.
    /// The memory's state is held alone. After an error the rest is for the next seal to see.
    pub(super) fn compare(&self, sealed: &Sealed, hot: &mut Hot, limit: u64, full: bool) -> Result {
        let (mut count, mut done) = (0, Ok(()));
        hot.pages.retain(|page| {
            if done.is_err() {
                return true;
            }
            count += 1;
            let stays = self.compare_page(sealed, page, full, count > limit);
            stays.unwrap_or_else(|error| {
                done = Err(error);
                true
            })
        });
        done
    }

    /// Returns whether the page stays hot.
    fn compare_page(
        &self,
        sealed: &Sealed,
        hot: &mut HotPage,
        full: bool,
        excess: bool,
    ) -> Result<bool> {
        let dirty = &sealed.dirty.set;
        let Some(page) = self.page_at(hot.index) else {
            return Ok(false);
        };
        let lock = page.lock();
        let same = lock.equals(&hot.seen);
        hot.idle = if same { hot.idle.saturating_add(1) } else { 0 };
        let cold = excess || hot.idle >= IDLE;
        if !same || cold {
            dirty.insert(hot.index, &self.payer)?;
        }
        if cold {
            return Ok(false);
        }
        if !same {
            let _charge = self.payer.charge();
            let Ok(copy) = lock.copy() else {
                return Ok(false);
            };
            hot.seen = copy;
        }
        if full || dirty.contains(hot.index) {
            return self.keep(sealed, hot.index, false, || Ok(hot.seen.share()));
        }
        Ok(true)
    }

    /// Makes pages hot that `sealed` and the epoch before it have written: at most [`HEATED`], and at most `limit` in all.
    /// The memory's state is held alone.
    pub(super) fn heat(&self, sealed: &Sealed, hot: &mut Hot, limit: u64) -> Result {
        let Some(last) = hot.last.take() else {
            return Ok(());
        };
        let room = limit.saturating_sub(hot.count()).min(HEATED) as usize;
        let mut heated = KVec::with_capacity(room, GFP_KERNEL)?;
        let both = sealed.dirty.set.from(0).filter(|n| last.set.contains(*n));
        for index in both.filter(|n| !hot.contains(*n)).take(room) {
            let Some(page) = self.page_at(index) else {
                continue;
            };
            let lock = page.lock();
            let _charge = self.payer.charge();
            let Ok(seen) = lock.copy() else { break };
            // Without room for it the page is one like any other.
            if !self.keep(sealed, index, false, || Ok(seen.share()))? {
                break;
            }
            let idle = 0;
            let page = HotPage { index, seen, idle };
            if heated.push_within_capacity(page).is_err() {
                break;
            }
        }
        hot.add(heated)?;
        Ok(())
    }
}
