// SPDX-License-Identifier: GPL-2.0-or-later

//! The primary's loop, for as long as one connection to the standby lasts.
//!
//! ```text
//!  epochs         pause → seal N → save device state → resume, at the pace asked for
//!                        │ job, at most `depth` of them
//!  pipeline              └─▶ read the pages of N, encode, send them, the state, the end of N
//!  disks          what the guest's disks were changed by, up to N, on a stream of its own
//!  commits        ack N ─▶ commit N ─▶ trace
//!  heartbeat      a sign of life, whatever the others do
//! ```
//!
//! Whatever fails, the guest is let run again, and no epoch is committed that the standby has not
//! acknowledged: packets that wait stay held.

use std::collections::VecDeque;
use std::fmt;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::Receiver as Queue;
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Error;
use remus_proto::frame::Kind;

use super::commits::{listen, receive_all};
use super::disks::work::DiskWork;
use super::disks::{Disk, Disks};
use super::epochs::Epochs;
use super::link::Link;
use super::pace::{Pace, Pacer};
use super::pipeline::{self, Batches, Encoding};
use super::state::{Common, State};
use crate::host::kernel::{Guest, Hearing, Kernel, Pages};
use crate::peer::stream::{lock, Heartbeat};
use crate::report::live::Order;
use crate::report::Report;
use crate::threads::spawn;

/// What is to be done.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The domain.
    pub domain: String,
    /// Bytes of its memory.
    pub memory: u64,
    /// Its generation.
    pub generation: u64,
    /// A random number of this process.
    pub run: u128,
    /// When to end epochs, to begin with.
    pub pace: Pace,
    /// Silence after which the standby counts as dead.
    pub timeout: Duration,
    /// Most epochs that may wait for the standby.
    pub depth: usize,
    /// How pages are encoded.
    pub encoding: Encoding,
    /// Copy the pages while the guest stands still, as plain Remus does.
    pub copy_in_pause: bool,
    /// Its disks.
    pub disks: Vec<Disk>,
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
    /// Its disks, if it has any.
    pub disks: Option<Disks>,
    /// Tells of output; without it, it is assumed all the time.
    pub hearing: Option<Box<dyn Hearing>>,
    /// What is said of it elsewhere.
    pub report: Report,
    /// What somebody wants of it while it runs.
    pub orders: Queue<Order>,
    /// Set from outside to end it in good order; checked every few milliseconds.
    pub stop: Arc<AtomicBool>,
}

/// How protection, or a connection, ended. The guest runs on, or has ended, and what it sent and is not
/// committed stays held.
#[derive(Debug)]
pub enum End {
    /// Somebody asked for it.
    Asked,
    /// The guest was shut down; the reason.
    GuestEnded(String),
    /// The standby is lost; how that was noticed.
    PeerLost(String),
    /// The standby has become the domain's host without being asked to; what it says.
    TakenOver(String),
    /// The guest was handed over and runs on the standby; it is paused here.
    HandedOver,
    /// The guest was handed over, but nobody knows whether it runs there; it is paused here.
    Unconfirmed(String),
    /// Something on this host failed.
    Failed(Error),
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Asked => f.write_str("asked to"),
            Self::GuestEnded(why) => write!(f, "the guest was shut down ({why})"),
            Self::PeerLost(why) => write!(f, "the standby is lost: {why}"),
            Self::TakenOver(why) => write!(f, "the standby has taken over: {why}"),
            Self::HandedOver => f.write_str("handed over"),
            Self::Unconfirmed(why) => write!(f, "handed over without an answer: {why}"),
            Self::Failed(e) => write!(f, "{e:#}"),
        }
    }
}

/// Protects the guest until something ends that, or the connection. `pace` is what was last asked for.
pub fn run(plan: &Plan, parts: &mut Parts, link: Link, pace: &mut Pace) -> End {
    let Link {
        control,
        receiver,
        data,
        lease,
        held,
        disks,
    } = link;
    let common = Common {
        plan,
        state: Mutex::new(State {
            pacer: Pacer::new(*pace),
            flights: VecDeque::new(),
            end: None,
            // With disks, once these are known to be whole too.
            safe: held > 0 && disks.is_none(),
            passed: 0,
            pass: None,
            open: 0,
            output: 0,
            output_at: Instant::now(),
            full: 0,
            waiting: VecDeque::new(),
            handing_over: false,
            resumed: false,
            refused: false,
        }),
        changed: Condvar::new(),
        may_commit: Mutex::new(true),
        control: control.clone(),
        lease,
        report: &parts.report,
    };
    let heartbeat = match Heartbeat::start(control.clone(), plan.timeout, move || lease.stamp()) {
        Ok(heartbeat) => heartbeat,
        Err(e) => return End::Failed(e),
    };
    let ends_disks = disks.as_ref().map(|link| link.sender.clone());
    let of_disks = parts.disks.as_mut().zip(disks);
    let mut epochs = Epochs {
        common: &common,
        guest: parts.guest.as_mut(),
        disks: None,
        sealer: parts.sealer.as_mut(),
        copier: None,
        orders: &parts.orders,
        stop: &parts.stop,
        knows_output: parts.hearing.is_some(),
    };
    let (pages, committer) = (parts.pages.as_mut(), parts.committer.as_mut());
    let hearing = parts.hearing.as_deref_mut();
    let common = &common;
    thread::scope(|scope| {
        let ended = (data.clone(), ends_disks.clone());
        let receiving = move || {
            common.end(receive_all(common, receiver, committer));
            // Nothing that is sent now is of use, and whoever waits to send it must not wait on.
            common.control.shutdown();
            ended.0.shutdown();
            if let Some(disks) = ended.1 {
                disks.shutdown();
            }
        };
        let listening = move || {
            if let Some(hearing) = hearing {
                if let Err(e) = listen(common, hearing) {
                    common.end(End::Failed(e));
                }
            }
        };
        let reader = if plan.copy_in_pause {
            epochs.copier = Some(Batches::new(pages));
            None
        } else {
            Some(Batches::new(pages))
        };
        let started = pipeline::start(scope, reader, data.clone(), plan.encoding, common);
        let spawned = started.and_then(|jobs| {
            spawn(scope, "receiver", receiving)?;
            spawn(scope, "output", listening)?;
            if let Some((disks, link)) = of_disks {
                epochs.disks = Some(DiskWork::start(scope, common, disks, link)?);
            }
            Ok(jobs)
        });
        match spawned {
            Ok(jobs) => epochs.run(held, jobs),
            Err(e) => common.end(End::Failed(e)),
        }
        // Whoever waits for what it has to say need not any more.
        epochs.disks = None;
        common.changed.notify_all();
        // The standby must not take over after an end in good order, and must at once after a failure.
        let last = match &lock(&common.state).end {
            Some(End::Asked) => Some((Kind::Bye, "protection was ended on the primary".to_owned())),
            Some(End::GuestEnded(why)) => {
                Some((Kind::Bye, format!("the guest was shut down ({why})")))
            }
            Some(End::Failed(e)) => Some((Kind::Error, format!("{e:#}"))),
            _ => None,
        };
        if let Some((kind, why)) = last {
            // The standby may take over as soon as it reads this.
            *lock(&common.may_commit) = false;
            let _ = control.send(kind, 0, why.as_bytes());
        }
        control.shutdown();
        data.shutdown();
        if let Some(disks) = ends_disks {
            disks.shutdown();
        }
    });
    drop(heartbeat);
    let mut state = lock(&common.state);
    *pace = state.pacer.pace();
    state.end.take().unwrap_or(End::Asked)
}
