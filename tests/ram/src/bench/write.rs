// SPDX-License-Identifier: GPL-2.0

//! What the first write of a page in an epoch costs the writer.

use std::ops::Range;
use std::sync::atomic::Ordering;

use anyhow::{ensure, Result};
use remus_ram::map::Map;
use remus_ram::PAGE;

use crate::linux::{Protected, Region};
use crate::memory::{scattered, timed};
use crate::stats::{Figure, Series, Target};
use crate::Bench;

/// Pages written in a round.
const PAGES: usize = 2_000;

/// Beside a memfd's first write after write protection, by userfaultfd and by PAGEMAP_SCAN.
pub fn first(bench: &mut Bench) -> Result<()> {
    let small = &bench.small;
    let scanned = Protected::new(bench.small_mib, true)?;
    let answered = Protected::new(bench.small_mib, false)?;
    answered.answer()?;
    let mut regions = vec![Region::default(); small.pages() as usize + 1];
    let (mut plain, mut copied, mut scan, mut thread, mut unmapped) =
        <(Series, Series, Series, Series, Series)>::default();
    let protect = || {
        let done = small.seal()?;
        ensure!(
            [0, PAGES as u64].contains(&done.dirty_pages),
            "an epoch in which {PAGES} pages were written holds {}",
            done.dirty_pages
        );
        small.commit(done.epoch)
    };
    // Pages that a seal has unmapped are mapped again, as those of the memfds are.
    let map_again = |pages: Range<u64>| {
        for page in pages {
            small.map.word(page as usize * PAGE).load(Ordering::Relaxed);
        }
    };
    map_again(0..small.pages());
    let row: Vec<u64> = (0..PAGES as u64).collect();
    for round in bench.rounds() {
        let pages = scattered(&mut bench.rng, small.pages(), PAGES);
        let write_those = |pages: &[u64], map: &Map| -> Result<f64> {
            let ((), took) = timed(|| {
                map.write_pages(pages, round.number);
                Ok(())
            })?;
            Ok(took / 1e3 / PAGES as f64)
        };
        let write = |map: &Map| write_those(&pages, map);
        let mut took = [0.0; 5];
        for turn in 0..5 {
            let which = (round.number as usize + turn) % 5;
            took[which] = match which {
                // Nothing is sealed. As with the others, what the last write made writable is protected just before.
                0 => {
                    protect()?;
                    write(&small.map)?
                }
                // The same pages are in a sealed epoch, and were not read.
                1 => {
                    protect()?;
                    small.map.write_pages(&pages, round.number);
                    let epoch = small.seal_of(PAGES)?.epoch;
                    let took = write(&small.map)?;
                    small.commit(epoch)?;
                    took
                }
                2 => {
                    scanned.scan(&mut regions)?;
                    write(&scanned.map)?
                }
                3 => {
                    answered.protect()?;
                    write(&answered.map)?
                }
                _ => {
                    protect()?;
                    small.map.write_pages(&row, round.number);
                    protect()?;
                    let took = write_those(&row, &small.map)?;
                    protect()?;
                    map_again(0..PAGES as u64);
                    took
                }
            };
        }
        if round.counts {
            plain.push(took[0]);
            copied.push(took[1]);
            scan.push(took[2]);
            thread.push(took[3]);
            unmapped.push(took[4]);
        }
    }
    protect()?;
    let figure = Figure::new(
        &plain.over(&scan.least(&thread)),
        Target::AtMost(1.2),
        "first write of a page in an epoch, by the cheaper of a memfd's after PAGEMAP_SCAN and after \
         userfaultfd; 2,000 scattered pages of 64 MiB",
    )
    .beside("a page", "us", &plain)
    .beside("a page, copied first", "us", &copied)
    .beside("a page of 2,000 in a row", "us", &unmapped)
    .beside("memfd, PAGEMAP_SCAN", "us", &scan)
    .beside("memfd, userfaultfd and a thread", "us", &thread);
    bench.add("first_write_us", figure);
    Ok(())
}
