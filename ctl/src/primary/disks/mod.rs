// SPDX-License-Identifier: GPL-2.0-or-later

//! The primary's side of the guest's disks: from QEMU's mirror of each to the disk stream.
//!
//! ```text
//!  QEMU: mirror job ──NBD──▶ nbdkit, our plugin ──▶ server ──▶ queue ──▶ disk stream
//!           ▲                                                    ▲
//!        mirror: starts, watches, resumes                 seal, applied, …: the loop
//! ```
//!
//! | file | holds |
//! |---|---|
//! | [`mirror`] | what is asked of QEMU |
//! | [`server`] | nbdkit, and what its plugin says |
//! | [`queue`] | the changes, in order, until the standby has them |
//! | [`copy`] | what of a first copy need not be sent |
//! | [`stream`] | the disk stream |
//! | `work` | what is done about all this at the pauses of the guest |

pub mod copy;
pub mod mirror;
pub mod queue;
pub mod server;
pub mod stream;
pub(in crate::primary) mod work;

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result};

use self::queue::Queue;
use self::server::Server;
use crate::config;
use crate::host::qmp::Qmp;

/// A disk of the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disk {
    /// What it is called on both hosts.
    pub name: String,
    /// QEMU's block node.
    pub node: String,
    /// Bytes.
    pub size: u64,
}

/// The disks of a guest, while it is protected.
pub struct Disks {
    /// They, in the order in which the standby has them.
    pub list: Vec<Disk>,
    /// Their changes.
    pub queue: Arc<Queue>,
    server: Server,
}

impl Disks {
    /// What QEMU knows of the disks that `configured` names.
    pub fn find(qmp: &mut Qmp, configured: &[config::disk::Disk]) -> Result<Vec<Disk>> {
        let find = |disk: &config::disk::Disk| {
            let size =
                mirror::size(qmp, &disk.node).with_context(|| format!("disk {}", disk.name))?;
            Ok(Disk {
                name: disk.name.clone(),
                node: disk.node.clone(),
                size,
            })
        };
        configured.iter().map(find).collect()
    }

    /// The block nodes that the guest can write to and that are not in `list`: after a take-over they would
    /// be of another moment than the guest.
    pub fn left_out(qmp: &mut Qmp, list: &[Disk]) -> Result<Vec<String>> {
        let known = |node: &str| list.iter().any(|disk| disk.node == node);
        let mut written = mirror::written(qmp)?;
        written.retain(|node| !known(node));
        Ok(written)
    }

    /// Gets ready to hear of what is written to the disks `list` of `domain`, and to hold `bound` bytes of
    /// it. QEMU is not asked for it yet.
    pub fn serve(run_dir: &Path, domain: &str, list: &[Disk], bound: u64) -> Result<Self> {
        let queue = Arc::new(Queue::new(bound));
        Ok(Self {
            server: Server::start(run_dir, domain, list, &queue)?,
            list: list.to_vec(),
            queue,
        })
    }

    /// Process of nbdkit.
    #[cfg(test)]
    pub fn nbdkit(&self) -> u32 {
        self.server.pid()
    }

    /// Has QEMU stop telling of it.
    pub fn end(&self, qmp: Option<&mut Qmp>) -> Result<()> {
        // What is on its way must not wait for room.
        self.queue.track();
        qmp.map_or(Ok(()), mirror::cancel)
    }
}
