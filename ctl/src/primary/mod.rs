// SPDX-License-Identifier: GPL-2.0-or-later

//! `remusctl protect`: gathers what the primary's loop needs, without touching the guest before all
//! of it is there.

mod commits;
pub mod disks;
mod epochs;
pub mod keep;
pub mod lease;
pub mod link;
pub mod pace;
pub mod pipeline;
pub mod protect;
mod state;

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::mpsc::channel;
use std::time::Duration;

use anyhow::{bail, Context, Result};
use rustix::rand::{getrandom, GetRandomFlags};
use serde_json::json;

use crate::args::Protect;
use crate::commands::domain;
use crate::config::{Config, ProtectSettings};
use crate::host::events::Events;
use crate::host::kernel::Kernel;
use crate::host::netlink::Remus;
use crate::host::qmp::Qmp;
use crate::host::ram::{self, Ram};
use crate::peer::address;
use crate::peer::channel::{Channel, Way};
use crate::peer::stream::lock;
use crate::primary::disks::Disks;
use crate::primary::keep::keep;
use crate::primary::link::introduce;
use crate::primary::pipeline::Encoding;
use crate::primary::protect::{End, Parts, Plan};
use crate::report::live::{Live, Station};
use crate::report::trace::ms;
use crate::report::{metrics, say, service, Report};
use crate::{say, signals};

/// How long to try to reach the standby.
const REACH: Duration = Duration::from_secs(5);
/// Protects until something ends that. Returns the exit code.
pub fn protect(args: &Protect, run_dir: &Path) -> Result<u8> {
    let config = args.config.as_deref().map(Config::read).transpose()?;
    let settings = ProtectSettings::of(args, config.as_ref())?;
    let way = Way::of(settings.keys.as_deref())?;
    let name = &settings.domain;
    let report = Report::open(settings.trace.as_deref())?;
    let live = report.live();
    say::about(name, live);

    let mut sealer = Remus::connect()?;
    let mut committer = Remus::connect()?;
    let found = sealer.get(name)?;
    let (Some(memory), Some(device)) = (found.memory, found.device) else {
        bail!("domain {name} has no memory that could be replicated: create it with --memory SIZE");
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
    let hearing = Events::open(name)?;
    *lock(live) = Live {
        role: "primary".into(),
        state: "starting".into(),
        pid: std::process::id(),
        peer: Some(settings.to.clone()),
        secured: Some(way.word().into()),
        pace: Some(settings.pace.to_string()),
        timeout_ms: Some(ms(settings.timeout)),
        ..Live::default()
    };
    let (order, orders) = channel();
    let _station = Station::open(run_dir, name, &report, order)?;
    if let Some(address) = settings.metrics {
        metrics::serve(address, name, &report)?;
    }
    report.start_watchdog()?;
    signals::raise_priority();
    let mut random = [0; 16];
    getrandom(&mut random, GetRandomFlags::empty()).context("no random numbers")?;
    // Before anything is looked for: with a mirror the guest writes to that, and not to the disk's node.
    disks::mirror::cancel(&mut qmp)?;
    let disks = Disks::find(&mut qmp, &settings.disks)?;
    let left_out = Disks::left_out(&mut qmp, &disks)?;
    if !left_out.is_empty() && !settings.force {
        bail!(
            "the guest writes to {}, which is not replicated: name it as node of a [[disk]] in the configuration, or \
             give -F if the standby has it by other means",
            left_out.join(", ")
        );
    }
    let plan = Plan {
        domain: name.clone(),
        memory,
        generation: generation(run_dir, name)?,
        run: u128::from_le_bytes(random),
        pace: settings.pace,
        timeout: settings.timeout,
        depth: settings.depth,
        encoding: Encoding {
            encoders: settings.encoders,
            cache_bytes: usize::try_from(settings.delta_cache(memory))?,
            raw: settings.raw,
        },
        copy_in_pause: settings.copy_in_pause,
        disks: disks.clone(),
    };
    let to = settings.to.clone();
    let mut connect = move || Channel::connect(address::connect(&to, REACH)?, &way, REACH);
    let link = introduce(&plan, &mut connect)?;
    let disks = match disks.as_slice() {
        [] => None,
        list => Some(Disks::serve(run_dir, name, list, settings.disk_buffer)?),
    };
    let stop = signals::stop_flag()?;
    // For as long as this process drives it.
    sealer.own(name)?;
    if domain::abort_all(&mut committer, name).context("cannot tidy up after an earlier run")? {
        say!("took back the epochs that an earlier run had left sealed");
    }
    say!(
        "protecting {name} ({} MiB, QEMU {version}) by {}: an epoch {}",
        memory >> 20,
        settings.to,
        plan.pace,
    );
    report.event(
        "protect-start",
        json!({
            "domain": name,
            "memory": memory,
            "pace": plan.pace.to_string(),
            "timeout_ms": ms(plan.timeout),
            "depth": plan.depth,
            "delta_cache": plan.encoding.cache_bytes,
            "peer": settings.to,
            "qemu": version,
        }),
    );
    let mut parts = Parts {
        guest: Box::new(qmp),
        sealer: Box::new(sealer),
        committer: Box::new(committer),
        pages: Box::new(pages),
        disks,
        hearing: Some(Box::new(hearing)),
        report: report.clone(),
        orders,
        stop,
    };
    let end = keep(
        &plan,
        &mut parts,
        &mut connect,
        link,
        settings.on_standby_loss,
    );
    if matches!(end, End::HandedOver) {
        // Nobody may let it go on here.
        if let Err(e) = parts.guest.quit() {
            say!("end the guest of {name} here: {e:#}");
        }
    }
    let lives = !matches!(end, End::HandedOver | End::GuestEnded(_));
    if let Some(disks) = parts.disks.as_ref().filter(|_| lives) {
        if let Err(e) = disks.end(parts.guest.qmp()) {
            say!("cannot tidy up after the mirrors of the disks: {e:#}");
        }
    }
    Ok(tell(&plan, &end, &report))
}

/// The life that a domain is in: one more for each time that it was taken over. Who takes over leaves
/// the number in the run directory.
pub fn generation(run_dir: &Path, domain: &str) -> Result<u64> {
    let path = generation_file(run_dir, domain);
    match fs::read_to_string(&path) {
        Ok(text) => text.trim().parse().with_context(|| {
            format!(
                "{} is damaged: write the number of take-overs and 1 into it",
                path.display()
            )
        }),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(1),
        Err(e) => Err(e).with_context(|| format!("cannot read {}", path.display())),
    }
}

/// Where the number is.
pub fn generation_file(run_dir: &Path, domain: &str) -> PathBuf {
    run_dir.join(format!("{domain}.generation"))
}

/// Says how it ended, and returns the exit code.
fn tell(plan: &Plan, end: &End, report: &Report) -> u8 {
    service::stopping("protection has ended");
    let name = &plan.domain;
    let (event, code) = match end {
        End::Asked => ("protect-end", 0),
        End::GuestEnded(_) => ("guest-ended", 0),
        End::HandedOver => ("handed-over", 0),
        End::PeerLost(_) | End::TakenOver(_) | End::Unconfirmed(_) => ("peer-lost", 3),
        End::Failed(_) => ("protect-failed", 3),
    };
    let epoch = lock(report.live()).epoch;
    report.event(event, json!({"reason": end.to_string(), "epoch": epoch}));
    match end {
        End::Asked => say!(
            "protection of {name} ended as asked to after epoch {epoch}; the guest runs on, and its output stays \
             held: protect it again, or delete the domain to let it speak (what is held is dropped)"
        ),
        End::GuestEnded(why) => say!("the guest of {name} was shut down ({why}); protection has ended"),
        End::HandedOver => say!(
            "{name} runs on the standby now, from epoch {epoch} on; the guest here has ended"
        ),
        End::TakenOver(why) => say!(
            "the standby has taken {name} over: {why}; what this guest sends stays held: end it"
        ),
        End::Unconfirmed(why) => say!("{name} was handed over after epoch {epoch}: {why}"),
        End::PeerLost(why) => say!(
            "the standby of {name} is lost after epoch {epoch}: {why}; the guest runs on, and its output stays held"
        ),
        End::Failed(e) => say!(
            "protection of {name} failed after epoch {epoch}: {e:#}; what the guest sends stays held, and the \
             standby takes over: end this guest once it has"
        ),
    }
    code
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn generations() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(generation(dir.path(), "web").unwrap(), 1);
        fs::write(generation_file(dir.path(), "web"), "3\n").unwrap();
        assert_eq!(generation(dir.path(), "web").unwrap(), 3);
        fs::write(generation_file(dir.path(), "web"), "x").unwrap();
        let told = generation(dir.path(), "web").unwrap_err().to_string();
        assert!(told.contains("is damaged"), "{told}");
    }
}
