// SPDX-License-Identifier: GPL-2.0-or-later

//! What changed in a page, as runs: so many bytes as they were, so many new ones.
//!
//! ```text
//!  delta = run …, at least one
//!  run   = skip  varint: bytes that stay, 0 only in the first run
//!          copy  varint: how many bytes follow, at least 1
//!          copy bytes of the new content
//! ```
//!
//! What comes after the last run stays. The new bytes are sent and not their XOR with the old ones, so
//! that it does no harm to put a delta twice on the same page.
//!
//! Two pages are compared 64 bytes at a time; only where these differ is it looked up which ones do,
//! as a bit for each byte.

use crate::varint;
use remus_core::uapi::ram::PAGE_SIZE;

/// A page's content.
pub type Page = [u8; PAGE_SIZE];

/// Bytes that are compared at once: a bit for each in a word.
const CHUNK: usize = 64;
/// Bytes that a run has before its content, at least.
const HEAD: usize = 2;

/// Which bytes of a page differ from its old content.
#[derive(Clone, Debug)]
pub struct Diff {
    /// Bit `b` of word `w`: byte `64 w + b` differs, or stays in a gap that is not worth a new run.
    words: [u64; PAGE_SIZE / CHUNK],
    bytes: usize,
    runs: usize,
}

impl Diff {
    /// Compares two pages.
    pub fn new(old: &Page, new: &Page) -> Self {
        let mut words = [0; PAGE_SIZE / CHUNK];
        let mut bytes = 0;
        let mut runs = 0;
        let mut last = 0;
        let chunks = old.as_chunks().0.iter().zip(new.as_chunks().0);
        for (word, (old, new)) in words.iter_mut().zip(chunks) {
            if old != new {
                *word = join(differing(old, new));
                bytes += word.count_ones() as usize;
                runs += (*word & !(*word << 1 | last >> 63)).count_ones() as usize;
            }
            last = *word;
        }
        Self { words, bytes, runs }
    }

    /// In how many pieces the pages differ; 0 if they do not.
    pub fn runs(&self) -> usize {
        self.runs
    }

    /// Bytes that the delta takes, but for one more for each run and each gap of 128 bytes or more.
    pub fn size(&self) -> usize {
        self.bytes + HEAD * self.runs
    }

    /// Appends the delta that makes `new` of the old content, unless it would take more than `most`
    /// bytes. Returns whether it did; if not, or if nothing differs, `out` is as it was.
    pub fn encode(&self, new: &Page, most: usize, out: &mut Vec<u8>) -> bool {
        if self.runs == 0 || self.size() > most {
            return false;
        }
        let start = out.len();
        let mut kept = 0;
        let mut open = None;
        let mut last = 0;
        for (at, word) in self.words.iter().enumerate() {
            // Where a run begins, and where it ends, in turn.
            let mut edges = word ^ (word << 1 | last >> 63);
            last = *word;
            while edges != 0 {
                let edge = at * CHUNK + edges.trailing_zeros() as usize;
                edges &= edges - 1;
                if let Some(from) = open.take() {
                    run(
                        from - kept,
                        new.get(from..).unwrap_or(&[]),
                        edge - from,
                        out,
                    );
                    kept = edge;
                } else {
                    open = Some(edge);
                }
            }
        }
        if let Some(from) = open {
            let rest = new.get(from..).unwrap_or(&[]);
            run(from - kept, rest, rest.len(), out);
        }
        let fits = out.len() - start <= most;
        if !fits {
            out.truncate(start);
        }
        fits
    }
}

/// Appends a run: `skip` bytes that stay, then the first `copy` of `new`.
fn run(skip: usize, new: &[u8], copy: usize, out: &mut Vec<u8>) {
    varint::put(skip as u64, out);
    varint::put(copy as u64, out);
    match new.first_chunk::<8>() {
        // Eight bytes are written faster than fewer.
        Some(eight) if copy <= 8 => {
            let end = out.len() + copy;
            out.extend_from_slice(eight);
            out.truncate(end);
        }
        _ => out.extend_from_slice(new.get(..copy).unwrap_or(new)),
    }
}

/// A bit for each byte that differs, the first lowest.
fn differing(old: &[u8; CHUNK], new: &[u8; CHUNK]) -> u64 {
    // A byte of 0 or 1 for each first, which the compiler does many at a time.
    let mut ones = [0u8; CHUNK];
    for (one, (old, new)) in ones.iter_mut().zip(old.iter().zip(new)) {
        *one = u8::from(old != new);
    }
    let mut bits = 0;
    for (at, eight) in ones.as_chunks::<8>().0.iter().enumerate() {
        // Moves bit 8 i to bit 56 + i; no two products meet, so nothing is carried.
        let top = u64::from_le_bytes(*eight).wrapping_mul(0x0102_0408_1020_4080);
        bits |= (top >> 56) << (8 * at);
    }
    bits
}

/// Fills gaps of one and of two bytes: a run of its own would have as long a head.
fn join(bits: u64) -> u64 {
    let one = bits << 1 & bits >> 1;
    let two = bits << 1 & bits >> 2;
    bits | one | two | two << 1
}

/// Puts a delta on `page`, which has the old content. `None` if it is not a delta; the runs before
/// what is wrong are then on the page.
pub fn apply(mut delta: &[u8], page: &mut Page) -> Option<()> {
    let mut rest = &mut page[..];
    let mut first = true;
    loop {
        let skip = usize::try_from(varint::take(&mut delta)?).ok()?;
        let copy = usize::try_from(varint::take(&mut delta)?).ok()?;
        if copy == 0 || (skip == 0 && !first) {
            return None;
        }
        first = false;
        rest.split_off_mut(..skip)?;
        rest.split_off_mut(..copy)?
            .copy_from_slice(delta.split_off(..copy)?);
        if delta.is_empty() {
            return Some(());
        }
    }
}
