// SPDX-License-Identifier: GPL-2.0-or-later

//! What comes back: the standby's acknowledgements, which allow commits, and the kernel's events.

use std::time::Instant;

use anyhow::{anyhow, Result};
use remus_proto::frame::{Kind, Stamp};

use super::protect::End;
use super::state::{Common, TICK};
use crate::host::events::Event;
use crate::host::kernel::{Hearing, Kernel};
use crate::peer::stream::{lock, Receiver};
use crate::report::live::PageKinds;
use crate::report::trace::ms;
use crate::report::Epoch;

/// Notices when the guest has sent something, or so much that the epoch has to end early.
pub(super) fn listen(common: &Common<'_>, hearing: &mut dyn Hearing) -> Result<()> {
    while lock(&common.state).end.is_none() {
        let Some(event) = hearing.hear(TICK * 5)? else {
            continue;
        };
        let mut state = lock(&common.state);
        match event {
            Event::OutputPending { open_epoch } if open_epoch > state.output => {
                state.output = open_epoch;
                state.output_at = Instant::now();
                let since = state.output_at;
                state.waiting.push_back((open_epoch, since));
            }
            Event::BufferHigh { open_epoch } => state.full = state.full.max(open_epoch),
            // What may have been missed is there now, and not in epochs to come.
            Event::Lost => {
                state.output = state.output.max(state.open);
            }
            Event::DomainGone => {
                state
                    .end
                    .get_or_insert_with(|| End::Failed(anyhow!("the domain was deleted")));
            }
            _ => continue,
        }
        drop(state);
        common.changed.notify_all();
    }
    Ok(())
}

/// Receives what the standby says, and commits what it acknowledges.
pub(super) fn receive_all(
    common: &Common<'_>,
    mut receiver: Receiver,
    committer: &mut dyn Kernel,
) -> End {
    let mut lease = common.lease;
    // Acknowledged and not committed.
    let mut waiting = None;
    loop {
        let (header, payload) = match receiver.next() {
            Ok(frame) => frame,
            Err(e) => return End::PeerLost(e.to_string()),
        };
        common.report.heard();
        let text = || String::from_utf8_lossy(&payload).into_owned();
        match header.kind {
            Kind::Heartbeat | Kind::Ack => match Stamp::decode(&payload) {
                Ok(stamp) => lease.came_back(stamp.0),
                Err(e) => return End::PeerLost(e.to_string()),
            },
            Kind::Resumed => {
                lock(&common.state).resumed = true;
                common.changed.notify_all();
            }
            Kind::Bye => return End::PeerLost(format!("it was ended in good order ({})", text())),
            Kind::Error => {
                lock(&common.state).refused = true;
                return End::PeerLost(format!("it reports: {}", text()));
            }
            kind => return End::PeerLost(format!("it sent {kind:?}, which makes no sense")),
        }
        if header.kind == Kind::Ack {
            let epoch = header.epoch;
            let whole = lock(&common.state)
                .flights
                .iter()
                .any(|f| f.epoch == epoch && f.sent.is_some());
            if !whole || header.generation != common.plan.generation {
                let why = format!("it acknowledged epoch {epoch}, which it cannot have");
                return End::PeerLost(why);
            }
            waiting = Some(epoch);
        }
        // It may have taken over since it acknowledged.
        if lease.holds() && !receiver.is_closed() {
            if let Some(epoch) = waiting.take() {
                if let Err(e) = commit(common, epoch, committer) {
                    return End::Failed(e);
                }
            }
        }
    }
}

/// Commits what the standby has acknowledged.
fn commit(common: &Common<'_>, epoch: u64, committer: &mut dyn Kernel) -> Result<()> {
    let may_commit = lock(&common.may_commit);
    if !*may_commit {
        return Ok(());
    }
    let done = committer.commit(&common.plan.domain, epoch)?;
    let committed = Instant::now();
    let mut state = lock(&common.state);
    state.safe = true;
    while let Some((_, since)) = state.waiting.front().filter(|w| w.0 <= epoch).copied() {
        state.waiting.pop_front();
        state.pacer.held(committed.saturating_duration_since(since));
    }
    while let Some(flight) = state.flights.pop_front() {
        let lag = committed.saturating_duration_since(flight.sealed);
        // The kernel counts the packets of all that it commits together.
        let packets = if flight.epoch == epoch {
            done.packets
        } else {
            0
        };
        let sent = flight.sent.unwrap_or_default();
        common.report.epoch(&Epoch {
            epoch: flight.epoch,
            interval_ms: flight.interval.map(ms),
            pause_ms: ms(flight.pause),
            stop_ms: ms(flight.stop),
            seal_ms: ms(flight.seal),
            copy_ms: ms(flight.copy),
            save_ms: ms(flight.save),
            cont_ms: ms(flight.cont),
            dirty_pages: flight.dirty_pages,
            bytes: sent.bytes,
            packets,
            commit_lag_ms: ms(lag),
            in_flight: state.flights.len() as u64,
            limited_by: flight.limited_by,
            read_ms: ms(sent.read),
            encode_ms: ms(sent.encode),
            send_ms: ms(sent.send),
            kinds: PageKinds {
                zero: sent.counts.zero,
                unchanged: sent.counts.unchanged,
                delta: sent.counts.delta,
                packed: sent.counts.packed,
                lz4: sent.counts.lz4,
                raw: sent.counts.raw,
            },
        });
        if flight.epoch == epoch {
            break;
        }
    }
    drop(state);
    common.changed.notify_all();
    Ok(())
}
