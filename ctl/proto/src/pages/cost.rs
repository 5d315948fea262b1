// SPDX-License-Identifier: GPL-2.0-or-later

//! Which ways to encode a page are worth trying, learned from what they did cost and save.
//!
//! A byte costs what the link takes for it, and an attempt what the CPU takes. What an attempt takes and
//! how many bytes come of it are running means, so content that cannot be compressed, or a fast link,
//! stops attempts that do not pay within some pages. Now and then one is made all the same, to find out
//! that content or CPU have changed.
//!
//! No clock is read here: the caller does, when it is told to.

use remus_core::uapi::ram::PAGE_SIZE;

/// A sample counts for 1/8.
const WEIGHT: f64 = 8.0;
/// A time counts as at most so many times what is known, for it may have been interrupted.
const OUTLIER: f64 = 4.0;
/// The attempts for one in so many pages are timed.
const TIMED: u32 = 32;
/// One in so many attempts that do not pay is made all the same.
const PROBE: u32 = 64;
/// The same where it would not pay if nothing came of it to be sent.
const PROBE_HOPELESS: u32 = 1024;
/// Link, before anything is known of it: 1 Gbit/s, in nanoseconds a byte.
const LINK: f64 = 8.0;
/// What changed in a page is not compressed if it has fewer bytes.
const PACKED_MIN: usize = 128;
/// From so many runs on a delta tells what a run takes.
const RUNS: usize = 16;

/// What changed in a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    /// Bytes of the delta.
    pub bytes: usize,
    /// Runs that it has.
    pub runs: usize,
}

/// What to try for a page. Where this is nothing, the page goes as it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// What changed.
    pub delta: bool,
    /// LZ4 of what changed.
    pub packed: bool,
    /// LZ4 of the page.
    pub content: bool,
    /// Take the time of each.
    pub timed: bool,
}

/// What is known of LZ4 on one kind of bytes.
#[derive(Clone, Copy, Debug)]
struct Lz4 {
    /// Nanoseconds a byte that it is given.
    time: f64,
    /// Bytes that it makes of one, at most 1.
    ratio: f64,
    /// How often it was left since it was tried.
    left: u32,
}

impl Lz4 {
    /// Before anything is known: half as many bytes, at 1 GB/s.
    const NEW: Self = Self {
        time: 1.0,
        ratio: 0.5,
        left: 0,
    };

    fn cost(&self, bytes: usize, link: f64) -> f64 {
        bytes as f64 * (self.ratio * link + self.time)
    }

    /// Whether to try it though it does not pay, where there is a way for `cheapest`.
    fn probe(&mut self, bytes: usize, cheapest: f64) -> bool {
        // Too dear whatever comes of it: no other content can change that.
        let hopeless = bytes as f64 * self.time >= cheapest;
        self.left += 1;
        self.left >= if hopeless { PROBE_HOPELESS } else { PROBE }
    }

    fn learn(&mut self, bytes: usize, made: usize, ns: Option<u64>) {
        let bytes = bytes.max(1) as f64;
        self.left = 0;
        self.ratio = blend(self.ratio, (made as f64 / bytes).min(1.0));
        if let Some(ns) = ns {
            self.time = blend(self.time, (ns as f64 / bytes).min(OUTLIER * self.time));
        }
    }
}

/// Learned costs.
#[derive(Clone, Copy, Debug)]
pub struct Cost {
    /// Nanoseconds a byte.
    link: f64,
    /// Nanoseconds that it takes to encode a run.
    run: f64,
    content: Lz4,
    packed: Lz4,
    pages: u32,
}

impl Cost {
    /// Before anything is known.
    pub const fn new() -> Self {
        Self {
            link: LINK,
            run: 10.0,
            content: Lz4::NEW,
            packed: Lz4::NEW,
            pages: 0,
        }
    }

    /// Sets what a byte costs on the link, in nanoseconds. What is no such number is not taken in.
    pub const fn set_link(&mut self, ns_per_byte: f64) {
        if ns_per_byte.is_finite() && ns_per_byte >= 0.0 {
            self.link = ns_per_byte;
        }
    }

    /// Decides on a page of which this is known to have changed, or nothing. What is tried has to be
    /// told to the functions below.
    pub fn plan(&mut self, delta: Option<Size>) -> Plan {
        let raw = PAGE_SIZE as f64 * self.link;
        let content = self.content.cost(PAGE_SIZE, self.link);
        let mut cheapest = raw.min(content);
        let mut plan = Plan {
            content: content < raw,
            timed: self.pages.is_multiple_of(TIMED),
            ..Plan::default()
        };
        self.pages = self.pages.wrapping_add(1);
        if let Some(Size { bytes, runs }) = delta {
            let encode = runs as f64 * self.run;
            let delta = encode + bytes as f64 * self.link;
            if delta < cheapest {
                cheapest = delta;
                plan.content = false;
                plan.delta = true;
            }
            if bytes >= PACKED_MIN {
                if encode + self.packed.cost(bytes, self.link) < cheapest {
                    plan.content = false;
                    plan.delta = true;
                    plan.packed = true;
                } else if self.packed.probe(bytes, cheapest) {
                    plan.delta = true;
                    plan.packed = true;
                    plan.timed = true;
                }
            }
        }
        // Where little has changed, nothing can be learned for pages in which much has.
        let much = delta.is_none_or(|delta| delta.bytes >= PAGE_SIZE / 2);
        if !plan.content && much && self.content.probe(PAGE_SIZE, cheapest) {
            plan.content = true;
            plan.timed = true;
        }
        plan
    }

    /// Takes in that LZ4 made `made` bytes of a page, in `ns` nanoseconds if it was timed.
    pub fn content(&mut self, made: usize, ns: Option<u64>) {
        self.content.learn(PAGE_SIZE, made, ns);
    }

    /// Takes in that LZ4 made `made` bytes of a delta of `bytes`.
    pub fn packed(&mut self, bytes: usize, made: usize, ns: Option<u64>) {
        self.packed.learn(bytes, made, ns);
    }

    /// Takes in how long a delta of so many runs took, if it was timed.
    pub fn delta(&mut self, runs: usize, ns: Option<u64>) {
        if let Some(ns) = ns.filter(|_| runs >= RUNS) {
            let run = ns as f64 / runs as f64;
            self.run = blend(self.run, run.min(OUTLIER * self.run));
        }
    }
}

impl Default for Cost {
    fn default() -> Self {
        Self::new()
    }
}

/// Moves what is known towards a sample. It stays above 0, from where it could not grow any more.
fn blend(known: f64, sample: f64) -> f64 {
    (known + (sample - known) / WEIGHT).max(0.001)
}
