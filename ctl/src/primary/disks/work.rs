// SPDX-License-Identifier: GPL-2.0-or-later

//! What the thread that stops the guest does with its disks.

use std::sync::mpsc::{channel, sync_channel, Receiver as Queued, Sender as Sink, TryRecvError};
use std::sync::Arc;
use std::thread::Scope;

use anyhow::{bail, Context, Result};
use remus_proto::frame::Kind;

use super::copy::Known;
use super::mirror;
use super::queue::{Cursor, Through};
use super::stream::{self, DiskLink};
use super::Disks;
use crate::host::qmp::Qmp;
use crate::peer::stream::{lock, Sender};
use crate::primary::state::Common;
use crate::threads::spawn;

/// The disks of a guest, for as long as one connection lasts.
pub(in crate::primary) struct DiskWork<'a> {
    /// They.
    pub(in crate::primary) disks: &'a mut Disks,
    /// The disk stream.
    pub(in crate::primary) sender: Sender,
    /// The epoch of this run that the standby's images are whole at, or 0.
    pub(in crate::primary) held: u64,
    /// What the standby's images have, once it has told.
    pub(in crate::primary) known: Queued<Vec<Known>>,
    /// Where who sends gets its cursors.
    pub(in crate::primary) cursors: Sink<Cursor>,
}

/// How far a first copy is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(in crate::primary) enum Stage {
    /// The standby reads what it has.
    Comparing,
    /// So many bytes are done, of so many.
    Copying { done: u64, total: u64 },
    /// Whatever the guest writes is on its way.
    Synced,
}

impl<'a> DiskWork<'a> {
    /// Starts the threads of the disk stream. They end when that ends and what is returned is dropped.
    pub(in crate::primary) fn start<'scope>(
        scope: &'scope Scope<'scope, '_>,
        common: &'scope Common<'scope>,
        disks: &'a mut Disks,
        link: DiskLink,
    ) -> Result<Self> {
        let (told, known) = sync_channel(1);
        let (cursors, to_send) = channel();
        let DiskLink {
            sender,
            receiver,
            held,
        } = link;
        let (queue, stream) = (Arc::clone(&disks.queue), sender.clone());
        let over = || lock(&common.state).end.is_some();
        let sending = move || {
            if let Err(e) = stream::send(&queue, &stream, &to_send, over) {
                common.lost(format!("{e:#}"));
            }
        };
        let (queue, list) = (Arc::clone(&disks.queue), disks.list.clone());
        let hearing = move || common.lost(stream::receive(&queue, receiver, &list, &told));
        spawn(scope, "disk sender", sending)?;
        spawn(scope, "disk receiver", hearing)?;
        Ok(Self {
            disks,
            sender,
            held,
            known,
            cursors,
        })
    }

    /// Goes on where the standby is, if what it lacks is all here. Whether that is so.
    pub(in crate::primary) fn go_on(&self) -> Result<bool> {
        let cursor = match self.held {
            0 => None,
            held => self.disks.queue.resume(held),
        };
        let Some(cursor) = cursor else {
            return Ok(false);
        };
        self.sender.send(Kind::DiskState, self.held, &[])?;
        let _ = self.cursors.send(cursor);
        Ok(true)
    }

    /// Begins a copy: of what was missed while there was no standby if that is known, else of all, which
    /// goes on when the standby has told what it has.
    pub(in crate::primary) fn begin(&mut self, qmp: &mut Qmp) -> Result<Stage> {
        let queue = &self.disks.queue;
        let missed = match self.held {
            0 => None,
            held => queue.copy_on(held),
        };
        if let Some(cursor) = missed {
            self.sender.send(Kind::DiskState, 0, &[])?;
            let _ = self.cursors.send(cursor);
            return self.copied(qmp);
        }
        queue.track();
        mirror::cancel(qmp)?;
        self.sender.send(Kind::DiskState, 0, &[1])?;
        Ok(Stage::Comparing)
    }

    /// How far it is; goes on with what comes next.
    pub(in crate::primary) fn advance(&mut self, stage: Stage, qmp: &mut Qmp) -> Result<Stage> {
        if stage != Stage::Comparing {
            return self.copied(qmp);
        }
        match self.known.try_recv() {
            Ok(known) => {
                let _ = self.cursors.send(self.disks.queue.copy(known));
                for disk in &self.disks.list {
                    mirror::start(qmp, disk, self.disks.server.socket())?;
                }
                self.copied(qmp)
            }
            Err(TryRecvError::Empty | TryRecvError::Disconnected) => Ok(stage),
        }
    }

    /// How far the mirrors are. Those that an error has stopped go on, with what they have missed: until
    /// now nothing was taken, or QEMU hears only now of that.
    fn copied(&mut self, qmp: &mut Qmp) -> Result<Stage> {
        if let Some(status) = self.disks.server.ended()? {
            bail!(
                "nbdkit, which takes the changes of the disks from QEMU, ended ({status}): protect the guest again"
            );
        }
        let states = mirror::states(qmp, &self.disks.list)?;
        for (disk, state) in self.disks.list.iter().zip(&states) {
            if state.stopped {
                mirror::resume(qmp, disk)?;
            }
        }
        if states.iter().all(|state| state.synced) {
            return Ok(Stage::Synced);
        }
        Ok(Stage::Copying {
            done: states.iter().map(|s| s.done).sum(),
            total: states.iter().map(|s| s.total).sum(),
        })
    }

    /// So much is held that an epoch should end.
    pub(in crate::primary) fn is_full(&self) -> bool {
        self.disks.queue.is_half_full()
    }

    /// While this is held, the guest can be paused.
    pub(in crate::primary) fn let_through(&self) -> Through<'_> {
        self.disks.queue.let_through()
    }

    /// Ends `epoch` of the disks. The guest stands still.
    pub(in crate::primary) fn seal(&self, epoch: u64, qmp: &mut Qmp) -> Result<()> {
        let states = mirror::states(qmp, &self.disks.list)?;
        let lost = self.disks.list.iter().zip(&states).find(|(_, s)| !s.synced);
        if let Some((disk, _)) = lost {
            bail!(
                "disk {} is not mirrored any more (was nbdkit ended?): protect the guest again",
                disk.name
            );
        }
        self.disks.queue.seal(epoch);
        Ok(())
    }
}

/// QEMU of a guest that has disks.
pub(in crate::primary) fn qemu(qmp: Option<&mut Qmp>) -> Result<&mut Qmp> {
    qmp.context("only QEMU's disks can be replicated")
}
