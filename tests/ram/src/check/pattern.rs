// SPDX-License-Identifier: GPL-2.0

//! What a writer writes: the same steps for the writer, which does them, and for the checker, which
//! only has to be told how many were done.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use remus_ram::bits::Bits;
use remus_ram::guest::{lcg_next, lcg_page, Job};
use remus_ram::PAGE;

/// Pages that a writer keeps coming back to, and for how many rounds the same ones.
const HOT: u64 = 64;
const HOT_ROUNDS: u64 = 4;
/// Most steps of a process, and most jobs of a guest, in a round.
const MOST_STEPS: u64 = 2_000;
const MOST_JOBS: u64 = 40;

/// What a process does to the memory. `value` says what it writes.
#[derive(Clone, Copy, Debug)]
pub enum Step {
    /// A word, through the mapping.
    Store {
        /// Page.
        page: u64,
        /// Word in it.
        word: usize,
        /// Content.
        value: u64,
    },
    /// A whole page, through the mapping.
    Fill {
        /// Page.
        page: u64,
        /// Content, repeated.
        value: u64,
    },
    /// A word with what it holds, through the mapping. Counts as written.
    Same {
        /// Page.
        page: u64,
        /// Word in it.
        word: usize,
    },
    /// `pwrite` to the device.
    Pwrite(Span),
    /// `pread` of another file into the mapping: the kernel writes, by the process's page tables.
    Pread(Span),
    /// `process_vm_writev` into the mapping: the kernel writes, after it has looked up the pages.
    Remote(Span),
    /// Unmap everything and map it again.
    Remap,
    /// Give up the page table entries of a part of the mapping (`MADV_DONTNEED`).
    Forget {
        /// The first page.
        page: u64,
        /// How many.
        count: u64,
    },
}

/// Bytes within the memory, and what is written there.
#[derive(Clone, Copy, Debug)]
pub struct Span {
    /// The first byte.
    pub at: u64,
    /// How many, at most two pages.
    pub length: usize,
    /// Content, repeated.
    pub value: u64,
}

impl Step {
    /// Adds the pages that this step writes.
    fn written(&self, set: &mut Bits) {
        match *self {
            Self::Store { page, .. } | Self::Fill { page, .. } | Self::Same { page, .. } => {
                set.insert(page);
            }
            Self::Pwrite(span) | Self::Pread(span) | Self::Remote(span) => {
                let last = span.at + span.length as u64 - 1;
                for page in span.at / PAGE as u64..=last / PAGE as u64 {
                    set.insert(page);
                }
            }
            Self::Remap | Self::Forget { .. } => {}
        }
    }
}

/// The endless sequence of one writer in one round.
pub struct Pattern {
    rng: ChaCha8Rng,
    pages: u64,
    hot: u64,
    last: u64,
}

impl Pattern {
    /// The sequence of writer number `writer` in `round`, over `pages` pages.
    pub fn new(seed: u64, writer: u64, round: u64, pages: u64) -> Self {
        let stable = random(seed, writer, round / HOT_ROUNDS, 1).random_range(0..pages);
        Self {
            rng: random(seed, writer, round, 0),
            pages,
            hot: stable,
            last: stable,
        }
    }

    /// At most how many steps to do in the round, and how many at a stretch. What a guest does in one
    /// job takes a process many steps.
    pub fn pace(&mut self, guest: bool) -> (u64, u64) {
        let most = if guest { MOST_JOBS } else { MOST_STEPS };
        let most = self.rng.random_range(0..=most);
        (most, self.rng.random_range(1..=most / 8 + 1))
    }

    /// The next step of a process.
    pub fn step(&mut self) -> Step {
        let page = self.page();
        let value = self.rng.random();
        let word = self.rng.random_range(0..PAGE / 8);
        match self.rng.random_range(0..1000) {
            0..500 => Step::Store { page, word, value },
            500..650 => Step::Fill { page, value },
            650..800 => Step::Same { page, word },
            800..900 => Step::Pwrite(self.span(page, value)),
            900..950 => Step::Pread(self.span(page, value)),
            950..996 => Step::Remote(self.span(page, value)),
            996..998 => Step::Forget {
                page,
                count: self.rng.random_range(1..=self.pages - page),
            },
            _ => Step::Remap,
        }
    }

    /// The next job of a guest.
    pub fn job(&mut self) -> Job {
        let page = self.page() as u32;
        let value = self.rng.random();
        let count = self.rng.random_range(1..=64);
        match self.rng.random_range(0..4) {
            0 | 1 => Job::Scatter {
                state: value,
                count,
            },
            2 => Job::Touch {
                state: value,
                count,
            },
            _ => Job::Sweep {
                page,
                count: count.min(self.pages as u32 - page),
                value,
            },
        }
    }

    /// Half of the time one of a few pages, else the neighbour of the last one, or any.
    fn page(&mut self) -> u64 {
        self.last = match self.rng.random_range(0..4) {
            0 | 1 => self.hot + self.rng.random_range(0..HOT),
            2 => self.last + 1,
            _ => self.rng.random_range(0..self.pages),
        } % self.pages;
        self.last
    }

    fn span(&mut self, page: u64, value: u64) -> Span {
        let at = page * PAGE as u64 + self.rng.random_range(0..PAGE as u64);
        let room = (self.pages * PAGE as u64 - at).min(2 * PAGE as u64);
        let length = match self.rng.random_range(0..3) {
            0 => room,
            _ => self.rng.random_range(1..=room.min(64)),
        };
        Span {
            at,
            length: length as usize,
            value,
        }
    }

    /// Adds the pages that the first `steps` steps of a process write.
    pub fn process_writes(mut self, steps: u64, set: &mut Bits) {
        self.pace(false);
        for _ in 0..steps {
            self.step().written(set);
        }
    }

    /// Adds the pages that the first `jobs` jobs of a guest write.
    pub fn guest_writes(mut self, jobs: u64, set: &mut Bits) {
        self.pace(true);
        for _ in 0..jobs {
            match self.job() {
                Job::Scatter { mut state, count } | Job::Touch { mut state, count } => {
                    for _ in 0..count {
                        state = lcg_next(state);
                        set.insert(lcg_page(state, self.pages));
                    }
                }
                Job::Sweep { page, count, .. } => {
                    (page..page + count).for_each(|page| set.insert(page.into()));
                }
                Job::Listed { .. } => unreachable!("no job of a pattern"),
            }
        }
    }
}

/// Random numbers for one purpose.
pub fn random(seed: u64, writer: u64, round: u64, purpose: u64) -> ChaCha8Rng {
    let mut bytes = [0; 32];
    for (to, from) in bytes
        .chunks_exact_mut(8)
        .zip([seed, writer, round, purpose])
    {
        to.copy_from_slice(&from.to_le_bytes());
    }
    ChaCha8Rng::from_seed(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pattern_stays_within_the_memory() {
        for pages in [1, 64, 8192] {
            for round in 0..50 {
                // Bits::insert panics at a page beyond the end.
                let mut set = Bits::new(pages);
                Pattern::new(1, 2, round, pages).process_writes(200, &mut set);
                Pattern::new(1, 3, round, pages).guest_writes(200, &mut set);
                assert!(set.count() > 0);
            }
        }
    }

    #[test]
    fn the_same_pattern_twice() {
        let sets = [7, 7, 8].map(|seed| {
            let mut set = Bits::new(8192);
            Pattern::new(seed, 0, 5, 8192).process_writes(500, &mut set);
            set
        });
        assert_eq!(sets[0], sets[1]);
        assert_ne!(sets[0], sets[2]);
    }
}
