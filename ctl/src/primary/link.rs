// SPDX-License-Identifier: GPL-2.0-or-later

//! The way to a standby that has accepted: a control stream, a data stream, and one for disks.

use std::fmt;
use std::time::{Duration, Instant};

use anyhow::{bail, Context, Result};
use remus_core::uapi::ram::PAGE_SIZE;
use remus_proto::frame::{Hello, Kind, Welcome, HELLO_MAX};

use super::disks::stream::{attach, DiskLink};
use super::lease::Lease;
use super::protect::Plan;
use crate::peer::channel::Channel;
use crate::peer::stream::{Broken, Receiver, Sender};

/// How long the standby may take to answer the first frame: it may still be starting its machine.
const WELCOME: Duration = Duration::from_secs(15);
/// How long the standby may take no data at all.
const STUCK: Duration = Duration::from_secs(30);

/// How a channel to the standby is had.
pub type Connect<'a> = dyn FnMut() -> Result<Channel> + Send + 'a;

/// A standby that has accepted.
pub struct Link {
    /// What is small and must not wait.
    pub control: Sender,
    /// What it answers.
    pub receiver: Receiver,
    /// The epochs.
    pub data: Sender,
    /// How long it is known not to take over.
    pub lease: Lease,
    /// The newest epoch of this run that it holds whole, or 0.
    pub held: u64,
    /// The disks, if there are any.
    pub disks: Option<DiskLink>,
}

/// The standby has become the domain's host: it must not run here any more.
#[derive(Debug)]
pub struct TakenOver(pub String);

impl fmt::Display for TakenOver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for TakenOver {}

/// Introduces `plan` to the standby and waits for its welcome. Nothing was done to the guest yet.
///
/// Errors: it cannot be reached, or refuses; [`TakenOver`].
pub fn introduce(plan: &Plan, connect: &mut Connect<'_>) -> Result<Link> {
    let (reader, writer, handle) = connect()?.split();
    handle.set_write_timeout(Some(STUCK))?;
    let control = Sender::new(writer, &handle, plan.generation);
    let mut receiver = Receiver::new(reader, &handle, plan.timeout.max(WELCOME))?;
    let hello = Hello {
        memory: plan.memory,
        page_size: PAGE_SIZE as u32,
        timeout_ms: u32::try_from(plan.timeout.as_millis()).unwrap_or(u32::MAX),
        run: plan.run,
        name: &plan.domain,
    };
    let mut payload = [0; HELLO_MAX];
    let length = hello.encode(&mut payload)?;
    let asked = Instant::now();
    control.send(Kind::Hello, 0, payload.get(..length).unwrap_or(&[]))?;
    let welcome = loop {
        let (header, payload) = match receiver.next() {
            Err(Broken::Silence(_)) => {
                bail!("the standby does not answer: does it serve another primary already?")
            }
            other => other.context("the standby did not accept")?,
        };
        let text = || String::from_utf8_lossy(&payload).into_owned();
        match header.kind {
            Kind::Heartbeat => {}
            Kind::Welcome => break Welcome::decode(&payload)?,
            Kind::TakenOver => return Err(TakenOver(text()).into()),
            Kind::Error | Kind::Bye => bail!("the standby refuses: {}", text()),
            kind => bail!("the standby answered with {kind:?}"),
        }
    };
    let (_, writer, handle) = connect()?.split();
    // A standby that gives signs of life but takes no data must not block this side for ever.
    handle.set_write_timeout(Some(STUCK))?;
    let data = Sender::new(writer, &handle, plan.generation);
    data.send(Kind::Attach, 0, &welcome.token.encode())?;
    let disks = match plan.disks.as_slice() {
        [] => None,
        disks => Some(attach(
            connect()?,
            plan.generation,
            welcome.token.0,
            disks,
            STUCK,
        )?),
    };
    receiver.set_timeout(plan.timeout)?;
    let timeout = Duration::from_millis(welcome.timeout_ms.into());
    Ok(Link {
        control,
        receiver,
        data,
        lease: Lease::new(asked, timeout),
        held: welcome.held,
        disks,
    })
}
