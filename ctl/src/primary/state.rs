// SPDX-License-Identifier: GPL-2.0-or-later

//! What the threads of a connection share.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use anyhow::Error;
use remus_proto::disk::CHUNK;

use super::lease::Lease;
use super::pace::Pacer;
use super::pipeline::{Sent, Watcher};
use super::protect::{End, Plan};
use crate::peer::stream::{lock, Sender};
use crate::report::live::Progress;
use crate::report::Report;

/// How often to look for what cannot notify, such as signals and orders.
pub(super) const TICK: Duration = Duration::from_millis(20);

/// An epoch that is sealed and not committed.
#[derive(Clone, Debug)]
pub(super) struct Flight {
    pub(super) epoch: u64,
    pub(super) sealed: Instant,
    pub(super) interval: Option<Duration>,
    /// What made the interval longer than asked for.
    pub(super) limited_by: Option<&'static str>,
    pub(super) stop: Duration,
    pub(super) seal: Duration,
    pub(super) copy: Duration,
    pub(super) save: Duration,
    pub(super) cont: Duration,
    pub(super) pause: Duration,
    pub(super) dirty_pages: u64,
    /// What went out, once all of it did.
    pub(super) sent: Option<Sent>,
}

/// A pass of the first copy.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pass {
    pub(super) number: u32,
    pub(super) epoch: u64,
    pub(super) pages: u64,
    pub(super) begin: Instant,
}

pub(super) struct State {
    pub(super) pacer: Pacer,
    pub(super) flights: VecDeque<Flight>,
    pub(super) end: Option<End>,
    /// The standby has a whole machine.
    pub(super) safe: bool,
    /// The newest pass of the first copy that went out whole.
    pub(super) passed: u64,
    /// The pass that is on its way.
    pub(super) pass: Option<Pass>,
    /// The epoch that is open, once one was sealed.
    pub(super) open: u64,
    /// The newest epoch in which packets are known to wait.
    pub(super) output: u64,
    /// Since when they do.
    pub(super) output_at: Instant,
    /// The newest epoch that holds so many packets that it should end.
    pub(super) full: u64,
    /// Epochs that are not committed and in which packets wait, and since when.
    pub(super) waiting: VecDeque<(u64, Instant)>,
    /// The standby is told to run the guest, and ends the streams that it needs no more.
    pub(super) handing_over: bool,
    /// The standby has said that the guest runs there.
    pub(super) resumed: bool,
    /// The standby has said that it cannot go on: no guest runs there.
    pub(super) refused: bool,
}

/// What the threads share.
pub(super) struct Common<'a> {
    pub(super) plan: &'a Plan,
    pub(super) state: Mutex<State>,
    pub(super) changed: Condvar,
    /// Whether anything may be committed. Held while that is done, and taken before `state`.
    pub(super) may_commit: Mutex<bool>,
    pub(super) control: Sender,
    /// As it began.
    pub(super) lease: Lease,
    pub(super) report: &'a Report,
}

impl Common<'_> {
    /// Ends it all, unless that has happened: the first reason is the true one.
    pub(super) fn end(&self, end: End) {
        lock(&self.state).end.get_or_insert(end);
        self.changed.notify_all();
    }

    /// So much of the disks is copied.
    pub(super) fn copied_disks(&self, done: u64, total: u64, begin: Instant) {
        let chunks = |bytes: u64| bytes / CHUNK as u64;
        let spent = begin.elapsed().as_secs_f64().max(0.001);
        let left = total.saturating_sub(done) as f64;
        self.report.copied(Progress {
            disks: true,
            pages_done: chunks(done),
            pages_total: chunks(total),
            bytes_per_s: done as f64 / spent,
            seconds_left: (done > 0).then(|| left * spent / done as f64),
            ..Progress::default()
        });
    }

    /// A stream to the standby is of no use any more. It may be about to tell the reason on another.
    pub(super) fn lost(&self, why: String) {
        let begin = Instant::now();
        let mut state = lock(&self.state);
        if state.handing_over {
            return;
        }
        while state.end.is_none() && begin.elapsed() < Duration::from_millis(500) {
            state = self.wait(state, TICK);
        }
        drop(state);
        self.end(End::PeerLost(why));
        self.control.shutdown();
    }

    pub(super) fn wait<'a>(
        &self,
        state: MutexGuard<'a, State>,
        span: Duration,
    ) -> MutexGuard<'a, State> {
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
            ..Progress::default()
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
        self.lost(format!("{error:#}"));
    }

    fn failed(&self, error: Error) {
        self.end(End::Failed(error));
    }
}
