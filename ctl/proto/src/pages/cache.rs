// SPDX-License-Identifier: GPL-2.0-or-later

//! What the standby has of some pages.
//!
//! Which page leaves when there is no room is decided by second chance: a hand goes around the pages
//! and takes the first that was not used since it last came by. A page that came only once is not
//! counted as used, so the whole memory can pass without driving out what changes all the time.

use crate::delta::Page;
use std::collections::hash_map::{HashMap, RandomState};
use std::hash::{BuildHasher, Hasher};

/// What a page takes: its content, and its places in two tables that grow by doubling.
pub(super) const PAGE_COST: usize = size_of::<Page>() + 2 * size_of::<Slot>() + 4 * 16;

struct Slot {
    page: u64,
    used: bool,
    content: Box<Page>,
}

/// A bounded map from page to content.
///
/// # Invariants
///
/// `index` has for each slot, and for nothing else, its place by its page.
pub(super) struct Cache {
    index: HashMap<u64, usize, Hashing>,
    slots: Vec<Slot>,
    most: usize,
    hand: usize,
}

impl Cache {
    /// An empty cache that takes up to `bytes` of memory.
    pub(super) fn new(bytes: usize) -> Self {
        Self {
            index: HashMap::with_hasher(Hashing::new()),
            slots: Vec::new(),
            most: bytes / PAGE_COST,
            hand: 0,
        }
    }

    /// The content of `page`, to be read and replaced.
    pub(super) fn get(&mut self, page: u64) -> Option<&mut Page> {
        let slot = self.slots.get_mut(*self.index.get(&page)?)?;
        slot.used = true;
        Some(&mut slot.content)
    }

    /// Puts a page in that is not there, in the place of another if there is no room.
    pub(super) fn insert(&mut self, page: u64, content: &Page) {
        if self.slots.len() < self.most {
            self.index.insert(page, self.slots.len());
            self.slots.push(Slot {
                page,
                used: false,
                content: Box::new(*content),
            });
            return;
        }
        // Ends: whatever the hand passes is not used any more when it is back.
        loop {
            if self.hand >= self.slots.len() {
                self.hand = 0;
            }
            let Some(slot) = self.slots.get_mut(self.hand) else {
                return;
            };
            if !slot.used {
                self.index.remove(&slot.page);
                self.index.insert(page, self.hand);
                slot.page = page;
                *slot.content = *content;
                self.hand += 1;
                return;
            }
            slot.used = false;
            self.hand += 1;
        }
    }

    /// Takes `page` out, if it is there.
    pub(super) fn remove(&mut self, page: u64) {
        let Some(at) = self.index.remove(&page) else {
            return;
        };
        if at < self.slots.len() {
            self.slots.swap_remove(at);
        }
        if let Some(moved) = self.slots.get(at) {
            self.index.insert(moved.page, at);
        }
    }

    /// Takes everything out.
    pub(super) fn clear(&mut self) {
        self.index.clear();
        self.slots.clear();
        self.hand = 0;
    }
}

/// Hashes a page number with one multiplication. The guest chooses which pages it writes to, so there is
/// something in it that the guest does not know.
#[derive(Clone)]
struct Hashing {
    secret: u64,
}

impl Hashing {
    fn new() -> Self {
        Self {
            secret: RandomState::new().build_hasher().finish() | 1,
        }
    }
}

impl BuildHasher for Hashing {
    type Hasher = Hash;

    fn build_hasher(&self) -> Hash {
        Hash(self.secret)
    }
}

/// State of [`Hashing`].
struct Hash(u64);

impl Hasher for Hash {
    fn write_u64(&mut self, number: u64) {
        // Both halves: the upper depends on all lower bits, the lower on all of the secret.
        let product = u128::from(number ^ 0x9e37_79b9_7f4a_7c15) * u128::from(self.0);
        self.0 = product as u64 ^ (product >> 64) as u64;
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u64(u64::from(*byte));
        }
    }

    fn finish(&self) -> u64 {
        self.0
    }
}
