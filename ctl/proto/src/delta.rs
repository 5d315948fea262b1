// SPDX-License-Identifier: GPL-2.0

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
/// So many bytes that stay between two that do not are sent along: a run of its own has two bytes of
/// head at least.
const JOIN: usize = 2;

/// Which bytes of a page differ from its old content.
#[derive(Clone, Debug)]
pub struct Diff {
    /// Bit `b` of word `w`: byte `64 w + b` differs.
    words: [u64; PAGE_SIZE / CHUNK],
    bytes: usize,
}

impl Diff {
    /// Compares two pages.
    pub fn new(old: &Page, new: &Page) -> Self {
        let mut words = [0; PAGE_SIZE / CHUNK];
        let mut bytes = 0;
        let chunks = old.as_chunks().0.iter().zip(new.as_chunks().0);
        for (word, (old, new)) in words.iter_mut().zip(chunks) {
            if old != new {
                *word = differing(old, new);
                bytes += word.count_ones() as usize;
            }
        }
        Self { words, bytes }
    }

    /// How many bytes differ.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Appends the delta that makes `new` of the old content, unless it would take more than `most`
    /// bytes. Returns whether it did; if not, or if nothing differs, `out` is as it was.
    pub fn encode(&self, new: &Page, most: usize, out: &mut Vec<u8>) -> bool {
        if self.bytes == 0 || self.bytes > most {
            return false;
        }
        let start = out.len();
        let mut kept = 0;
        let mut from = self.next(0, true);
        while from < PAGE_SIZE {
            let mut end = self.next(from, false);
            let mut next = self.next(end, true);
            while next < PAGE_SIZE && next - end <= JOIN {
                end = self.next(next, false);
                next = self.next(end, true);
            }
            varint::put((from - kept) as u64, out);
            varint::put((end - from) as u64, out);
            out.extend_from_slice(new.get(from..end).unwrap_or(&[]));
            if out.len() - start > most {
                out.truncate(start);
                return false;
            }
            kept = end;
            from = next;
        }
        true
    }

    /// The first byte from `from` on that differs, or that does not; [`PAGE_SIZE`] if there is none.
    fn next(&self, from: usize, differs: bool) -> usize {
        let flip = if differs { 0 } else { u64::MAX };
        let mut rest = u64::MAX << (from % CHUNK);
        for (at, word) in self.words.iter().enumerate().skip(from / CHUNK) {
            let bits = (word ^ flip) & rest;
            if bits != 0 {
                return at * CHUNK + bits.trailing_zeros() as usize;
            }
            rest = u64::MAX;
        }
        PAGE_SIZE
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
