// SPDX-License-Identifier: GPL-2.0-or-later

//! Protection beyond one connection: a standby that is lost is looked for until it is there again, and
//! then protection goes on where it was, if the standby still holds that, or from the start.

use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;
use serde_json::json;

use super::link::{introduce, Connect, Link, TakenOver};
use super::protect::{run, End, Parts, Plan};
use crate::args::Loss;
use crate::commands::domain;
use crate::host::kernel::Kernel;
use crate::peer::stream::lock;
use crate::report::live::Ask;
use crate::report::service;
use crate::say;

/// How often to look for a standby that is lost.
const AGAIN: Duration = Duration::from_secs(1);
/// How often to look for signals and orders meanwhile.
const TICK: Duration = Duration::from_millis(50);

/// Protects until something ends that for good.
pub fn keep(
    plan: &Plan,
    parts: &mut Parts,
    connect: &mut Connect<'_>,
    first: Link,
    on_loss: Loss,
) -> End {
    let (mut link, mut pace) = (first, plan.pace);
    loop {
        let end = match settle(plan, parts, link.held) {
            Ok(held) => {
                if let (Some(disks), Some(link)) = (&parts.disks, &link.disks) {
                    disks.queue.unseal(held.max(link.held));
                }
                link.held = held;
                let mut live = lock(parts.report.live());
                live.state = "replicating".into();
                live.alone = false;
                drop(live);
                run(plan, parts, link, &mut pace)
            }
            Err(e) => End::Failed(e),
        };
        let End::PeerLost(why) = end else {
            return end;
        };
        if let Some(disks) = &parts.disks {
            disks.queue.lost();
        }
        let epoch = lock(parts.report.live()).epoch;
        parts
            .report
            .event("standby-lost", json!({"reason": why, "epoch": epoch}));
        say!(
            "the standby of {} is lost after epoch {epoch}: {why}; the guest runs on, and {}; looking for a standby",
            plan.domain,
            match on_loss {
                Loss::Hold => "what it sends is held",
                Loss::Continue => "what it sends passes unprotected",
            }
        );
        {
            let mut live = lock(parts.report.live());
            live.alone = on_loss == Loss::Continue;
            live.state = match on_loss {
                Loss::Hold => "standby-lost".into(),
                Loss::Continue => "alone".into(),
            };
            live.in_flight = None;
        }
        service::status("looking for a standby");
        if on_loss == Loss::Continue {
            if let Err(e) = release(plan, parts.committer.as_mut()) {
                return End::Failed(e);
            }
        }
        link = match regain(plan, parts, connect, &mut pace) {
            Ok(link) => link,
            Err(end) => return end,
        };
        service::status("there is a standby again");
        let from = link.held;
        parts.report.event("standby-found", json!({"held": from}));
        match from {
            0 => say!("a standby of {} is here: copying all of it", plan.domain),
            _ => say!(
                "the standby of {} is here again, with epoch {from}: going on",
                plan.domain
            ),
        }
    }
}

/// Takes back the epochs that the standby does not hold. Returns the newest that it does.
fn settle(plan: &Plan, parts: &mut Parts, held: u64) -> Result<u64> {
    let kernel = parts.committer.as_mut();
    let now = kernel.get(&plan.domain)?;
    let held = if held >= now.committed_epoch && held < now.open_epoch {
        held
    } else {
        0
    };
    // What it holds beyond the last commit is committed with the next that it acknowledges.
    if now.sealed_epochs > 0 {
        domain::abort_after(kernel, &now, held);
    }
    Ok(held)
}

/// Lets pass what the guest sends.
fn release(plan: &Plan, kernel: &mut dyn Kernel) -> Result<()> {
    domain::abort_all(kernel, &plan.domain)?;
    kernel.set_passthrough(&plan.domain, true)
}

/// Looks for a standby until there is one, or something ends this.
fn regain(
    plan: &Plan,
    parts: &mut Parts,
    connect: &mut Connect<'_>,
    pace: &mut super::pace::Pace,
) -> Result<Link, End> {
    let mut refused = String::new();
    loop {
        match introduce(plan, connect) {
            Ok(link) => return Ok(link),
            Err(e) => match e.downcast::<TakenOver>() {
                Ok(TakenOver(why)) => return Err(End::TakenOver(why)),
                Err(e) => {
                    let why = format!("{e:#}");
                    if why != refused {
                        say!("no standby of {} yet: {why}", plan.domain);
                        refused = why;
                    }
                }
            },
        }
        let next = Instant::now() + AGAIN;
        while Instant::now() < next {
            parts.report.alive();
            if parts.stop.load(Ordering::Relaxed) {
                return Err(End::Asked);
            }
            while let Ok(order) = parts.orders.try_recv() {
                let answer = match order.ask {
                    Ask::Pace(new) => {
                        *pace = new;
                        Ok(format!("an epoch ends {new} once there is a standby"))
                    }
                    Ask::Unprotect => {
                        let _ = order.reply.send(Ok("protection ends".into()));
                        return Err(End::Asked);
                    }
                    Ask::Failover => Err("there is no standby at the moment".into()),
                };
                let _ = order.reply.send(answer);
            }
            thread::sleep(TICK);
        }
        if let Some(why) = parts.guest.ended() {
            return Err(End::GuestEnded(why));
        }
        // A machine that has crashed ends it too.
        if let Err(e) = parts.guest.runs() {
            return Err(End::Failed(e));
        }
    }
}
