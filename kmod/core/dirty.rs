// SPDX-License-Identifier: GPL-2.0-or-later

//! Which pages were written: the bits of one leaf of a page set.
//!
//! A leaf has one bit a page, in words of 64, least significant first: 4 KiB of words for 128 MiB of
//! memory, so that a leaf's words can be mapped by who wants to read them. A second, small layer of bits
//! says which words are not empty, so that a walk costs what is set and not what could be.
//!
//! Bits are only ever added while a leaf is shared, by any number of threads at once. The words belong to
//! the caller (a page in the kernel, a `Vec` elsewhere), so that nothing here allocates.

use core::ops::Deref;
// Not the kernel's own atomics, which a host does not have. Bits carry no order of their own but for
// `insert`'s: what came before it is seen by whoever sees the bit.
use core::sync::atomic::{AtomicU64, Ordering};

/// Words in a leaf.
pub const WORDS: usize = 512;
/// Pages of which a leaf has a bit.
pub const PAGES: u64 = WORDS as u64 * 64;
const GROUPS: usize = WORDS / 64;

/// The bits of [`PAGES`] pages.
///
/// # Invariants
///
/// Bit `w % 64` of `filled[w / 64]` is set if word `w` is not 0, once the insertion that filled it has
/// returned.
#[derive(Debug)]
pub struct Leaf<W> {
    words: W,
    filled: [AtomicU64; GROUPS],
}

impl<W: Deref<Target = [AtomicU64; WORDS]>> Leaf<W> {
    /// An empty leaf in `words`, which are cleared.
    pub fn new(words: W) -> Self {
        for word in words.iter() {
            word.store(0, Ordering::Relaxed);
        }
        Self {
            words,
            filled: [const { AtomicU64::new(0) }; GROUPS],
        }
    }

    /// Where the bits are.
    pub fn words(&self) -> &W {
        &self.words
    }

    /// Adds page `n`, modulo [`PAGES`]. Returns whether it is new.
    pub fn insert(&self, n: u64) -> bool {
        let n = (n % PAGES) as usize;
        let bit = 1 << (n % 64);
        let old = self.words[n / 64].fetch_or(bit, Ordering::AcqRel);
        if old == 0 {
            self.filled[n / 64 / 64].fetch_or(1 << (n / 64 % 64), Ordering::AcqRel);
        }
        old & bit == 0
    }

    /// Whether page `n`, modulo [`PAGES`], is there.
    pub fn contains(&self, n: u64) -> bool {
        let n = (n % PAGES) as usize;
        self.words[n / 64].load(Ordering::Acquire) & (1 << (n % 64)) != 0
    }

    /// The first word that has a page not below `from`: its first page's number, and the bits of those that
    /// are not below `from`. What is being inserted meanwhile may be missed.
    pub fn next(&self, from: u64) -> Option<(u64, u64)> {
        let from = usize::try_from(from)
            .ok()
            .filter(|from| *from < WORDS * 64)?;
        let first = from / 64;
        let rest = self.words[first].load(Ordering::Acquire) & (u64::MAX << (from % 64));
        if rest != 0 {
            return Some((first as u64 * 64, rest));
        }
        let word = self.next_filled(first + 1)?;
        Some((word as u64 * 64, self.words[word].load(Ordering::Acquire)))
    }

    /// The first word from `from` on that is not empty.
    fn next_filled(&self, from: usize) -> Option<usize> {
        let mut mask = u64::MAX << (from % 64);
        for (i, group) in self.filled.iter().enumerate().skip(from / 64) {
            let group = group.load(Ordering::Acquire) & mask;
            if group != 0 {
                return Some(i * 64 + group.trailing_zeros() as usize);
            }
            mask = u64::MAX;
        }
        None
    }

    /// Adds the pages of `other`. Returns how many of them are new.
    pub fn merge(&self, other: &Self) -> u64 {
        let (mut new, mut from) = (0, 0);
        while let Some(word) = other.next_filled(from) {
            let bits = other.words[word].load(Ordering::Acquire);
            let old = self.words[word].fetch_or(bits, Ordering::AcqRel);
            if old == 0 {
                self.filled[word / 64].fetch_or(1 << (word % 64), Ordering::AcqRel);
            }
            new += u64::from((bits & !old).count_ones());
            from = word + 1;
        }
        new
    }

    /// Whether nothing is there.
    pub fn is_empty(&self) -> bool {
        self.next_filled(0).is_none()
    }
}

/// The runs of ones in a word, least significant first: the first bit's number, and how many there are.
pub fn runs(mut bits: u64) -> impl Iterator<Item = (u64, u64)> {
    core::iter::from_fn(move || {
        if bits == 0 {
            return None;
        }
        let first = bits.trailing_zeros();
        let count = (bits >> first).trailing_ones();
        // The carry clears the run, and sets a bit that was not.
        bits &= bits.wrapping_add(1 << first);
        Some((first.into(), count.into()))
    })
}
