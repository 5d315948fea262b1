// SPDX-License-Identifier: GPL-2.0-or-later

//! The command line.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;
use serde::{Deserialize, Serialize};

use crate::commands::keys::Keys;
use crate::config::{Amount, Size};

/// Exit codes, as `--help` shows them.
const EXIT_CODES: &str = "\
Exit codes:
  0  done; or protection ended because it was asked to, or the guest was handed over or shut down
  1  refused or failed, nothing was changed (doctor: something is missing)
  2  the command line is wrong
  3  protection ended by a failure, or the standby has taken over: the guest's output stays held
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
        /// Also look at what this file names: the keys, the memory, the standby.
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
        /// Also look at the way to this host.
        #[arg(long, value_name = "HOST[:PORT]")]
        peer: Option<String>,
        /// Print JSON.
        #[arg(short, long)]
        json: bool,
    },
    /// Create, list, show and delete domains.
    #[command(subcommand)]
    Domain(Domain),
    /// Make, install and show the keys of a pair of hosts.
    #[command(subcommand)]
    Keys(Keys),
    /// Keep a running virtual machine protected by a standby.
    Protect(Box<Protect>),
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
    /// Show what the domains on this host do, again and again; q ends it.
    Top {
        /// Only this domain.
        name: Option<String>,
    },
    /// Print what happens to a domain, or to all, as it happens: one JSON object a line.
    Events {
        /// Only this domain.
        name: Option<String>,
    },
    /// Change when the epochs of a protected domain end.
    Set {
        /// The domain.
        name: String,
        /// When its epochs end.
        #[command(flatten)]
        pace: Pace,
    },
    /// Planned switch: have the standby of a domain take over. Nothing that was sent is lost.
    Failover {
        /// The domain.
        name: String,
    },
    /// End the protection of a domain in good order; the standby does not take over.
    Unprotect {
        /// The domain.
        name: String,
    },
    /// Write the manual pages to a directory.
    #[command(hide = true)]
    Man {
        /// The directory.
        dir: PathBuf,
    },
    /// Print what completes these commands in a shell.
    #[command(hide = true)]
    Completions {
        /// The shell.
        shell: Shell,
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
    /// Create a domain; its output is held from then on, unless told otherwise.
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
        /// Let what the guest sends pass, until it is protected.
        #[arg(long)]
        passthrough: bool,
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
        /// Let what the guest sends pass, until it is protected; or hold it again.
        #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
        passthrough: Option<bool>,
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

/// Limits of a domain; 0 is no limit, but for the last one.
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
    /// Most memory to watch pages that are written all the time, such as 16M, or 0 for none: they are compared, not
    /// write-protected.
    #[arg(long, value_name = "SIZE", value_parser = limit)]
    pub hot_limit: Option<u64>,
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
    text.parse::<Amount>().map(|amount| amount.0)
}

/// What decides when an epoch ends: one of the three, or what the file says.
#[derive(Clone, Debug, Default, PartialEq, Eq, Args)]
pub struct Pace {
    /// So long after the last one, in milliseconds [default: 100].
    #[arg(short, long, value_name = "MS", conflicts_with_all = ["on_output", "target_latency"],
        value_parser = clap::value_parser!(u64).range(1..=3_600_000))]
    pub interval: Option<u64>,
    /// As soon as the guest has sent something.
    #[arg(long, conflicts_with = "target_latency")]
    pub on_output: bool,
    /// With --on-output, the least time between two, in milliseconds [default: 10].
    #[arg(long, value_name = "MS", conflicts_with_all = ["interval", "target_latency"],
        value_parser = clap::value_parser!(u64).range(1..=3_600_000))]
    pub floor: Option<u64>,
    /// So that replies come about this much later than without protection, in milliseconds.
    #[arg(long, value_name = "MS", value_parser = clap::value_parser!(u64).range(1..=3_600_000))]
    pub target_latency: Option<u64>,
}

/// What becomes of a guest whose standby is lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Loss {
    /// What it sends stays held until somebody decides.
    Hold,
    /// It goes on without protection: what it sends leaves at once.
    Continue,
}

/// What `protect` and `standby` have in common.
#[derive(Clone, Debug, Default, Args)]
pub struct Common {
    /// Silence after which the other host counts as dead, in milliseconds [default: 1000].
    #[arg(long, value_name = "MS", value_parser = clap::value_parser!(u64).range(10..=3_600_000))]
    pub timeout: Option<u64>,
    /// Keys of this host, which prove to the other one who it is [default: /etc/remus/keys/default.pem].
    #[arg(long, value_name = "FILE")]
    pub keys: Option<PathBuf>,
    /// Allow what weakens protection: running without keys, --on-standby-loss continue, disks that are not
    /// replicated.
    #[arg(short = 'F', long)]
    pub force: bool,
    /// Serve metrics over HTTP, at /metrics.
    #[arg(long, value_name = "ADDR:PORT")]
    pub metrics: Option<SocketAddr>,
    /// Append events to this file, one JSON object a line.
    #[arg(long, value_name = "FILE")]
    pub trace: Option<PathBuf>,
}

/// Arguments of `protect`.
#[derive(Clone, Debug, Args)]
pub struct Protect {
    /// The domain.
    pub name: String,
    /// QEMU's QMP socket.
    #[arg(long, value_name = "SOCK")]
    pub qmp: Option<PathBuf>,
    /// The standby.
    #[arg(long, value_name = "HOST[:PORT]")]
    pub to: Option<String>,
    /// When its epochs end.
    #[command(flatten)]
    pub pace: Pace,
    /// Most epochs that may wait for the standby [default: 4].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=1024))]
    pub depth: Option<u64>,
    /// Most memory for what the standby has of the guest's, so that only differences are sent; 0 for
    /// none [default: a quarter of the guest's memory].
    #[arg(long, value_name = "SIZE", value_parser = limit)]
    pub delta_cache: Option<u64>,
    /// Threads that encode pages [default: as many as processors, at most 4].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=64))]
    pub encoders: Option<u64>,
    /// Send pages as they are, neither as differences nor compressed.
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub raw: Option<bool>,
    /// Copy pages while the guest stands still, as plain Remus does: for comparison.
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub copy_in_pause: Option<bool>,
    /// What becomes of the guest when the standby is lost; continue needs -F [default: hold].
    #[arg(long, value_name = "POLICY")]
    pub on_standby_loss: Option<Loss>,
    /// What `standby` has too.
    #[command(flatten)]
    pub common: Common,
    /// File that describes the domain; what is named here comes first.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
}

/// Arguments of `standby`.
#[derive(Clone, Debug, Args)]
pub struct Standby {
    /// File that describes the domain; what is named here comes first.
    #[arg(long, value_name = "FILE")]
    pub config: PathBuf,
    /// Where to listen [default: 0.0.0.0:7072].
    #[arg(long, value_name = "ADDR[:PORT]")]
    pub listen: Option<String>,
    /// What to call the domain on this host, if its own name is taken.
    #[arg(long = "as", value_name = "NAME")]
    pub local: Option<String>,
    /// The virtual machine's network interface on this host.
    #[arg(long, value_name = "DEV")]
    pub port: Option<String>,
    /// What `protect` has too.
    #[command(flatten)]
    pub common: Common,
}
