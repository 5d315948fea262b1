// SPDX-License-Identifier: GPL-2.0-or-later

//! The standby's side of a connection: stage an epoch, acknowledge it when it is whole, apply it.
//!
//! ```text
//!  control stream ─▶ control    heartbeats, silence, the end
//!  data stream    ─▶ stage ──Ack N──▶ (control stream)
//!                      │ └──whole epochs──▶ apply ─▶ image, images of disks
//!  disk stream    ─▶ changes held, up to the seal of N
//! ```
//!
//! One epoch is applied while the next one is staged; then the socket fills and the primary waits. An
//! epoch is staged as it came, so what is staged is bounded by twice the memory's size; what is held of
//! the disks, by what they are opened with. Every acknowledged epoch is applied before anything else
//! happens.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::Receiver as Queue;
use std::sync::mpsc::{channel, sync_channel, RecvTimeoutError};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{anyhow, Context, Error, Result};
use remus_proto::disk::Disks;
use remus_proto::frame::{Header, Kind, Stamp, Token, Welcome};
use rustix::rand::{getrandom, GetRandomFlags};

use super::apply::apply_all;
use super::caller::{refuse, Caller, Callers, INTRODUCTION};
use super::disk_stream::DiskStream;
use super::disks::Store;
use super::stage::Staging;
use crate::host::kernel::{Image, Machine};
use crate::peer::channel::Handle;
use crate::peer::stream::{Broken, Heartbeat, Receiver, Sender};
use crate::report::Report;
use crate::threads::spawn;

/// How often to look for signals, other callers and the waiting machine.
const TICK: Duration = Duration::from_millis(50);
/// How many pieces of work may wait to be applied, beside the one that is staged.
const AHEAD: usize = 0;
/// The data stream may be silent for as long as the guest is.
const FOR_EVER: Duration = Duration::from_secs(1 << 24);

/// What this standby serves.
pub struct Offer {
    /// The domain, as the primary calls it.
    pub domain: String,
    /// Bytes of its memory.
    pub memory: u64,
    /// Silence after which the primary counts as dead.
    pub timeout: Duration,
}

/// What the standby holds of the machine.
#[derive(Debug, Default)]
pub struct Held {
    /// The newest epoch that is whole; the image is this one's. 0 if none is.
    pub epoch: u64,
    /// Its device state.
    pub state: Vec<u8>,
    /// Generation of the domain.
    pub generation: u64,
    /// Whose it is: the primary's process. 0 if nothing was received yet.
    pub run: u128,
}

/// How serving a primary ended.
pub enum End {
    /// It was no primary of this domain; nothing has changed.
    Refused(Error),
    /// The image is of another run of the primary, or was begun and is not whole: it is to be served from
    /// the start.
    Other(Box<Caller>),
    /// The primary ended protection in good order; its reason.
    Bye(String),
    /// Somebody asked this side to end.
    Asked,
    /// The connection is lost.
    Lost(Lost),
    /// The primary has stopped the guest at the epoch that is held, and wants it resumed here.
    Handover(Handover),
    /// This side cannot go on, and its image is of no use.
    Failed(Error),
}

/// A connection that is lost.
pub struct Lost {
    /// When the primary was last heard.
    pub heard: Instant,
    /// How it was noticed.
    pub why: String,
    /// The primary has said that it commits nothing any more: no need to wait for its timeout.
    pub given_up: bool,
    /// The primary is here again.
    pub again: Option<Box<Caller>>,
}

/// A primary that waits to hear that its guest runs here.
pub struct Handover {
    control: Sender,
    handle: Handle,
    _heartbeat: Heartbeat,
}

impl Handover {
    /// Tells it that the guest runs here now.
    pub fn resumed(self) {
        let _ = self.control.send(Kind::Resumed, 0, &[]);
        let _ = self.handle.stream().shutdown(std::net::Shutdown::Write);
        // It has read that when it closes.
        let begin = Instant::now();
        while !self.handle.is_closed() && begin.elapsed() < Duration::from_secs(2) {
            thread::sleep(Duration::from_millis(10));
        }
        self.control.shutdown();
    }

    /// Tells it that the guest could not be resumed here.
    pub fn failed(self, why: &str) {
        refuse(&self.control, &self.handle, Kind::Error, why);
    }
}

/// What the standby works with.
pub struct Parts<'a> {
    /// Where other callers come in meanwhile.
    pub callers: &'a Callers,
    /// The memory.
    pub image: &'a mut dyn Image,
    /// The images of its disks, if it has any.
    pub disks: Option<&'a Store>,
    /// The virtual machine that waits.
    pub machine: &'a mut dyn Machine,
    /// What is said of it elsewhere.
    pub report: &'a Report,
    /// Set from outside to end it.
    pub stop: &'a AtomicBool,
    /// Called now and then meanwhile.
    pub tick: &'a dyn Fn(),
}

/// Serves the primary that has called.
///
/// On return unsent acknowledgements are thrown away if the connection is lost, and the image is that of
/// `held.epoch`.
pub fn serve(caller: Caller, offer: &Offer, held: &mut Held, parts: &mut Parts<'_>) -> End {
    let (generation, run) = match caller.hello(offer) {
        Ok(hello) => hello,
        Err(e) => {
            caller.refuse(Kind::Error, &format!("{e:#}"));
            return End::Refused(e);
        }
    };
    // An image that was begun and is not whole may have pages that the primary has given back since.
    if held.run != 0 && (held.run != run || held.epoch == 0) {
        return End::Other(Box::new(caller));
    }
    let (control, mut receiver, handle) = caller.accept(generation);
    let has_disks = parts.disks.is_some();
    let streams = welcome(&control, offer, held.epoch, has_disks, parts.callers);
    let welcomed = streams.and_then(|(data, disks)| {
        let attach = |(store, (caller, disks)): (_, (_, Disks))| {
            DiskStream::attach(caller, &disks, store, generation, run, FOR_EVER)
        };
        Ok((data, parts.disks.zip(disks).map(attach).transpose()?))
    });
    let (data, disks) = match welcomed {
        Ok(streams) => streams,
        Err(e) => {
            let why = format!("{e:#}");
            refuse(&control, &handle, Kind::Error, &why);
            // It was welcome, and may know that.
            return match held.run == run {
                true => End::Lost(Lost {
                    heard: Instant::now(),
                    why,
                    given_up: false,
                    again: None,
                }),
                false => End::Refused(e),
            };
        }
    };
    (held.generation, held.run) = (generation, run);
    let (_, mut incoming, data) = data.accept(generation);
    let timeouts = receiver
        .set_timeout(offer.timeout)
        .and_then(|()| incoming.set_timeout(FOR_EVER));
    if let Err(e) = timeouts {
        return End::Failed(e);
    }
    let seen = Arc::new(AtomicU64::new(0));
    let newest = Arc::clone(&seen);
    let stamp = move || newest.load(Ordering::Relaxed);
    let heartbeat = match Heartbeat::start(control.clone(), offer.timeout, stamp) {
        Ok(heartbeat) => heartbeat,
        Err(e) => return End::Failed(e),
    };
    let stage = Staging::new(offer, generation, held.epoch, &seen, &control);
    let outcome = work(
        parts, held, run, offer, receiver, incoming, disks, stage, &handle, &data,
    );
    // What was not acknowledged: the primary has it, and sends it again.
    if let Some(Err(e)) = parts.disks.map(Store::discard) {
        return End::Failed(e.context("the images of its disks are of no use any more"));
    }
    match outcome {
        Outcome::Lost(lost) => End::Lost(lost),
        // It may be a damaged stream: what was sent and not acknowledged stays held there, and the
        // primary can come again and go on.
        Outcome::Nonsense(heard, e) => End::Lost(Lost {
            heard,
            why: nonsense(&e),
            given_up: false,
            again: None,
        }),
        Outcome::DataLost(why) => End::Lost(Lost {
            heard: Instant::now(),
            why: format!("a stream ended: {why}"),
            given_up: false,
            again: None,
        }),
        Outcome::Asked => End::Asked,
        Outcome::Failed(e) => End::Failed(e),
        Outcome::Bye(why) => End::Bye(why),
        Outcome::Handover(epoch) if epoch == held.epoch => End::Handover(Handover {
            control,
            handle,
            _heartbeat: heartbeat,
        }),
        Outcome::Handover(epoch) => {
            let why = format!(
                "epoch {epoch} was handed over, but {} is held here",
                held.epoch
            );
            refuse(&control, &handle, Kind::Error, &why);
            End::Failed(anyhow!("{why}"))
        }
    }
}

/// Welcomes the primary, and waits for the streams that it brings, in whatever order they come.
fn welcome(
    control: &Sender,
    offer: &Offer,
    held: u64,
    has_disks: bool,
    callers: &Callers,
) -> Result<(Caller, Option<(Caller, Disks)>)> {
    let mut random = [0; 16];
    getrandom(&mut random, GetRandomFlags::empty()).context("no random numbers")?;
    let token = Token(u128::from_le_bytes(random));
    let welcome = Welcome {
        timeout_ms: u32::try_from(offer.timeout.as_millis()).unwrap_or(u32::MAX),
        held,
        token,
    };
    control.send(Kind::Welcome, 0, &welcome.encode())?;
    let (mut data, mut disks) = (None, None);
    let begin = Instant::now();
    while begin.elapsed() < INTRODUCTION {
        let Some((caller, _)) = callers.next(TICK) else {
            continue;
        };
        match caller.disks().filter(|disks| disks.token == token.0) {
            _ if caller.attaches(token) => data = Some(caller),
            Some(described) if has_disks => disks = Some((caller, described)),
            Some(_) => caller.refuse(Kind::Error, NO_DISKS),
            None => caller.refuse(Kind::Error, BUSY),
        }
        if disks.is_some() == has_disks {
            if let Some(data) = data.take() {
                return Ok((data, disks));
            }
        }
    }
    Err(match data {
        None => anyhow!("no data stream came"),
        Some(_) => anyhow!(
            "the primary brings no disks, but there are some here: use the same configuration on both hosts"
        ),
    })
}

/// What another caller is told meanwhile.
const BUSY: &str = "this standby serves a primary already";
/// What a disk stream is told that nothing is there for.
const NO_DISKS: &str = "the standby's configuration has no disks: use the same on both hosts";

/// What ends a connection.
pub(crate) enum Outcome {
    Lost(Lost),
    DataLost(String),
    Nonsense(Instant, Error),
    Bye(String),
    Asked,
    Handover(u64),
    Failed(Error),
}

/// The next frame of a stream, which has to be of this generation; or why there is none.
pub(crate) fn next(receiver: &mut Receiver, generation: u64) -> Result<(Header, Vec<u8>), Outcome> {
    let (header, payload) = receiver.next().map_err(|e| match e {
        Broken::Wire(e) => Outcome::Nonsense(receiver.heard(), e.into()),
        e => Outcome::DataLost(e.to_string()),
    })?;
    if header.generation == generation {
        return Ok((header, payload));
    }
    let e = anyhow!("a frame is of generation {}", header.generation);
    Err(Outcome::Nonsense(receiver.heard(), e))
}

/// Runs the threads until something ends it. All that was acknowledged is applied on return.
#[allow(clippy::too_many_arguments)]
fn work<'a>(
    parts: &mut Parts<'_>,
    held: &mut Held,
    run: u128,
    offer: &Offer,
    receiver: Receiver,
    incoming: Receiver,
    disks: Option<DiskStream<'a>>,
    mut stage: Staging<'a>,
    handle: &Handle,
    data: &Handle,
) -> Outcome {
    let (outcomes, outcome) = channel();
    let (queue, todo) = sync_channel(AHEAD);
    let control = stage.control.clone();
    let seen = stage.seen;
    let Parts {
        callers,
        image,
        disks: _,
        machine,
        report,
        stop,
        tick,
    } = parts;
    let report: &Report = report;
    let over: Arc<AtomicBool> = Arc::default();
    stage.disks = disks.as_ref().map(|d| (d.store, Arc::clone(&over)));
    let to_tell = disks.as_ref().map(|d| (d.store, d.sender.clone()));
    let of_disks = disks.as_ref().map(DiskStream::handle);
    thread::scope(|scope| {
        let (of_control, of_data, of_apply) =
            (outcomes.clone(), outcomes.clone(), outcomes.clone());
        let listening = move || {
            let _ = of_control.send(listen(receiver, seen, report));
        };
        let staging = move || {
            let _ = of_data.send(stage.run(incoming, queue));
        };
        let applying = move || {
            let disks = to_tell.as_ref().map(|(store, sender)| (*store, sender));
            if let Err(e) = apply_all(&todo, *image, offer, held, disks, report) {
                let _ = of_apply.send(Outcome::Failed(e));
            }
        };
        let start = || -> std::io::Result<()> {
            spawn(scope, "apply", applying)?;
            spawn(scope, "stage", staging)?;
            spawn(scope, "control", listening)?;
            if let Some(disks) = disks {
                let over = Arc::clone(&over);
                let changing = move || {
                    let outcome = disks.run();
                    over.store(true, Ordering::Relaxed);
                    let _ = outcomes.send(outcome);
                };
                spawn(scope, "disks", changing)?;
            }
            Ok(())
        };
        let ended = match start() {
            Ok(()) => watch(&outcome, callers, *machine, offer, run, stop, *tick),
            Err(e) => Outcome::Failed(e.into()),
        };
        let farewell = match &ended {
            Outcome::Nonsense(_, e) => Some((Kind::Error, nonsense(e))),
            Outcome::Failed(e) => Some((Kind::Error, format!("{e:#}"))),
            Outcome::Asked => Some((Kind::Bye, "the standby was ended".to_owned())),
            _ => None,
        };
        if let Some((kind, why)) = farewell {
            let _ = control.send(kind, 0, why.as_bytes());
            // Until the primary has read it, and closes.
            let _ = handle.stream().shutdown(std::net::Shutdown::Write);
            let begin = Instant::now();
            while begin.elapsed() < Duration::from_secs(1) {
                match outcome.recv_timeout(TICK) {
                    Ok(Outcome::Lost(_)) | Err(RecvTimeoutError::Disconnected) => break,
                    _ => {}
                }
            }
        }
        if !matches!(ended, Outcome::Handover(_)) {
            // No acknowledgement may get through after this.
            control.cut();
        }
        data.cut();
        over.store(true, Ordering::Relaxed);
        if let Some(disks) = of_disks {
            disks.cut();
        }
        ended
    })
}

/// What the primary is told of what makes no sense.
fn nonsense(e: &Error) -> String {
    format!("what the primary sends makes no sense: {e:#}")
}

/// Waits for the first outcome, and meanwhile for what cannot notify.
fn watch(
    outcome: &Queue<Outcome>,
    callers: &Callers,
    machine: &mut dyn Machine,
    offer: &Offer,
    run: u128,
    stop: &AtomicBool,
    tick: &dyn Fn(),
) -> Outcome {
    // Since when there is no data stream any more, and why.
    let mut data_lost: Option<(Instant, String)> = None;
    loop {
        tick();
        match outcome.recv_timeout(TICK) {
            // The control stream tells why, such as an end in good order, or is silent for the timeout.
            Ok(Outcome::DataLost(why)) => {
                data_lost.get_or_insert_with(|| (Instant::now(), why));
            }
            Ok(outcome) => return outcome,
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => {
                return Outcome::Failed(anyhow!("all threads have ended"));
            }
        }
        if let Some((_, why)) = data_lost.take_if(|lost| lost.0.elapsed() > offer.timeout) {
            return Outcome::DataLost(why);
        }
        if stop.load(Ordering::Relaxed) {
            return Outcome::Asked;
        }
        if let Err(e) = machine.ready() {
            return Outcome::Failed(e);
        }
        while let Some((caller, address)) = callers.next(Duration::ZERO) {
            // The primary knows best that the connection is lost.
            if caller.hello(offer).is_ok_and(|(_, other)| other == run) {
                return Outcome::Lost(Lost {
                    heard: Instant::now(),
                    why: format!("the primary has called again, from {address}"),
                    given_up: false,
                    again: Some(Box::new(caller)),
                });
            }
            let why = match caller.disks() {
                Some(_) => NO_DISKS,
                None => BUSY,
            };
            caller.refuse(Kind::Error, why);
        }
    }
}

/// Listens to the control stream until it ends.
fn listen(mut receiver: Receiver, seen: &AtomicU64, report: &Report) -> Outcome {
    loop {
        let (header, payload) = match receiver.next() {
            Ok(frame) => frame,
            Err(Broken::Wire(e)) => return Outcome::Nonsense(receiver.heard(), e.into()),
            Err(e) => return lost(&receiver, e.to_string(), false),
        };
        report.heard();
        let text = || String::from_utf8_lossy(&payload).into_owned();
        match header.kind {
            Kind::Heartbeat => match Stamp::decode(&payload) {
                Ok(stamp) => {
                    seen.fetch_max(stamp.0, Ordering::Relaxed);
                }
                Err(e) => return Outcome::Nonsense(receiver.heard(), e.into()),
            },
            Kind::Bye => return Outcome::Bye(text()),
            Kind::Error => return lost(&receiver, format!("it reports: {}", text()), true),
            Kind::Handover => return Outcome::Handover(header.epoch),
            kind => {
                let e = anyhow!("{kind:?} has no place on the control stream");
                return Outcome::Nonsense(receiver.heard(), e);
            }
        }
    }
}

fn lost(receiver: &Receiver, why: String, given_up: bool) -> Outcome {
    Outcome::Lost(Lost {
        heard: receiver.heard(),
        why,
        given_up,
        again: None,
    })
}
