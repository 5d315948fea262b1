// SPDX-License-Identifier: GPL-2.0

//! The primary's loop.
//!
//! ```text
//!  this thread    pause → seal N → save device state → resume, every interval
//!                        │ job, at most `depth` of them
//!  sender                └─▶ read the pages of N, send them, the state, the end of N
//!  receiver       ack N ─▶ commit N ─▶ trace
//!  heartbeat      a sign of life, whatever the others do
//! ```
//!
//! Whatever fails, the guest is let run again, and no epoch is committed that the standby has not
//! acknowledged: packets that wait stay held.

use std::collections::VecDeque;
use std::fmt;
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{bail, Context, Error, Result};
use remus_core::uapi::ram::{self, PAGE_SIZE, RECORD_SIZE};
use remus_proto::frame::{
    EpochBegin, EpochEnd, Hello, Kind, Stamp, Welcome, HEADER_SIZE, HELLO_MAX, PAYLOAD_MAX,
    RECORDS_MAX,
};
use serde_json::json;

use crate::host::kernel::{Guest, Kernel, Pages, Seal};
use crate::peer::stream::{lock, Broken, Heartbeat, Receiver, Sender, Unsent};
use crate::report::live::{Live, Shared};
use crate::report::trace::{ms, Trace};

/// How long the standby may take to answer the first frame: it may still be starting its machine.
const WELCOME: Duration = Duration::from_secs(15);

/// How long the standby may take no data at all.
const STUCK: Duration = Duration::from_secs(30);

/// What is to be done.
pub struct Plan {
    /// The domain.
    pub domain: String,
    /// Bytes of its memory.
    pub memory: u64,
    /// Its generation.
    pub generation: u64,
    /// Time from seal to seal.
    pub interval: Duration,
    /// Silence after which the standby counts as dead.
    pub timeout: Duration,
    /// Most epochs that may wait for the standby.
    pub depth: usize,
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
    /// Where events are written to.
    pub trace: Trace,
    /// What is said of it elsewhere.
    pub live: Shared,
    /// Set from outside to end it in good order; checked every few milliseconds.
    pub stop: Arc<AtomicBool>,
}

/// How long the standby is known not to take over.
///
/// It waits for its timeout after it has heard something, and what it sends back tells what it has
/// heard; see the protocol.
#[derive(Clone, Copy, Debug)]
pub struct Lease {
    /// What stamps count from.
    start: Instant,
    /// The standby's timeout.
    timeout: Duration,
    /// The newest stamp that came back.
    echo: Option<Duration>,
}

impl Lease {
    fn new(timeout: Duration) -> Self {
        Self {
            start: Instant::now(),
            timeout,
            echo: None,
        }
    }

    /// A stamp for now. Never 0.
    fn stamp(&self) -> u64 {
        (self.start.elapsed().as_micros() as u64).saturating_add(1)
    }

    fn came_back(&mut self, stamp: u64) {
        if stamp > 0 {
            let echo = Duration::from_micros(stamp - 1);
            self.echo = Some(self.echo.map_or(echo, |e| e.max(echo)));
        }
    }

    fn holds(&self) -> bool {
        self.echo
            .is_some_and(|echo| self.start.elapsed() < echo.saturating_add(self.timeout))
    }
}

/// How protection ended. The guest runs on, or has ended, and what it sent and is not committed stays
/// held.
#[derive(Debug)]
pub enum End {
    /// Somebody asked for it.
    Asked,
    /// The guest was shut down; the reason.
    GuestEnded(String),
    /// The standby is lost; how that was noticed.
    PeerLost(String),
    /// Something on this host failed.
    Failed(Error),
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Asked => f.write_str("asked to"),
            Self::GuestEnded(why) => write!(f, "the guest was shut down ({why})"),
            Self::PeerLost(why) => write!(f, "the standby is lost: {why}"),
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
    save: Duration,
    cont: Duration,
    pause: Duration,
    dirty_pages: u64,
    /// Bytes on the wire.
    bytes: u64,
    /// Whether all of it went out.
    sent: bool,
}

/// What the sender has to do for an epoch.
struct Job {
    epoch: u64,
    base: u64,
    dirty_pages: u64,
    state: Vec<u8>,
}

#[derive(Default)]
struct State {
    flights: VecDeque<Flight>,
    end: Option<End>,
    /// Something was committed: the standby has a whole machine.
    safe: bool,
}

/// What the threads share.
struct Common {
    state: Mutex<State>,
    changed: Condvar,
    sender: Sender,
    /// As it began: a source of stamps.
    lease: Lease,
}

impl Common {
    /// Ends it all, unless that has happened: the first reason is the true one.
    fn end(&self, end: End) {
        lock(&self.state).end.get_or_insert(end);
        self.changed.notify_all();
    }
}

/// A stream to a standby that has accepted.
pub struct Link {
    sender: Sender,
    receiver: Receiver,
    lease: Lease,
}

/// Introduces `plan` to the standby and waits for its welcome. Nothing was done to the guest yet.
pub fn introduce(plan: &Plan, stream: &TcpStream) -> Result<Link> {
    stream
        .set_nodelay(true)
        .context("cannot set up the connection")?;
    // A standby that gives signs of life but takes no data must not block this side for ever.
    stream
        .set_write_timeout(Some(STUCK))
        .context("cannot set up the connection")?;
    let sender = Sender::new(stream, plan.generation)?;
    let mut receiver = Receiver::new(stream, plan.timeout.max(WELCOME))?;
    let short = |d: Duration| u32::try_from(d.as_millis()).unwrap_or(u32::MAX);
    let hello = Hello {
        memory: plan.memory,
        page_size: PAGE_SIZE as u32,
        interval_ms: short(plan.interval),
        timeout_ms: short(plan.timeout),
        name: &plan.domain,
    };
    let mut payload = [0; HELLO_MAX];
    let length = hello.encode(&mut payload)?;
    sender.send(Kind::Hello, 0, payload.get(..length).unwrap_or(&[]))?;
    let welcome = loop {
        let (header, payload) = match receiver.next() {
            Err(Broken::Silence(_)) => {
                bail!("the standby does not answer: does it serve another primary already?")
            }
            other => other.context("the standby did not accept")?,
        };
        match header.kind {
            Kind::Heartbeat => {}
            Kind::Welcome => break Welcome::decode(&payload)?,
            Kind::Error | Kind::Bye => {
                bail!("the standby refuses: {}", String::from_utf8_lossy(&payload))
            }
            kind => bail!("the standby answered with {kind:?}"),
        }
    };
    receiver.set_timeout(plan.timeout)?;
    let lease = Lease::new(Duration::from_millis(welcome.timeout_ms.into()));
    Ok(Link {
        sender,
        receiver,
        lease,
    })
}

/// Protects the guest until something ends that.
pub fn run(plan: &Plan, parts: Parts, link: Link) -> End {
    let Link {
        sender,
        receiver,
        lease,
    } = link;
    let common = Arc::new(Common {
        state: Mutex::default(),
        changed: Condvar::new(),
        sender: sender.clone(),
        lease,
    });
    let Parts {
        mut guest,
        mut sealer,
        mut committer,
        mut pages,
        trace,
        live,
        stop,
    } = parts;
    let heartbeat = match Heartbeat::start(sender.clone(), plan.timeout, move || lease.stamp()) {
        Ok(heartbeat) => heartbeat,
        Err(e) => return End::Failed(e),
    };
    let (jobs, queue) = mpsc::channel();
    thread::scope(|scope| {
        let sending = || {
            if let Err(e) = send_all(&common, pages.as_mut(), queue) {
                common.end(e);
            }
        };
        let receiving = || {
            common.end(receive_all(
                plan,
                &common,
                receiver,
                committer.as_mut(),
                &trace,
                &live,
            ));
            // Nothing that is sent now is of use, and whoever waits to send it must not wait on.
            common.sender.shutdown();
        };
        let spawned = thread::Builder::new()
            .name("sender".into())
            .spawn_scoped(scope, sending)
            .and(
                thread::Builder::new()
                    .name("receiver".into())
                    .spawn_scoped(scope, receiving)
                    .map(drop),
            );
        match spawned {
            Ok(()) => {
                epochs(
                    plan,
                    &common,
                    guest.as_mut(),
                    sealer.as_mut(),
                    jobs,
                    &stop,
                    &live,
                );
            }
            Err(e) => common.end(End::Failed(e.into())),
        }
        // The standby must not take over after an end in good order, and must at once after any other.
        let bye = match &lock(&common.state).end {
            Some(End::Asked) => Some("protection was ended on the primary".to_owned()),
            Some(End::GuestEnded(why)) => Some(format!("the guest was shut down ({why})")),
            _ => None,
        };
        if let Some(why) = bye {
            let _ = sender.send(Kind::Bye, 0, why.as_bytes());
        }
        sender.shutdown();
    });
    drop(heartbeat);
    let end = lock(&common.state).end.take();
    end.unwrap_or(End::Asked)
}

/// Seals epochs until the end.
fn epochs(
    plan: &Plan,
    common: &Common,
    guest: &mut dyn Guest,
    sealer: &mut dyn Kernel,
    jobs: mpsc::Sender<Job>,
    stop: &AtomicBool,
    live: &Shared,
) {
    let mut base = 0;
    let mut last: Option<Instant> = None;
    let mut due = Instant::now();
    let mut slow_pause = false;
    loop {
        let Some(slow_standby) = wait(plan, common, due, stop) else {
            return;
        };
        let begin = Instant::now();
        let (mut flight, state) = match checkpoint(plan, guest, sealer, base == 0) {
            Ok(done) => done,
            // What fails because the guest has come to its end is no failure.
            Err(e) => {
                common.end(guest.ended().map_or(End::Failed(e), End::GuestEnded));
                return;
            }
        };
        flight.interval = last.map(|l| flight.sealed.saturating_duration_since(l));
        flight.limited_by = match (slow_standby, slow_pause) {
            (true, _) => Some("replication"),
            (_, true) => Some("pause"),
            _ => None,
        };
        last = Some(flight.sealed);
        // A guest whose pauses take as long as the interval still has to get somewhere: half of the
        // time is its own.
        let pause = begin.elapsed();
        let (regular, least) = (
            begin + plan.interval,
            begin + pause + pause.min(plan.interval),
        );
        slow_pause = least > regular;
        due = regular.max(least);
        note(&mut lock(live), &flight);
        let (epoch, dirty_pages) = (flight.epoch, flight.dirty_pages);
        lock(&common.state).flights.push_back(flight);
        let job = Job {
            epoch,
            base,
            dirty_pages,
            state,
        };
        // The sender has an error of its own to tell if it is gone.
        let _ = jobs.send(job);
        base = epoch;
    }
}

/// Waits until `due`, and until there is room for another epoch. Returns whether it was the room that
/// was waited for, or nothing if it has come to an end.
fn wait(plan: &Plan, common: &Common, due: Instant, stop: &AtomicBool) -> Option<bool> {
    let mut held_up = false;
    let mut state = lock(&common.state);
    loop {
        if stop.load(Ordering::Relaxed) {
            state.end.get_or_insert(End::Asked);
        }
        if state.end.is_some() {
            return None;
        }
        // Until the standby has a whole machine, more epochs would only cost memory.
        let room = if state.safe { plan.depth.max(1) } else { 1 };
        let left = due.saturating_duration_since(Instant::now());
        if left.is_zero() {
            if state.flights.len() < room {
                return Some(held_up);
            }
            held_up = true;
        }
        // Signals cannot notify, so look for one every now and then.
        let tick = Duration::from_millis(20);
        let span = if left.is_zero() { tick } else { left.min(tick) };
        state = match common.changed.wait_timeout(state, span) {
            Ok((state, _)) => state,
            Err(poisoned) => poisoned.into_inner().0,
        };
    }
}

/// Pauses the guest, seals, saves, and lets it go on: what the guest has to wait for.
fn checkpoint(
    plan: &Plan,
    guest: &mut dyn Guest,
    sealer: &mut dyn Kernel,
    full: bool,
) -> Result<(Flight, Vec<u8>)> {
    let begin = Instant::now();
    let paused = guest.pause();
    let stopped = Instant::now();
    let mut sealed = stopped;
    let work = paused.and_then(|()| {
        let done = sealer.seal(
            &plan.domain,
            Seal {
                full,
                ..Seal::default()
            },
        )?;
        sealed = Instant::now();
        Ok((done, guest.save()?))
    });
    let saved = Instant::now();
    // Whatever went wrong, and also when it is not known whether the guest was paused.
    let resumed = guest.resume();
    let end = Instant::now();
    let (done, state) = work?;
    resumed?;
    let flight = Flight {
        epoch: done.epoch,
        sealed,
        interval: None,
        limited_by: None,
        stop: stopped - begin,
        seal: sealed - stopped,
        save: saved - sealed,
        cont: end - saved,
        pause: end - begin,
        dirty_pages: done.dirty_pages,
        bytes: 0,
        sent: false,
    };
    Ok((flight, state))
}

fn note(live: &mut Live, flight: &Flight) {
    live.interval_reached_ms = flight.interval.map(ms);
    live.pause_ms = Some(ms(flight.pause));
    live.dirty_pages = Some(flight.dirty_pages);
    live.limited_by = flight.limited_by.map(str::to_owned);
}

/// Sends the epochs that come through `queue`.
fn send_all(common: &Common, pages: &mut dyn Pages, queue: mpsc::Receiver<Job>) -> Result<(), End> {
    let mut frame = vec![0; HEADER_SIZE + RECORDS_MAX * RECORD_SIZE];
    for job in queue {
        match send_epoch(common, pages, &job, &mut frame) {
            Ok(()) => {}
            // The receiver notices too, and may have been told the reason.
            Err(e) if e.is::<Unsent>() => return Ok(()),
            Err(e) => return Err(End::Failed(e)),
        }
    }
    Ok(())
}

fn send_epoch(common: &Common, pages: &mut dyn Pages, job: &Job, frame: &mut [u8]) -> Result<()> {
    let (sender, epoch) = (&common.sender, job.epoch);
    let begin = EpochBegin { base: job.base };
    let mut bytes = sender.send(Kind::EpochBegin, epoch, &begin.encode())?;
    let (mut count, mut cursor) = (0, 0);
    while cursor != ram::END {
        let room = frame.get_mut(HEADER_SIZE..).context("short frame")?;
        let got = pages.read(epoch, &mut cursor, room)?;
        if got > 0 {
            count += got as u64;
            let end = HEADER_SIZE + got * RECORD_SIZE;
            let filled = frame
                .get_mut(..end)
                .context("the kernel claims too many pages")?;
            bytes += sender.send_in_place(Kind::Pages, epoch, filled)?;
        } else if cursor != ram::END {
            bail!("the kernel handed out no page of epoch {epoch}");
        }
    }
    if count != job.dirty_pages {
        bail!(
            "the kernel handed out {count} of the {} pages of epoch {epoch}",
            job.dirty_pages
        );
    }
    for piece in job.state.chunks(PAYLOAD_MAX) {
        bytes += sender.send(Kind::DeviceState, epoch, piece)?;
    }
    let end = EpochEnd {
        pages: count,
        state: job.state.len() as u64,
        stamp: common.lease.stamp(),
    }
    .encode();
    // The acknowledgement may be here before the call is back.
    if let Some(flight) = lock(&common.state)
        .flights
        .iter_mut()
        .find(|f| f.epoch == epoch)
    {
        flight.bytes = (bytes + HEADER_SIZE + end.len()) as u64;
        flight.sent = true;
    }
    sender.send(Kind::EpochEnd, epoch, &end)?;
    Ok(())
}

/// Receives what the standby says, and commits what it acknowledges.
fn receive_all(
    plan: &Plan,
    common: &Common,
    mut receiver: Receiver,
    committer: &mut dyn Kernel,
    trace: &Trace,
    live: &Shared,
) -> End {
    let mut lease = common.lease;
    // Acknowledged and not committed.
    let mut waiting = None;
    loop {
        let (header, payload) = match receiver.next() {
            Ok(frame) => frame,
            Err(e) => return End::PeerLost(e.to_string()),
        };
        let text = || String::from_utf8_lossy(&payload).into_owned();
        match header.kind {
            Kind::Heartbeat | Kind::Ack => match Stamp::decode(&payload) {
                Ok(stamp) => lease.came_back(stamp.0),
                Err(e) => return End::PeerLost(e.to_string()),
            },
            Kind::Bye => return End::PeerLost(format!("it was ended in good order ({})", text())),
            Kind::Error => return End::PeerLost(format!("it reports: {}", text())),
            kind => return End::PeerLost(format!("it sent {kind:?}, which makes no sense")),
        }
        if header.kind == Kind::Ack {
            let epoch = header.epoch;
            let whole = lock(&common.state)
                .flights
                .iter()
                .any(|f| f.epoch == epoch && f.sent);
            if !whole || header.generation != plan.generation {
                let why = format!("it acknowledged epoch {epoch}, which it cannot have");
                return End::PeerLost(why);
            }
            waiting = Some(epoch);
        }
        // It may have taken over since it acknowledged.
        if lease.holds() && !receiver.is_closed() {
            if let Some(epoch) = waiting.take() {
                if let Err(e) = commit(plan, common, epoch, committer, trace, live) {
                    return End::Failed(e);
                }
            }
        }
    }
}

/// Commits what the standby has acknowledged.
fn commit(
    plan: &Plan,
    common: &Common,
    epoch: u64,
    committer: &mut dyn Kernel,
    trace: &Trace,
    live: &Shared,
) -> Result<()> {
    let done = committer.commit(&plan.domain, epoch)?;
    let committed = Instant::now();
    let mut state = lock(&common.state);
    state.safe = true;
    while let Some(flight) = state.flights.pop_front() {
        let lag = committed.saturating_duration_since(flight.sealed);
        // The kernel counts the packets of all that it commits together.
        let packets = if flight.epoch == epoch {
            done.packets
        } else {
            0
        };
        trace.event(
            "epoch",
            json!({
                "epoch": flight.epoch,
                "interval_ms": flight.interval.map(ms),
                "pause_ms": ms(flight.pause),
                "stop_ms": ms(flight.stop),
                "seal_ms": ms(flight.seal),
                "save_ms": ms(flight.save),
                "cont_ms": ms(flight.cont),
                "dirty_pages": flight.dirty_pages,
                "bytes": flight.bytes,
                "packets": packets,
                "commit_lag_ms": ms(lag),
                "in_flight": state.flights.len(),
                "limited_by": flight.limited_by,
            }),
        );
        {
            let mut live = lock(live);
            live.epoch = flight.epoch;
            live.epochs += 1;
            live.commit_lag_ms = Some(ms(lag));
            live.in_flight = Some(state.flights.len() as u64);
        }
        if flight.epoch == epoch {
            break;
        }
    }
    drop(state);
    common.changed.notify_all();
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lease() {
        let mut lease = Lease::new(Duration::from_millis(80));
        assert!(!lease.holds(), "nothing came back yet");
        lease.came_back(0);
        assert!(!lease.holds(), "nothing was seen yet");
        let first = lease.stamp();
        assert!(first > 0);
        lease.came_back(first);
        assert!(lease.holds());
        thread::sleep(Duration::from_millis(50));
        let second = lease.stamp();
        lease.came_back(second);
        lease.came_back(first);
        thread::sleep(Duration::from_millis(50));
        assert!(lease.holds(), "the newest counts");
        thread::sleep(Duration::from_millis(40));
        assert!(!lease.holds());
        // Rubbish from the other side makes no panic.
        lease.came_back(u64::MAX);
    }
}
