// SPDX-License-Identifier: GPL-2.0

//! `remusctl protect`: gathers what the primary's loop needs, without touching the guest before all
//! of it is there.

pub mod pace;
pub mod protect;

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{mpsc, Arc};
use std::thread;
use std::time::Duration;

use anyhow::{bail, Context, Result};
use serde_json::json;

use crate::args::Protect;
use crate::commands::domain;
use crate::config::{Config, ProtectSettings};
use crate::host::kernel::Kernel;
use crate::host::netlink::Remus;
use crate::host::qmp::Qmp;
use crate::host::ram::{self, Ram};
use crate::peer::address;
use crate::peer::stream::lock;
use crate::primary::pace::Pace;
use crate::primary::protect::{introduce, run, End, Parts, Plan};
use crate::report::live::{Ask, Live, Order, Station};
use crate::report::trace::ms;
use crate::report::{metrics, say, service, Report};
use crate::{say, signals};

/// How long to try to reach the standby.
const REACH: Duration = Duration::from_secs(5);
/// The first life of a domain. Fail-back, which has to remember a later one, is not there yet.
const GENERATION: u64 = 1;

/// Protects until something ends that. Returns the exit code.
pub fn protect(args: &Protect, run_dir: &Path) -> Result<u8> {
    let config = args.config.as_deref().map(Config::read).transpose()?;
    let settings = ProtectSettings::of(args, config.as_ref())?;
    // The loop does not know the others yet.
    let (Pace::Fixed(interval)
    | Pace::OnOutput { floor: interval }
    | Pace::Latency { target: interval }) = settings.pace;
    if settings.keys.is_some() {
        bail!("this version cannot use keys yet: give -F and no --keys");
    }
    let timeout = settings.timeout;
    let trace = Report::open(settings.trace.as_deref())?;
    let live = trace.live();
    say::about(&settings.domain, live);

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
    let mut qmp = Qmp::connect(&settings.qmp)?;
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
    *lock(live) = Live {
        role: "primary".into(),
        state: "starting".into(),
        pid: std::process::id(),
        peer: Some(settings.to.clone()),
        pace: Some(settings.pace.to_string()),
        interval_ms: Some(ms(interval)),
        secured: Some("plain".into()),
        timeout_ms: Some(ms(timeout)),
        ..Live::default()
    };
    let (orders, asked) = mpsc::channel();
    let _station = Station::open(run_dir, &args.name, &trace, orders)?;
    if let Some(address) = settings.metrics {
        metrics::serve(address, &args.name, &trace)?;
    }
    trace.start_watchdog()?;
    signals::raise_priority();
    let stream = address::connect(&settings.to, REACH)?;
    let plan = Plan {
        domain: args.name.clone(),
        memory,
        generation: GENERATION,
        interval,
        timeout,
        depth: settings.depth,
    };
    let link = introduce(&plan, &stream)?;
    // The link has it; when that is gone it is closed.
    drop(stream);
    let stop = signals::stop_flag()?;
    thread::Builder::new().name("orders".into()).spawn({
        let stop = Arc::clone(&stop);
        move || obey(&asked, &stop)
    })?;
    // For as long as this process drives it.
    sealer.own(&args.name)?;
    if domain::abort_all(&mut committer, &args.name)
        .context("cannot tidy up after an earlier run")?
    {
        say!("took back the epochs that an earlier run had left sealed");
    }
    say!(
        "protecting {} ({} MiB, QEMU {version}) by {}: an epoch {}",
        args.name,
        memory >> 20,
        settings.to,
        settings.pace
    );
    trace.event(
        "protect-start",
        json!({
            "domain": args.name,
            "memory": memory,
            "interval_ms": ms(interval),
            "timeout_ms": ms(timeout),
            "depth": settings.depth,
            "delta_cache": settings.delta_cache(memory),
            "peer": settings.to,
            "qemu": version,
        }),
    );
    lock(live).state = "replicating".into();
    let parts = Parts {
        guest: Box::new(qmp),
        sealer: Box::new(sealer),
        committer: Box::new(committer),
        pages: Box::new(pages),
        report: trace.clone(),
        stop,
    };
    let end = run(&plan, parts, link);
    Ok(report(&plan, &end, &trace))
}

/// Does what can be done of what is asked for, until nobody can ask any more.
fn obey(asked: &mpsc::Receiver<Order>, stop: &AtomicBool) {
    for order in asked {
        let answer = match order.ask {
            Ask::Unprotect => {
                stop.store(true, Ordering::Relaxed);
                Ok("protection ends; what the guest sends stays held".to_owned())
            }
            Ask::Pace(_) | Ask::Failover => Err("this controller cannot do that yet".to_owned()),
        };
        // Whoever asked may have gone.
        let _ = order.reply.send(answer);
    }
}

/// Says how it ended, and returns the exit code.
fn report(plan: &Plan, end: &End, trace: &Report) -> u8 {
    let name = &plan.domain;
    service::stopping("protection has ended");
    let (event, code) = match end {
        End::Asked => ("protect-end", 0),
        End::GuestEnded(_) => ("guest-ended", 0),
        End::PeerLost(_) => ("peer-lost", 3),
        End::Failed(_) => ("protect-failed", 3),
    };
    let epoch = lock(trace.live()).epoch;
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
