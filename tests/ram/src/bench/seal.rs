// SPDX-License-Identifier: GPL-2.0

//! What a seal costs: by size of the memory, by how the pages lie, beside PAGEMAP_SCAN and KVM's log.

use std::os::fd::AsFd;

use anyhow::{ensure, Result};
use remus_ram::guest::{Guest, Job};
use remus_ram::map::{memfd, Map};
use remus_ram::netlink::Done;

use crate::linux::{kvm_log, Protected, Region};
use crate::memory::{scattered, timed, touch, Memory};
use crate::stats::{Figure, Series, Target};
use crate::Bench;

/// Scattered pages of an epoch.
const FEW: usize = 500;
/// Pages of 8 MiB.
const MANY: usize = 2048;

/// A seal's time, once by the kernel's own account and once as the caller sees it, in microseconds.
#[derive(Default)]
struct Both {
    kernel: Series,
    wall: Series,
}

impl Both {
    fn push(&mut self, done: &Done) {
        self.kernel.push(done.kernel_ns as f64 / 1e3);
        self.wall.push(done.wall_ns as f64 / 1e3);
    }
}

/// 500 scattered pages of 1 GiB, and of 64 MiB.
pub fn by_size(bench: &mut Bench) -> Result<()> {
    let (big, small) = (&bench.big, &bench.small);
    let (mut a, mut b) = (Both::default(), Both::default());
    for round in bench.rounds() {
        let mut seal = |memory: &Memory, to: &mut Both| -> Result<()> {
            let pages = scattered(&mut bench.rng, memory.pages(), FEW);
            memory.map.write_pages(&pages, round.number);
            let done = memory.seal_of(FEW)?;
            if round.counts {
                to.push(&done);
            }
            memory.commit(done.epoch).map(drop)
        };
        if round.number % 2 == 0 {
            seal(big, &mut a)?;
            seal(small, &mut b)?;
        } else {
            seal(small, &mut b)?;
            seal(big, &mut a)?;
        }
    }
    let figure = Figure::new(
        &a.kernel.over(&b.kernel),
        Target::AtMost(1.1),
        "seal of 500 scattered pages of 1 GiB, by 64 MiB; both fully touched, duration-ns",
    )
    .beside("1 GiB, duration-ns", "us", &a.kernel)
    .beside("64 MiB, duration-ns", "us", &b.kernel)
    .beside("1 GiB, whole call", "us", &a.wall)
    .beside("64 MiB, whole call", "us", &b.wall);
    bench.add("seal_1g_vs_64m", figure);
    Ok(())
}

/// Seal, hand-off and a look at every bit, beside PAGEMAP_SCAN.
pub fn beside_scan(bench: &mut Bench) -> Result<()> {
    let big = &bench.big;
    let protected = Protected::new(bench.big_mib, true)?;
    let mut regions = vec![Region::default(); FEW + 1];
    // Everything is written at first: one region, as it is touched in order.
    protected.scan(&mut regions)?;
    let (mut ours, mut scan) = (Series::default(), Series::default());
    let (mut seal, mut hand_off, mut commit) = <(Both, Series, Series)>::default();
    for round in bench.rounds() {
        let pages = scattered(&mut bench.rng, big.pages(), FEW);
        for turn in 0..2 {
            if (round.number + turn) % 2 == 0 {
                big.map.write_pages(&pages, round.number);
                let done = big.seal()?;
                let mut found = Vec::with_capacity(FEW);
                let ((), handed) = timed(|| {
                    big.device.bitmap(done.epoch)?.each(|page| found.push(page));
                    Ok(())
                })?;
                ensure!(found.len() == FEW, "the bitmap has {} pages", found.len());
                let committed = big.commit(done.epoch)?;
                if round.counts {
                    ours.push((done.wall_ns as f64 + handed) / 1e3);
                    seal.push(&done);
                    hand_off.push(handed / 1e3);
                    commit.push(committed.wall_ns as f64 / 1e3);
                }
            } else {
                protected.map.write_pages(&pages, round.number);
                let (found, took) = timed(|| protected.scan(&mut regions))?;
                ensure!(found == FEW as u64, "PAGEMAP_SCAN found {found} pages");
                if round.counts {
                    scan.push(took / 1e3);
                }
            }
        }
    }
    let figure = Figure::new(
        &ours.over(&scan),
        Target::AtMost(0.25),
        "collect and re-arm 500 scattered pages of 1 GiB (seal, BITMAP, mmap, every bit looked at), \
         by PAGEMAP_SCAN with write protection over a memfd; whole calls",
    )
    .beside("seal and bitmap, whole", "us", &ours)
    .beside("PAGEMAP_SCAN", "us", &scan)
    .beside("of it the seal's call", "us", &seal.wall)
    .beside("of it the seal, duration-ns", "us", &seal.kernel)
    .beside("of it the bitmap", "us", &hand_off)
    .beside("commit, not counted", "us", &commit);
    bench.add("seal_vs_pagemap_scan", figure);
    Ok(())
}

/// 8 MiB written through, and 2,048 scattered pages, by a KVM guest.
pub fn dense_and_sparse(bench: &mut Bench, guest: &mut Guest) -> Result<()> {
    let big = &bench.big;
    let (mut dense, mut sparse) = (Both::default(), Both::default());
    for round in bench.rounds() {
        let pages = scattered(&mut bench.rng, big.pages(), MANY);
        let first = pages[0].min(big.pages() - MANY as u64) as u32;
        for turn in 0..2 {
            let in_a_row = (round.number + turn) % 2 == 0;
            let value = round.number as u32;
            guest.run(if in_a_row {
                let (page, count) = (first, MANY as u32);
                Job::Sweep { page, count, value }
            } else {
                guest.list(0, &pages)?;
                let (from, count) = (0, MANY as u32);
                Job::Listed { from, count, value }
            })?;
            let done = big.seal_of(MANY)?;
            if round.counts {
                if in_a_row { &mut dense } else { &mut sparse }.push(&done);
            }
            big.commit(done.epoch)?;
        }
    }
    let each = 1e3 / MANY as f64;
    let figure = Figure::new(
        &dense.kernel.over(&sparse.kernel),
        Target::AtMost(0.2),
        "nanoseconds a page, of 8 MiB written through, by 2,048 scattered pages of 1 GiB; KVM guest, \
         duration-ns",
    )
    .beside("in a row, a page, duration-ns", "ns", &dense.kernel.times(each))
    .beside("scattered, a page, duration-ns", "ns", &sparse.kernel.times(each))
    .beside("in a row, whole call", "us", &dense.wall)
    .beside("scattered, whole call", "us", &sparse.wall);
    bench.add("seal_dense_vs_sparse", figure);
    Ok(())
}

/// The same pages of a KVM guest's memory found by KVM's log.
pub fn beside_kvm_log(bench: &mut Bench, guest: &mut Guest) -> Result<()> {
    let length = (bench.big_mib as usize) << 20;
    let file = memfd(length)?;
    let map = Map::shared(file.as_fd(), length, 0, true)?;
    touch(&map);
    let mut logged = Guest::new(&map, true)?;
    let (page, count, value) = (0, bench.big.pages() as u32, 1);
    logged.run(Job::Sweep { page, count, value })?;
    kvm_log(&logged)?;

    for (name, count) in [("kvm_reference", MANY), ("kvm_reference_500", FEW)] {
        let big = &bench.big;
        let (mut ours, mut seal, mut log) = <(Series, Both, Series)>::default();
        for round in bench.rounds() {
            let pages = scattered(&mut bench.rng, big.pages(), count);
            let job = Job::Listed {
                from: 0,
                count: count as u32,
                value: round.number as u32,
            };
            for turn in 0..2 {
                if (round.number + turn) % 2 == 0 {
                    guest.list(0, &pages)?;
                    guest.run(job)?;
                    let (done, took) = timed(|| {
                        let done = big.seal()?;
                        let mut found = 0;
                        big.device.bitmap(done.epoch)?.each(|_| found += 1);
                        ensure!(found == count, "the bitmap has {found} pages");
                        Ok(done)
                    })?;
                    big.commit(done.epoch)?;
                    if round.counts {
                        ours.push(took / 1e3);
                        seal.push(&done);
                    }
                } else {
                    logged.list(0, &pages)?;
                    logged.run(job)?;
                    let (found, took) = timed(|| kvm_log(&logged))?;
                    ensure!(found == count as u64, "KVM's log has {found} pages");
                    if round.counts {
                        log.push(took / 1e3);
                    }
                }
            }
        }
        let figure = Figure::new(
            &ours.over(&log),
            Target::None,
            &format!(
                "seal, BITMAP, mmap, every bit looked at, by KVM_GET_DIRTY_LOG and KVM_CLEAR_DIRTY_LOG; \
                 {count} scattered pages of 1 GiB, whole calls"
            ),
        )
        .beside("seal and bitmap, whole", "us", &ours)
        .beside("of it the seal, duration-ns", "us", &seal.kernel)
        .beside("KVM's log, whole", "us", &log);
        bench.add(name, figure);
    }
    Ok(())
}
