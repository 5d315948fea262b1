// SPDX-License-Identifier: GPL-2.0-or-later

//! Ending epochs: the thread that stops the guest, and lets it go on.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver as Queue, Sender as Sink, SyncSender};
use std::time::{Duration, Instant};

use anyhow::{anyhow, bail, Error, Result};
use remus_core::uapi::ram::PAGE_SIZE;
use remus_proto::frame::Kind;
use serde_json::json;

use super::disks::work::{qemu, DiskWork, Stage};
use super::pipeline::{Batch, Batches, Job};
use super::protect::End;
use super::state::{Common, Flight, Pass, State, TICK};
use crate::host::kernel::{Guest, Kernel, Seal};
use crate::peer::stream::lock;
use crate::report::live::{Ask, Order};
use crate::report::trace::ms;

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

/// What is done in the thread that stops the guest.
pub(super) struct Epochs<'a> {
    pub(super) common: &'a Common<'a>,
    pub(super) guest: &'a mut dyn Guest,
    pub(super) disks: Option<DiskWork<'a>>,
    pub(super) sealer: &'a mut dyn Kernel,
    pub(super) copier: Option<Batches<'a>>,
    pub(super) orders: &'a Queue<Order>,
    pub(super) stop: &'a AtomicBool,
    pub(super) knows_output: bool,
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
    pub(super) fn run(&mut self, mut base: u64, jobs: SyncSender<Job>) {
        let common = self.common;
        match self.copy_disks(base) {
            Ok(whole) => lock(&common.state).safe = base > 0 && whole,
            Err(e) => common.end(self.reason(e)),
        }
        if lock(&common.state).end.is_some() {
            return;
        }
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
            if let Some(disks) = &self.disks {
                lock(common.report.live()).disks = Some(disks.disks.queue.level());
            }
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

    /// Copies the disks while the guest runs, unless what the standby lacks is at hand. Whether its images
    /// are whole meanwhile.
    fn copy_disks(&mut self, base: u64) -> Result<bool> {
        let Some(disks) = &mut self.disks else {
            return Ok(true);
        };
        // A copy of the memory takes longer than changes of the disks can be held back.
        if base > 0 && disks.go_on()? {
            return Ok(true);
        }
        let begin = Instant::now();
        let mut stage = disks.begin(qemu(self.guest.qmp())?)?;
        while stage != Stage::Synced {
            if let Stage::Copying { done, total } = stage {
                self.common.copied_disks(done, total, begin);
            }
            if self.attend().is_some() {
                return Ok(false);
            }
            drop(self.common.wait(lock(&self.common.state), TICK));
            if let Some(disks) = &mut self.disks {
                stage = disks.advance(stage, qemu(self.guest.qmp())?)?;
            }
        }
        let took = ms(begin.elapsed());
        self.common
            .report
            .event("disks-copied", json!({"copy_ms": took}));
        Ok(false)
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
            let output = (!self.knows_output || state.output >= open).then_some(state.output_at);
            let full = state.full >= open || self.disks.as_ref().is_some_and(DiskWork::is_full);
            let due = match last {
                None => Some(Instant::now()),
                Some(_) if full => Some(state.pacer.least()),
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
        let through = self.disks.as_ref().map(DiskWork::let_through);
        let paused = self.guest.pause();
        drop(through);
        let stopped = Instant::now();
        let (mut sealed, mut copied) = (stopped, stopped);
        let work = paused.and_then(|()| {
            let how = Seal {
                full,
                keep_passthrough: false,
            };
            let done = self.sealer.seal(&self.common.plan.domain, how)?;
            if let Some(disks) = &self.disks {
                disks.seal(done.epoch, qemu(self.guest.qmp())?)?;
            }
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
        let committed = settled(&|state| state.flights.is_empty()).and_then(|()| {
            lock(&common.state).handing_over = true;
            common.control.send(Kind::Handover, epoch, &[]).map(drop)
        });
        if let Err(e) = committed {
            // It runs nowhere else: nobody was told to run it.
            self.go_on(&e, reply);
            return;
        }
        match settled(&|state| state.resumed) {
            Err(e) if lock(&common.state).refused => self.go_on(&e, reply),
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

    /// The guest was not handed over: it goes on here.
    fn go_on(&mut self, why: &Error, reply: &Sink<Result<String, String>>) {
        lock(&self.common.state).handing_over = false;
        let answer = match self.guest.resume() {
            Ok(()) => format!("{why:#}; the guest goes on here"),
            Err(more) => format!("{why:#}; and the guest does not go on: {more:#}"),
        };
        let _ = reply.send(Err(answer));
    }

    /// What a handover ends with counts, even if the connection has ended meanwhile.
    fn replace_end(&self, end: End) {
        lock(&self.common.state).end = Some(end);
    }
}
