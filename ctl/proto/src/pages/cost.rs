// SPDX-License-Identifier: GPL-2.0

//! Whether it pays to try LZ4 on a page, learned from what it did cost and save.
//!
//! A byte costs what the link takes for it, and an attempt what the CPU does. LZ4 is tried if the
//! bytes that it is thought to save cost more on the link than the attempt. How long an attempt takes
//! and how many bytes come of it are running means, so content that cannot be compressed stops the
//! attempts within some pages. Now and then one is made all the same, to find out that content or CPU
//! have changed.
//!
//! No clock is read here: the caller does, when it is told to.

use remus_core::uapi::ram::PAGE_SIZE;

/// A sample counts for 1/8.
const WEIGHT: f64 = 8.0;
/// A time counts as at most so many times what is known, for it may have been interrupted.
const OUTLIER: f64 = 4.0;
/// One in so many attempts is timed.
const TIMED: u32 = 32;
/// One in so many pages for which it does not pay is tried all the same.
const PROBE: u32 = 64;
/// Link, before anything is known of it: 1 Gbit/s, in nanoseconds a byte.
const LINK: f64 = 8.0;

/// What to do with a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attempt {
    /// Leave LZ4.
    No,
    /// Try it, and [`Cost::learn`] its bytes.
    Yes,
    /// Try it, and learn its bytes and how long it took.
    Timed,
}

/// Learned costs.
#[derive(Clone, Copy, Debug)]
pub struct Cost {
    /// Nanoseconds a byte.
    link: f64,
    /// Nanoseconds an attempt.
    time: f64,
    /// Bytes that come of an attempt, at most a page.
    length: f64,
    attempts: u32,
    left: u32,
}

impl Cost {
    /// Before anything is known: pages become half as long, in 2 µs.
    pub const fn new() -> Self {
        Self {
            link: LINK,
            time: 2000.0,
            length: PAGE_SIZE as f64 / 2.0,
            attempts: 0,
            left: 0,
        }
    }

    /// Sets what a byte costs on the link, in nanoseconds. What is no such number is not taken in.
    pub const fn set_link(&mut self, ns_per_byte: f64) {
        if ns_per_byte.is_finite() && ns_per_byte >= 0.0 {
            self.link = ns_per_byte;
        }
    }

    /// Whether LZ4 is worth trying on a page that takes `best` bytes without it.
    pub fn pays(&self, best: usize) -> bool {
        (best as f64 - self.length) * self.link > self.time
    }

    /// Decides on a page that takes `best` bytes without LZ4.
    pub fn decide(&mut self, best: usize) -> Attempt {
        if self.pays(best) {
            self.left = 0;
            let timed = self.attempts.is_multiple_of(TIMED);
            self.attempts = self.attempts.wrapping_add(1);
            return if timed { Attempt::Timed } else { Attempt::Yes };
        }
        // A page that is short as it is says nothing about LZ4.
        if best < PAGE_SIZE / 2 {
            return Attempt::No;
        }
        self.left += 1;
        if self.left < PROBE {
            return Attempt::No;
        }
        self.left = 0;
        Attempt::Timed
    }

    /// Takes in that an attempt made `length` bytes of a page, in `ns` nanoseconds if it was timed.
    pub fn learn(&mut self, length: usize, ns: Option<u64>) {
        self.length += (length.min(PAGE_SIZE) as f64 - self.length) / WEIGHT;
        if let Some(ns) = ns {
            let time = (ns as f64).min(OUTLIER * self.time);
            self.time = (self.time + (time - self.time) / WEIGHT).max(1.0);
        }
    }
}

impl Default for Cost {
    fn default() -> Self {
        Self::new()
    }
}
