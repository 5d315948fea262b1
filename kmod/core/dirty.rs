// SPDX-License-Identifier: GPL-2.0

//! A set of page numbers: the pages that were written in an epoch.
//!
//! One bit a page, in words of 64, least significant first. The words belong to the caller
//! (`KVVec` in the kernel, `Vec` elsewhere), so that nothing here allocates.

use core::ops::DerefMut;

/// Words needed for `pages` bits.
pub const fn words(pages: u64) -> u64 {
    pages.div_ceil(64)
}

/// The set.
///
/// # Invariants
///
/// - `count` is the number of bits set in `words`.
/// - No bit at or above `pages` is set.
#[derive(Debug)]
pub struct Dirty<W> {
    words: W,
    pages: u64,
    count: u64,
}

impl<W: DerefMut<Target = [u64]>> Dirty<W> {
    /// An empty set in `words`, which are cleared. It can hold the numbers below `pages`, or fewer
    /// if there are not enough words.
    pub fn new(mut words: W, pages: u64) -> Self {
        words.fill(0);
        let pages = pages.min((words.len() as u64).saturating_mul(64));
        Self {
            words,
            pages,
            count: 0,
        }
    }

    /// The numbers that fit are those below this.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// How many pages are in the set.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Adds `page`. Returns whether it is new; a page that does not fit never is.
    pub fn insert(&mut self, page: u64) -> bool {
        if page >= self.pages {
            return false;
        }
        let Some(word) = self.words.get_mut((page / 64) as usize) else {
            return false;
        };
        let bit = 1 << (page % 64);
        let new = *word & bit == 0;
        *word |= bit;
        self.count += u64::from(new);
        new
    }

    /// Whether `page` is in the set.
    pub fn contains(&self, page: u64) -> bool {
        self.words
            .get((page / 64) as usize)
            .is_some_and(|word| word & (1 << (page % 64)) != 0)
    }

    /// The lowest page in the set that is not below `from`.
    pub fn next(&self, from: u64) -> Option<u64> {
        let first = usize::try_from(from / 64).ok()?;
        // In the first word the bits below `from` do not count.
        let mut mask = u64::MAX << (from % 64);
        for (i, word) in self.words.iter().enumerate().skip(first) {
            let word = word & mask;
            if word != 0 {
                return Some(i as u64 * 64 + u64::from(word.trailing_zeros()));
            }
            mask = u64::MAX;
        }
        None
    }

    /// Adds every page of `other` that fits.
    pub fn merge<V: DerefMut<Target = [u64]>>(&mut self, other: &Dirty<V>) {
        if other.pages <= self.pages {
            let mut count = 0;
            for (to, from) in self.words.iter_mut().zip(other.words.iter()) {
                *to |= from;
                count += u64::from(to.count_ones());
            }
            count += self
                .words
                .iter()
                .skip(other.words.len())
                .map(|w| u64::from(w.count_ones()))
                .sum::<u64>();
            self.count = count;
        } else {
            let mut from = 0;
            while let Some(page) = other.next(from) {
                self.insert(page);
                from = page + 1;
            }
        }
    }
}
