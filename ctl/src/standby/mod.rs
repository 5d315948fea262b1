// SPDX-License-Identifier: GPL-2.0-or-later

//! `remusctl standby`: the domain, its memory and a waiting virtual machine on this host; a primary
//! at a time; take-over.

pub(crate) mod apply;
pub mod caller;
mod disk_stream;
pub mod disks;
pub mod serve;
pub(crate) mod stage;
pub mod takeover;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{channel, Receiver as Queue};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use remus_proto::frame::Kind;
use rustix::io::Errno;
use serde_json::json;

use crate::args::{self, Standby};
use crate::commands::domain;
use crate::config::disk::{paths, Disk, Images};
use crate::config::{Config, Places, StandbySettings, Vmm as VmmConfig};
use crate::host::kernel::{Kernel, Machine};
use crate::host::netlink::{refusal, Remus};
use crate::host::qmp::Qmp;
use crate::host::ram::{self, Ram};
use crate::host::vmm::Vmm;
use crate::peer::address;
use crate::peer::channel::Way;
use crate::peer::door::Limits;
use crate::peer::stream::lock;
use crate::primary::generation_file;
use crate::report::live::{Ask, Live, Order, Station};
use crate::report::trace::ms;
use crate::report::{metrics, say, service, Report};
use crate::standby::caller::{Caller, Callers};
use crate::standby::disks::{Spec, Store};
use crate::standby::serve::{serve, End, Handover, Held, Lost, Offer, Parts};
use crate::standby::takeover::take_over;
use crate::{say, signals};

/// How long a machine that has not run may take to end.
const ENDING: Duration = Duration::from_secs(10);

/// What a standby of one domain is made of.
struct Setup<'a> {
    local: &'a str,
    memory: u64,
    limits: args::Limits,
    port: Option<&'a str>,
    command: &'a VmmConfig,
    images: Option<&'a Images>,
    disks: BTreeMap<String, PathBuf>,
    qmp: PathBuf,
    log: PathBuf,
}

/// The domain on this host. Dropped, it ends the machine and deletes the domain, in this order.
struct Host {
    qmp: Qmp,
    vmm: Vmm,
    ram: Ram,
    disks: Option<Store>,
    _domain: OwnDomain,
}

impl Drop for Host {
    fn drop(&mut self) {
        if let Some(Err(e)) = self.disks.take().map(Store::close) {
            say!("cannot close the images of the disks: {e:#}");
        }
    }
}

/// The images of its disks, brought to a whole epoch.
fn open_images(images: &Images) -> Result<Store> {
    let spec = |disk: &Disk| Spec {
        name: disk.name.clone(),
        path: disk.path.clone(),
        format: disk.format,
    };
    let specs: Vec<Spec> = images.disks.iter().map(spec).collect();
    Store::open(&specs, &images.journal, images.durability, images.bound)
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

/// Whether the kernel has refused with this.
fn refused(error: &anyhow::Error, with: Errno) -> bool {
    refusal(error).is_some_and(|r| r.errno() == with)
}

/// Ends the machine, and deletes the domain, of a standby that was killed before it took over: what that one knew
/// of its epochs is lost, so the machine will never run. False, and nothing is changed, if that is not what is here.
fn end_waiting(kernel: &mut Remus, setup: &Setup<'_>) -> Result<bool> {
    let domain = kernel.get(setup.local)?;
    let (Some(device), Some(memory)) = (&domain.device, domain.memory) else {
        return Ok(false);
    };
    let Ok(mut qmp) = Qmp::connect(&setup.qmp) else {
        return Ok(false);
    };
    let its_own = qmp.check_memory(&ram::path(device), memory).is_ok();
    // Until it is told to run, and never again after that.
    if !its_own || qmp.status()? != "inmigrate" {
        return Ok(false);
    }
    say!("the machine of an earlier standby still waits here, and never ran: ending it");
    qmp.execute("quit", json!({}))?;
    let deadline = Instant::now() + ENDING;
    // Fails when it closes the connection, a moment before it lets the memory go.
    let _ = qmp.wait_event(ENDING, |_| false);
    loop {
        let gone = domain::del_when_free(kernel, setup.local);
        let busy = gone.as_ref().is_err_and(|e| refused(e, Errno::BUSY));
        if !busy || Instant::now() > deadline {
            return gone.map(|()| true);
        }
    }
}

impl Host {
    fn start(setup: &Setup<'_>) -> Result<Self> {
        let disks = setup.images.map(open_images).transpose()?;
        let mut kernel = Remus::connect()?;
        let name = setup.local;
        let mut made = kernel.domain_new(name, Some(setup.memory));
        let exists = |e: &anyhow::Error| refused(e, Errno::EXIST);
        if made.as_ref().is_err_and(exists) && end_waiting(&mut kernel, setup)? {
            made = kernel.domain_new(name, Some(setup.memory));
        }
        let made = made.map_err(|e| match exists(&e) {
            true => e.context(format!(
                "domain {name} is here already: delete it (remusctl domain del {name}), or give \
                 this one another name (--as NAME)"
            )),
            false => e,
        })?;
        let domain = OwnDomain {
            name: Some(name.to_owned()),
        };
        if setup.limits != args::Limits::default() {
            kernel.domain_set(name, &setup.limits)?;
        }
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
            disks: &setup.disks,
        };
        let command = setup.command.fill(&places)?;
        let (vmm, mut qmp) = Vmm::start(&command, &setup.qmp, &setup.log)?;
        qmp.check_memory(&path, setup.memory)?;
        Ok(Self {
            qmp,
            vmm,
            ram,
            disks,
            _domain: domain,
        })
    }

    /// Whether the images of its disks, if it has any, are those of `epoch`.
    fn has_disks_of(&self, epoch: u64) -> bool {
        let Some(disks) = &self.disks else {
            return true;
        };
        disks.whole().is_some_and(|stamp| stamp.epoch == epoch)
    }

    /// Leaves the machine and its domain to themselves.
    fn let_go(mut self) {
        self.vmm.let_go();
        self._domain.name = None;
    }
}

/// Serves primaries until one dies or this is ended. Returns the exit code.
pub fn standby(args: &Standby, run_dir: &Path) -> Result<u8> {
    let config = Config::read(&args.config)?;
    let settings = StandbySettings::of(args, Some(&config))?;
    let way = Way::of(settings.keys.as_deref())?;
    let (local, listen) = (settings.local.as_str(), settings.listen.as_str());
    let report = Report::open(settings.trace.as_deref())?;
    let live = report.live();
    say::about(local, live);
    *lock(live) = Live {
        role: "standby".into(),
        state: "starting".into(),
        pid: std::process::id(),
        protects: (local != settings.domain).then(|| settings.domain.clone()),
        secured: Some(way.word().into()),
        timeout_ms: Some(ms(settings.timeout)),
        ..Live::default()
    };
    let (order, orders) = channel();
    let _station = Station::open(run_dir, local, &report, order)?;
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
        limits: settings.limits,
        port: settings.port.as_deref(),
        command: &settings.vmm,
        images: settings.images.as_ref(),
        disks: settings
            .images
            .as_ref()
            .map(|i| paths(&i.disks))
            .unwrap_or_default(),
        qmp: run_dir.join(format!("{local}.qmp")),
        log: run_dir.join(format!("{local}.vmm.log")),
    };
    let offer = Offer {
        domain: settings.domain.clone(),
        memory: settings.memory,
        timeout: settings.timeout,
    };
    let callers = Callers::open(listener, way, Limits::default(), Caller::meet)?;
    let around = Around {
        offer: &offer,
        callers: &callers,
        local,
        run_dir: &run_dir,
        report: &report,
        orders: &orders,
        stop: &stop,
    };
    let mut caller = None;
    loop {
        let host = Host::start(&setup)?;
        // After the machine was started: that one gets no more than others.
        signals::raise_priority();
        let pid = host.vmm.pid();
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
        service::ready(&format!("listens on {listen}, and its machine waits"));
        report.event(
            "standby-ready",
            json!({"domain": settings.domain, "vmm_pid": pid}),
        );
        match around.attend(host, caller)? {
            Attended::Done(code) => return Ok(code),
            Attended::Anew(next) => caller = next,
        }
        say!("starting anew for the next primary");
    }
}

/// How attending to primaries ended.
enum Attended {
    /// With this exit code.
    Done(u8),
    /// The machine is of no use any more; who is to be served next.
    Anew(Option<Box<Caller>>),
}

/// What stays while machines come and go.
struct Around<'a> {
    offer: &'a Offer,
    /// What the domain is called here.
    local: &'a str,
    run_dir: &'a Path,
    callers: &'a Callers,
    report: &'a Report,
    orders: &'a Queue<Order>,
    stop: &'a AtomicBool,
}

impl Around<'_> {
    /// Serves a primary, and again each time that it comes back, until it is dead or has ended.
    fn attend(&self, mut host: Host, mut caller: Option<Box<Caller>>) -> Result<Attended> {
        let domain = &self.offer.domain;
        let mut held = Held::default();
        // The connection that was lost last, and when: nobody who is refused meanwhile changes that.
        let mut lost: Option<(Lost, String)> = None;
        loop {
            let next = match (caller.take(), &lost) {
                (Some(caller), _) => Some(caller),
                (None, None) => self.wait(&mut host.vmm, None)?,
                (None, Some((lost, peer))) => match self.lost(&mut host, &held, lost, peer)? {
                    After::Again(again) => Some(again),
                    After::Done(code) => return Ok(Attended::Done(code)),
                    After::TakeOver(heard) => {
                        say!(
                            "the primary {peer} is dead; taking {domain} over from epoch {}",
                            held.epoch
                        );
                        let code = self.own(host, &held, heard, None)?;
                        return Ok(Attended::Done(code));
                    }
                },
            };
            let Some(next) = next else {
                say!("standby for {domain} ended as asked to");
                self.report.event("standby-end", json!({}));
                return Ok(Attended::Done(0));
            };
            let peer = next.address();
            {
                let mut live = lock(self.report.live());
                live.state = "receiving".into();
                live.peer = Some(peer.clone());
            }
            let mut parts = Parts {
                callers: self.callers,
                image: &mut host.ram,
                disks: host.disks.as_ref(),
                machine: &mut host.vmm,
                report: self.report,
                stop: self.stop,
                tick: &|| self.obey(),
            };
            match serve(*next, self.offer, &mut held, &mut parts) {
                End::Refused(e) => {
                    say!("refused {peer}: {e:#}");
                    let reason = json!({"peer": peer, "reason": format!("{e:#}")});
                    self.report.event("refused", reason);
                    if lost.is_none() {
                        let mut live = lock(self.report.live());
                        live.state = "waiting".into();
                        live.peer = None;
                    }
                }
                End::Other(next) => {
                    say!("{peer} protects {domain} anew");
                    return Ok(Attended::Anew(Some(next)));
                }
                End::Bye(why) => {
                    say!("{peer} ended protection of {domain} ({why}): no take-over");
                    let reason = json!({"reason": why, "epoch": held.epoch});
                    self.report.event("bye", reason);
                    lock(self.report.live()).peer = None;
                    return Ok(Attended::Anew(None));
                }
                End::Asked => {
                    say!("standby for {domain} ended as asked to: it is not protected any more");
                    self.report
                        .event("standby-end", json!({"epoch": held.epoch}));
                    return Ok(Attended::Done(0));
                }
                End::Failed(e) => {
                    say!("the standby cannot go on: {e:#}; {domain} is not protected any more");
                    let reason = json!({"reason": format!("{e:#}")});
                    self.report.event("standby-failed", reason);
                    return Ok(Attended::Done(3));
                }
                End::Lost(mut now) => {
                    caller = now.again.take();
                    lost = Some((now, peer));
                }
                End::Handover(primary) => {
                    say!("{peer} hands {domain} over at epoch {}", held.epoch);
                    self.report.event("handover", json!({"epoch": held.epoch}));
                    let code = self.own(host, &held, Instant::now(), Some(primary))?;
                    return Ok(Attended::Done(code));
                }
            }
        }
    }

    /// The connection is lost: waits for the primary to come back for as long as it may still commit.
    fn lost(&self, host: &mut Host, held: &Held, lost: &Lost, peer: &str) -> Result<After> {
        let domain = &self.offer.domain;
        let deadline = match lost.given_up {
            true => Instant::now(),
            false => lost.heard + self.offer.timeout,
        };
        lock(self.report.live()).state = "primary-lost".into();
        while Instant::now() < deadline {
            match self.wait(&mut host.vmm, Some(deadline))? {
                Some(caller) => return Ok(After::Again(caller)),
                None if self.stop.load(Ordering::Relaxed) => {
                    say!("standby for {domain} ended as asked to: it is not protected any more");
                    self.report
                        .event("standby-end", json!({"epoch": held.epoch}));
                    return Ok(After::Done(0));
                }
                None => {}
            }
        }
        let detect_ms = ms(lost.heard.elapsed());
        let seen = json!({"reason": lost.why, "detect_ms": detect_ms, "epoch": held.epoch});
        self.report.event("silence", seen);
        if held.epoch == 0 || !host.has_disks_of(held.epoch) {
            let lacks = match held.epoch {
                0 => "no epoch of it has come whole",
                _ => "its disks were being copied",
            };
            say!(
                "the primary {peer} is lost ({}), and {lacks}: there is nothing of {domain} to resume",
                lost.why
            );
            self.report.event("nothing-to-resume", json!({}));
            return Ok(After::Done(4));
        }
        say!("{peer}: {}", lost.why);
        Ok(After::TakeOver(lost.heard))
    }

    /// Answers who wants something of this side, and shows that it is alive.
    fn obey(&self) {
        self.report.alive();
        while let Ok(order) = self.orders.try_recv() {
            let answer = match order.ask {
                Ask::Unprotect => {
                    self.stop.store(true, Ordering::Relaxed);
                    Ok("the standby ends".to_owned())
                }
                Ask::Pace(_) => Err("the primary decides when epochs end: ask there".to_owned()),
                Ask::Failover => Err("a planned switch is asked for on the primary".to_owned()),
            };
            let _ = order.reply.send(answer);
        }
    }

    /// Waits for somebody to connect, until `deadline` if there is one; nothing if this is ended first.
    fn wait(&self, vmm: &mut Vmm, deadline: Option<Instant>) -> Result<Option<Box<Caller>>> {
        let tick = Duration::from_millis(50);
        while !self.stop.load(Ordering::Relaxed) {
            self.obey();
            vmm.ready()?;
            let left = deadline.map(|d| d.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                break;
            }
            if let Some((caller, _)) = self.callers.next(left.unwrap_or(tick).min(tick)) {
                return Ok(Some(Box::new(caller)));
            }
        }
        Ok(None)
    }

    /// Takes over, and owns the machine until it ends or this process is ended.
    fn own(
        &self,
        mut host: Host,
        held: &Held,
        heard: Instant,
        primary: Option<Handover>,
    ) -> Result<u8> {
        let name = &self.offer.domain;
        lock(self.report.live()).state = "taking-over".into();
        let disks = host.disks.take();
        let phases = match take_over(&mut host.qmp, held, disks, heard, self.report) {
            Ok(phases) => phases,
            Err(e) => {
                let words = host.vmm.last_words();
                let why = format!("{e:#} (the machine's last words: {words})");
                say!("take-over of {name} failed: {why}");
                self.report
                    .event("takeover-failed", json!({"reason": format!("{e:#}")}));
                if let Some(primary) = primary {
                    // It lets the guest go on when it hears this.
                    drop(host);
                    primary.failed(&why);
                }
                return Ok(5);
            }
        };
        let file = generation_file(self.run_dir, self.local);
        if let Err(e) = fs::write(&file, format!("{}\n", phases.generation)) {
            say!("cannot write {}: {e}", file.display());
        }
        if let Some(primary) = primary {
            primary.resumed();
        }
        lock(self.report.live()).state = "taken-over".into();
        say!(
            "{name} runs here from epoch {} on: noticed after {} ms, loaded in {} ms, resumed in {} ms",
            phases.epoch,
            phases.detect_ms,
            phases.load_ms,
            phases.resume_ms
        );
        // A signal that came meanwhile meant the standby, not the machine that now runs.
        loop {
            if let Some(status) = host.vmm.ended()? {
                say!("the machine of {name} has ended ({status})");
                self.report
                    .event("vmm-ended", json!({"status": status.to_string()}));
                return Ok(0);
            }
            if self.stop.load(Ordering::Relaxed) {
                let pid = host.vmm.pid();
                say!("the machine of {name} runs on without this process, as process {pid}");
                self.report.event("standby-end", json!({"vmm_pid": pid}));
                host.let_go();
                return Ok(0);
            }
            self.obey();
            if let Some((caller, _)) = self.callers.next(Duration::from_millis(50)) {
                let why = format!("{name} runs on the standby since epoch {}", held.epoch);
                caller.refuse(Kind::TakenOver, &why);
            }
        }
    }
}

/// What follows on a lost connection.
enum After {
    Again(Box<Caller>),
    TakeOver(Instant),
    Done(u8),
}
