// SPDX-License-Identifier: GPL-2.0-or-later

//! The disk stream, from the primary's side: introducing the disks, sending their changes, hearing what
//! the standby has.

use std::sync::mpsc::{Receiver as Queued, SyncSender as Sink, TrySendError};
use std::time::Duration;

use anyhow::{bail, Context, Result};
use remus_proto::disk::{Disks as Described, Sums};
use remus_proto::frame::Kind;

use super::copy::Known;
use super::queue::{Cursor, Next, Queue};
use super::Disk;
use crate::peer::channel::Channel;
use crate::peer::stream::{Receiver, Sender};

/// How often who sends looks whether it is over.
const TICK: Duration = Duration::from_millis(100);
/// The standby has nothing to say for as long as the guest writes nothing.
const FOR_EVER: Duration = Duration::from_secs(1 << 24);

/// A standby that has these disks.
pub struct DiskLink {
    /// Where changes go.
    pub sender: Sender,
    /// What the standby says of them.
    pub receiver: Receiver,
    /// The epoch of this run that its images are whole at, or 0.
    pub held: u64,
}

/// Brings the disk stream to a standby that has sent `token`.
pub fn attach(
    channel: Channel,
    generation: u64,
    token: u128,
    disks: &[Disk],
    patience: Duration,
) -> Result<DiskLink> {
    let (reader, writer, handle) = channel.split();
    handle.set_write_timeout(Some(patience))?;
    let sender = Sender::new(writer, &handle, generation);
    let mut receiver = Receiver::new(reader, &handle, patience)?;
    let described = Described {
        token,
        disks: disks.iter().map(|d| (d.name.clone(), d.size)).collect(),
    };
    sender.send(Kind::AttachDisks, 0, &described.encode()?)?;
    let (header, payload) = receiver
        .next()
        .context("the standby did not accept the disks")?;
    match header.kind {
        Kind::DiskState => {}
        Kind::Error => bail!(
            "the standby refuses the disks: {}",
            String::from_utf8_lossy(&payload)
        ),
        kind => bail!("the standby answered to the disks with {kind:?}"),
    }
    receiver.set_timeout(FOR_EVER)?;
    Ok(DiskLink {
        sender,
        receiver,
        held: header.epoch,
    })
}

/// Sends changes, with one cursor after the other, until there are no more cursors.
pub(in crate::primary) fn send(
    queue: &Queue,
    sender: &Sender,
    cursors: &Queued<Cursor>,
    over: impl Fn() -> bool,
) -> Result<()> {
    let mut frame = Vec::new();
    for mut cursor in cursors {
        loop {
            match queue.next(&mut cursor, &mut frame, TICK) {
                Next::Changes(epoch) => {
                    sender.send_in_place(Kind::DiskChanges, epoch, &mut frame)?;
                }
                Next::Seal(epoch) => {
                    sender.send_in_place(Kind::DiskSeal, epoch, &mut frame)?;
                }
                Next::Nothing if over() => return Ok(()),
                Next::Nothing => {}
                Next::Over => break,
            }
        }
    }
    Ok(())
}

/// Hears what the standby says: what its images have before a first copy, which goes to `known` (that has
/// room for it) when it is complete, and how far it is. Returns why it ended.
pub(in crate::primary) fn receive(
    queue: &Queue,
    mut receiver: Receiver,
    disks: &[Disk],
    known: &Sink<Vec<Known>>,
) -> String {
    let nothing = || disks.iter().map(|disk| Known::new(disk.size)).collect();
    let mut learnt: Vec<Known> = nothing();
    loop {
        let (header, payload) = match receiver.next() {
            Ok(frame) => frame,
            Err(e) => return format!("the disk stream ended: {e}"),
        };
        match header.kind {
            Kind::DiskApplied if queue.applied(header.epoch) => {}
            Kind::DiskApplied => {
                let epoch = header.epoch;
                return format!(
                    "it says that it has the disks of epoch {epoch}, which it cannot have"
                );
            }
            Kind::DiskSums => match Sums::decode(&payload) {
                Ok(sums) => {
                    if let Some(known) = learnt.get_mut(usize::from(sums.disk)) {
                        known.learn(sums.first, &sums.sums);
                    }
                }
                Err(e) => return format!("what it says of its disks makes no sense: {e}"),
            },
            Kind::DiskState => {
                let told = known.try_send(std::mem::replace(&mut learnt, nothing()));
                // After the end nobody waits for it, which is no harm.
                if let Err(TrySendError::Full(_)) = told {
                    return "it told twice what its disks have, which makes no sense".into();
                }
            }
            Kind::Error => return format!("it reports: {}", String::from_utf8_lossy(&payload)),
            kind => return format!("it sent {kind:?} on the disk stream, which makes no sense"),
        }
    }
}
