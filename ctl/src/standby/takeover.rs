// SPDX-License-Identifier: GPL-2.0-or-later

//! Take-over: the waiting virtual machine becomes the domain.

use std::time::Instant;

use anyhow::{Context, Result};
use serde::Serialize;
use serde_json::json;

use crate::host::kernel::Successor;
use crate::report::trace::ms;
use crate::report::Report;
use crate::say;
use crate::standby::disks::Store;
use crate::standby::serve::Held;

/// How long the phases of a take-over took, in milliseconds.
#[derive(Clone, Debug, Serialize)]
pub struct Phases {
    /// From the primary's last sign of life until its death was noticed.
    pub detect_ms: f64,
    /// Loading the device state.
    pub load_ms: f64,
    /// Closing the images of its disks, for the machine to open them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disks_ms: Option<f64>,
    /// Letting the machine run.
    pub resume_ms: f64,
    /// Having it announce itself.
    pub announce_ms: f64,
    /// The epoch that it goes on from.
    pub epoch: u64,
    /// The new generation of the domain.
    pub generation: u64,
}

/// Resumes from `held`, whose epoch is not 0. The stream to the primary is closed, so that nothing can
/// be acknowledged any more. `heard` is the primary's last sign of life.
///
/// Errors: the machine does not take the state, or does not run; the domain is lost then. That it
/// cannot announce itself is only said.
pub fn take_over(
    successor: &mut dyn Successor,
    held: &Held,
    disks: Option<Store>,
    heard: Instant,
    report: &Report,
) -> Result<Phases> {
    let has_disks = disks.is_some();
    let begin = Instant::now();
    successor
        .load(&held.state)
        .context("cannot load the device state")?;
    let loaded = Instant::now();
    if let Some(disks) = disks {
        disks
            .hand_over()
            .context("cannot close the images of its disks")?;
    }
    let closed = Instant::now();
    successor.resume().context("cannot resume the machine")?;
    let resumed = Instant::now();
    if let Err(e) = successor.announce() {
        say!("the machine runs, but cannot announce itself to the network: {e:#}");
    }
    let announced = Instant::now();
    let phases = Phases {
        detect_ms: ms(begin.saturating_duration_since(heard)),
        load_ms: ms(loaded - begin),
        disks_ms: has_disks.then(|| ms(closed - loaded)),
        resume_ms: ms(resumed - closed),
        announce_ms: ms(announced - resumed),
        epoch: held.epoch,
        generation: held.generation + 1,
    };
    report.event("takeover", json!(phases));
    Ok(phases)
}
