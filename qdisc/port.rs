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
//! The open epoch is read under the lock of `State`. A seal stores the next epoch first, and takes that
//! lock afterwards ([`Port::sealed`]): once it has, no packet is added to the sealed epoch any more.
//!
//! Lock order: the domain's lock, [`Port::delivery`], the waker's, the root lock of the device's queues,
//! then that of `State`.

use crate::{
    abi::{
        lock::{
            SoftirqsOff,
            SpinLockBh, //
        },
        netdev::Label,
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
use kernel::{
    impl_has_work,
    new_mutex,
    new_work,
    prelude::*,
    sync::{
        atomic::{
            Acquire,
            Atomic,
            Full,
            Release, //
        },
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

impl Limits {
    /// Of a port, unless `tc` says something else: 0.1 s of 10 Gbit/s in large packets.
    pub(crate) const DEFAULT: Self = Self {
        packets: 65_536,
        bytes: 256 << 20,
    };
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

struct State {
    queue: PacketQueue,
    ledger: Ledger<KVVec<Record>>,
    /// Packets in the queue of this epoch, and before it, may go.
    committed: u64,
    /// On the way out although their epoch is open: see [`Port::pass`]. Before all in `queue`.
    released: PacketQueue,
    limits: Limits,
    drops: Drops,
    hold_last_ns: u64,
    hold_max_ns: u64,
    /// How many packets dequeue may return, of those that may go.
    budget: usize,
    /// What is here is counted for the domain too, which has a limit.
    counted: bool,
    closed: bool,
}

impl State {
    fn packets(&self) -> u64 {
        self.queue.packets() + self.released.packets()
    }

    fn memory(&self) -> u64 {
        self.queue.memory() + self.released.memory()
    }

    /// Whether a packet may go.
    fn is_due(&self) -> bool {
        self.released.is_due(u64::MAX) || self.queue.is_due(self.committed)
    }

    /// The next packet that may go.
    fn pop(&mut self) -> Option<Packet> {
        let packet = self.released.pop(u64::MAX);
        packet.or_else(|| self.queue.pop(self.committed))
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
    waker: Arc<Waker>,
    created: Instant<Monotonic>,
    /// Nothing is held. Becomes true with `state` locked, so that what is held before goes first; becomes
    /// false in a seal, or when told to, and only under the domain's lock.
    passing: Atomic<bool>,
    /// A packet may go, to save dequeue the lock as long as none may: it is called for each packet that
    /// is held. Changes with `state` locked.
    due: Atomic<bool>,
    /// Held by whoever hands packets of the guest on, so that they leave in order, and none after
    /// [`Port::close`].
    #[pin]
    delivery: Mutex<()>,
    #[pin]
    state: SpinLockBh<State>,
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
                this.waker.wake();
            }
        }
    }
}

impl Port {
    /// A port that holds everything from now on, or passes everything until the next seal.
    pub(crate) fn new(
        domain: Arc<Domain>,
        id: u64,
        direction: Direction,
        limits: Limits,
        passing: bool,
        waker: Arc<Waker>,
    ) -> Result<Arc<Self>, Refusal> {
        let state = State {
            queue: PacketQueue::new(),
            ledger: Ledger::new(KVVec::new(), domain.open_epoch()),
            committed: 0,
            released: PacketQueue::new(),
            limits,
            drops: Drops::default(),
            hold_last_ns: 0,
            hold_max_ns: 0,
            budget: usize::MAX,
            counted: false,
            closed: false,
        };
        Ok(Arc::pin_init(
            pin_init!(Self {
                domain,
                id,
                direction,
                waker,
                created: Instant::now(),
                passing: Atomic::new(passing),
                due: Atomic::new(false),
                delivery <- new_mutex!((), "remus_delivery"),
                state <- SpinLockBh::new(
                    state,
                    c"remus_port",
                    kernel::static_lock_class!(),
                ),
                deliver <- new_work!("remus_deliver"),
            }),
            GFP_KERNEL,
        )?)
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
        self.waker.label()
    }

    /// How much it may hold.
    pub(crate) fn limits(&self) -> Limits {
        self.state.lock().limits
    }

    /// Changes how much it may hold; what it holds already stays.
    pub(crate) fn set_limits(&self, limits: Limits) {
        self.state.lock().limits = limits;
    }

    /// Whether it holds nothing until the next seal.
    pub(crate) fn passing(&self) -> bool {
        self.passing.load(Acquire)
    }

    /// How it is now.
    pub(crate) fn view(&self) -> View {
        let state = self.state.lock();
        View {
            held: state.ledger.held(),
            memory: state.memory(),
            drops: state.drops,
            limits: state.limits,
            hold_last_ns: state.hold_last_ns,
            hold_max_ns: state.hold_max_ns,
            passing: self.passing(),
        }
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

    /// Takes a packet that the device received; returns it if it passes. Softirqs are off.
    pub(crate) fn take_incoming(
        &self,
        mut packet: Packet,
        softirqs: SoftirqsOff<'_>,
    ) -> Option<Packet> {
        // A packet that overlooks the first seal was sent before it.
        if self.passing() {
            return Some(packet);
        }
        let detached = packet.detach();
        match self.hold(packet, detached, softirqs, |_| ()) {
            Verdict::Pass(packet) => Some(packet),
            Verdict::Held(()) | Verdict::Drop(_) => None,
        }
    }

    /// Takes a packet on its way out. Root lock held. Its socket does not account for it any more: it
    /// would be stuck for an epoch, and would keep its namespace.
    pub(crate) fn take_outgoing(&self, queue: &Queue<'_>, packet: Outgoing<'_>) -> Enqueued {
        let (mut packet, caller) = packet.into_parts();
        if self.passing() {
            return caller.pass(queue, packet);
        }
        let detached = packet.detach();
        match self.hold(packet, detached, queue.softirqs_off(), |packet| {
            queue.held(packet)
        }) {
            Verdict::Held(enqueued) => enqueued,
            Verdict::Pass(packet) => caller.pass(queue, packet),
            Verdict::Drop(packet) => caller.drop(queue, packet),
        }
    }

    /// Decides on a packet. `account` is called before it is kept.
    fn hold<R>(
        &self,
        packet: Packet,
        detached: bool,
        softirqs: SoftirqsOff<'_>,
        account: impl FnOnce(&Packet) -> R,
    ) -> Verdict<R> {
        let memory = u64::from(packet.memory());
        let mut state = self.state.lock_softirq(softirqs);
        if self.passing() {
            return Verdict::Pass(packet);
        }
        if !detached {
            state.drops.memory += 1;
            return Verdict::Drop(packet);
        }
        if state.closed {
            state.drops.discarded += 1;
            return Verdict::Drop(packet);
        }
        let (packets, bytes) = (state.packets() + 1, state.memory() + memory);
        if packets > state.limits.packets
            || bytes > state.limits.bytes
            || (state.counted && !self.domain.take(memory))
        {
            state.drops.limit += 1;
            self.domain.tell(Event::Overflow);
            return Verdict::Drop(packet);
        }
        let result = account(&packet);
        let epoch = self.domain.open_epoch();
        let first = state.ledger.hold(epoch, packet.len().into(), || self.now());
        state.queue.push(packet, epoch);
        if first {
            self.domain.tell(Event::OutputPending);
        }
        if packets > state.limits.packets / 2 || bytes > state.limits.bytes / 2 {
            self.domain.tell(Event::BufferHigh);
        }
        Verdict::Held(result)
    }

    /// The next packet that may leave. Root lock held.
    pub(crate) fn next_outgoing(&self, queue: &Queue<'_>) -> Option<Packet> {
        if !self.due.load(Acquire) {
            return self.next_passed(queue);
        }
        let packet = {
            let mut state = self.state.lock_softirq(queue.softirqs_off());
            if state.budget == 0 {
                return None;
            }
            // What passed came after what is released, and before what is held.
            let packet = match state.released.pop(u64::MAX) {
                None if queue.fifo_is_empty() => state.pop(),
                packet => packet,
            };
            match &packet {
                Some(packet) => {
                    state.budget -= usize::from(state.budget != usize::MAX);
                    self.gone(&state, 1, packet.memory().into());
                }
                None => self.due.store(state.is_due(), Release),
            }
            packet
        };
        match packet {
            Some(packet) => {
                queue.sent(&packet);
                Some(packet)
            }
            None => self.next_passed(queue),
        }
    }

    /// The next packet of those that pass through the queue. Root lock held.
    fn next_passed(&self, queue: &Queue<'_>) -> Option<Packet> {
        if queue.fifo_is_empty() {
            return None;
        }
        queue.fifo_dequeue()
    }

    /// So many packets are not here any more.
    fn gone(&self, state: &State, packets: u64, memory: u64) {
        if state.counted {
            self.domain.give(packets, memory);
        }
    }

    /// Counts what is here for the domain too from now on, or not any more. The domain's lock held.
    pub(crate) fn count(&self, counted: bool) {
        let mut state = self.state.lock();
        if state.counted != counted {
            let (packets, memory) = (state.packets(), state.memory());
            if counted {
                self.domain.add(packets, memory);
            } else {
                self.domain.give(packets, memory);
            }
            state.counted = counted;
        }
    }

    /// Makes sure that the next seal has what it needs. Process context; the domain's lock held.
    pub(crate) fn prepare_seal(&self) -> Result<(), Refusal> {
        let wanted = self.state.lock().ledger.wants_room();
        if let Some(records) = wanted {
            let mut room = KVVec::new();
            room.resize(records, Record::default(), GFP_KERNEL)?;
            // The old one is freed after the lock.
            let _old = self.state.lock().ledger.lend(room);
        }
        Ok(())
    }

    /// `epoch` was sealed, and the domain's next one is stored: from here on no packet is added to it.
    /// Returns what is in it.
    pub(crate) fn sealed(&self, epoch: u64) -> Sum {
        // Protection begins. What passes a moment later has been sent before.
        self.stop_passing();
        self.state.lock().ledger.seal(epoch)
    }

    /// All epochs sealed after `newest` were folded into the open one. Their packets stay where they
    /// are: those epochs will not be committed by themselves, only together with the open one (see
    /// `core::epoch`). Returns what was in them.
    pub(crate) fn aborted(&self, newest: u64) -> Sum {
        self.state.lock().ledger.abort(newest)
    }

    /// Lets the packets up to `epoch` go. Process context; the domain's lock held. Returns what that is:
    /// the first packet leaves now, the others a moment later, in order.
    pub(crate) fn committed(self: &Arc<Self>, epoch: u64) -> Sum {
        let (sum, due) = {
            let mut state = self.state.lock();
            state.committed = epoch;
            let due = state.is_due();
            self.due.store(due, Release);
            let (sum, since) = state.ledger.commit(epoch);
            if let Some(since) = since {
                state.hold_last_ns = self.now().saturating_sub(since);
                state.hold_max_ns = state.hold_max_ns.max(state.hold_last_ns);
            }
            (sum, due)
        };
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
                    self.state.lock().budget = 1;
                    self.waker.wake();
                    self.state.lock().budget = usize::MAX;
                }
            }
        }
        if let Some(queue) = workqueue::queue() {
            // If it is queued already it has not begun, and will see these packets.
            let _ = queue.enqueue(self.clone());
        }
    }

    /// Hands packets of the guest on that may go, at most so many. Returns how many. Process context, may
    /// sleep.
    fn hand_on(&self, _: &Delivery<'_>, most: u64) -> u64 {
        let mut batch = PacketQueue::new();
        {
            let mut state = self.state.lock();
            while batch.packets() < most {
                match state.pop() {
                    Some(packet) => batch.push(packet, 0),
                    None => break,
                }
            }
            self.gone(&state, batch.packets(), batch.memory());
        }
        let packets = batch.packets();
        if packets > 0 {
            batch.receive();
        }
        packets
    }

    /// Holds nothing any more until the next seal, and lets go what the open epoch holds: it is not
    /// protected any more. No epoch is sealed; the domain's lock held. Process context.
    pub(crate) fn pass(self: &Arc<Self>) {
        if self.direction == Direction::Guest {
            // What passes will not wait here, so what waits has to go first. Under more traffic than
            // this can hand on a few packets are overtaken.
            for _ in 0..1024 {
                self.release_held(false);
                if self.hand_on(&self.delivery.lock(), BATCH) < BATCH {
                    break;
                }
            }
        }
        self.release_held(true);
        self.bypass();
        self.start_handing_on();
    }

    /// While nothing is held, lets packets leave without being queued. Process context, may sleep.
    pub(crate) fn bypass(&self) {
        if self.direction == Direction::Egress {
            // Under that lock, so that `stop_passing` comes either before this or after.
            self.waker.lock(|queue| queue.set_bypass(self.passing()));
        }
    }

    fn release_held(&self, passing: bool) {
        let mut state = self.state.lock();
        let held = core::mem::replace(&mut state.queue, PacketQueue::new());
        state.released.append(held);
        state.ledger.discard();
        self.due.store(state.is_due(), Release);
        self.passing.store(passing, Release);
    }

    /// Holds everything from now on. Process context, may sleep.
    pub(crate) fn stop_passing(&self) {
        if self.passing.xchg(false, Full) {
            self.bypass();
        }
    }

    /// Drops, and counts, everything that is not committed. Process context. Returns what that was.
    pub(crate) fn discard(&self) -> Sum {
        let (sum, mut gone) = {
            let mut state = self.state.lock();
            let committed = state.committed;
            let mut rest = core::mem::replace(&mut state.queue, PacketQueue::new());
            // What may go already, but is still here.
            while let Some(packet) = rest.pop(committed) {
                state.released.push(packet, 0);
            }
            state.drops.discarded += rest.packets();
            self.gone(&state, rest.packets(), rest.memory());
            (state.ledger.discard(), rest)
        };
        if self.direction == Direction::Egress {
            while self.waker.lock(|queue| queue.forget(&mut gone, BATCH)) == Some(BATCH) {}
        }
        sum
    }

    /// Drops, and counts, everything. Any context.
    pub(crate) fn discard_all(&self) {
        // Dropped after the lock.
        let _gone = {
            let mut state = self.state.lock();
            state.ledger.discard();
            state.drops.discarded += state.packets();
            self.gone(&state, state.packets(), state.memory());
            (
                core::mem::replace(&mut state.queue, PacketQueue::new()),
                core::mem::replace(&mut state.released, PacketQueue::new()),
            )
        };
    }

    /// The port leaves its domain: what it holds is dropped, never sent. RTNL held, process context.
    pub(crate) fn close(self: &Arc<Self>) {
        self.state.lock().closed = true;
        self.discard_all();
        // Whoever hands packets on is done with the device after this, and will find no more.
        drop(self.delivery.lock());
        self.domain.leave(self);
    }
}
