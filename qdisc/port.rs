// SPDX-License-Identifier: GPL-2.0

//! A port: one network interface of a domain, and the packets that it holds.
//!
//! Packets wait in one queue, in the order of their arrival, each with the epoch that was open then. A
//! commit of epoch N lets the packets at the head go whose epoch is at most N. So a seal, a commit and
//! an abort touch no packet (`core::ledger` has the counts), and a late packet belongs to a later epoch.
//!
//! The first committed packet is handed on by the commit itself. The others follow in batches: from the
//! module's work queue (guest), or by the queue discipline's dequeue, which the work queue sets going
//! (egress).
//!
//! [`State`] is protected by the root lock of the device's queues, which is held anyway when a packet leaves. The
//! open epoch is read under that lock. A seal stores the next epoch first, and takes the lock afterwards
//! ([`Port::sealed`]): once it has, no packet is added to the sealed epoch any more.
//!
//! Lock order: the domain's lock, [`Port::delivery`], then those of [`Instance`].

use crate::{
    abi::{
        netdev::Label,
        qdisc::{
            Caller,
            Enqueued,
            Instance,
            Outgoing,
            Queue,
            Unlocked, //
        },
        skb::{
            Packet,
            PacketQueue, //
        },
        workqueue, //
    },
    core::{
        ledger::{
            Ledger,
            Record,
            Sum, //
        },
        uapi::{
            direction,
            tca, //
        }, //
    },
    domain::{
        Domain,
        Event, //
    },
    refusal::Refusal,
};
use core::num::NonZeroU64;
use kernel::{
    impl_has_work,
    new_mutex,
    new_work,
    prelude::*,
    sync::{
        lock::{
            mutex::MutexBackend,
            Guard, //
        },
        Arc,
        Mutex, //
    },
    time::{
        Instant,
        Monotonic, //
    },
    workqueue::{
        Work,
        WorkItem, //
    }, //
};

/// Packets of a guest are handed on in batches of this many, so that they do not overrun the next
/// device's backlog (`netdev_max_backlog`, 1,000 by default): softirqs run after each.
const BATCH: u64 = 64;

/// Proof that nobody else hands a port's packets on.
type Delivery<'a> = Guard<'a, (), MutexBackend>;

/// Which packets are the guest's output.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Direction {
    /// What the device receives: a guest is behind it.
    Guest,
    /// What the host sends through the device.
    Egress,
}

impl Direction {
    /// Its number in `core::uapi`.
    pub(crate) fn number(self) -> u8 {
        match self {
            Self::Guest => direction::GUEST,
            Self::Egress => direction::EGRESS,
        }
    }
}

/// How much may be held.
#[derive(Clone, Copy)]
pub(crate) struct Limits {
    /// Packets.
    pub(crate) packets: u64,
    /// Bytes of memory that packets take, not of payload.
    pub(crate) bytes: u64,
}

impl Default for Limits {
    /// Of a port, unless `tc` says something else: 0.1 s of 10 Gbit/s in large packets.
    fn default() -> Self {
        Self {
            packets: 65_536,
            bytes: 256 << 20,
        }
    }
}

impl Limits {
    fn half(self) -> Self {
        Self {
            packets: self.packets / 2,
            bytes: self.bytes / 2,
        }
    }

    /// Whether so much is more.
    fn are_passed(self, packets: u64, bytes: u64) -> bool {
        packets > self.packets || bytes > self.bytes
    }
}

/// Packets dropped, by cause.
#[derive(Clone, Copy, Default)]
pub(crate) struct Drops {
    /// Beyond a limit, of the port or of the domain.
    pub(crate) limit: u64,
    /// No memory to make them independent of their sender.
    pub(crate) memory: u64,
    /// Held, and then thrown away.
    pub(crate) discarded: u64,
}

impl Drops {
    /// All of them.
    pub(crate) fn total(&self) -> u64 {
        self.limit + self.memory + self.discarded
    }
}

/// What a port looks like.
#[derive(Default)]
pub(crate) struct View {
    /// Not committed yet.
    pub(crate) held: Sum,
    /// Memory of these, and of what is committed but still here.
    pub(crate) memory: u64,
    pub(crate) drops: Drops,
    pub(crate) limits: Limits,
    pub(crate) hold_last_ns: u64,
    pub(crate) hold_max_ns: u64,
    pub(crate) passing: bool,
}

/// What a port holds. The root lock of its device's queues protects it.
pub(crate) struct State {
    queue: PacketQueue,
    ledger: Ledger<KVVec<Record>>,
    /// Packets in the queue of this epoch, and before it, may go.
    committed: u64,
    /// So many packets at the head of the queue may go although their epoch is open: see [`Port::pass`].
    released: u64,
    /// Thrown away, but the device's queue still counts them.
    discarded: PacketQueue,
    /// Nothing is held: becomes true when what was held before is on its way, and false in a seal that does not
    /// keep it, or when told to. Changes only under the domain's lock, too.
    passing: bool,
    limits: Limits,
    /// What may be held without a closer look: half of the limits; nothing while this port passes or the domain counts.
    easy: Limits,
    drops: Drops,
    hold_last_ns: u64,
    hold_max_ns: u64,
    /// How many packets dequeue may return, of those that may go. The largest number is no limit.
    budget: u64,
    /// What is here is counted for the domain too, which has a limit.
    counted: bool,
    /// What is committed, while that alone decides what dequeue returns: [`Port::look_closer`] finds out. None
    /// as soon as something changes.
    ready: Option<NonZeroU64>,
}

impl Default for State {
    fn default() -> Self {
        Self {
            queue: PacketQueue::new(),
            ledger: Ledger::new(KVVec::new(), 0),
            committed: 0,
            released: 0,
            discarded: PacketQueue::new(),
            passing: false,
            limits: Limits::default(),
            easy: Limits::default().half(),
            drops: Drops::default(),
            hold_last_ns: 0,
            hold_max_ns: 0,
            budget: u64::MAX,
            counted: false,
            ready: None,
        }
    }
}

impl State {
    /// To be called whenever that has changed on which `easy` and `ready` depend.
    fn changed(&mut self) {
        self.ready = None;
        self.easy = if self.passing || self.counted {
            Limits {
                packets: 0,
                bytes: 0,
            }
        } else {
            self.limits.half()
        };
    }

    /// The newest epoch of which the first packet in the queue may go.
    fn due(&self) -> u64 {
        if self.released > 0 {
            u64::MAX
        } else {
            self.committed
        }
    }

    /// Everything may go.
    fn release(&mut self) {
        self.released = self.queue.packets();
        self.ledger.discard();
        self.changed();
    }

    /// The next packet that may go.
    fn pop(&mut self) -> Option<Packet> {
        let packet = self.queue.pop(self.due())?;
        self.released = self.released.saturating_sub(1);
        Some(packet)
    }

    /// The next packets that may go, at most so many.
    fn take(&mut self, most: u64) -> PacketQueue {
        let mut taken = self.queue.take(most.min(self.released), u64::MAX);
        self.released -= taken.packets();
        taken.append(self.queue.take(most - taken.packets(), self.committed));
        taken
    }
}

/// What becomes of a packet.
enum Verdict<R> {
    Held(R),
    Pass(Packet),
    Drop(Packet),
}

/// A port.
#[pin_data]
pub(crate) struct Port {
    domain: Arc<Domain>,
    /// Orders the ports of a domain.
    id: u64,
    direction: Direction,
    instance: Arc<Instance<Self>>,
    created: Instant<Monotonic>,
    /// Held by whoever hands packets of the guest on, so that they leave in order, and none after
    /// [`Port::close`].
    #[pin]
    delivery: Mutex<()>,
    #[pin]
    deliver: Work<Port>,
}

impl_has_work! {
    impl HasWork<Self> for Port { self.deliver }
}

impl WorkItem for Port {
    type Pointer = Arc<Self>;

    fn run(this: Arc<Self>) {
        match this.direction {
            // Somebody else may want to do the same: let go of the lock now and then.
            Direction::Guest => while this.hand_on(&this.delivery.lock(), BATCH) == BATCH {},
            Direction::Egress => {
                let _delivery = this.delivery.lock();
                this.instance.wake();
            }
        }
    }
}

impl Port {
    /// A port that holds everything from now on, or passes everything until the next seal that ends it.
    pub(crate) fn new(
        domain: Arc<Domain>,
        id: u64,
        direction: Direction,
        limits: Limits,
        passing: bool,
        instance: Arc<Instance<Self>>,
    ) -> Result<Arc<Self>, Refusal> {
        let port = Arc::pin_init(
            pin_init!(Self {
                domain,
                id,
                direction,
                instance,
                created: Instant::now(),
                delivery <- new_mutex!((), "remus_delivery"),
                deliver <- new_work!("remus_deliver"),
            }),
            GFP_KERNEL,
        )?;
        port.instance.lock(|queue| {
            queue.state.limits = limits;
            port.set_passing(queue, passing);
        });
        Ok(port)
    }

    /// The domain it is a port of.
    pub(crate) fn domain(&self) -> &Domain {
        &self.domain
    }

    /// Orders the ports of a domain.
    pub(crate) fn id(&self) -> u64 {
        self.id
    }

    /// Which packets it holds.
    pub(crate) fn direction(&self) -> Direction {
        self.direction
    }

    /// Its device, as long as it is there.
    pub(crate) fn label(&self) -> Option<Label> {
        self.instance.label()
    }

    /// Changes how much it may hold; what it holds already stays. Process context.
    pub(crate) fn set_limits(&self, change: impl FnOnce(Limits) -> Limits) {
        self.instance.lock(|queue| {
            queue.state.limits = change(queue.state.limits);
            queue.state.changed();
        });
    }

    /// How it is now: nothing is left once its qdisc is gone. Process context.
    pub(crate) fn view(&self) -> View {
        let view = self.instance.lock(|queue| View {
            held: queue.state.ledger.held(),
            memory: queue.state.queue.memory(),
            drops: queue.state.drops,
            limits: queue.state.limits,
            hold_last_ns: queue.state.hold_last_ns,
            hold_max_ns: queue.state.hold_max_ns,
            passing: queue.state.passing,
        });
        view.unwrap_or_default()
    }

    /// What `tc -s` shows.
    pub(crate) fn stats(&self) -> tca::Stats {
        let view = self.view();
        let (open_epoch, committed_epoch, sealed_epochs) = self.domain.epochs();
        tca::Stats {
            open_epoch,
            committed_epoch,
            sealed_epochs,
            packets: view.held.packets,
            bytes: view.held.bytes,
            memory: view.memory,
            hold_last_ns: view.hold_last_ns,
            hold_max_ns: view.hold_max_ns,
            dropped_limit: view.drops.limit,
            dropped_memory: view.drops.memory,
            dropped_discarded: view.drops.discarded,
            passthrough: view.passing.into(),
            direction: self.direction.number().into(),
        }
    }

    fn now(&self) -> u64 {
        u64::try_from(self.created.elapsed().as_nanos()).unwrap_or(0)
    }

    /// Takes a packet that the device received; returns it if it passes.
    pub(crate) fn take_incoming(
        &self,
        packet: Packet,
        instance: Unlocked<'_, Self>,
    ) -> Option<Packet> {
        instance.lock(|queue| {
            if let Some(epoch) = self.counts_another(queue.state, &packet) {
                queue.state.queue.push(packet, epoch);
                return None;
            }
            match self.hold(queue, packet, |_, _| ()) {
                Verdict::Pass(packet) => Some(packet),
                Verdict::Held(()) | Verdict::Drop(_) => None,
            }
        })
    }

    /// Takes a packet on its way out.
    #[inline]
    pub(crate) fn take_outgoing(
        &self,
        queue: &mut Queue<'_, Self>,
        packet: Outgoing<'_>,
    ) -> Enqueued {
        let (packet, caller) = packet.into_parts();
        match self.counts_another(queue.state, &packet) {
            Some(epoch) => {
                let enqueued = queue.held(&packet);
                queue.state.queue.push(packet, epoch);
                enqueued
            }
            None => self.decide_outgoing(queue.reborrow(), packet, caller),
        }
    }

    /// The same for the packets that need a decision. Apart, so that little is called for the others.
    #[inline(never)]
    fn decide_outgoing(
        &self,
        mut queue: Queue<'_, Self>,
        packet: Packet,
        caller: Caller<'_>,
    ) -> Enqueued {
        match self.hold(&mut queue, packet, |queue, packet| queue.held(packet)) {
            Verdict::Held(enqueued) => enqueued,
            Verdict::Pass(packet) => caller.pass(&queue, packet),
            Verdict::Drop(packet) => caller.drop(&queue, packet),
        }
    }

    /// Counts a packet that is to be held like the one before it: of the same epoch, far from the limits, with data
    /// of its own. Returns that epoch, or nothing for a packet that [`hold`](Self::hold) decides on.
    #[inline]
    fn counts_another(&self, state: &mut State, packet: &Packet) -> Option<u64> {
        // Sums over what is in memory do not overflow.
        let packets = state.queue.packets().wrapping_add(1);
        let bytes = state.queue.memory().wrapping_add(packet.memory().into());
        if state.easy.are_passed(packets, bytes) || !packet.owns_data() {
            return None;
        }
        let epoch = self.domain.open_epoch();
        let counted = state.ledger.hold_another(epoch, packet.len().into());
        counted.then_some(epoch)
    }

    /// Decides on a packet. `account` is called before it is kept.
    fn hold<R>(
        &self,
        queue: &mut Queue<'_, Self>,
        mut packet: Packet,
        account: impl FnOnce(&Queue<'_, Self>, &Packet) -> R,
    ) -> Verdict<R> {
        let state = &mut *queue.state;
        if state.passing {
            return Verdict::Pass(packet);
        }
        if !packet.detach() {
            state.drops.memory += 1;
            return Verdict::Drop(packet);
        }
        let memory = u64::from(packet.memory());
        let (packets, bytes) = (state.queue.packets() + 1, state.queue.memory() + memory);
        if state.easy.are_passed(packets, bytes) && !self.fits(state, packets, bytes, memory) {
            return Verdict::Drop(packet);
        }
        let result = account(queue, &packet);
        let (state, epoch) = (&mut *queue.state, self.domain.open_epoch());
        let first = state.ledger.hold(epoch, packet.len().into(), || self.now());
        state.queue.push(packet, epoch);
        if first {
            self.domain.tell(Event::OutputPending);
        }
        Verdict::Held(result)
    }

    /// Whether the limits allow another packet, of so much memory, which makes it so many. Tells listeners if
    /// not, and well before.
    #[inline(never)]
    fn fits(&self, state: &mut State, packets: u64, bytes: u64, memory: u64) -> bool {
        let limits = state.limits;
        let fits =
            !limits.are_passed(packets, bytes) && (!state.counted || self.domain.take(memory));
        if !fits {
            state.drops.limit += 1;
            self.domain.tell(Event::Overflow);
        } else if limits.half().are_passed(packets, bytes) {
            self.domain.tell(Event::BufferHigh);
        }
        fits
    }

    /// The next packet that may leave: what the host sends past a guest's port, too.
    #[inline]
    pub(crate) fn next_outgoing(&self, queue: &mut Queue<'_, Self>) -> Option<Packet> {
        let Some(epoch) = queue.state.ready else {
            return self.look_closer(queue.reborrow());
        };
        let packet = queue.state.queue.pop(epoch.get())?;
        Some(queue.sent(packet))
    }

    /// The same where more than the epoch of the first packet may matter. Apart, so that
    /// [`next_outgoing`](Self::next_outgoing), which is called twice for each packet, stays short.
    #[inline(never)]
    fn look_closer(&self, queue: Queue<'_, Self>) -> Option<Packet> {
        if self.direction == Direction::Guest {
            return queue.fifo_dequeue();
        }
        if queue.state.budget == 0 {
            return None;
        }
        // What passed came after what is released, and before what is held.
        if queue.state.released == 0 && !queue.fifo_is_empty() {
            return queue.fifo_dequeue();
        }
        let state = &mut *queue.state;
        if state.counted {
            if let Some(memory) = state.queue.first_due(state.due()) {
                self.domain.give(1, memory);
            }
        }
        if !state.passing && !state.counted && state.released == 0 && state.budget == u64::MAX {
            state.ready = NonZeroU64::new(state.committed);
        }
        let packet = state.pop()?;
        if state.budget != u64::MAX {
            state.budget -= 1;
        }
        Some(queue.sent(packet))
    }

    /// So many packets are not here any more.
    fn gone(&self, state: &State, packets: u64, memory: u64) {
        if state.counted {
            self.domain.give(packets, memory);
        }
    }

    /// Counts what is here for the domain too from now on, or not any more. The domain's lock held.
    pub(crate) fn count(&self, counted: bool) {
        self.instance.lock(|queue| {
            let state = &mut *queue.state;
            if state.counted != counted {
                let (packets, memory) = (state.queue.packets(), state.queue.memory());
                if counted {
                    self.domain.add(packets, memory);
                } else {
                    self.domain.give(packets, memory);
                }
                state.counted = counted;
                state.changed();
            }
        });
    }

    /// Makes sure that the next seal has what it needs. Process context; the domain's lock held.
    pub(crate) fn prepare_seal(&self) -> Result<(), Refusal> {
        let wanted = self.instance.lock(|queue| queue.state.ledger.wants_room());
        if let Some(records) = wanted.flatten() {
            let mut room = KVVec::new();
            room.resize(records, Record::default(), GFP_KERNEL)?;
            // The old one is freed after the lock.
            let _old = self.instance.lock(|queue| queue.state.ledger.lend(room));
        }
        Ok(())
    }

    /// `epoch` was sealed, and the domain's next one is stored: from here on no packet is added to it.
    /// Returns what is in it. With `keep`, a port that passes goes on doing so: what it passes is in no epoch.
    pub(crate) fn sealed(&self, epoch: u64, keep: bool) -> Sum {
        let sum = self.instance.lock(|queue| {
            // Protection begins. What passes a moment later has been sent before.
            if !keep {
                self.set_passing(queue, false);
            }
            queue.state.ledger.seal(epoch)
        });
        sum.unwrap_or_default()
    }

    /// All epochs sealed after `newest` were folded into the open one. Their packets stay where they
    /// are: those epochs will not be committed by themselves, only together with the open one (see
    /// `core::epoch`). Returns what was in them.
    pub(crate) fn aborted(&self, newest: u64) -> Sum {
        let sum = self.instance.lock(|queue| queue.state.ledger.abort(newest));
        sum.unwrap_or_default()
    }

    /// Lets the packets up to `epoch` go. Process context; the domain's lock held. Returns what that is:
    /// the first packet leaves now, the others a moment later, in order.
    pub(crate) fn committed(self: &Arc<Self>, epoch: u64) -> Sum {
        let done = self.instance.lock(|queue| {
            let state = &mut *queue.state;
            state.committed = epoch;
            state.changed();
            let (sum, since) = state.ledger.commit(epoch);
            if let Some(since) = since {
                state.hold_last_ns = self.now().saturating_sub(since);
                state.hold_max_ns = state.hold_max_ns.max(state.hold_last_ns);
            }
            (sum, state.queue.first_due(state.due()).is_some())
        });
        let (sum, due) = done.unwrap_or_default();
        if due {
            self.start_handing_on();
        }
        sum
    }

    /// Hands the first packet on that may go, and has the work queue do the rest. Process context; the
    /// domain's lock held.
    fn start_handing_on(self: &Arc<Self>) {
        {
            let delivery = self.delivery.lock();
            match self.direction {
                Direction::Guest => {
                    self.hand_on(&delivery, 1);
                }
                Direction::Egress => {
                    self.set_budget(1);
                    self.instance.wake();
                    self.set_budget(u64::MAX);
                }
            }
        }
        if let Some(queue) = workqueue::queue() {
            // If it is queued already it has not begun, and will see these packets.
            let _ = queue.enqueue(self.clone());
        }
    }

    /// Dequeue returns at most so many packets from now on.
    fn set_budget(&self, packets: u64) {
        self.instance.lock(|queue| {
            queue.state.budget = packets;
            queue.state.changed();
        });
    }

    /// Hands packets of the guest on that may go, at most so many. Returns how many. Process context, may
    /// sleep.
    fn hand_on(&self, _: &Delivery<'_>, most: u64) -> u64 {
        let batch = self.instance.lock(|queue| {
            let batch = queue.state.take(most);
            self.gone(queue.state, batch.packets(), batch.memory());
            batch
        });
        let Some(batch) = batch else {
            return 0;
        };
        let packets = batch.packets();
        if packets > 0 {
            batch.receive();
        }
        packets
    }

    /// Holds nothing any more until a seal ends that, and lets go what the open epoch holds: it is not
    /// protected any more. No epoch is sealed; the domain's lock held. Process context.
    pub(crate) fn pass(self: &Arc<Self>) {
        if self.direction == Direction::Guest {
            // What passes will not wait here, so what waits has to go first. Under more traffic than
            // this can hand on a few packets are overtaken.
            for _ in 0..1024 {
                self.instance.lock(|queue| queue.state.release());
                if self.hand_on(&self.delivery.lock(), BATCH) < BATCH {
                    break;
                }
            }
        }
        self.instance.lock(|queue| {
            queue.state.release();
            self.set_passing(queue, true);
        });
        self.start_handing_on();
    }

    /// While nothing is held, packets need not be queued on their way out.
    fn set_passing(&self, queue: &mut Queue<'_, Self>, passing: bool) {
        queue.state.passing = passing;
        queue.state.changed();
        if self.direction == Direction::Egress {
            queue.set_bypass(passing);
        }
    }

    /// Holds everything from now on. Process context; the domain's lock held.
    pub(crate) fn stop_passing(&self) {
        self.instance.lock(|queue| self.set_passing(queue, false));
    }

    /// Drops, and counts, everything that is not committed. Process context. Returns what that was.
    pub(crate) fn discard(&self) -> Sum {
        let done = self.instance.lock(|queue| {
            let state = &mut *queue.state;
            // What may go already, but is still here.
            let due = state.take(u64::MAX);
            state.released = due.packets();
            state.changed();
            let rest = core::mem::replace(&mut state.queue, due);
            state.drops.discarded += rest.packets();
            self.gone(state, rest.packets(), rest.memory());
            let sum = state.ledger.discard();
            match self.direction {
                Direction::Guest => (sum, Some(rest)),
                Direction::Egress => {
                    state.discarded.append(rest);
                    (sum, None)
                }
            }
        });
        // Those of a guest are freed here, after the lock.
        let (sum, _gone) = done.unwrap_or_default();
        if self.direction == Direction::Egress {
            while self.instance.lock(|queue| self.forget(queue)) == Some(true) {}
        }
        sum
    }

    /// Has the device's queue forget some of what was discarded. Whether there may be more.
    fn forget(&self, queue: &mut Queue<'_, Self>) -> bool {
        for _ in 0..BATCH {
            match queue.state.discarded.pop(u64::MAX) {
                Some(packet) => queue.forget(packet),
                None => return false,
            }
        }
        true
    }

    /// Drops, and counts, everything.
    pub(crate) fn discard_all(&self, queue: &mut Queue<'_, Self>) {
        let state = &mut *queue.state;
        state.ledger.discard();
        state.drops.discarded += state.queue.packets();
        self.gone(state, state.queue.packets(), state.queue.memory());
        state.released = 0;
        state.changed();
        for queue in [&mut state.queue, &mut state.discarded] {
            *queue = PacketQueue::new();
        }
    }

    /// The port leaves its domain: what it holds is dropped, never sent. RTNL held, process context;
    /// nothing is held any more.
    pub(crate) fn close(self: &Arc<Self>) {
        self.instance.lock(|queue| self.discard_all(queue));
        // Whoever hands packets on is done with the device after this, and will find no more.
        drop(self.delivery.lock());
        self.domain.leave(self);
    }
}
