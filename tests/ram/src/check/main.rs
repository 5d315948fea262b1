// SPDX-License-Identifier: GPL-2.0

//! An independent checker of the RAM device: exact dirty sets, true snapshots, equal standby.
//!
//! Processes and a KVM guest write a domain's memory by seeded patterns. At each seal they are paused
//! and all of the memory is copied; while they run on, the sealed epoch's bitmap must be exactly what
//! they say they wrote, each page read of it must be what the copy holds, and a second memory that
//! only gets whole epochs must equal the copy. The first difference ends the run.

mod crew;
mod epochs;
mod image;
mod pattern;
mod reader;
mod writer;

use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Args, Parser, Subcommand};
use rand::SeedableRng;

/// Checks the RAM device of the loaded module against a full copy of the memory at each seal.
#[derive(Parser)]
#[command(args_conflicts_with_subcommands = true)]
struct Arguments {
    #[command(subcommand)]
    role: Option<Role>,
    #[command(flatten)]
    options: Options,
}

#[derive(Subcommand)]
enum Role {
    /// Write as the checker says
    #[command(hide = true)]
    Writer(writer::Options),
}

/// What to do.
#[derive(Args, Clone, Debug)]
pub struct Options {
    /// How many epochs
    #[arg(long, default_value_t = 2000)]
    epochs: u64,
    /// Seed of all that is random; any if not given, and printed
    #[arg(long)]
    seed: Option<u64>,
    /// Size of the memory in MiB, a power of two
    #[arg(long, default_value_t = 16)]
    memory: u64,
    /// Pages of the memory, a power of two, instead of its size
    #[arg(long)]
    pages: Option<u64>,
    /// How many processes write, besides the guest
    #[arg(long, default_value_t = 3)]
    writers: usize,
    /// Most old contents that may be kept at once, in pages; beyond that writers wait (any number)
    #[arg(long, default_value_t = 0)]
    cow_limit: u64,
    /// Most pages that may be hot: not write-protected but compared (none)
    #[arg(long, default_value_t = 0)]
    hot_limit: u64,
    /// Without the KVM guest
    #[arg(long)]
    no_guest: bool,
    /// Name of the domain to create; its standby's is this with -standby
    #[arg(long, default_value = "ram-check")]
    domain: String,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("ram-check: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    if let Some(Role::Writer(options)) = &arguments.role {
        return writer::run(options);
    }
    let options = &arguments.options;
    let seed = options.seed.unwrap_or_else(any_seed);
    eprintln!("# seed {seed}, {} epochs", options.epochs);
    let report = epochs::run(options, seed).with_context(|| format!("seed {seed}"))?;
    println!("{report}");
    Ok(())
}

fn any_seed() -> u64 {
    use rand::Rng;
    // 32 bits are easier to type again.
    rand_chacha::ChaCha8Rng::from_os_rng()
        .random::<u32>()
        .into()
}
