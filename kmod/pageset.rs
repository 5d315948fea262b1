// SPDX-License-Identifier: GPL-2.0

//! A set of pages of a memory of any size, made of leaves (`core::dirty`) where there is something.

use crate::{
    abi::{
        array::Array,
        page::Words, //
    },
    core::dirty::{
        self,
        Leaf, //
    },
};
use kernel::{
    alloc::flags::GFP_KERNEL_ACCOUNT,
    prelude::*,
    sync::atomic::{
        Atomic,
        Relaxed, //
    },
};

/// A set of page numbers, to which any number of threads add at once. It costs a page of memory for each
/// 128 MiB in which there is something, charged to whoever adds.
pub(crate) struct PageSet {
    leaves: Pin<KBox<Array<KBox<Leaf<Words>>>>>,
    count: Atomic<u64>,
}

impl PageSet {
    /// An empty set.
    pub(crate) fn new() -> Result<Self> {
        Ok(Self {
            leaves: KBox::pin_init(Array::new(), GFP_KERNEL_ACCOUNT)?,
            count: Atomic::new(0),
        })
    }

    /// How many pages are in it.
    pub(crate) fn count(&self) -> u64 {
        self.count.load(Relaxed)
    }

    fn leaf(&self, number: u64) -> Result<&Leaf<Words>> {
        loop {
            if let Some(leaf) = self.leaves.get(number) {
                return Ok(leaf);
            }
            // If somebody else was faster, theirs it is.
            let leaf = KBox::new(Leaf::new(Words::new()?), GFP_KERNEL_ACCOUNT)?;
            self.leaves.insert(number, leaf)?;
        }
    }

    /// Adds a page. Fails if there is no memory for its leaf, which there is after [`make_room`](Self::make_room).
    pub(crate) fn insert(&self, page: u64) -> Result {
        if self.leaf(page / dirty::PAGES)?.insert(page) {
            self.count.fetch_add(1, Relaxed);
        }
        Ok(())
    }

    /// Whether a page is in it.
    pub(crate) fn contains(&self, page: u64) -> bool {
        self.leaves
            .get(page / dirty::PAGES)
            .is_some_and(|leaf| leaf.contains(page))
    }

    /// The lowest page that is not below `from`.
    pub(crate) fn next(&self, from: u64) -> Option<u64> {
        let (mut number, mut within) = (from / dirty::PAGES, from % dirty::PAGES);
        while let Some((found, leaf)) = self.leaves.next(number) {
            if found != number {
                within = 0;
            }
            if let Some(page) = leaf.next(within) {
                return Some(found * dirty::PAGES + page);
            }
            (number, within) = (found + 1, 0);
        }
        None
    }

    /// Makes room for every page of `other`, so that [`merge`](Self::merge) will not need memory.
    pub(crate) fn make_room(&self, other: &Self) -> Result {
        let mut number = 0;
        while let Some((found, leaf)) = other.leaves.next(number) {
            if !leaf.is_empty() {
                self.leaf(found)?;
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
                self.count.fetch_add(own.merge(leaf), Relaxed);
            }
            number = found + 1;
        }
    }

    /// The words of the leaf with this number, if it has any.
    pub(crate) fn words(&self, number: u64) -> Option<&Words> {
        self.leaves.get(number).map(Leaf::words)
    }
}
