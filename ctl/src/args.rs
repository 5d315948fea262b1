// SPDX-License-Identifier: GPL-2.0

//! The command line.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use serde::{Deserialize, Serialize};

use crate::config::Size;

/// Exit codes, as `--help` shows them.
const EXIT_CODES: &str = "\
Exit codes:
  0  done; or protection ended because it was asked to, or the guest was shut down
  1  refused or failed, nothing was changed (doctor: something is missing)
  2  the command line is wrong
  3  protection ended by a failure: the guest's output stays held
  4  standby: the primary is dead, and no epoch is whole to resume from
  5  standby: take-over failed";

/// Protects virtual machines: a standby host resumes them where their own host died.
#[derive(Debug, Parser)]
#[command(name = "remusctl", version, about, after_help = EXIT_CODES)]
pub struct Cli {
    /// Where running controllers keep their sockets.
    #[arg(
        long,
        global = true,
        env = "REMUS_RUN_DIR",
        default_value = "/run/remus",
        value_name = "DIR"
    )]
    pub run_dir: PathBuf,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Say whether this host is fit, and if not, what to do.
    Doctor {
        /// Print JSON.
        #[arg(short, long)]
        json: bool,
    },
    /// Create, list, show and delete domains.
    #[command(subcommand)]
    Domain(Domain),
    /// Keep a running virtual machine protected by a standby.
    Protect(Protect),
    /// Receive a domain's epochs, and take over when its host dies.
    Standby(Standby),
    /// Show what the domains on this host do.
    Status {
        /// Only this domain.
        name: Option<String>,
        /// Print JSON.
        #[arg(short, long)]
        json: bool,
    },
    /// Raw step: end the open epoch of a domain.
    Seal {
        /// The domain.
        name: String,
        /// Count every page that exists as written.
        #[arg(long)]
        full: bool,
        /// Print JSON.
        #[arg(short, long)]
        json: bool,
    },
    /// Raw step: release the packets of a sealed epoch and of all before it.
    Commit(Step),
    /// Raw step: fold a sealed epoch and all after it into the open one.
    Abort(Step),
    /// Raw step: throw away all packets that are not committed; epochs stay as they are.
    Discard {
        /// The domain.
        name: String,
        /// Print JSON.
        #[arg(short, long)]
        json: bool,
    },
}

/// Arguments of a raw step.
#[derive(Debug, Args)]
pub struct Step {
    /// The domain.
    pub name: String,
    /// The epoch; by default the newest sealed one for commit, the oldest for abort.
    pub epoch: Option<u64>,
    /// Print JSON.
    #[arg(short, long)]
    pub json: bool,
}

/// What to do with domains.
#[derive(Debug, Subcommand)]
pub enum Domain {
    /// Create a domain; its output is held from then on.
    Add {
        /// Its name.
        #[arg(required_unless_present = "config")]
        name: Option<String>,
        /// Size of its memory, such as 128M; none by default.
        #[arg(long, value_name = "SIZE")]
        memory: Option<Size>,
        /// A network interface of it; may be repeated.
        #[arg(long = "port", value_name = "DEV")]
        ports: Vec<String>,
        /// Its limits.
        #[command(flatten)]
        limits: Limits,
        /// File that describes it.
        #[arg(long, value_name = "FILE", conflicts_with_all = ["memory", "ports"])]
        config: Option<PathBuf>,
        /// Print JSON.
        #[arg(short, long)]
        json: bool,
    },
    /// List all domains.
    List {
        /// Print JSON.
        #[arg(short, long)]
        json: bool,
    },
    /// Show one domain.
    Show {
        /// Its name.
        name: String,
        /// Print JSON.
        #[arg(short, long)]
        json: bool,
    },
    /// Change the limits of a domain, or add ports to it; what is not named stays.
    Set {
        /// Its name.
        name: String,
        /// Another network interface of it, as after a take-over; may be repeated.
        #[arg(long = "port", value_name = "DEV")]
        ports: Vec<String>,
        /// Its limits.
        #[command(flatten)]
        limits: Limits,
        /// Print JSON.
        #[arg(short, long)]
        json: bool,
    },
    /// Delete a domain; packets that it holds are dropped.
    Del {
        /// Its name.
        name: String,
        /// Also if a virtual machine runs on its memory, which then cannot be protected any more.
        #[arg(short = 'F', long)]
        force: bool,
    },
}

/// Limits of a domain; 0 is no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Args)]
pub struct Limits {
    /// Most packets that its ports hold together.
    #[arg(long, value_name = "N")]
    pub limit_packets: Option<u64>,
    /// Most memory that these may take, such as 64M.
    #[arg(long, value_name = "SIZE", value_parser = limit)]
    pub limit_bytes: Option<u64>,
    /// Most memory for old contents of pages that were written again before they were read, such as 64M.
    #[arg(long, value_name = "SIZE", value_parser = limit)]
    pub cow_limit: Option<u64>,
    /// What happens beyond that: the guest waits, or the epoch fails.
    #[arg(long, value_name = "POLICY")]
    pub cow_policy: Option<CowPolicy>,
}

/// What happens when there is no room for the old content of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum CowPolicy {
    /// The writer waits until the page was read out.
    Throttle,
    /// The epoch is aborted.
    Fail,
}

fn limit(text: &str) -> anyhow::Result<u64> {
    if text == "0" {
        return Ok(0);
    }
    text.parse::<Size>().map(|size| size.0)
}

/// Arguments of `protect`.
#[derive(Debug, Args)]
pub struct Protect {
    /// The domain.
    pub name: String,
    /// QEMU's QMP socket.
    #[arg(long, value_name = "SOCK")]
    pub qmp: PathBuf,
    /// The standby.
    #[arg(long, value_name = "HOST[:PORT]")]
    pub to: String,
    /// Time from epoch to epoch, in milliseconds [default: 100].
    #[arg(short, long, value_name = "MS", value_parser = clap::value_parser!(u64).range(1..=3_600_000))]
    pub interval: Option<u64>,
    /// Silence after which the standby counts as dead, in milliseconds [default: 1000].
    #[arg(long, value_name = "MS", value_parser = clap::value_parser!(u64).range(10..=3_600_000))]
    pub timeout: Option<u64>,
    /// Most epochs that may wait for the standby.
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u64).range(1..=1024))]
    pub depth: u64,
    /// Append events to this file, one JSON object a line.
    #[arg(long, value_name = "FILE")]
    pub trace: Option<PathBuf>,
    /// File that describes the domain.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
}

/// Arguments of `standby`.
#[derive(Debug, Args)]
pub struct Standby {
    /// File that describes the domain.
    #[arg(long, value_name = "FILE")]
    pub config: PathBuf,
    /// Where to listen [default: 0.0.0.0:7072].
    #[arg(long, value_name = "ADDR[:PORT]")]
    pub listen: Option<String>,
    /// Silence after which the primary counts as dead, in milliseconds [default: 1000].
    #[arg(long, value_name = "MS", value_parser = clap::value_parser!(u64).range(10..=3_600_000))]
    pub timeout: Option<u64>,
    /// What to call the domain on this host, if its own name is taken.
    #[arg(long = "as", value_name = "NAME")]
    pub local: Option<String>,
    /// The virtual machine's network interface on this host.
    #[arg(long, value_name = "DEV")]
    pub port: Option<String>,
    /// Append events to this file, one JSON object a line.
    #[arg(long, value_name = "FILE")]
    pub trace: Option<PathBuf>,
}
