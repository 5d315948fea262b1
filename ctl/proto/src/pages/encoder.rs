// SPDX-License-Identifier: GPL-2.0-or-later

//! The primary's side: from page records to entries.

use super::cache::Cache;
use super::cost::{Cost, Size};
use super::{Kind, BATCH_RECORDS, LENGTH_MAX, PAGES_MAX};
use crate::delta::{Diff, Page};
use crate::frame::records;
use crate::varint;
use lz4_flex::block::{compress_into_with_table, get_maximum_output_size, CompressTable};
use remus_core::uapi::ram::PAGE_SIZE;
use std::ops::AddAssign;
use std::time::Instant;

/// Pages that stay together, as a power of two.
const RUN_SHIFT: u32 = 6;

/// Which pages are whose, where several encode at once: runs of 64 pages in turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share {
    /// Which share, below `of`.
    pub index: u64,
    /// How many there are; 0 is as 1.
    pub of: u64,
}

impl Share {
    /// The only one.
    pub const ALL: Self = Self { index: 0, of: 1 };

    /// Whether `page` belongs to it.
    pub const fn owns(&self, page: u64) -> bool {
        match (page >> RUN_SHIFT).checked_rem(self.of) {
            Some(index) => index == self.index,
            None => self.index == 0,
        }
    }
}

/// How an [`Encoder`] works.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// The pages that it takes.
    pub share: Share,
    /// Bytes of memory for what the standby has; 0 for none, and so neither `unchanged` nor `delta`.
    pub cache_bytes: usize,
    /// Every page as it is, as the paper does without compression. There is no cache then.
    pub raw: bool,
}

/// Why records are not encoded. Nothing has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RecordsError {
    /// Not a whole number of records.
    Length,
    /// A page's number is too high, or not above the one before it.
    Number(u64),
    /// More than [`BATCH_RECORDS`] of the share.
    TooMany,
}

impl core::fmt::Display for RecordsError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Self::Length => f.write_str("there is a part of a page record"),
            Self::Number(page) => write!(f, "page {page} is out of order or of range"),
            Self::TooMany => f.write_str("there are more page records than go into a frame"),
        }
    }
}

impl core::error::Error for RecordsError {}

/// Pages by how they were encoded, and the bytes that came of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Pages of zeros.
    pub zero: u64,
    /// Pages of which the standby has the very content. They have no entry.
    pub unchanged: u64,
    /// Pages sent as what changed in them.
    pub delta: u64,
    /// Pages sent as what changed in them, compressed.
    pub packed: u64,
    /// Compressed pages.
    pub lz4: u64,
    /// Pages sent as they are.
    pub raw: u64,
    /// Bytes of all entries.
    pub bytes: u64,
}

impl Counts {
    /// How many entries there are: every page but the unchanged ones.
    pub const fn entries(&self) -> u64 {
        self.zero + self.delta + self.packed + self.lz4 + self.raw
    }
}

impl AddAssign for Counts {
    fn add_assign(&mut self, other: Self) {
        self.zero += other.zero;
        self.unchanged += other.unchanged;
        self.delta += other.delta;
        self.packed += other.packed;
        self.lz4 += other.lz4;
        self.raw += other.raw;
        self.bytes += other.bytes;
    }
}

/// Encodes the pages of a share, for one stream to one standby.
pub struct Encoder {
    share: Share,
    raw: bool,
    cache: Option<Cache>,
    cost: Cost,
    table: CompressTable,
    delta: Vec<u8>,
    whole: Room,
    part: Room,
}

impl Encoder {
    /// An encoder that knows nothing of the standby yet.
    pub fn new(options: Options) -> Self {
        let cached = !options.raw && options.cache_bytes >= super::cache::PAGE_COST;
        Self {
            share: options.share,
            raw: options.raw,
            cache: cached.then(|| Cache::new(options.cache_bytes)),
            cost: Cost::new(),
            table: CompressTable::small(),
            delta: Vec::with_capacity(2 * PAGE_SIZE),
            whole: Room::new(),
            part: Room::new(),
        }
    }

    /// Sets what a byte costs on the link now, in nanoseconds, as measured by who sends. Until then it is
    /// taken to be one of 1 Gbit/s.
    ///
    /// Where several encoders work at once for one link, a byte costs each of them as many times more, as
    /// the others' time is not lost while one of them works.
    pub fn set_link(&mut self, ns_per_byte: f64) {
        self.cost.set_link(ns_per_byte);
    }

    /// Forgets what the standby has. To be called if something that was encoded will not be applied
    /// there, before anything more is encoded.
    pub fn forget(&mut self) {
        if let Some(cache) = &mut self.cache {
            cache.clear();
        }
    }

    /// Appends a payload to `out`: the entries for those of `records` that are of this share, at most
    /// [`PAYLOAD_MAX`](crate::frame::PAYLOAD_MAX) bytes. Adds what they are to `counts`.
    ///
    /// The standby has to apply every payload of an encoder, in their order.
    pub fn encode(
        &mut self,
        bytes: &[u8],
        out: &mut Vec<u8>,
        counts: &mut Counts,
    ) -> Result<(), RecordsError> {
        let all = || records(bytes).map_err(|_| RecordsError::Length);
        // All that can be wrong, before the cache changes.
        let mut next = 0;
        let mut own = 0;
        for (page, _) in all()? {
            if page < next || page >= PAGES_MAX {
                return Err(RecordsError::Number(page));
            }
            next = page + 1;
            own += usize::from(self.share.owns(page));
        }
        if own > BATCH_RECORDS {
            return Err(RecordsError::TooMany);
        }
        let start = out.len();
        let mut next = 0;
        for (page, content) in all()? {
            if self.share.owns(page) && self.page(page, page - next, content, out, counts) {
                next = page + 1;
            }
        }
        counts.bytes += (out.len() - start) as u64;
        Ok(())
    }

    /// Appends the entry of a page, `gap` pages above the lowest that it could be. Returns whether it
    /// needs one.
    fn page(
        &mut self,
        page: u64,
        gap: u64,
        content: &Page,
        out: &mut Vec<u8>,
        counts: &mut Counts,
    ) -> bool {
        if self.raw {
            counts.raw += 1;
            entry(gap, Kind::Raw, content, out);
            return true;
        }
        if is_zero(content) {
            // It takes a byte to say so again, which is no reason to take room from other pages.
            if let Some(cache) = &mut self.cache {
                cache.remove(page);
            }
            counts.zero += 1;
            entry(gap, Kind::Zero, &[], out);
            return true;
        }
        let mut diff = None;
        if let Some(cache) = &mut self.cache {
            if let Some(old) = cache.get(page) {
                let between = Diff::new(old, content);
                if between.runs() == 0 {
                    counts.unchanged += 1;
                    return false;
                }
                *old = *content;
                diff = Some(between);
            } else {
                cache.insert(page, content);
            }
        }
        let (kind, shortest) = self.shortest(content, diff.as_ref());
        match kind {
            Kind::Lz4 => counts.lz4 += 1,
            Kind::Packed => counts.packed += 1,
            Kind::Delta => counts.delta += 1,
            Kind::Raw | Kind::Zero => counts.raw += 1,
        }
        entry(gap, kind, shortest, out);
        true
    }

    /// The shortest of what is worth trying for a page, of which `diff` says what changed.
    fn shortest<'a>(&'a mut self, content: &'a Page, diff: Option<&Diff>) -> (Kind, &'a [u8]) {
        // One that is too long is not to be chosen in place of LZ4.
        let diff = diff.filter(|diff| diff.size() <= LENGTH_MAX);
        let plan = self.cost.plan(diff.map(|diff| Size {
            bytes: diff.size(),
            runs: diff.runs(),
        }));
        let clock = Clock(plan.timed);
        let mut best = (Kind::Raw, content.as_slice());
        if plan.content {
            let (length, ns) = clock.time(|| self.whole.pack(content, &mut self.table));
            self.cost.content(length, ns);
            best = shorter(best, Kind::Lz4, self.whole.get(length));
        }
        // Its size is known before it is made.
        let Some(diff) = diff.filter(|diff| {
            plan.delta || plan.packed || (plan.content && diff.size() < best.1.len())
        }) else {
            return best;
        };
        self.delta.clear();
        let (made, ns) = clock.time(|| diff.encode(content, LENGTH_MAX, &mut self.delta));
        self.cost.delta(diff.runs(), ns);
        if !made {
            return best;
        }
        if plan.packed {
            let (length, ns) = clock.time(|| self.part.pack(&self.delta, &mut self.table));
            self.cost.packed(self.delta.len(), length, ns);
            best = shorter(best, Kind::Packed, self.part.get(length));
        }
        shorter(best, Kind::Delta, Some(&self.delta))
    }
}

/// Whichever is shorter of a page's content and another form of it, which has a length before it.
fn shorter<'a>(best: (Kind, &'a [u8]), kind: Kind, other: Option<&'a [u8]>) -> (Kind, &'a [u8]) {
    match other {
        Some(other) if other.len() <= LENGTH_MAX && other.len() < best.1.len() => (kind, other),
        _ => best,
    }
}

/// Takes the time, or not.
#[derive(Clone, Copy)]
struct Clock(bool);

impl Clock {
    /// Does `work`, and says how many nanoseconds it took.
    fn time<T>(self, work: impl FnOnce() -> T) -> (T, Option<u64>) {
        let since = self.0.then(Instant::now);
        let done = work();
        let ns = since.map(|since| since.elapsed().as_nanos().min(u128::from(u64::MAX)) as u64);
        (done, ns)
    }
}

/// Room for what LZ4 makes of a page, or of a part of one.
struct Room(Vec<u8>);

impl Room {
    fn new() -> Self {
        Self(vec![0; get_maximum_output_size(PAGE_SIZE)])
    }

    /// Compresses `bytes`, at most a page of them. Returns how many bytes that made.
    fn pack(&mut self, bytes: &[u8], table: &mut CompressTable) -> usize {
        // There is room enough; if there were not, no length would be long enough to be chosen.
        compress_into_with_table(bytes, &mut self.0, table).unwrap_or(usize::MAX)
    }

    fn get(&self, length: usize) -> Option<&[u8]> {
        self.0.get(..length)
    }
}

/// Appends an entry: see the module for its form.
fn entry(gap: u64, kind: Kind, content: &[u8], out: &mut Vec<u8>) {
    varint::put(gap << Kind::BITS | kind as u64, out);
    if kind.has_length() {
        varint::put(content.len() as u64, out);
    }
    out.extend_from_slice(content);
}

fn is_zero(page: &Page) -> bool {
    // Most pages that are not show it at once.
    page.as_chunks::<64>()
        .0
        .iter()
        .all(|chunk| *chunk == [0; 64])
}
