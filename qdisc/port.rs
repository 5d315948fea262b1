// SPDX-License-Identifier: GPL-2.0

//! A port: one network interface of a domain, and the packets that it holds.
//!
//! Packets wait in one queue, in the order of their arrival, each with the epoch that was open then.
//! A commit of epoch N lets go of the packets at the head whose epoch is at most N. So a seal and an
//! abort change no packet, and a late packet belongs to a later epoch.
//!
//! The open epoch is read under the queue's lock. A seal stores the next epoch first, and takes that
//! lock afterwards ([`Port::sealed`]): once it has, no packet is added to the sealed epoch any more.
//!
//! Lock order: the domain's lock or the root lock of the device's queues, then the queue's.

use crate::{
    abi::{
        lock::SpinLockBh,
        qdisc::{
            Enqueued,
            Outgoing,
            Queue,
            Waker, //
        },
        skb::{
            Packet,
            PacketQueue, //
        },
    },
    domain::Domain,
    refusal::Refusal,
};
use kernel::{
    prelude::*,
    sync::Arc, //
};

/// Released packets are handed on in batches of this many, so that they do not overrun the next
/// device's backlog (`netdev_max_backlog`, 1,000 by default): softirqs run after each.
const BATCH: usize = 64;

/// Which packets are the guest's output.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Direction {
    /// What the device receives: a guest is behind it.
    Guest,
    /// What the host sends through the device.
    Egress,
}

/// How much a port may hold.
#[derive(Clone, Copy)]
pub(crate) struct Limits {
    /// Packets.
    pub(crate) packets: u64,
    /// Bytes of memory that packets take, not of payload.
    pub(crate) bytes: u64,
}

impl Limits {
    /// Unless `tc` says something else: 0.1 s of 10 Gbit/s in large packets.
    pub(crate) const DEFAULT: Self = Self {
        packets: 65_536,
        bytes: 256 << 20,
    };
}

/// What a port holds.
pub(crate) struct Held {
    pub(crate) packets: u64,
    pub(crate) bytes: u64,
    pub(crate) dropped: u64,
}

struct State {
    queue: PacketQueue,
    /// The newest epoch of which packets were counted, its packets and bytes in the queue, and those
    /// of the one before.
    newest: u64,
    open: (u64, u64),
    before: (u64, u64),
    /// On the way out, and committed.
    released: PacketQueue,
    limits: Limits,
    dropped: u64,
    closed: bool,
}

impl State {
    fn hold(&mut self, packet: Packet, epoch: u64) {
        if epoch != self.newest {
            self.newest = epoch;
            self.before = core::mem::take(&mut self.open);
        }
        self.open.0 += 1;
        self.open.1 += u64::from(packet.len());
        self.queue.push(packet, epoch);
    }

    fn has_room(&self, packet: &Packet) -> bool {
        !self.closed
            && self.queue.packets() + self.released.packets() < self.limits.packets
            && self.queue.memory() + self.released.memory() + u64::from(packet.memory())
                <= self.limits.bytes
    }
}

/// A port.
#[pin_data]
pub(crate) struct Port {
    domain: Arc<Domain>,
    direction: Direction,
    waker: Arc<Waker>,
    #[pin]
    state: SpinLockBh<State>,
}

impl Port {
    /// A port that holds everything from now on.
    pub(crate) fn new(
        domain: Arc<Domain>,
        direction: Direction,
        limits: Limits,
        waker: Arc<Waker>,
    ) -> Result<Arc<Self>, Refusal> {
        let state = State {
            queue: PacketQueue::new(),
            newest: 0,
            open: (0, 0),
            before: (0, 0),
            released: PacketQueue::new(),
            limits,
            dropped: 0,
            closed: false,
        };
        Ok(Arc::pin_init(
            pin_init!(Self {
                domain,
                direction,
                waker,
                state <- SpinLockBh::new(
                    state,
                    c"remus_port",
                    kernel::static_lock_class!(),
                ),
            }),
            GFP_KERNEL,
        )?)
    }

    /// The domain it is a port of.
    pub(crate) fn domain(&self) -> &Domain {
        &self.domain
    }

    /// Which packets it holds.
    pub(crate) fn direction(&self) -> Direction {
        self.direction
    }

    /// How much it may hold.
    pub(crate) fn limits(&self) -> Limits {
        self.state.lock().limits
    }

    /// Changes how much it may hold; what it holds already stays.
    pub(crate) fn set_limits(&self, limits: Limits) {
        self.state.lock().limits = limits;
    }

    /// What it holds now.
    pub(crate) fn held(&self) -> Held {
        let state = self.state.lock();
        Held {
            packets: state.queue.packets(),
            bytes: state.queue.bytes(),
            dropped: state.dropped,
        }
    }

    /// Holds a packet that the device received. Softirqs are off.
    pub(crate) fn hold_incoming(&self, mut packet: Packet) {
        let detached = packet.detach();
        let mut state = self.state.lock();
        if detached && state.has_room(&packet) {
            let epoch = self.domain.open_epoch();
            state.hold(packet, epoch);
        } else {
            state.dropped += 1;
        }
    }

    /// Holds a packet on its way out. Root lock held. Its socket does not account for it any more: it
    /// would be stuck for an epoch, and would keep its namespace.
    pub(crate) fn hold_outgoing(&self, queue: &Queue<'_>, mut packet: Outgoing<'_>) -> Enqueued {
        let detached = packet.packet().detach();
        let mut state = self.state.lock();
        if !detached || !state.has_room(packet.packet()) {
            state.dropped += 1;
            return packet.drop(queue);
        }
        let enqueued = queue.held(packet.packet());
        let epoch = self.domain.open_epoch();
        state.hold(packet.into_packet(), epoch);
        enqueued
    }

    /// The next packet that may leave. Root lock held.
    pub(crate) fn next_released(&self) -> Option<Packet> {
        self.state.lock().released.pop(u64::MAX)
    }

    /// `epoch` was sealed, and the domain's next one is stored: from here on no packet is added to it.
    /// Returns how many packets and bytes are in it.
    pub(crate) fn sealed(&self, epoch: u64) -> (u64, u64) {
        let mut state = self.state.lock();
        if state.newest > epoch {
            // A packet of the next epoch was faster.
            core::mem::take(&mut state.before)
        } else {
            state.newest = epoch + 1;
            core::mem::take(&mut state.open)
        }
    }

    /// All epochs sealed after `newest` were folded into the open one. Their packets stay where they
    /// are: those epochs will not be committed by themselves, only together with the open one (see
    /// `core::epoch`). Returns how many packets and bytes were in them.
    pub(crate) fn aborted(&self, newest: u64) -> (u64, u64) {
        let mut state = self.state.lock();
        let (packets, bytes) = state.queue.count_after(newest);
        let before = core::mem::replace(&mut state.open, (packets, bytes));
        (packets - before.0.min(packets), bytes - before.1.min(bytes))
    }

    /// Lets go of the packets up to `epoch`. Process context, may sleep. Returns how many packets
    /// and bytes that were.
    pub(crate) fn release(&self, epoch: u64) -> (u64, u64) {
        let (mut packets, mut bytes) = (0, 0);
        loop {
            let batch = self.take(epoch);
            if batch.packets() == 0 {
                break;
            }
            packets += batch.packets();
            bytes += batch.bytes();
            match self.direction {
                Direction::Guest => batch.receive(),
                Direction::Egress => self.state.lock().released.append(batch),
            }
        }
        if self.direction == Direction::Egress {
            self.waker.wake();
        }
        (packets, bytes)
    }

    /// Takes a batch of packets up to `epoch` out.
    fn take(&self, epoch: u64) -> PacketQueue {
        let mut batch = PacketQueue::new();
        let mut state = self.state.lock();
        for _ in 0..BATCH {
            match state.queue.pop(epoch) {
                Some(packet) => batch.push(packet, epoch),
                None => break,
            }
        }
        batch
    }

    /// Drops, and counts, everything that is held.
    pub(crate) fn discard(&self) {
        let gone = {
            let mut state = self.state.lock();
            state.dropped += state.queue.packets() + state.released.packets();
            (state.open, state.before) = ((0, 0), (0, 0));
            (
                core::mem::replace(&mut state.queue, PacketQueue::new()),
                core::mem::replace(&mut state.released, PacketQueue::new()),
            )
        };
        drop(gone);
    }

    /// The port leaves its domain: what it holds is dropped, never sent. RTNL held.
    pub(crate) fn close(self: &Arc<Self>) {
        self.state.lock().closed = true;
        self.domain.leave(self);
        self.discard();
    }
}
