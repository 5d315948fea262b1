// SPDX-License-Identifier: GPL-2.0

//! `remusctl standby`: the domain, its memory and a waiting virtual machine on this host; a primary
//! at a time; take-over.

pub mod serve;
pub mod takeover;

use std::fs;
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{mpsc, Arc};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{bail, Context, Result};
use rustix::event::{poll, PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use serde_json::json;

use crate::args::Standby;
use crate::commands::domain;
use crate::config::{Config, Places, StandbySettings, Vmm as VmmConfig};
use crate::host::kernel::Image;
use crate::host::netlink::{refusal, Remus};
use crate::host::qmp::Qmp;
use crate::host::ram::{self, Ram};
use crate::host::vmm::Vmm;
use crate::peer::address;
use crate::peer::stream::lock;
use crate::report::live::{Live, Station};
use crate::report::trace::ms;
use crate::report::{metrics, say, service, Report};
use crate::standby::serve::{serve, End, Held, Offer};
use crate::standby::takeover::take_over;
use crate::{say, signals};

/// What a standby of one domain is made of.
struct Setup<'a> {
    local: &'a str,
    memory: u64,
    port: Option<&'a str>,
    command: &'a VmmConfig,
    qmp: PathBuf,
    log: PathBuf,
}

/// The domain on this host. Dropped, it ends the machine and deletes the domain, in this order.
struct Host {
    qmp: Qmp,
    seat: Seat,
    _domain: OwnDomain,
}

/// The memory, and the machine that waits for it.
struct Seat {
    vmm: Vmm,
    ram: Ram,
}

impl Image for Seat {
    fn ready(&mut self) -> Result<()> {
        match self.vmm.ended()? {
            None => Ok(()),
            Some(status) => {
                bail!(
                    "the waiting machine has ended ({status}): {}",
                    self.vmm.last_words()
                )
            }
        }
    }

    fn write(&mut self, page: u64, content: &[u8]) -> Result<()> {
        self.ram.write(page, content)
    }
}

/// A domain that is deleted when this is dropped.
struct OwnDomain {
    name: Option<String>,
}

impl Drop for OwnDomain {
    fn drop(&mut self) {
        let Some(name) = self.name.take() else {
            return;
        };
        let gone = Remus::connect().and_then(|mut k| domain::del_when_free(&mut k, &name));
        if let Err(e) = gone {
            say!("{e:#}");
        }
    }
}

impl Host {
    fn start(setup: &Setup<'_>) -> Result<Self> {
        let mut kernel = Remus::connect()?;
        let name = setup.local;
        let made = kernel.domain_new(name, Some(setup.memory)).map_err(|e| {
            match refusal(&e).map(|r| r.errno()) {
                Some(Errno::EXIST) => e.context(format!(
                    "domain {name} is here already: delete it (remusctl domain del {name}), or give \
                     this one another name (--as NAME)"
                )),
                _ => e,
            }
        })?;
        let domain = OwnDomain {
            name: Some(name.to_owned()),
        };
        let device = made
            .device
            .context("the kernel gave the domain no memory")?;
        let path = ram::path(&device);
        let ram = Ram::open(&path)?;
        let places = Places {
            name,
            memory: setup.memory,
            ram: &path,
            qmp: &setup.qmp,
            port: setup.port,
        };
        let command = setup.command.fill(&places)?;
        let (vmm, mut qmp) = Vmm::start(&command, &setup.qmp, &setup.log)?;
        qmp.check_memory(&path, setup.memory)?;
        Ok(Self {
            qmp,
            seat: Seat { vmm, ram },
            _domain: domain,
        })
    }

    /// Leaves the machine and its domain to themselves.
    fn let_go(mut self) {
        self.seat.vmm.let_go();
        self._domain.name = None;
    }
}

/// Serves primaries until one dies or this is ended. Returns the exit code.
pub fn standby(args: &Standby, run_dir: &Path) -> Result<u8> {
    let config = Config::read(&args.config)?;
    let settings = StandbySettings::of(args, Some(&config))?;
    let (local, listen, timeout) = (
        settings.local.as_str(),
        settings.listen.as_str(),
        settings.timeout,
    );
    if settings.keys.is_some() {
        bail!("this version cannot use keys yet: give -F and no --keys");
    }
    let report = Report::open(settings.trace.as_deref())?;
    let live = report.live();
    say::about(local, live);
    *lock(live) = Live {
        role: "standby".into(),
        state: "starting".into(),
        pid: std::process::id(),
        protects: (local != settings.domain).then(|| settings.domain.clone()),
        secured: Some("plain".into()),
        timeout_ms: Some(ms(timeout)),
        ..Live::default()
    };
    // Nobody obeys yet.
    let (orders, _) = mpsc::channel();
    let _station = Station::open(run_dir, local, &report, orders)?;
    if let Some(address) = settings.metrics {
        metrics::serve(address, local, &report)?;
    }
    report.start_watchdog()?;
    let listener = address::listen(listen)?;
    let stop = signals::stop_flag()?;
    let run_dir = fs::canonicalize(run_dir).context("the run directory")?;
    let setup = Setup {
        local,
        memory: settings.memory,
        port: settings.port.as_deref(),
        command: &settings.vmm,
        qmp: run_dir.join(format!("{local}.qmp")),
        log: run_dir.join(format!("{local}.vmm.log")),
    };
    let offer = Offer {
        domain: settings.domain.clone(),
        memory: settings.memory,
        timeout,
    };
    loop {
        let host = Host::start(&setup)?;
        // After the machine was started: that one gets no more than others.
        signals::raise_priority();
        let pid = host.seat.vmm.pid();
        {
            let mut live = lock(live);
            live.state = "waiting".into();
            live.vmm_pid = Some(pid);
            (live.epoch, live.epochs) = (0, 0);
        }
        say!(
            "standby for {} listens on {listen}; its machine waits (process {pid})",
            settings.domain
        );
        service::ready("waits for a primary");
        report.event(
            "standby-ready",
            json!({"domain": settings.domain, "vmm_pid": pid}),
        );
        match attend(host, &listener, &offer, &report, &stop)? {
            Some(code) => return Ok(code),
            None => say!("starting anew for the next primary"),
        }
    }
}

/// Serves one primary. Returns the exit code, or nothing if the standby is to begin anew.
fn attend(
    mut host: Host,
    listener: &TcpListener,
    offer: &Offer,
    report: &Report,
    stop: &Arc<AtomicBool>,
) -> Result<Option<u8>> {
    let live = report.live();
    loop {
        let Some((stream, peer)) = accept(listener, &mut host.seat, report, stop)? else {
            say!("standby for {} ended as asked to", offer.domain);
            report.event("standby-end", json!({}));
            return Ok(Some(0));
        };
        {
            let mut live = lock(live);
            live.state = "receiving".into();
            live.peer = Some(peer.clone());
        }
        let mut held = Held::default();
        let end = serve(stream, offer, &mut held, &mut host.seat, report, stop);
        let noticed = Instant::now();
        match end {
            End::Refused(e) => {
                say!("refused {peer}: {e:#}");
                report.event("refused", json!({"peer": peer, "reason": format!("{e:#}")}));
                let mut live = lock(live);
                live.state = "waiting".into();
                live.peer = None;
            }
            End::Bye(why) => {
                say!(
                    "{peer} ended protection of {} ({why}): no take-over",
                    offer.domain
                );
                report.event("bye", json!({"reason": why, "epoch": held.epoch}));
                lock(live).peer = None;
                return Ok(None);
            }
            End::Asked => {
                say!(
                    "standby for {} ended as asked to: it is not protected any more",
                    offer.domain
                );
                report.event("standby-end", json!({"epoch": held.epoch}));
                return Ok(Some(0));
            }
            End::Failed(e) => {
                say!(
                    "the standby cannot go on: {e:#}; {} is not protected any more",
                    offer.domain
                );
                report.event("standby-failed", json!({"reason": format!("{e:#}")}));
                return Ok(Some(3));
            }
            End::Dead(heard, why) => {
                let detect_ms = ms(noticed.saturating_duration_since(heard));
                let seen = json!({"reason": why, "detect_ms": detect_ms, "epoch": held.epoch});
                report.event("silence", seen);
                if held.epoch == 0 {
                    say!(
                        "the primary {peer} is lost ({why}), and no epoch of {} has come whole: there is nothing \
                         to resume",
                        offer.domain
                    );
                    report.event("nothing-to-resume", json!({}));
                    return Ok(Some(4));
                }
                say!(
                    "the primary {peer} is dead: {why}; taking {} over from epoch {}",
                    offer.domain,
                    held.epoch
                );
                lock(live).state = "taking-over".into();
                return own(host, offer, &held, heard, noticed, report, stop).map(Some);
            }
        }
    }
}

/// Waits for somebody to connect; nothing if this is ended first.
fn accept(
    listener: &TcpListener,
    seat: &mut Seat,
    report: &Report,
    stop: &AtomicBool,
) -> Result<Option<(TcpStream, String)>> {
    let tick = Timespec {
        tv_sec: 0,
        tv_nsec: 100_000_000,
    };
    while !stop.load(Ordering::Relaxed) {
        report.alive();
        seat.ready()?;
        match poll(&mut [PollFd::new(listener, PollFlags::IN)], Some(&tick)) {
            Ok(0) | Err(Errno::INTR) => continue,
            other => other.context("cannot wait for a primary")?,
        };
        match listener.accept() {
            Ok((stream, address)) => return Ok(Some((stream, address.to_string()))),
            // It has gone again.
            Err(_) => thread::sleep(Duration::from_millis(10)),
        }
    }
    Ok(None)
}

/// Takes over, and owns the machine until it ends or this process is ended.
#[allow(clippy::too_many_arguments)]
fn own(
    mut host: Host,
    offer: &Offer,
    held: &Held,
    heard: Instant,
    noticed: Instant,
    report: &Report,
    stop: &AtomicBool,
) -> Result<u8> {
    let name = &offer.domain;
    let phases = match take_over(&mut host.qmp, held, heard, noticed, report) {
        Ok(phases) => phases,
        Err(e) => {
            let words = host.seat.vmm.last_words();
            say!("take-over of {name} failed: {e:#} (the machine's last words: {words})");
            report.event("takeover-failed", json!({"reason": format!("{e:#}")}));
            return Ok(5);
        }
    };
    lock(report.live()).state = "taken-over".into();
    service::status("has taken over");
    say!(
        "{name} runs here from epoch {} on: noticed after {} ms, loaded in {} ms, resumed in {} ms",
        phases.epoch,
        phases.detect_ms,
        phases.load_ms,
        phases.resume_ms
    );
    // A signal that came meanwhile meant the standby, not the machine that now runs.
    loop {
        report.alive();
        if let Some(status) = host.seat.vmm.ended()? {
            say!("the machine of {name} has ended ({status})");
            report.event("vmm-ended", json!({"status": status.to_string()}));
            return Ok(0);
        }
        if stop.load(Ordering::Relaxed) {
            let pid = host.seat.vmm.pid();
            say!("the machine of {name} runs on without this process, as process {pid}");
            report.event("standby-end", json!({"vmm_pid": pid}));
            host.let_go();
            return Ok(0);
        }
        thread::sleep(Duration::from_millis(50));
    }
}
