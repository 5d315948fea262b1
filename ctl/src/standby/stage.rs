// SPDX-License-Identifier: GPL-2.0-or-later

//! The data stream's side: collecting an epoch, and acknowledging it when it is whole.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::SyncSender;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{anyhow, Result};
use remus_core::uapi::ram::PAGE_SIZE;
use remus_proto::frame::{EpochBegin, EpochEnd, Header, Kind, Stamp};
use remus_proto::pages::{self, Scratch};

use super::disks::Store;
use super::serve::{next, Offer, Outcome};
use crate::host::qmp::STATE_MAX;
use crate::peer::stream::{Receiver, Sender};

/// How often to look whether there is use in waiting for the disks.
const TICK: Duration = Duration::from_millis(20);

/// What is to be done to the image.
pub(crate) enum Work {
    /// A frame of pages, without an epoch being whole.
    Pages(Vec<u8>),
    /// An epoch that was acknowledged.
    Whole(Stage),
}

/// An epoch that is not whole yet.
pub(crate) struct Stage {
    pub(super) epoch: u64,
    /// Payloads with pages, as they came, but checked.
    pub(super) frames: Vec<Vec<u8>>,
    pub(super) pages: u64,
    pub(super) state: Vec<u8>,
    pub(super) begin: Instant,
    pub(super) staged: Instant,
    pub(super) bytes: u64,
}

/// The data stream's side.
pub(crate) struct Staging<'a> {
    offer: &'a Offer,
    generation: u64,
    /// The newest epoch that is whole.
    newest: u64,
    /// There is no image yet that would have to stay whole: no need to keep it all twice.
    direct: bool,
    stage: Option<Stage>,
    scratch: Scratch,
    /// The newest of the primary's stamps, which come on the control stream.
    pub(super) seen: &'a AtomicU64,
    pub(super) control: &'a Sender,
    /// The guest's disks, whose changes come by another stream, and whether that has ended.
    pub(super) disks: Option<(&'a Store, Arc<AtomicBool>)>,
}

/// Shorthand for what makes no sense.
macro_rules! nonsense {
    ($($arg:tt)*) => { return Err(anyhow!($($arg)*)) };
}

impl<'a> Staging<'a> {
    /// Goes on after the epoch `newest`, or begins with 0.
    pub(crate) fn new(
        offer: &'a Offer,
        generation: u64,
        newest: u64,
        seen: &'a AtomicU64,
        control: &'a Sender,
    ) -> Self {
        Self {
            offer,
            generation,
            newest,
            direct: newest == 0,
            stage: None,
            scratch: Scratch::new(),
            seen,
            control,
            disks: None,
        }
    }

    /// Stages what comes in, until the stream ends or makes no sense.
    pub(crate) fn run(&mut self, mut incoming: Receiver, queue: SyncSender<Work>) -> Outcome {
        loop {
            let (header, payload) = match next(&mut incoming, self.generation) {
                Ok(frame) => frame,
                Err(outcome) => return outcome,
            };
            match self.frame(&header, payload) {
                Ok(None) if self.disks_ended() => {
                    return Outcome::DataLost("the disk stream ended".into())
                }
                Ok(None) => {}
                Ok(Some(work)) => {
                    // Who applies has told the reason if it has ended.
                    if queue.send(work).is_err() {
                        return Outcome::DataLost("nothing can be applied".into());
                    }
                }
                Err(e) => return Outcome::Nonsense(incoming.heard(), e),
            }
        }
    }

    fn frame(&mut self, header: &Header, payload: Vec<u8>) -> Result<Option<Work>> {
        match header.kind {
            Kind::EpochBegin => self.begin(header, &payload).map(|()| None),
            Kind::Pages => self.pages(header, payload),
            Kind::DeviceState => self.device_state(header, &payload).map(|()| None),
            Kind::EpochEnd => self.end(header, &payload),
            kind => nonsense!("{kind:?} has no place on the data stream"),
        }
    }

    fn begin(&mut self, header: &Header, payload: &[u8]) -> Result<()> {
        let base = EpochBegin::decode(payload)?.base;
        if self.stage.is_some() {
            nonsense!("epoch {} begins within another", header.epoch);
        }
        if header.epoch <= self.newest {
            nonsense!("epoch {} comes after {}", header.epoch, self.newest);
        }
        if base != self.newest {
            nonsense!(
                "epoch {} goes on top of {base}, but {} is here",
                header.epoch,
                self.newest
            );
        }
        let now = Instant::now();
        self.stage = Some(Stage {
            epoch: header.epoch,
            frames: Vec::new(),
            pages: 0,
            state: Vec::new(),
            begin: now,
            staged: now,
            bytes: 0,
        });
        Ok(())
    }

    fn stage(&mut self, header: &Header) -> Result<&mut Stage> {
        match &mut self.stage {
            Some(stage) if stage.epoch == header.epoch => Ok(stage),
            _ => nonsense!(
                "{:?} of epoch {}, which has not begun",
                header.kind,
                header.epoch
            ),
        }
    }

    fn pages(&mut self, header: &Header, payload: Vec<u8>) -> Result<Option<Work>> {
        let limit = self.offer.memory / PAGE_SIZE as u64;
        let direct = self.direct;
        // Before anything is acknowledged: what was checked can be applied.
        let count = pages::check(&payload, limit, &mut self.scratch)?;
        let stage = self.stage(header)?;
        stage.pages += count;
        stage.bytes += payload.len() as u64;
        if stage.pages > limit {
            nonsense!("epoch {} has more pages than the memory", header.epoch);
        }
        if direct {
            return Ok(Some(Work::Pages(payload)));
        }
        stage.frames.push(payload);
        Ok(None)
    }

    fn device_state(&mut self, header: &Header, payload: &[u8]) -> Result<()> {
        let stage = self.stage(header)?;
        if stage.state.len() as u64 + payload.len() as u64 > STATE_MAX {
            nonsense!("the device state is larger than {STATE_MAX} bytes");
        }
        stage.state.extend_from_slice(payload);
        stage.bytes += payload.len() as u64;
        Ok(())
    }

    fn end(&mut self, header: &Header, payload: &[u8]) -> Result<Option<Work>> {
        let end = EpochEnd::decode(payload)?;
        let stage = self.stage(header)?;
        if (stage.pages, stage.state.len() as u64) != (end.pages, end.state) {
            nonsense!("epoch {} is not whole", header.epoch);
        }
        if end.state == 0 && !self.direct {
            nonsense!("epoch {} has no device state", header.epoch);
        }
        let Some(mut stage) = self.stage.take() else {
            return Ok(None);
        };
        if end.state == 0 || !self.has_disks(stage.epoch) {
            return Ok(None);
        }
        stage.staged = Instant::now();
        // If this fails the primary is gone, which the next read tells. The epoch is whole either
        // way, and nothing of a later one can have been seen by anybody.
        let seen = Stamp(self.seen.load(Ordering::Relaxed)).encode();
        let _ = self.control.send(Kind::Ack, stage.epoch, &seen);
        (self.newest, self.direct) = (stage.epoch, false);
        Ok(Some(Work::Whole(stage)))
    }

    /// Waits until the changes of the disks up to the end of `epoch` are held. They never will be if the
    /// disk stream has ended.
    fn has_disks(&self, epoch: u64) -> bool {
        let Some((store, _)) = &self.disks else {
            return true;
        };
        while !store.wait_sealed(epoch, TICK) {
            if self.disks_ended() {
                return false;
            }
        }
        true
    }

    fn disks_ended(&self) -> bool {
        let over = self.disks.as_ref().map(|(_, over)| over);
        over.is_some_and(|over| over.load(Ordering::Relaxed))
    }
}
