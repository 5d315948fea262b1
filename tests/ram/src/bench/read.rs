// SPDX-License-Identifier: GPL-2.0

//! How fast a sealed epoch is read.

use anyhow::{ensure, Result};
use remus_ram::abi::RECORD;
use remus_ram::PAGE;

use crate::memory::{buffer, scattered, timed, BATCH};
use crate::stats::{Figure, Series, Target};
use crate::Bench;

/// Pages read in a round: 32 MiB.
const PAGES: usize = 8192;

/// Beside a memcpy of the same pages into the same kind of buffer.
pub fn beside_memcpy(bench: &mut Bench) -> Result<()> {
    let big = &bench.big;
    let mut buffer = buffer();
    let (mut read, mut copy) = <(Series, Series)>::default();
    for round in bench.rounds() {
        let mut pages = scattered(&mut bench.rng, big.pages(), PAGES);
        big.map.write_pages(&pages, round.number);
        pages.sort_unstable();
        let epoch = big.seal_of(PAGES)?.epoch;
        // READ takes the pages out of the epoch, so it comes once; before the copy or after it.
        let mut took = [0.0; 2];
        for turn in 0..2 {
            let which = (round.number as usize + turn) % 2;
            took[which] = if which == 0 {
                let (count, took) = timed(|| big.read_out(epoch, &mut buffer))?;
                ensure!(count == PAGES, "READ delivered {count} pages");
                took
            } else {
                let copied = timed(|| {
                    for batch in pages.chunks(BATCH) {
                        for (record, &page) in buffer.chunks_exact_mut(RECORD).zip(batch) {
                            let (number, content) = record.split_at_mut(8);
                            number.copy_from_slice(&page.to_le_bytes());
                            big.map.read(page as usize * PAGE, content);
                        }
                    }
                    Ok(())
                })?;
                copied.1
            };
        }
        big.commit(epoch)?;
        if round.counts {
            let mib = (PAGES * PAGE) as f64 / f64::from(1 << 20) * 1e9;
            read.push(mib / took[0]);
            copy.push(mib / took[1]);
        }
    }
    let figure = Figure::new(
        &read.over(&copy),
        Target::AtLeast(0.5),
        "READ of 8,192 scattered pages of 1 GiB in batches of 256, by memcpy of the same pages in user \
         space; throughput",
    )
    .beside("READ", "MiB/s", &read)
    .beside("memcpy", "MiB/s", &copy);
    bench.add("snapshot_read_vs_memcpy", figure);
    Ok(())
}
