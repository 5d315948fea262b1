// SPDX-License-Identifier: GPL-2.0

//! The standby's side of the stream: stage an epoch, acknowledge it when it is whole, apply it.
//!
//! One epoch at a time: the next one waits in the socket while one is applied, so that what is staged
//! is bounded by the size of the memory, and every acknowledged epoch is applied before anything
//! else happens.

use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{bail, Context, Error, Result};
use remus_core::uapi::ram::PAGE_SIZE;
use remus_proto::frame::{records, EpochBegin, EpochEnd, Header, Hello, Kind, Stamp, Welcome};

use crate::host::kernel::Image;
use crate::host::qmp::STATE_MAX;
use crate::peer::stream::{Broken, Heartbeat, Receiver, Sender};
use crate::report::trace::ms;
use crate::report::{Applied, Report};
use crate::say;

/// How long a caller may take to say what it wants.
const INTRODUCTION: Duration = Duration::from_secs(3);

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
    /// Pages were written to the image without an epoch being whole.
    pub begun: bool,
}

/// How serving a primary ended.
#[derive(Debug)]
pub enum End {
    /// It was no primary of this domain; nothing has changed.
    Refused(Error),
    /// The primary ended protection in good order; its reason.
    Bye(String),
    /// Somebody asked this side to end.
    Asked,
    /// The primary is dead: take over if there is something to resume. When it was last heard, and
    /// how its death was noticed.
    Dead(Instant, String),
    /// This side cannot go on, and its image is of no use.
    Failed(Error),
}

/// Serves the primary that has connected on `stream`.
///
/// The stream is closed on return, unsent acknowledgements are thrown away if the primary is dead, and
/// the image is that of `held.epoch`.
pub fn serve(
    stream: TcpStream,
    offer: &Offer,
    held: &mut Held,
    image: &mut dyn Image,
    report: &Report,
    stop: &Arc<AtomicBool>,
) -> End {
    let (sender, receiver, generation) = match welcome(&stream, offer) {
        Ok(accepted) => accepted,
        Err(e) => return End::Refused(e),
    };
    held.generation = generation;
    let seen = Arc::new(AtomicU64::new(0));
    let newest = Arc::clone(&seen);
    let stamp = move || newest.load(Ordering::Relaxed);
    let heartbeat = match Heartbeat::start(sender.clone(), offer.timeout, stamp) {
        Ok(heartbeat) => heartbeat,
        Err(e) => return End::Failed(e),
    };
    let mut session = Session {
        offer,
        held,
        image,
        report,
        stop,
        sender: &sender,
        receiver,
        seen: &seen,
        stage: None,
    };
    let end = session.run();
    match &end {
        End::Dead(..) => sender.cut(),
        End::Asked => {
            let _ = sender.send(Kind::Bye, 0, b"the standby was ended");
            sender.shutdown();
        }
        End::Failed(e) => refuse(&sender, &stream, &format!("{e:#}")),
        End::Bye(_) | End::Refused(_) => sender.shutdown(),
    }
    drop(heartbeat);
    end
}

/// Reads the primary's hello and answers it.
fn welcome(stream: &TcpStream, offer: &Offer) -> Result<(Sender, Receiver, u64)> {
    stream
        .set_nodelay(true)
        .context("cannot set up the connection")?;
    stream
        .set_write_timeout(Some(INTRODUCTION))
        .context("cannot set up the connection")?;
    let mut receiver = Receiver::new(stream, INTRODUCTION)?;
    let checked = receiver
        .next()
        .map_err(Error::from)
        .and_then(|(header, payload)| {
            check_hello(offer, &header, &payload)?;
            Ok(header.generation)
        });
    match checked {
        Ok(generation) => {
            let sender = Sender::new(stream, generation)?;
            receiver.set_timeout(offer.timeout)?;
            let timeout_ms = u32::try_from(offer.timeout.as_millis()).unwrap_or(u32::MAX);
            sender.send(Kind::Welcome, 0, &Welcome { timeout_ms }.encode())?;
            Ok((sender, receiver, generation))
        }
        Err(e) => {
            refuse(&Sender::new(stream, 0)?, stream, &format!("{e:#}"));
            Err(e)
        }
    }
}

fn check_hello(offer: &Offer, header: &Header, payload: &[u8]) -> Result<()> {
    if header.kind != Kind::Hello {
        bail!("the first frame is {:?}, not a hello", header.kind);
    }
    let hello = Hello::decode(payload)?;
    if hello.name != offer.domain {
        bail!(
            "this standby is for domain {}, not for {}",
            offer.domain,
            hello.name
        );
    }
    if hello.memory != offer.memory {
        bail!(
            "domain {} has {} bytes of memory on the primary and {} on the standby: \
             use the same configuration on both hosts",
            offer.domain,
            hello.memory,
            offer.memory
        );
    }
    if hello.page_size as usize != PAGE_SIZE {
        bail!(
            "the primary's pages have {} bytes, the standby's {PAGE_SIZE}",
            hello.page_size
        );
    }
    Ok(())
}

/// Tells the other side why, and closes so that it can read that.
fn refuse(sender: &Sender, stream: &TcpStream, why: &str) {
    if sender.send(Kind::Error, 0, why.as_bytes()).is_err() {
        return;
    }
    let _ = stream.shutdown(std::net::Shutdown::Write);
    // What it still sends would make the kernel reset the connection, and the reason be lost.
    let _ = stream.set_read_timeout(Some(Duration::from_millis(300)));
    let (begin, mut sink) = (Instant::now(), [0; 1 << 14]);
    while begin.elapsed() < Duration::from_secs(1) {
        match std::io::Read::read(&mut &*stream, &mut sink) {
            Ok(n) if n > 0 => {}
            _ => break,
        }
    }
    sender.shutdown();
}

/// An epoch that is not whole yet.
struct Stage {
    epoch: u64,
    /// Records, as they came.
    frames: Vec<Vec<u8>>,
    pages: u64,
    /// The next page number has to be at least this.
    next_page: u64,
    state: Vec<u8>,
    begin: Instant,
    bytes: u64,
}

struct Session<'a> {
    offer: &'a Offer,
    held: &'a mut Held,
    image: &'a mut dyn Image,
    report: &'a Report,
    stop: &'a Arc<AtomicBool>,
    sender: &'a Sender,
    receiver: Receiver,
    /// The newest of the primary's stamps.
    seen: &'a AtomicU64,
    stage: Option<Stage>,
}

/// Whose fault it is that a frame cannot be dealt with.
enum Fault {
    /// This side's: it cannot go on.
    Ours(Error),
    /// The primary's: it makes no sense.
    Theirs(Error),
}

impl<E: Into<Error>> From<E> for Fault {
    fn from(e: E) -> Self {
        Self::Theirs(e.into())
    }
}

/// Shorthand for a fault of the primary's.
macro_rules! theirs {
    ($($arg:tt)*) => { return Err(Fault::Theirs(anyhow::anyhow!($($arg)*))) };
}

impl Session<'_> {
    fn run(&mut self) -> End {
        loop {
            let (header, payload) = match self.receiver.next() {
                Ok(frame) => frame,
                Err(_) if self.stop.load(Ordering::Relaxed) => return End::Asked,
                Err(Broken::Wire(e)) => return self.nonsense(&e.into()),
                Err(e) => return self.dead(e.to_string()),
            };
            self.report.alive();
            self.report.heard();
            let text = || String::from_utf8_lossy(&payload).into_owned();
            let result = match header.kind {
                Kind::Bye => return End::Bye(text()),
                Kind::Error => return self.dead(format!("it reports: {}", text())),
                _ => self.frame(&header, payload),
            };
            match result {
                Ok(()) => {}
                Err(Fault::Ours(e)) => return End::Failed(e),
                Err(Fault::Theirs(e)) => return self.nonsense(&e),
            }
            if self.stop.load(Ordering::Relaxed) {
                return End::Asked;
            }
        }
    }

    fn frame(&mut self, header: &Header, payload: Vec<u8>) -> Result<(), Fault> {
        if header.generation != self.held.generation {
            theirs!("a frame is of generation {}", header.generation);
        }
        match header.kind {
            Kind::Heartbeat => {
                self.seen
                    .fetch_max(Stamp::decode(&payload)?.0, Ordering::Relaxed);
                Ok(())
            }
            Kind::EpochBegin => self.begin(header, &payload),
            Kind::Pages => self.pages(header, payload),
            Kind::DeviceState => self.device_state(header, &payload),
            Kind::EpochEnd => self.end(header, &payload),
            kind => theirs!("{kind:?} has no place here"),
        }
    }

    fn dead(&self, why: String) -> End {
        End::Dead(self.receiver.heard(), why)
    }

    /// The primary makes no sense: it is told, and counts as dead. What it has sent and was not
    /// acknowledged stays held there, so to go on here is safe.
    fn nonsense(&self, e: &Error) -> End {
        let why = format!("what the primary sends makes no sense: {e:#}");
        let _ = self.sender.send(Kind::Error, 0, why.as_bytes());
        self.dead(why)
    }

    fn begin(&mut self, header: &Header, payload: &[u8]) -> Result<(), Fault> {
        let base = EpochBegin::decode(payload)?.base;
        let held = self.held.epoch;
        if self.stage.is_some() {
            theirs!("epoch {} begins within another", header.epoch);
        }
        if header.epoch <= held {
            theirs!("epoch {} comes after {held}", header.epoch);
        }
        if base != held {
            theirs!(
                "epoch {} goes on top of {base}, but {held} is here",
                header.epoch
            );
        }
        self.stage = Some(Stage {
            epoch: header.epoch,
            frames: Vec::new(),
            pages: 0,
            next_page: 0,
            state: Vec::new(),
            begin: Instant::now(),
            bytes: 0,
        });
        Ok(())
    }

    fn stage(&mut self, header: &Header) -> Result<&mut Stage, Fault> {
        match &mut self.stage {
            Some(stage) if stage.epoch == header.epoch => Ok(stage),
            _ => theirs!(
                "{:?} of epoch {}, which has not begun",
                header.kind,
                header.epoch
            ),
        }
    }

    fn pages(&mut self, header: &Header, payload: Vec<u8>) -> Result<(), Fault> {
        let limit = self.offer.memory / PAGE_SIZE as u64;
        // There is no image yet that would have to stay whole: no need to keep it all twice.
        let direct = self.held.epoch == 0;
        let stage = self.stage(header)?;
        for (page, _) in records(&payload)? {
            if page < stage.next_page || page >= limit {
                theirs!("page {page} is out of order");
            }
            stage.next_page = page + 1;
            stage.pages += 1;
        }
        stage.bytes += payload.len() as u64;
        if direct {
            self.held.begun = true;
            apply(self.image, &payload).map_err(Fault::Ours)?;
        } else {
            stage.frames.push(payload);
        }
        Ok(())
    }

    fn device_state(&mut self, header: &Header, payload: &[u8]) -> Result<(), Fault> {
        let stage = self.stage(header)?;
        if stage.state.len() as u64 + payload.len() as u64 > STATE_MAX {
            theirs!("the device state is larger than {STATE_MAX} bytes");
        }
        stage.state.extend_from_slice(payload);
        stage.bytes += payload.len() as u64;
        Ok(())
    }

    fn end(&mut self, header: &Header, payload: &[u8]) -> Result<(), Fault> {
        let end = EpochEnd::decode(payload)?;
        let stage = self.stage(header)?;
        if (stage.pages, stage.state.len() as u64) != (end.pages, end.state) || end.state == 0 {
            theirs!("epoch {} is not whole", header.epoch);
        }
        self.seen.fetch_max(end.stamp, Ordering::Relaxed);
        match self.stage.take() {
            Some(stage) => self.whole(stage).map_err(Fault::Ours),
            None => Ok(()),
        }
    }

    /// Acknowledges an epoch and applies it.
    fn whole(&mut self, stage: Stage) -> Result<()> {
        let staged = Instant::now();
        self.image.ready()?;
        // If this fails the primary is gone, which the next read tells. The epoch is whole either
        // way, and nothing of a later one can have been seen by anybody.
        let seen = Stamp(self.seen.load(Ordering::Relaxed)).encode();
        let _ = self.sender.send(Kind::Ack, stage.epoch, &seen);
        for frame in &stage.frames {
            apply(self.image, frame)
                .context("the image is torn, nothing can be resumed from it")?;
        }
        let applied = Instant::now();
        if self.held.epoch == 0 {
            say!(
                "epoch {} is here: {} is protected",
                stage.epoch,
                self.offer.domain
            );
        }
        self.held.epoch = stage.epoch;
        self.held.state = stage.state;
        self.report.applied(&Applied {
            epoch: stage.epoch,
            pages: stage.pages,
            bytes: stage.bytes,
            stage_ms: ms(staged - stage.begin),
            apply_ms: ms(applied - staged),
        });
        Ok(())
    }
}

fn apply(image: &mut dyn Image, payload: &[u8]) -> Result<()> {
    for (page, content) in records(payload)? {
        image.write(page, content)?;
    }
    Ok(())
}
