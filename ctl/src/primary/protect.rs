// SPDX-License-Identifier: GPL-2.0-or-later

//! The primary's loop, for as long as one connection to the standby lasts.
//!
//! ```text
//!  this thread    pause → seal N → save device state → resume, at the pace asked for
//!                        │ job, at most `depth` of them
//!  pipeline              └─▶ read the pages of N, encode, send them, the state, the end of N
//!  receiver       ack N ─▶ commit N ─▶ trace
//!  heartbeat      a sign of life, whatever the others do
//! ```
//!
//! Whatever fails, the guest is let run again, and no epoch is committed that the standby has not
//! acknowledged: packets that wait stay held.

use std::collections::VecDeque;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver as Queue, Sender as Sink, SyncSender};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::{self, Builder};
use std::time::{Duration, Instant};

use anyhow::{anyhow, bail, Error, Result};
use remus_core::uapi::ram::PAGE_SIZE;
use remus_proto::frame::{Kind, Stamp};
use serde_json::json;

use super::lease::Lease;
use super::link::Link;
use super::pace::{Pace, Pacer};
use super::pipeline::{self, Batch, Batches, Encoding, Job, Sent, Watcher};
use crate::host::events::Event;
use crate::host::kernel::{Guest, Hearing, Kernel, Pages, Seal};
use crate::peer::stream::{lock, Heartbeat, Receiver, Sender};
use crate::report::live::{Ask, Order, PageKinds, Progress};
use crate::report::trace::ms;
use crate::report::{Epoch, Report};

/// How often to look for signals and orders, which cannot notify.
const TICK: Duration = Duration::from_millis(20);
/// How long the standby may take to hold and resume a guest that is handed over.
const HANDOVER: Duration = Duration::from_secs(40);
/// The first copy is followed by the first epoch when what is left goes within this time.
const LEFT_OVER: Duration = Duration::from_millis(300);
/// Most passes of the first copy.
const PASSES_MAX: u32 = 30;
/// How often to look whether a guest that sends nothing has written very much.
const LOOK: Duration = Duration::from_millis(250);
/// Bytes written that end an epoch even if nothing was sent.
const WRITTEN_MAX: u64 = 32 << 20;

/// What is to be done.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The domain.
    pub domain: String,
    /// Bytes of its memory.
    pub memory: u64,
    /// Its generation.
    pub generation: u64,
    /// A random number of this process.
    pub run: u128,
    /// When to end epochs, to begin with.
    pub pace: Pace,
    /// Silence after which the standby counts as dead.
    pub timeout: Duration,
    /// Most epochs that may wait for the standby.
    pub depth: usize,
    /// How pages are encoded.
    pub encoding: Encoding,
    /// Copy the pages while the guest stands still, as plain Remus does.
    pub copy_in_pause: bool,
}

/// What it is done with.
pub struct Parts {
    /// The virtual machine.
    pub guest: Box<dyn Guest>,
    /// Seals.
    pub sealer: Box<dyn Kernel>,
    /// Commits, in another thread.
    pub committer: Box<dyn Kernel>,
    /// Reads pages, in a third one.
    pub pages: Box<dyn Pages>,
    /// Tells of output; without it, it is assumed all the time.
    pub hearing: Option<Box<dyn Hearing>>,
    /// What is said of it elsewhere.
    pub report: Report,
    /// What somebody wants of it while it runs.
    pub orders: Queue<Order>,
    /// Set from outside to end it in good order; checked every few milliseconds.
    pub stop: Arc<AtomicBool>,
}

/// How protection, or a connection, ended. The guest runs on, or has ended, and what it sent and is not
/// committed stays held.
#[derive(Debug)]
pub enum End {
    /// Somebody asked for it.
    Asked,
    /// The guest was shut down; the reason.
    GuestEnded(String),
    /// The standby is lost; how that was noticed.
    PeerLost(String),
    /// The standby has become the domain's host without being asked to; what it says.
    TakenOver(String),
    /// The guest was handed over and runs on the standby; it is paused here.
    HandedOver,
    /// The guest was handed over, but nobody knows whether it runs there; it is paused here.
    Unconfirmed(String),
    /// Something on this host failed.
    Failed(Error),
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Asked => f.write_str("asked to"),
            Self::GuestEnded(why) => write!(f, "the guest was shut down ({why})"),
            Self::PeerLost(why) => write!(f, "the standby is lost: {why}"),
            Self::TakenOver(why) => write!(f, "the standby has taken over: {why}"),
            Self::HandedOver => f.write_str("handed over"),
            Self::Unconfirmed(why) => write!(f, "handed over without an answer: {why}"),
            Self::Failed(e) => write!(f, "{e:#}"),
        }
    }
}

/// An epoch that is sealed and not committed.
#[derive(Clone, Debug)]
struct Flight {
    epoch: u64,
    sealed: Instant,
    interval: Option<Duration>,
    /// What made the interval longer than asked for.
    limited_by: Option<&'static str>,
    stop: Duration,
    seal: Duration,
    copy: Duration,
    save: Duration,
    cont: Duration,
    pause: Duration,
    dirty_pages: u64,
    /// What went out, once all of it did.
    sent: Option<Sent>,
}

/// A pass of the first copy.
#[derive(Clone, Copy, Debug)]
struct Pass {
    number: u32,
    epoch: u64,
    pages: u64,
    begin: Instant,
}

struct State {
    pacer: Pacer,
    flights: VecDeque<Flight>,
    end: Option<End>,
    /// The standby has a whole machine.
    safe: bool,
    /// The newest pass of the first copy that went out whole.
    passed: u64,
    /// The pass that is on its way.
    pass: Option<Pass>,
    /// The epoch that is open, once one was sealed.
    open: u64,
    /// The newest epoch in which packets are known to wait, and since when they do in those that are not
    /// committed.
    output: u64,
    /// The newest epoch that holds so many packets that it should end.
    full: u64,
    waiting: VecDeque<(u64, Instant)>,
    /// The standby has said that the guest runs there.
    resumed: bool,
}

/// What the threads share.
struct Common<'a> {
    plan: &'a Plan,
    state: Mutex<State>,
    changed: Condvar,
    /// Whether anything may be committed. Held while that is done, and taken before `state`.
    may_commit: Mutex<bool>,
    control: Sender,
    /// As it began.
    lease: Lease,
    report: &'a Report,
}

impl Common<'_> {
    /// Ends it all, unless that has happened: the first reason is the true one.
    fn end(&self, end: End) {
        lock(&self.state).end.get_or_insert(end);
        self.changed.notify_all();
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>, span: Duration) -> MutexGuard<'a, State> {
        match self.changed.wait_timeout(state, span) {
            Ok((state, _)) => state,
            Err(poisoned) => poisoned.into_inner().0,
        }
    }
}

impl Watcher for Common<'_> {
    fn progress(&self, epoch: u64, pages: u64, bytes: u64) {
        let state = lock(&self.state);
        let Some(pass) = state.pass.filter(|pass| pass.epoch == epoch) else {
            return;
        };
        drop(state);
        let spent = pass.begin.elapsed().as_secs_f64().max(0.001);
        let left = pass.pages.saturating_sub(pages) as f64;
        let progress = Progress {
            pass: pass.number.into(),
            pages_done: pages,
            pages_total: pass.pages,
            bytes_per_s: bytes as f64 / spent,
            seconds_left: (pages > 0).then(|| left * spent / pages as f64),
        };
        self.report.copied(progress);
    }

    fn sent(&self, epoch: u64, sent: &Sent) {
        let mut state = lock(&self.state);
        match state.flights.iter_mut().find(|f| f.epoch == epoch) {
            Some(flight) => flight.sent = Some(*sent),
            None => state.passed = epoch,
        }
        drop(state);
        self.changed.notify_all();
    }

    fn unsent(&self, error: &Error) {
        // The standby may be about to tell the reason.
        let begin = Instant::now();
        let mut state = lock(&self.state);
        while state.end.is_none() && begin.elapsed() < Duration::from_millis(500) {
            state = self.wait(state, TICK);
        }
        drop(state);
        self.end(End::PeerLost(format!("{error:#}")));
        self.control.shutdown();
    }

    fn failed(&self, error: Error) {
        self.end(End::Failed(error));
    }
}

/// Protects the guest until something ends that, or the connection. `pace` is what was last asked for.
pub fn run(plan: &Plan, parts: &mut Parts, link: Link, pace: &mut Pace) -> End {
    let Link {
        control,
        receiver,
        data,
        lease,
        held,
    } = link;
    let common = Common {
        plan,
        state: Mutex::new(State {
            pacer: Pacer::new(*pace),
            flights: VecDeque::new(),
            end: None,
            safe: held > 0,
            passed: 0,
            pass: None,
            open: 0,
            output: 0,
            full: 0,
            waiting: VecDeque::new(),
            resumed: false,
        }),
        changed: Condvar::new(),
        may_commit: Mutex::new(true),
        control: control.clone(),
        lease,
        report: &parts.report,
    };
    let heartbeat = match Heartbeat::start(control.clone(), plan.timeout, move || lease.stamp()) {
        Ok(heartbeat) => heartbeat,
        Err(e) => return End::Failed(e),
    };
    let mut epochs = Epochs {
        common: &common,
        guest: parts.guest.as_mut(),
        sealer: parts.sealer.as_mut(),
        copier: None,
        orders: &parts.orders,
        stop: &parts.stop,
        knows_output: parts.hearing.is_some(),
    };
    let (pages, committer) = (parts.pages.as_mut(), parts.committer.as_mut());
    let hearing = parts.hearing.as_deref_mut();
    let common = &common;
    thread::scope(|scope| {
        let receiving_data = data.clone();
        let receiving = move || {
            common.end(receive_all(common, receiver, committer));
            // Nothing that is sent now is of use, and whoever waits to send it must not wait on.
            common.control.shutdown();
            receiving_data.shutdown();
        };
        let listening = move || {
            if let Some(hearing) = hearing {
                if let Err(e) = listen(common, hearing) {
                    common.end(End::Failed(e));
                }
            }
        };
        let reader = if plan.copy_in_pause {
            epochs.copier = Some(Batches::new(pages));
            None
        } else {
            Some(Batches::new(pages))
        };
        let started = pipeline::start(scope, reader, data.clone(), plan.encoding, common);
        let spawned = started.and_then(|jobs| {
            let receiver = Builder::new().name("receiver".into());
            receiver.spawn_scoped(scope, receiving)?;
            let output = Builder::new().name("output".into());
            output.spawn_scoped(scope, listening)?;
            Ok(jobs)
        });
        match spawned {
            Ok(jobs) => epochs.run(held, jobs),
            Err(e) => common.end(End::Failed(e)),
        }
        common.changed.notify_all();
        // The standby must not take over after an end in good order, and must at once after a failure.
        let last = match &lock(&common.state).end {
            Some(End::Asked) => Some((Kind::Bye, "protection was ended on the primary".to_owned())),
            Some(End::GuestEnded(why)) => {
                Some((Kind::Bye, format!("the guest was shut down ({why})")))
            }
            Some(End::Failed(e)) => Some((Kind::Error, format!("{e:#}"))),
            _ => None,
        };
        if let Some((kind, why)) = last {
            // The standby may take over as soon as it reads this.
            *lock(&common.may_commit) = false;
            let _ = control.send(kind, 0, why.as_bytes());
        }
        control.shutdown();
        data.shutdown();
    });
    drop(heartbeat);
    let mut state = lock(&common.state);
    *pace = state.pacer.pace();
    state.end.take().unwrap_or(End::Asked)
}

/// What is done in the thread that stops the guest.
struct Epochs<'a> {
    common: &'a Common<'a>,
    guest: &'a mut dyn Guest,
    sealer: &'a mut dyn Kernel,
    copier: Option<Batches<'a>>,
    orders: &'a Queue<Order>,
    stop: &'a AtomicBool,
    knows_output: bool,
}

/// What is to be done next.
enum Next {
    Epoch { slow_standby: bool },
    Failover(Sink<Result<String, String>>),
    End,
}

/// What a checkpoint yields.
struct Checkpoint {
    flight: Flight,
    state: Vec<u8>,
    copied: Option<Vec<Batch>>,
}

impl Epochs<'_> {
    /// Seals epochs until the end. `base` is the newest that the standby holds.
    fn run(&mut self, mut base: u64, jobs: SyncSender<Job>) {
        let common = self.common;
        if base == 0 {
            if let Err(e) = self.first_copy(&jobs) {
                common.end(self.reason(e));
                return;
            }
        }
        let mut last: Option<Instant> = None;
        let mut slow_pause = false;
        loop {
            let next = self.wait(last);
            let (slow_standby, failover) = match next {
                Next::End => return,
                Next::Epoch { slow_standby } => (slow_standby, None),
                Next::Failover(reply) => (false, Some(reply)),
            };
            let full = base == 0 && lock(&common.state).passed == 0;
            let begin = Instant::now();
            let done = match self.checkpoint(full, failover.is_none()) {
                Ok(done) => done,
                Err(e) => {
                    if let Some(reply) = failover {
                        let _ = reply.send(Err(format!("{e:#}")));
                    }
                    common.end(self.reason(e));
                    return;
                }
            };
            let mut flight = done.flight;
            flight.interval = last.map(|l| flight.sealed.saturating_duration_since(l));
            flight.limited_by = match (slow_standby, slow_pause) {
                (true, _) => Some("replication"),
                (_, true) => Some("pause"),
                _ => None,
            };
            last = Some(flight.sealed);
            let (epoch, dirty_pages) = (flight.epoch, flight.dirty_pages);
            {
                let mut state = lock(&common.state);
                slow_pause = state.pacer.paused(begin, flight.pause);
                state.flights.push_back(flight);
                state.open = epoch + 1;
            }
            let job = Job {
                epoch,
                base,
                dirty_pages,
                state: done.state,
                copied: done.copied,
            };
            // Who does not take it has an error of its own to tell.
            let _ = jobs.send(job);
            base = epoch;
            if let Some(reply) = failover {
                self.hand_over(epoch, &reply);
            }
        }
    }

    /// What fails because the guest has come to its end is no failure.
    fn reason(&mut self, e: Error) -> End {
        self.guest.ended().map_or(End::Failed(e), End::GuestEnded)
    }

    /// Sends all of the memory while the guest runs, by passes, until little is left. What was in
    /// passthrough stays in it: there is no standby yet whose state could be older than what was seen.
    fn first_copy(&mut self, jobs: &SyncSender<Job>) -> Result<()> {
        let common = self.common;
        if !self.guest.runs()? {
            return Ok(());
        }
        let domain = &common.plan.domain;
        for pass in 1..=PASSES_MAX {
            let how = Seal {
                full: pass == 1,
                keep_passthrough: true,
            };
            let begin = Instant::now();
            let done = self.sealer.seal(domain, how)?;
            let copied = match &mut self.copier {
                Some(copier) => Some(copier.all(done.epoch)?),
                None => None,
            };
            let job = Job {
                epoch: done.epoch,
                base: 0,
                dirty_pages: done.dirty_pages,
                state: Vec::new(),
                copied,
            };
            lock(&common.state).pass = Some(Pass {
                number: pass,
                epoch: done.epoch,
                pages: done.dirty_pages,
                begin,
            });
            let _ = jobs.send(job);
            let mut state = lock(&common.state);
            while state.passed != done.epoch {
                drop(state);
                if self.attend().is_some() {
                    return Ok(());
                }
                state = common.wait(lock(&common.state), TICK);
            }
            drop(state);
            let took = begin.elapsed();
            let left = self.sealer.get(domain)?.dirty_pages;
            common.report.event(
                "pass",
                json!({"pass": pass, "epoch": done.epoch, "pages": done.dirty_pages, "left": left, "pass_ms": ms(took)}),
            );
            let fit = done.dirty_pages as f64 * LEFT_OVER.as_secs_f64() / took.as_secs_f64();
            // It no longer gets less: longer passes only make for more to send.
            let stuck = pass > 2 && left * 10 > done.dirty_pages * 9;
            if left as f64 <= fit || stuck {
                break;
            }
        }
        Ok(())
    }

    /// Looks for an end, a signal and orders. What has to be done at once, if there is anything.
    fn attend(&mut self) -> Option<Next> {
        self.common.report.alive();
        let mut state = lock(&self.common.state);
        if self.stop.load(Ordering::Relaxed) {
            state.end.get_or_insert(End::Asked);
        }
        while let Ok(order) = self.orders.try_recv() {
            let answer = match order.ask {
                Ask::Pace(pace) => {
                    state.pacer.set(pace);
                    lock(self.common.report.live()).pace = Some(pace.to_string());
                    Ok(format!("an epoch ends {pace} now"))
                }
                Ask::Unprotect => {
                    state.end.get_or_insert(End::Asked);
                    Ok("protection ends; output stays held".to_owned())
                }
                Ask::Failover if !state.safe => {
                    Err("the standby does not hold the machine yet".to_owned())
                }
                Ask::Failover if state.end.is_none() => {
                    return Some(Next::Failover(order.reply));
                }
                Ask::Failover => Err("protection is ending".to_owned()),
            };
            let _ = order.reply.send(answer);
        }
        state.end.is_some().then_some(Next::End)
    }

    /// Waits until it is time for an epoch, and there is room for it.
    fn wait(&mut self, last: Option<Instant>) -> Next {
        let common = self.common;
        let (mut held_up, mut looked) = (false, Instant::now());
        loop {
            if let Some(next) = self.attend() {
                return next;
            }
            let mut state = lock(&common.state);
            // Until the standby has a whole machine, more epochs would only cost memory.
            let room = if state.safe {
                common.plan.depth.max(1)
            } else {
                1
            };
            let open = state.open;
            let output = !self.knows_output || state.output >= open;
            let due = match last {
                None => Some(Instant::now()),
                Some(_) if state.full >= open => Some(state.pacer.least()),
                Some(_) => state.pacer.due(output),
            };
            let left = due.map(|due| due.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                if state.flights.len() < room {
                    return Next::Epoch {
                        slow_standby: held_up,
                    };
                }
                held_up = true;
            }
            let span = match left {
                Some(left) if !left.is_zero() => left.min(TICK),
                _ => TICK,
            };
            let idle = due.is_none();
            state = common.wait(state, span);
            drop(state);
            if idle && looked.elapsed() > LOOK {
                looked = Instant::now();
                match self.sealer.get(&common.plan.domain) {
                    Ok(now) if now.dirty_pages * PAGE_SIZE as u64 > WRITTEN_MAX => {
                        let mut state = lock(&common.state);
                        state.output = state.output.max(state.open);
                    }
                    Ok(_) => {}
                    Err(e) => common.end(End::Failed(e)),
                }
            }
        }
    }

    /// Pauses the guest, seals, saves, and lets it go on if `go_on`: what the guest has to wait for.
    fn checkpoint(&mut self, full: bool, go_on: bool) -> Result<Checkpoint> {
        let begin = Instant::now();
        let paused = self.guest.pause();
        let stopped = Instant::now();
        let (mut sealed, mut copied) = (stopped, stopped);
        let work = paused.and_then(|()| {
            let how = Seal {
                full,
                keep_passthrough: false,
            };
            let done = self.sealer.seal(&self.common.plan.domain, how)?;
            sealed = Instant::now();
            let pages = match &mut self.copier {
                Some(copier) => Some(copier.all(done.epoch)?),
                None => None,
            };
            copied = Instant::now();
            Ok((done, pages, self.guest.save()?))
        });
        let saved = Instant::now();
        // Whatever went wrong, and also when it is not known whether the guest was paused.
        let resumed = if go_on || work.is_err() {
            self.guest.resume()
        } else {
            Ok(())
        };
        let end = Instant::now();
        let (done, pages, state) = work?;
        resumed?;
        let flight = Flight {
            epoch: done.epoch,
            sealed,
            interval: None,
            limited_by: None,
            stop: stopped - begin,
            seal: sealed - stopped,
            copy: copied - sealed,
            save: saved - copied,
            cont: end - saved,
            pause: end - begin,
            dirty_pages: done.dirty_pages,
            sent: None,
        };
        Ok(Checkpoint {
            flight,
            state,
            copied: pages,
        })
    }

    /// The guest stands still after `epoch`: once that is committed, the standby resumes it.
    fn hand_over(&mut self, epoch: u64, reply: &Sink<Result<String, String>>) {
        let common = self.common;
        let deadline = Instant::now() + HANDOVER;
        let settled = |holds: &dyn Fn(&State) -> bool| {
            let mut state = lock(&common.state);
            loop {
                if holds(&state) {
                    return Ok(());
                }
                if let Some(end) = &state.end {
                    return Err(anyhow!("{end}"));
                }
                if Instant::now() > deadline {
                    bail!("the standby did not answer in time");
                }
                state = common.wait(state, TICK);
            }
        };
        let committed = settled(&|state| state.flights.is_empty())
            .and_then(|()| common.control.send(Kind::Handover, epoch, &[]).map(drop));
        if let Err(e) = committed {
            // It runs nowhere else: nobody was told to run it.
            let answer = match self.guest.resume() {
                Ok(()) => format!("{e:#}; the guest goes on here"),
                Err(more) => format!("{e:#}; and the guest does not go on: {more:#}"),
            };
            let _ = reply.send(Err(answer));
            return;
        }
        match settled(&|state| state.resumed) {
            Ok(()) => {
                let _ = reply.send(Ok(format!(
                    "the guest runs on the standby, from epoch {epoch} on"
                )));
                self.replace_end(End::HandedOver);
            }
            Err(e) => {
                let why = format!(
                    "{e:#}; the guest stays paused here, as it may run on the standby: look there"
                );
                let _ = reply.send(Err(why.clone()));
                self.replace_end(End::Unconfirmed(why));
            }
        }
    }

    /// What a handover ends with counts, even if the connection has ended meanwhile.
    fn replace_end(&self, end: End) {
        lock(&self.common.state).end = Some(end);
    }
}

/// Notices when the guest has sent something, or so much that the epoch has to end early.
fn listen(common: &Common<'_>, hearing: &mut dyn Hearing) -> Result<()> {
    while lock(&common.state).end.is_none() {
        let Some(event) = hearing.hear(TICK * 5)? else {
            continue;
        };
        let mut state = lock(&common.state);
        match event {
            Event::OutputPending { open_epoch } if open_epoch > state.output => {
                state.output = open_epoch;
                state.waiting.push_back((open_epoch, Instant::now()));
            }
            Event::BufferHigh { open_epoch } => state.full = state.full.max(open_epoch),
            // What may have been missed is there now, and not in epochs to come.
            Event::Lost => {
                state.output = state.output.max(state.open);
            }
            Event::DomainGone => {
                state
                    .end
                    .get_or_insert_with(|| End::Failed(anyhow!("the domain was deleted")));
            }
            _ => continue,
        }
        drop(state);
        common.changed.notify_all();
    }
    Ok(())
}

/// Receives what the standby says, and commits what it acknowledges.
fn receive_all(common: &Common<'_>, mut receiver: Receiver, committer: &mut dyn Kernel) -> End {
    let mut lease = common.lease;
    // Acknowledged and not committed.
    let mut waiting = None;
    loop {
        let (header, payload) = match receiver.next() {
            Ok(frame) => frame,
            Err(e) => return End::PeerLost(e.to_string()),
        };
        common.report.heard();
        let text = || String::from_utf8_lossy(&payload).into_owned();
        match header.kind {
            Kind::Heartbeat | Kind::Ack => match Stamp::decode(&payload) {
                Ok(stamp) => lease.came_back(stamp.0),
                Err(e) => return End::PeerLost(e.to_string()),
            },
            Kind::Resumed => {
                lock(&common.state).resumed = true;
                common.changed.notify_all();
            }
            Kind::Bye => return End::PeerLost(format!("it was ended in good order ({})", text())),
            Kind::Error => return End::PeerLost(format!("it reports: {}", text())),
            kind => return End::PeerLost(format!("it sent {kind:?}, which makes no sense")),
        }
        if header.kind == Kind::Ack {
            let epoch = header.epoch;
            let whole = lock(&common.state)
                .flights
                .iter()
                .any(|f| f.epoch == epoch && f.sent.is_some());
            if !whole || header.generation != common.plan.generation {
                let why = format!("it acknowledged epoch {epoch}, which it cannot have");
                return End::PeerLost(why);
            }
            waiting = Some(epoch);
        }
        // It may have taken over since it acknowledged.
        if lease.holds() && !receiver.is_closed() {
            if let Some(epoch) = waiting.take() {
                if let Err(e) = commit(common, epoch, committer) {
                    return End::Failed(e);
                }
            }
        }
    }
}

/// Commits what the standby has acknowledged.
fn commit(common: &Common<'_>, epoch: u64, committer: &mut dyn Kernel) -> Result<()> {
    let may_commit = lock(&common.may_commit);
    if !*may_commit {
        return Ok(());
    }
    let done = committer.commit(&common.plan.domain, epoch)?;
    let committed = Instant::now();
    let mut state = lock(&common.state);
    state.safe = true;
    while let Some((_, since)) = state.waiting.front().filter(|w| w.0 <= epoch).copied() {
        state.waiting.pop_front();
        state.pacer.held(committed.saturating_duration_since(since));
    }
    while let Some(flight) = state.flights.pop_front() {
        let lag = committed.saturating_duration_since(flight.sealed);
        // The kernel counts the packets of all that it commits together.
        let packets = if flight.epoch == epoch {
            done.packets
        } else {
            0
        };
        let sent = flight.sent.unwrap_or_default();
        common.report.epoch(&Epoch {
            epoch: flight.epoch,
            interval_ms: flight.interval.map(ms),
            pause_ms: ms(flight.pause),
            stop_ms: ms(flight.stop),
            seal_ms: ms(flight.seal),
            copy_ms: ms(flight.copy),
            save_ms: ms(flight.save),
            cont_ms: ms(flight.cont),
            dirty_pages: flight.dirty_pages,
            bytes: sent.bytes,
            packets,
            commit_lag_ms: ms(lag),
            in_flight: state.flights.len() as u64,
            limited_by: flight.limited_by,
            read_ms: ms(sent.read),
            encode_ms: ms(sent.encode),
            send_ms: ms(sent.send),
            kinds: PageKinds {
                zero: sent.counts.zero,
                unchanged: sent.counts.unchanged,
                delta: sent.counts.delta,
                packed: sent.counts.packed,
                lz4: sent.counts.lz4,
                raw: sent.counts.raw,
            },
        });
        if flight.epoch == epoch {
            break;
        }
    }
    drop(state);
    common.changed.notify_all();
    Ok(())
}
