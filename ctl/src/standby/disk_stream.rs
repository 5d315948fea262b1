// SPDX-License-Identifier: GPL-2.0-or-later

//! The disk stream's side: what the primary's disks are, and their changes, on their way to the store.
//!
//! ```text
//!   AttachDisks ──▶ DiskState C ──┬─▶ DiskState C: what comes goes on top of epoch C
//!                                 └─▶ DiskState 0: a copy, of what was missed or, with a byte of payload, of
//!                                     all: then DiskSums …, DiskState 0 come back before it.
//!                                     DiskChanges 0 … until the first DiskSeal
//!   DiskChanges …, DiskSeal N ──▶ held; acknowledged with the memory of N, applied with it, DiskApplied N
//! ```

use std::time::Duration;

use anyhow::{anyhow, Error, Result};
use remus_proto::disk::Disks;
use remus_proto::frame::{Header, Kind};

use super::caller::Caller;
use super::disks::Store;
use super::serve::{next, Outcome};
use crate::peer::channel::Handle;
use crate::peer::stream::{Receiver, Sender};

/// The images of a guest, and the connection that their changes come by.
pub(crate) struct DiskStream<'a> {
    pub(super) store: &'a Store,
    pub(super) sender: Sender,
    receiver: Receiver,
    handle: Handle,
    generation: u64,
    run: u128,
    /// The images are being copied for the first time, at once.
    copying: bool,
}

impl<'a> DiskStream<'a> {
    /// Accepts who brings the disk stream of `run`: what it names has to be what is here.
    pub(crate) fn attach(
        caller: Caller,
        disks: &Disks,
        store: &'a Store,
        generation: u64,
        run: u128,
        silence: Duration,
    ) -> Result<Self> {
        if let Err(e) = store.check(&disks.disks) {
            caller.refuse(Kind::Error, &format!("{e:#}"));
            return Err(e);
        }
        let (sender, mut receiver, handle) = caller.accept(generation);
        receiver.set_timeout(silence)?;
        let whole = store.whole().filter(|stamp| stamp.run == run);
        let epoch = whole.map_or(0, |stamp| stamp.epoch);
        sender.send(Kind::DiskState, epoch, &[])?;
        Ok(Self {
            store,
            sender,
            receiver,
            handle,
            generation,
            run,
            copying: false,
        })
    }

    /// Both ways, to be ended from elsewhere.
    pub(crate) fn handle(&self) -> Handle {
        self.handle.clone()
    }

    /// Takes changes in, until the stream ends or makes no sense, or they find no room.
    pub(crate) fn run(mut self) -> Outcome {
        loop {
            let (header, payload) = match next(&mut self.receiver, self.generation) {
                Ok(frame) => frame,
                Err(outcome) => return outcome,
            };
            match self.frame(&header, payload) {
                Ok(()) => {}
                Err(Trouble::Here(e)) => return Outcome::Failed(e),
                Err(Trouble::There(e)) => return Outcome::Nonsense(self.receiver.heard(), e),
                Err(Trouble::Gone) => return Outcome::DataLost("the disk stream ended".into()),
            }
        }
    }

    fn frame(&mut self, header: &Header, payload: Vec<u8>) -> Result<(), Trouble> {
        match (header.kind, header.epoch) {
            (Kind::DiskState, 0) => self.begin_copy(!payload.is_empty()),
            (Kind::DiskState, epoch) => match self.store.whole() {
                Some(stamp) if (stamp.run, stamp.epoch) == (self.run, epoch) => Ok(()),
                _ => Err(there(format!("the disks are not those of epoch {epoch}"))),
            },
            (Kind::DiskChanges, 0) if self.copying => {
                self.store.check_changes(&payload).map_err(Trouble::There)?;
                self.store.copy(&payload).map_err(Trouble::Here)
            }
            (Kind::DiskChanges, 0) => Err(there("changes of a copy that was not begun".into())),
            (Kind::DiskChanges, _) => self.store.stage(payload).map_err(Trouble::There),
            (Kind::DiskSeal, epoch) => {
                self.copying = false;
                self.store.seal(epoch).map_err(Trouble::Here)
            }
            (kind, _) => Err(there(format!("{kind:?} has no place on the disk stream"))),
        }
    }

    /// Takes all that the images lack from now on, at once; tells the primary what they have before, if it
    /// wants to know.
    fn begin_copy(&mut self, tell: bool) -> Result<(), Trouble> {
        self.store
            .begin_copy(self.run, self.generation)
            .map_err(Trouble::Here)?;
        self.copying = true;
        if !tell {
            return Ok(());
        }
        let mut gone = false;
        let told = self.store.sums(&mut |sums| {
            let payload = sums.encode()?;
            let sent = self.sender.send(Kind::DiskSums, 0, &payload);
            gone = sent.is_err();
            sent.map(drop)
        });
        match told {
            Err(_) if gone => return Err(Trouble::Gone),
            other => other.map_err(Trouble::Here)?,
        }
        let done = self.sender.send(Kind::DiskState, 0, &[]);
        done.map(drop).map_err(|_| Trouble::Gone)
    }
}

/// Why changes are not taken.
enum Trouble {
    /// This host cannot hold them.
    Here(Error),
    /// They make no sense.
    There(Error),
    /// The primary is not there any more.
    Gone,
}

fn there(why: String) -> Trouble {
    Trouble::There(anyhow!(why))
}
