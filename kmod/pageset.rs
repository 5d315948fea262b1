// SPDX-License-Identifier: GPL-2.0

//! A set of pages of a memory of any size, made of leaves (`core::dirty`) where there is something.

use crate::{
    abi::{
        array::Array,
        memcg::Memcg,
        page::Words, //
    },
    core::dirty::{
        self,
        Leaf, //
    },
};
// As in `core::dirty`: with the kernel's own each addition to a set would cost a call.
use core::sync::atomic::{
    AtomicU64,
    Ordering, //
};
use kernel::{
    alloc::flags::GFP_KERNEL_ACCOUNT,
    prelude::*, //
};

/// A set of page numbers, to which any number of threads add at once. It costs a page of memory for each
/// 128 MiB in which there is something.
pub(crate) struct PageSet {
    leaves: Pin<KBox<Array<KBox<Leaf<Words>>>>>,
    count: AtomicU64,
}

impl PageSet {
    /// An empty set.
    pub(crate) fn new() -> Result<Self> {
        Ok(Self {
            leaves: KBox::pin_init(Array::new(), GFP_KERNEL_ACCOUNT)?,
            count: AtomicU64::new(0),
        })
    }

    /// How many pages are in it.
    pub(crate) fn count(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }

    fn leaf(&self, number: u64, payer: &Memcg) -> Result<&Leaf<Words>> {
        loop {
            if let Some(leaf) = self.leaves.get(number) {
                return Ok(leaf);
            }
            let _charge = payer.charge();
            // If somebody else was faster, theirs it is.
            let leaf = KBox::new(Leaf::new(Words::new()?), GFP_KERNEL_ACCOUNT)?;
            self.leaves.insert(number, leaf)?;
        }
    }

    /// Adds a page. Fails if there is no memory for its leaf, which there is after [`make_room`](Self::make_room).
    pub(crate) fn insert(&self, page: u64, payer: &Memcg) -> Result {
        if self.leaf(page / dirty::PAGES, payer)?.insert(page) {
            self.count.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Whether a page is in it.
    pub(crate) fn contains(&self, page: u64) -> bool {
        self.leaves
            .get(page / dirty::PAGES)
            .is_some_and(|leaf| leaf.contains(page))
    }

    /// All pages that are not below `from`, in ascending order. What is added meanwhile may be missed.
    pub(crate) fn from(&self, from: u64) -> impl Iterator<Item = u64> + '_ {
        let (mut words, mut base, mut bits) = (self.bits(from), 0, 0_u64);
        core::iter::from_fn(move || {
            if bits == 0 {
                (base, bits) = words.next()?;
            }
            let bit = bits.trailing_zeros();
            bits &= bits.wrapping_sub(1);
            Some(base + u64::from(bit))
        })
    }

    /// The same, 64 at a time: the first one's number and a bit each, least significant first, of which at least one is set.
    pub(crate) fn bits(&self, from: u64) -> Bits<'_> {
        let number = from / dirty::PAGES;
        let leaf = self.leaves.next(number);
        Bits {
            set: self,
            leaf,
            within: match leaf {
                Some((found, _)) if found == number => from % dirty::PAGES,
                _ => 0,
            },
        }
    }

    /// Makes room for every page of `other`, so that [`merge`](Self::merge) will not need memory.
    pub(crate) fn make_room(&self, other: &Self, payer: &Memcg) -> Result {
        let mut number = 0;
        while let Some((found, leaf)) = other.leaves.next(number) {
            if !leaf.is_empty() {
                self.leaf(found, payer)?;
            }
            number = found + 1;
        }
        Ok(())
    }

    /// Adds every page of `other`, for which there must be room.
    pub(crate) fn merge(&self, other: &Self) {
        let mut number = 0;
        while let Some((found, leaf)) = other.leaves.next(number) {
            if let Some(own) = self.leaves.get(found) {
                self.count.fetch_add(own.merge(leaf), Ordering::Relaxed);
            }
            number = found + 1;
        }
    }

    /// The words of the leaf with this number, if it has any.
    pub(crate) fn words(&self, number: u64) -> Option<&Words> {
        self.leaves.get(number).map(Leaf::words)
    }
}

/// The pages of a set in ascending order, 64 at a time.
pub(crate) struct Bits<'a> {
    set: &'a PageSet,
    /// The leaf that it has come to, and its number.
    leaf: Option<(u64, &'a Leaf<Words>)>,
    within: u64,
}

impl Iterator for Bits<'_> {
    type Item = (u64, u64);

    fn next(&mut self) -> Option<(u64, u64)> {
        loop {
            let (number, leaf) = self.leaf?;
            if let Some((found, bits)) = leaf.next(self.within) {
                self.within = found + 64;
                return Some((number * dirty::PAGES + found, bits));
            }
            (self.leaf, self.within) = (self.set.leaves.next(number + 1), 0);
        }
    }
}
