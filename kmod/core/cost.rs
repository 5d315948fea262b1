// SPDX-License-Identifier: GPL-2.0-or-later

//! What it costs to write-protect pages, learned from what it did cost.
//!
//! A call costs something, and each page that it covers something more, whether that page needed it or
//! not. So two pages with `gap` others between them are one call's work as long as these cost less than
//! a second call. Where everything is near, that makes a whole region one call; where nothing is, every
//! page has its own.

/// Time is kept in 1/16 ns.
const SCALE: u64 = 16;
/// A sample counts for 1/8.
const WEIGHT: u64 = 8;
/// A sample counts as at most so many times what is known, for it may have been interrupted.
const OUTLIER: u64 = 4;
/// From so many pages on a call tells what a page costs.
const LONG: u64 = 8;
/// The longest gap that is ever worth it.
const GAP_MAX: u64 = 64;
/// Longer than any call, in nanoseconds.
const TIME_MAX: u64 = 1 << 40;

/// Learned costs.
#[derive(Clone, Copy, Debug)]
pub struct Cost {
    call: u64,
    page: u64,
}

impl Cost {
    /// Before anything is known: a call costs as much as two pages.
    pub const fn new() -> Self {
        Self {
            call: 400 * SCALE,
            page: 200 * SCALE,
        }
    }

    /// Takes in that a call for so many pages took `ns` nanoseconds.
    pub fn learn(&mut self, pages: u64, ns: u64) {
        let time = ns.min(TIME_MAX) * SCALE;
        match pages {
            1 => self.call = blend(self.call, time.saturating_sub(self.page)),
            LONG.. => self.page = blend(self.page, time.saturating_sub(self.call) / pages),
            _ => {}
        }
    }

    /// So many pages in vain cost no more than another call.
    pub fn gap(&self) -> u64 {
        (self.call / self.page.max(1)).min(GAP_MAX)
    }
}

impl Default for Cost {
    fn default() -> Self {
        Self::new()
    }
}

/// Moves what is known towards a sample.
fn blend(known: u64, sample: u64) -> u64 {
    let sample = sample.min(OUTLIER * known.max(SCALE));
    known - known / WEIGHT + sample / WEIGHT
}
