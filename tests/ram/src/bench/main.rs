// SPDX-License-Identifier: GPL-2.0

//! What tracking and snapshots of memory cost, beside what Linux has.
//!
//! Prints one JSON object: a figure for each claim, with the absolute values that it comes from. What
//! is compared with each other is measured in the same rounds, by turns. A figure is the median of the
//! rounds' ratios; a first round is not counted.

mod linux;
mod memory;
mod pause;
mod qemu;
mod read;
mod seal;
mod stats;
mod write;

use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Parser;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use remus_ram::guest::{Guest, Job};
use serde_json::{Map, Value};

use crate::memory::Memory;
use crate::stats::Figure;

/// Measures the RAM device of the loaded module.
#[derive(Parser)]
struct Options {
    /// How many rounds count
    #[arg(long, default_value_t = 15, value_parser = clap::value_parser!(u64).range(1..))]
    rounds: u64,
    /// Size of the large memory in MiB, a power of two
    #[arg(long, default_value_t = 1024)]
    big: u64,
    /// Size of the small one
    #[arg(long, default_value_t = 64)]
    small: u64,
    /// Seed of the pages that are written
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Only figures whose names contain this
    #[arg(long, default_value = "")]
    only: String,
}

/// What all measurements share.
pub struct Bench {
    rounds: u64,
    big_mib: u64,
    small_mib: u64,
    big: Memory,
    small: Memory,
    rng: ChaCha8Rng,
    figures: Map<String, Value>,
}

/// A round: its number, and whether it counts.
#[derive(Clone, Copy, Debug)]
pub struct Round {
    number: u64,
    counts: bool,
}

impl Bench {
    /// All rounds, the one first that does not count.
    fn rounds(&self) -> impl Iterator<Item = Round> + use<> {
        (0..=self.rounds).map(|number| Round {
            number,
            counts: number > 0,
        })
    }

    fn add(&mut self, name: &str, figure: Figure) {
        self.figures.insert(name.into(), figure.json());
    }
}

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(figures) => {
            println!("{}", Value::from(figures));
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("ram-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// A measurement that needs a guest, or does not.
type Plain = fn(&mut Bench) -> Result<()>;
type Guested = fn(&mut Bench, &mut Guest) -> Result<()>;
const PLAIN: [(&str, Plain); 5] = [
    ("seal_1g_vs_64m", seal::by_size),
    ("seal_vs_pagemap_scan", seal::beside_scan),
    ("snapshot_read_vs_memcpy", read::beside_memcpy),
    ("first_write_us", write::first),
    ("pause_parts_ms", pause::parts),
];
const GUESTED: [(&str, Guested); 3] = [
    ("seal_dense_vs_sparse", seal::dense_and_sparse),
    ("pause_slope_cow_vs_copy", pause::by_pages),
    ("kvm_reference", seal::beside_kvm_log),
];

fn run(options: &Options) -> Result<Map<String, Value>> {
    let mut bench = Bench {
        rounds: options.rounds,
        big_mib: options.big,
        small_mib: options.small,
        big: Memory::new("bench-big", options.big)?,
        small: Memory::new("bench-small", options.small)?,
        rng: ChaCha8Rng::seed_from_u64(options.seed),
        figures: Map::new(),
    };
    let chosen = |name: &str| {
        let chosen = name.contains(&options.only);
        if chosen {
            eprintln!("  {name} ...");
        }
        chosen
    };
    for (name, measure) in PLAIN {
        if chosen(name) {
            measure(&mut bench).context(name)?;
        }
    }
    // Last: from here on KVM maps the large memory too.
    let mut guest = None;
    for (name, measure) in GUESTED {
        if chosen(name) {
            let guest = match &mut guest {
                Some(guest) => guest,
                None => guest.insert(start(&bench).context("the guest")?),
            };
            measure(&mut bench, guest).context(name)?;
        }
    }
    Ok(bench.figures)
}

/// A guest that has written all of the large memory, in a committed epoch.
fn start(bench: &Bench) -> Result<Guest> {
    let mut guest = Guest::new(&bench.big.map, false)?;
    let (page, count, value) = (0, bench.big.pages() as u32, 1);
    guest.run(Job::Sweep { page, count, value })?;
    let epoch = bench.big.seal()?.epoch;
    bench.big.commit(epoch)?;
    Ok(guest)
}
