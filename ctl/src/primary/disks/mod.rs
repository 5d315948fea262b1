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

#![allow(dead_code)]

pub mod copy;
pub mod mirror;
pub mod queue;
pub mod server;

/// A disk of the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disk {
    /// What it is called on both hosts.
    pub name: String,
    /// QEMU's block node.
    pub node: String,
    /// Bytes.
    pub size: u64,
    /// What the guest discards is discarded on the standby too.
    pub discard: bool,
}
