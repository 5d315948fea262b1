// SPDX-License-Identifier: GPL-2.0

//! `remusctl protect`: gathers what the primary's loop needs, without touching the guest before all
//! of it is there.

pub mod pace;
pub mod protect;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{bail, Context, Result};
use serde_json::json;

use crate::args::Protect;
use crate::commands::domain;
use crate::config::Config;
use crate::host::kernel::Kernel;
use crate::host::netlink::Remus;
use crate::host::qmp::Qmp;
use crate::host::ram::{self, Ram};
use crate::peer::address;
use crate::peer::stream::lock;
use crate::primary::protect::{introduce, run, End, Parts, Plan};
use crate::report::live::{Live, Shared, Station};
use crate::report::trace::{ms, Trace};
use crate::{say, signals};

/// Time from epoch to epoch unless told otherwise, in milliseconds.
const INTERVAL_MS: u64 = 100;
/// Silence after which the other host counts as dead unless told otherwise, in milliseconds.
pub const TIMEOUT_MS: u64 = 1000;
/// How long to try to reach the standby.
const REACH: Duration = Duration::from_secs(5);
/// The first life of a domain. Fail-back, which has to remember a later one, is not there yet.
const GENERATION: u64 = 1;

/// Protects until something ends that. Returns the exit code.
pub fn protect(args: &Protect, run_dir: &Path) -> Result<u8> {
    let config = args.config.as_deref().map(Config::read).transpose()?;
    if let Some(config) = config.as_ref().filter(|c| c.name != args.name) {
        bail!(
            "the configuration is for domain {}, not for {}",
            config.name,
            args.name
        );
    }
    let millis = |arg: Option<u64>, file: Option<u64>, default| {
        Duration::from_millis(arg.or(file).unwrap_or(default))
    };
    let from_file = |get: fn(&Config) -> Option<u64>| config.as_ref().and_then(get);
    let interval = millis(args.interval, from_file(|c| c.interval_ms), INTERVAL_MS);
    let timeout = millis(args.timeout, from_file(|c| c.timeout_ms), TIMEOUT_MS);
    let trace = Trace::open(args.trace.as_deref())?;

    let mut sealer = Remus::connect()?;
    let mut committer = Remus::connect()?;
    let found = sealer.get(&args.name)?;
    let (Some(memory), Some(device)) = (found.memory, found.device) else {
        bail!(
            "domain {} has no memory that could be replicated: create it with --memory SIZE",
            args.name
        );
    };
    let device = ram::path(&device);
    let mut qmp = Qmp::connect(&args.qmp)?;
    let version = qmp.version()?;
    qmp.check_memory(&device, memory)?;
    let status = qmp.status()?;
    match status.as_str() {
        "running" => {}
        // A controller that was killed between pause and resume leaves this behind.
        "paused" | "prelaunch" | "save-vm" => {
            say!("the guest is {status}; the first epoch lets it run")
        }
        _ => bail!("the guest is {status}: only a running one can be protected"),
    }
    let pages = Ram::open(&device)?;
    let live = Shared::default();
    *lock(&live) = Live {
        role: "primary".into(),
        state: "starting".into(),
        pid: std::process::id(),
        peer: Some(args.to.clone()),
        interval_ms: Some(ms(interval)),
        timeout_ms: Some(ms(timeout)),
        ..Live::default()
    };
    let _station = Station::open(run_dir, &args.name, Arc::clone(&live))?;
    signals::raise_priority();
    let stream = address::connect(&args.to, REACH)?;
    let plan = Plan {
        domain: args.name.clone(),
        memory,
        generation: GENERATION,
        interval,
        timeout,
        depth: usize::try_from(args.depth)?,
    };
    let link = introduce(&plan, &stream)?;
    // The link has it; when that is gone it is closed.
    drop(stream);
    let stop = signals::stop_flag()?;
    // For as long as this process drives it.
    sealer.own(&args.name)?;
    if domain::abort_all(&mut committer, &args.name)
        .context("cannot tidy up after an earlier run")?
    {
        say!("took back the epochs that an earlier run had left sealed");
    }
    say!(
        "protecting {} ({} MiB, QEMU {version}) by {}: an epoch every {} ms",
        args.name,
        memory >> 20,
        args.to,
        interval.as_millis()
    );
    trace.event(
        "protect-start",
        json!({
            "domain": args.name,
            "memory": memory,
            "interval_ms": ms(interval),
            "timeout_ms": ms(timeout),
            "depth": args.depth,
            "peer": args.to,
            "qemu": version,
        }),
    );
    lock(&live).state = "replicating".into();
    let parts = Parts {
        guest: Box::new(qmp),
        sealer: Box::new(sealer),
        committer: Box::new(committer),
        pages: Box::new(pages),
        trace: trace.clone(),
        live: Arc::clone(&live),
        stop,
    };
    let end = run(&plan, parts, link);
    Ok(report(&plan, &end, &trace, &live))
}

/// Says how it ended, and returns the exit code.
fn report(plan: &Plan, end: &End, trace: &Trace, live: &Shared) -> u8 {
    let name = &plan.domain;
    let (event, code) = match end {
        End::Asked => ("protect-end", 0),
        End::GuestEnded(_) => ("guest-ended", 0),
        End::PeerLost(_) => ("peer-lost", 3),
        End::Failed(_) => ("protect-failed", 3),
    };
    let epoch = lock(live).epoch;
    trace.event(event, json!({"reason": end.to_string(), "epoch": epoch}));
    match end {
        End::Asked => say!(
            "protection of {name} ended as asked to after epoch {epoch}; the guest runs on, and its output stays \
             held: protect it again, or delete the domain to let it speak (what is held is dropped)"
        ),
        End::GuestEnded(why) => say!("the guest of {name} was shut down ({why}); protection has ended"),
        End::PeerLost(why) => say!(
            "the standby of {name} is lost after epoch {epoch}: {why}; the guest runs on, and its output stays \
             held: if the standby has taken over, end this guest, else start a standby and protect again"
        ),
        End::Failed(e) => say!(
            "protection of {name} failed after epoch {epoch}: {e:#}; what the guest sends stays held, and the \
             standby takes over: end this guest once it has"
        ),
    }
    code
}
