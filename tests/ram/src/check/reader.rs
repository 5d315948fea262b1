// SPDX-License-Identifier: GPL-2.0

//! Reads a sealed epoch by READ while the writers go on, and compares each page with the reference.

use std::ops::Range;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{anyhow, bail, Context, Result};
use rand::Rng;
use rand_chacha::ChaCha8Rng;
use remus_ram::abi::{END, KEEP, RECORD};
use remus_ram::bits::Bits;
use remus_ram::device::{records, Device};

use crate::image::Image;

/// Most threads that read one epoch.
const THREADS: usize = 4;
/// At most 2 to the power of this many records in a batch.
const BATCH_BITS: u32 = 8;

/// What a sealed epoch must hold.
pub struct Expected {
    /// Its number.
    pub epoch: u64,
    /// Its pages.
    pub pages: Bits,
    /// All of the memory at the seal.
    pub reference: Image,
}

/// How to read it.
#[derive(Debug)]
pub struct Plan {
    /// Ranges of page numbers, one for each thread.
    ranges: Vec<Range<u64>>,
    /// Records in a batch.
    batch: usize,
    /// Between two batches.
    delay: Duration,
    /// Before the first.
    late: Duration,
    /// Once with KEEP before it is read out.
    twice: bool,
    /// A page at a time once more after it was read out.
    again: bool,
}

impl Plan {
    /// Any way to read a memory of `pages` pages.
    pub fn random(rng: &mut ChaCha8Rng, pages: u64) -> Self {
        let mut cuts: Vec<u64> = (1..rng.random_range(1..=THREADS))
            .map(|_| rng.random_range(0..=pages))
            .collect();
        cuts.sort_unstable();
        let last = if rng.random() { END } else { pages };
        let starts = [0].into_iter().chain(cuts.iter().copied());
        let ends = cuts.iter().copied().chain([last]);
        let largest = 1 << rng.random_range(0..=BATCH_BITS);
        let slow = rng.random_range(0..4) == 0;
        let pause = |most| Duration::from_micros(most);
        Self {
            ranges: starts.zip(ends).map(|(a, b)| a..b).collect(),
            batch: if slow {
                rng.random_range(32..=64)
            } else {
                rng.random_range(1..=largest)
            },
            delay: pause(if slow { rng.random_range(0..2_000) } else { 0 }),
            late: pause(if rng.random_range(0..3) == 0 {
                rng.random_range(0..30_000)
            } else {
                0
            }),
            twice: rng.random_range(0..6) == 0,
            again: rng.random_range(0..6) == 0,
        }
    }
}

/// What became of a reading.
pub enum Outcome {
    /// All pages came, as they should: whole batches of records, and how many in each.
    Read(Vec<(Vec<u8>, usize)>, Again),
    /// The epoch ceased to be sealed meanwhile.
    Gone,
}

/// What reading pages that were read out before came to, in pages.
#[derive(Clone, Copy, Debug, Default)]
pub struct Again {
    /// They came, and were what they should be.
    pub same: u64,
    /// They were refused, as written since.
    pub stale: u64,
}

/// A reading in the background.
pub struct Reading(JoinHandle<Result<Outcome>>);

impl Reading {
    /// Begins to read.
    pub fn start(device: Arc<Device>, expected: Arc<Expected>, plan: Plan) -> Self {
        Self(thread::spawn(move || {
            read(&device, &expected, &plan)
                .with_context(|| format!("READ of epoch {}, {plan:?}", expected.epoch))
        }))
    }

    /// Waits for its end.
    pub fn outcome(self) -> Result<Outcome> {
        join(self.0)
    }
}

fn join<T>(handle: JoinHandle<Result<T>>) -> Result<T> {
    let panicked = |_| Err(anyhow!("a reading thread panicked: see above"));
    handle.join().unwrap_or_else(panicked)
}

fn read(device: &Device, expected: &Expected, plan: &Plan) -> Result<Outcome> {
    thread::sleep(plan.late);
    let flags = if plan.twice { &[KEEP, 0][..] } else { &[0] };
    let mut batches = Vec::new();
    for &flags in flags {
        batches.clear();
        let parts: Vec<Result<Option<Part>>> = thread::scope(|scope| {
            let threads: Vec<_> = plan
                .ranges
                .iter()
                .map(|range| scope.spawn(|| read_range(device, expected, plan, range, flags)))
                .collect();
            threads
                .into_iter()
                .map(|t| t.join().unwrap_or_else(|_| Err(anyhow!("panicked"))))
                .collect()
        });
        for part in parts {
            match part? {
                Some(part) => batches.extend(part),
                None => return Ok(Outcome::Gone),
            }
        }
    }
    let mut again = Again::default();
    if plan.again && !read_again(device, expected, &mut again)? {
        return Ok(Outcome::Gone);
    }
    Ok(Outcome::Read(batches, again))
}

type Part = Vec<(Vec<u8>, usize)>;

/// Reads the pages of one range; nothing if the epoch is gone.
fn read_range(
    device: &Device,
    expected: &Expected,
    plan: &Plan,
    range: &Range<u64>,
    flags: u32,
) -> Result<Option<Part>> {
    let end = range.end.min(device.pages());
    let mut wanted = expected
        .pages
        .iter()
        .filter(|n| (range.start..end).contains(n));
    let mut out = Vec::new();
    let mut cursor = range.start;
    loop {
        let mut buffer = vec![0; plan.batch * RECORD];
        let batch = match device.read(expected.epoch, cursor..range.end, &mut buffer, flags) {
            Err(e) if e.raw_os_error() == Some(libc::ENOENT) => return Ok(None),
            other => other.with_context(|| format!("at page {cursor} of {range:?}"))?,
        };
        for (page, content) in records(&buffer, batch.count) {
            match wanted.next() {
                Some(n) if n == page => {}
                n => bail!("page {page} came in {range:?}, where page {n:?} was expected"),
            }
            expected.reference.expect(page, content)?;
        }
        buffer.truncate(batch.count * RECORD);
        out.push((buffer, batch.count));
        match batch.next {
            None => break,
            Some(next) if next <= cursor || batch.count == 0 => {
                bail!(
                    "cursor {next} after cursor {cursor} and {} records",
                    batch.count
                )
            }
            Some(next) => cursor = next,
        }
        thread::sleep(plan.delay);
    }
    match wanted.next() {
        None => Ok(Some(out)),
        Some(page) => bail!("page {page} did not come in {range:?}"),
    }
}

/// Reads each page once more, that was read out. Returns whether the epoch was there to the end.
fn read_again(device: &Device, expected: &Expected, again: &mut Again) -> Result<bool> {
    let mut buffer = vec![0; RECORD];
    for page in expected.pages.iter() {
        match device.read(expected.epoch, page..page + 1, &mut buffer, 0) {
            Ok(batch) => {
                let mut found = records(&buffer, batch.count);
                match found.next() {
                    Some((n, content)) if n == page => expected.reference.expect(page, content)?,
                    other => bail!("page {:?} came again for {page}", other.map(|o| o.0)),
                }
                again.same += 1;
            }
            Err(e) if e.raw_os_error() == Some(libc::ESTALE) => again.stale += 1,
            Err(e) if e.raw_os_error() == Some(libc::ENOENT) => return Ok(false),
            Err(e) => return Err(e).with_context(|| format!("page {page} again")),
        }
    }
    Ok(true)
}
