// SPDX-License-Identifier: GPL-2.0

//! Domains: an epoch counter, and what it counts for: ports (packets) and memory.
//!
//! Lock order: RTNL or the netlink lock, `DOMAINS`, [`Domain::state`], then `Ram::state`, [`Port`]'s
//! locks, or that of the events. A domain is created and deleted by netlink, or comes and goes with the queue
//! disciplines that name it.

use crate::{
    abi::{
        already,
        netlink::{
            may_have_listeners,
            Sender,
            Socket, //
        },
        ramdev,
        workqueue, //
    },
    core::{
        epoch::{
            Epochs,
            Refused, //
        },
        ledger::Sum,
        uapi, //
    },
    netlink,
    qdisc::port::Port,
    ram::{
        Alarm,
        CowPolicy,
        Ram, //
    },
    refusal::{
        refusal,
        Refusal, //
    },
};
use core::sync::atomic::{
    AtomicU64,
    Ordering, //
};
use kernel::{
    impl_has_work,
    new_mutex,
    new_work,
    page::PAGE_SIZE,
    prelude::*,
    sync::{
        atomic::{
            Acquire,
            Atomic,
            Relaxed,
            Release, //
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

kernel::sync::global_lock! {
    // SAFETY: Initialised by `Domains::new`, before anything can find a domain.
    unsafe(uninit) static DOMAINS: Mutex<KVec<Arc<Domain>>> = KVec::new();
}

/// The next number for a domain or a port. They are listed in the order of their numbers.
static NEXT_ID: Atomic<u64> = Atomic::new(1);
/// Whether any domain ever had an owner: most sockets that are closed are none of ours.
static OWNED: Atomic<bool> = Atomic::new(false);

/// A domain's name: 1 to [`uapi::NAME_MAX`] letters, digits, `.`, `_` and `-`, not starting with a
/// mark, so that it can be a file name.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Name {
    bytes: [u8; uapi::NAME_MAX],
    len: usize,
}

impl Name {
    /// Checks a name.
    pub(crate) fn new(name: &[u8]) -> Result<Self, Refusal> {
        let fits = name.first().is_some_and(u8::is_ascii_alphanumeric)
            && name
                .iter()
                .all(|b| b.is_ascii_alphanumeric() || b"._-".contains(b));
        let mut bytes = [0; uapi::NAME_MAX];
        match bytes.get_mut(..name.len()) {
            Some(to) if fits => to.copy_from_slice(name),
            _ => {
                return Err(refusal!(
                    EINVAL,
                    "a domain's name is 1 to {} letters, digits, '.', '_' and '-'",
                    uapi::NAME_MAX
                ))
            }
        }
        Ok(Self {
            bytes,
            len: name.len(),
        })
    }

    /// The name's bytes.
    pub(crate) fn as_bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }

    fn as_str(&self) -> &str {
        core::str::from_utf8(self.as_bytes()).unwrap_or("?")
    }
}

/// What a request says about the copies of a memory's pages.
#[derive(Default)]
pub(crate) struct Cow {
    /// Most that may be kept, in pages, 0 for any number.
    limit: Option<u64>,
    policy: Option<CowPolicy>,
    /// Pages that may be hot at most.
    hot: Option<u64>,
}

impl Cow {
    /// From a limit in bytes, a number of `uapi::cow_policy`, and the limit for hot pages in bytes.
    pub(crate) fn new(
        limit: Option<u64>,
        policy: Option<u64>,
        hot: Option<u64>,
    ) -> Result<Self, Refusal> {
        let policy = match policy.map(u8::try_from) {
            None => None,
            Some(Ok(uapi::cow_policy::THROTTLE)) => Some(CowPolicy::Throttle),
            Some(Ok(uapi::cow_policy::FAIL)) => Some(CowPolicy::Fail),
            Some(_) => {
                return Err(refusal!(
                    EINVAL,
                    "cow-policy is {} (throttle) or {} (fail)",
                    uapi::cow_policy::THROTTLE,
                    uapi::cow_policy::FAIL
                ))
            }
        };
        Ok(Self {
            // Part of a page is room for none, but not no limit.
            limit: limit.map(|bytes| bytes.div_ceil(PAGE_SIZE as u64)),
            policy,
            hot: hot.map(|bytes| bytes / PAGE_SIZE as u64),
        })
    }
}

/// What a request changes about a domain; what is `None` stays.
pub(crate) struct Change {
    /// Limits over all ports, 0 for none.
    pub(crate) packets: Option<u64>,
    pub(crate) bytes: Option<u64>,
    /// Those of the memory's copies.
    pub(crate) cow: Cow,
    /// Whether the ports pass everything until the next seal that ends it, or hold from now on.
    pub(crate) passing: Option<bool>,
    /// The sender becomes the owner.
    pub(crate) own: bool,
}

/// What a command on an epoch has done.
#[derive(Default)]
pub(crate) struct Done {
    pub(crate) epoch: u64,
    pub(crate) packets: u64,
    pub(crate) bytes: u64,
    pub(crate) pages: u64,
    pub(crate) duration_ns: u64,
}

/// What a domain looks like.
#[derive(Default)]
pub(crate) struct View {
    pub(crate) open: u64,
    pub(crate) committed: u64,
    pub(crate) sealed: u64,
    pub(crate) ports: u64,
    pub(crate) packets: u64,
    pub(crate) bytes: u64,
    pub(crate) memory: u64,
    pub(crate) dropped: u64,
    pub(crate) limit_packets: u64,
    pub(crate) limit_bytes: u64,
    pub(crate) owner: Option<u32>,
    pub(crate) orphaned: bool,
}

/// What listeners are told about a domain, at most once an epoch each.
#[derive(Clone, Copy)]
pub(crate) enum Event {
    /// The first packet of the open epoch is held.
    OutputPending,
    /// A port or the domain holds half of what it may hold.
    BufferHigh,
    /// A packet was dropped because of a limit.
    Overflow,
    /// Somebody who writes the memory waits for room for a copy.
    CowWait,
    /// Epochs were aborted for want of such room.
    CowAbort,
}

impl Event {
    const ALL: [Self; 5] = [
        Self::OutputPending,
        Self::BufferHigh,
        Self::Overflow,
        Self::CowWait,
        Self::CowAbort,
    ];

    fn command(self) -> u8 {
        match self {
            Self::OutputPending => uapi::cmd::OUTPUT_PENDING,
            Self::BufferHigh => uapi::cmd::BUFFER_HIGH,
            Self::Overflow => uapi::cmd::OVERFLOW,
            Self::CowWait => uapi::cmd::COW_WAIT,
            Self::CowAbort => uapi::cmd::COW_ABORT,
        }
    }
}

/// Of one kind of event: the epoch for which it was last told, and for which it was last sent.
struct Told {
    epoch: Atomic<u64>,
    sent: Atomic<u64>,
}

impl Told {
    const fn new() -> Self {
        Self {
            epoch: Atomic::new(0),
            sent: Atomic::new(0),
        }
    }
}

struct State {
    epochs: Epochs,
    ports: KVec<Arc<Port>>,
    /// What ports that are gone have dropped.
    dropped: u64,
    /// The process that alone may drive the domain, as long as this socket of its is open.
    owner: Option<Sender>,
    /// The last owner's socket was closed.
    orphaned: bool,
}

impl State {
    /// Has each port do its part, and sums up what was done.
    fn each_port(&self, epoch: u64, pages: u64, part: impl Fn(&Arc<Port>) -> Sum) -> Done {
        let mut done = Done {
            epoch,
            pages,
            ..Done::default()
        };
        for port in &self.ports {
            let sum = part(port);
            done.packets += sum.packets;
            done.bytes += sum.bytes;
        }
        done
    }

    /// Refuses to let go of what the open epoch holds while that would overtake a sealed one.
    fn check_pass(&self) -> Result<(), Refusal> {
        if self.epochs.sealed() > 0 {
            return Err(refusal!(
                EBUSY,
                "sealed epochs wait: commit or abort them first"
            ));
        }
        Ok(())
    }

    /// Refuses what another process than the owner asks for.
    fn check(&self, sender: Sender) -> Result<(), Refusal> {
        match self.owner {
            Some(owner) if owner.process != sender.process => Err(refusal!(
                EBUSY,
                "process {} owns the domain: end it first",
                owner.process
            )),
            _ => Ok(()),
        }
    }
}

/// A domain.
#[pin_data]
pub(crate) struct Domain {
    name: Name,
    id: u64,
    /// Deleted with its last port, because a queue discipline created it.
    implicit: bool,
    ram: Option<Arc<Ram>>,
    /// The device of `ram`, until the domain is deleted: a port that is on its way out may keep the
    /// domain for longer, and the name must be free by then.
    #[pin]
    device: Mutex<Option<ramdev::Registration<Ram>>>,
    /// The open epoch, for the packets' path: a copy of what `state` says. Not the kernel's own atomic, of
    /// which a load is a call.
    open: AtomicU64,
    /// Packets in all ports, and their memory, while there is a limit; what is not handed on yet counts
    /// too.
    packets: Atomic<i64>,
    memory: Atomic<i64>,
    /// Limits of these, 0 for none.
    limit_packets: Atomic<u64>,
    limit_bytes: Atomic<u64>,
    told: [Told; Event::ALL.len()],
    #[pin]
    state: Mutex<State>,
    #[pin]
    send_events: Work<Domain>,
}

impl_has_work! {
    impl HasWork<Self> for Domain { self.send_events }
}

impl WorkItem for Domain {
    type Pointer = Arc<Self>;

    fn run(this: Arc<Self>) {
        for (event, told) in Event::ALL.into_iter().zip(&this.told) {
            let epoch = told.epoch.load(Relaxed);
            // Only here, and this never runs twice at once.
            if told.sent.xchg(epoch, Relaxed) != epoch {
                netlink::send_event(&this, event.command(), epoch);
            }
        }
    }
}

impl Domain {
    fn create(name: Name, memory: Option<u64>, implicit: bool) -> Result<Arc<Self>, Refusal> {
        let (ram, device) = match memory {
            Some(size) => {
                let ram = Ram::new(size)?;
                let device = ram.register(name.as_bytes())?;
                (Some(ram), Some(device))
            }
            None => (None, None),
        };
        let epochs = Epochs::new();
        Ok(Arc::pin_init(
            pin_init!(Self {
                name,
                id: NEXT_ID.fetch_add(1, Relaxed),
                implicit,
                ram,
                device <- new_mutex!(device, "remus_device"),
                open: AtomicU64::new(epochs.open()),
                packets: Atomic::new(0),
                memory: Atomic::new(0),
                limit_packets: Atomic::new(0),
                limit_bytes: Atomic::new(0),
                told: [const { Told::new() }; Event::ALL.len()],
                state <- new_mutex!(
                    State {
                        epochs,
                        ports: KVec::new(),
                        dropped: 0,
                        owner: None,
                        orphaned: false,
                    },
                    "remus_domain",
                ),
                send_events <- new_work!("remus_events"),
            }),
            GFP_KERNEL,
        )?)
    }

    /// Its name.
    pub(crate) fn name(&self) -> &Name {
        &self.name
    }

    /// Its memory.
    pub(crate) fn ram(&self) -> Option<&Arc<Ram>> {
        self.ram.as_ref()
    }

    /// The open epoch, for a packet that arrives now. Any context; [`Port`] says why this may be
    /// read without the domain's lock.
    pub(crate) fn open_epoch(&self) -> u64 {
        self.open.load(Ordering::Acquire)
    }

    /// A packet is to be held, with so many bytes of memory. False if that is beyond a limit. Any context.
    pub(crate) fn take(self: &Arc<Self>, memory: u64) -> bool {
        let memory = i64::try_from(memory).unwrap_or(0);
        let packets = self.packets.fetch_add(1, Relaxed) + 1;
        let bytes = self.memory.fetch_add(memory, Relaxed) + memory;
        let limits = (
            self.limit_packets.load(Relaxed),
            self.limit_bytes.load(Relaxed),
        );
        let over = |now: i64, limit: u64| limit != 0 && now.unsigned_abs() > limit;
        if over(packets, limits.0) || over(bytes, limits.1) {
            self.packets.add(-1, Relaxed);
            self.memory.add(-memory, Relaxed);
            return false;
        }
        // A limit of 1 has no half; the largest has no successor.
        let half = |limit: u64| limit - limit / 2;
        if over(packets, half(limits.0)) || over(bytes, half(limits.1)) {
            self.tell(Event::BufferHigh);
        }
        true
    }

    /// So many packets are held already. Any context.
    pub(crate) fn add(&self, packets: u64, memory: u64) {
        self.packets
            .add(i64::try_from(packets).unwrap_or(0), Relaxed);
        self.memory.add(i64::try_from(memory).unwrap_or(0), Relaxed);
    }

    /// So many packets are not held any more, nor their memory. Any context.
    pub(crate) fn give(&self, packets: u64, memory: u64) {
        self.packets
            .add(-i64::try_from(packets).unwrap_or(0), Relaxed);
        self.memory
            .add(-i64::try_from(memory).unwrap_or(0), Relaxed);
    }

    fn is_limited(&self) -> bool {
        self.limit_packets.load(Relaxed) != 0 || self.limit_bytes.load(Relaxed) != 0
    }

    /// Has listeners told, unless they were in this epoch. Any context.
    pub(crate) fn tell(self: &Arc<Self>, event: Event) {
        if !may_have_listeners() {
            return;
        }
        let (told, epoch) = (&self.told[event as usize], self.open_epoch());
        // Only forward: two ports may see a seal at different moments.
        let mut known = told.epoch.load(Relaxed);
        loop {
            if known >= epoch {
                return;
            }
            match told.epoch.cmpxchg(known, epoch, Relaxed) {
                Ok(_) => break,
                Err(now) => known = now,
            }
        }
        if let Some(queue) = workqueue::queue() {
            // If it is queued already it has not begun, and will see this one.
            let _ = queue.enqueue(self.clone());
        }
    }

    /// The open epoch, the newest committed one, and how many are sealed. Process context.
    pub(crate) fn epochs(&self) -> (u64, u64, u64) {
        let epochs = &self.state.lock().epochs;
        (epochs.open(), epochs.committed(), epochs.sealed())
    }

    /// Counters now.
    pub(crate) fn view(&self) -> View {
        let state = self.state.lock();
        let mut view = View {
            open: state.epochs.open(),
            committed: state.epochs.committed(),
            sealed: state.epochs.sealed(),
            ports: state.ports.len() as u64,
            dropped: state.dropped,
            limit_packets: self.limit_packets.load(Relaxed),
            limit_bytes: self.limit_bytes.load(Relaxed),
            owner: state.owner.map(|owner| owner.process.unsigned_abs()),
            orphaned: state.orphaned,
            ..View::default()
        };
        for port in &state.ports {
            let port = port.view();
            view.packets += port.held.packets;
            view.bytes += port.held.bytes;
            view.memory += port.memory;
            view.dropped += port.drops.total();
        }
        view
    }

    /// Changes what `change` says. A refusal comes with the attribute that it is about.
    pub(crate) fn set(&self, sender: Sender, change: &Change) -> Result<(), (u16, Refusal)> {
        let mut state = self.state.lock();
        let about = |number| move |why| (number, why);
        state.check(sender).map_err(about(uapi::attr::DOMAIN))?;
        if change.passing == Some(true) && state.ports.iter().any(|port| !port.view().passing) {
            state.check_pass().map_err(about(uapi::attr::PASSTHROUGH))?;
        }
        // Nothing is refused from here on.
        if let Some(ram) = self.ram() {
            ram.set(change.cow.limit, change.cow.policy, change.cow.hot);
        }
        if let Some(packets) = change.packets {
            self.limit_packets.store(packets, Relaxed);
        }
        if let Some(bytes) = change.bytes {
            self.limit_bytes.store(bytes, Relaxed);
        }
        for port in &state.ports {
            port.count(self.is_limited());
            match change.passing {
                Some(true) if !port.view().passing => port.pass(),
                Some(false) => port.stop_passing(),
                _ => {}
            }
        }
        if change.own {
            OWNED.store(true, Release);
            state.owner = Some(sender);
            state.orphaned = false;
        }
        Ok(())
    }

    /// Has one of its ports hold nothing until the next seal that ends it, or everything from now on. RTNL
    /// held. A qdisc's option names no sender, so an owner refuses it to everybody.
    pub(crate) fn set_passing(&self, port: &Arc<Port>, passing: bool) -> Result<(), Refusal> {
        let state = self.state.lock();
        if !passing {
            port.stop_passing();
        } else if !port.view().passing {
            if state.owner.is_some() {
                return Err(refusal!(EBUSY, "a process owns the domain: end it first"));
            }
            state.check_pass()?;
            port.pass();
        }
        Ok(())
    }

    /// The port after the one with this number.
    pub(crate) fn port_after(&self, id: u64) -> Option<Arc<Port>> {
        let state = self.state.lock();
        state.ports.iter().find(|port| port.id() > id).cloned()
    }

    /// Seals the open epoch, of all ports and the memory. With `keep`, ports that pass go on doing so: the
    /// domain is not protected yet.
    pub(crate) fn seal(&self, sender: Sender, full: bool, keep: bool) -> Result<Done, Refusal> {
        let start = Instant::<Monotonic>::now();
        let mut state = self.state.lock();
        state.check(sender)?;
        state.epochs.check_seal().map_err(|r| refused(r, 0))?;
        for port in &state.ports {
            port.prepare_seal()?;
        }
        let epoch = state.epochs.open();
        let pages = match self.ram() {
            Some(ram) => ram.seal(epoch, full)?,
            None => 0,
        };
        state.epochs.seal().map_err(|r| refused(r, 0))?;
        self.open.store(state.epochs.open(), Ordering::Release);
        let done = state.each_port(epoch, pages, |port| port.sealed(epoch, keep));
        Ok(done.since(start))
    }

    /// Commits `epoch` and all before it: their packets leave, their snapshots are forgotten.
    pub(crate) fn commit(&self, sender: Sender, epoch: u64) -> Result<Done, Refusal> {
        let start = Instant::<Monotonic>::now();
        let mut state = self.state.lock();
        state.check(sender)?;
        if let Some(lost) = self
            .ram()
            .and_then(|ram| ram.lost())
            .filter(|lost| *lost <= epoch)
        {
            return Err(refusal!(
                EIO,
                "epoch {lost} lost pages for want of room (cow-limit): abort it"
            ));
        }
        state.epochs.commit(epoch).map_err(|r| refused(r, epoch))?;
        let done = state.each_port(epoch, 0, |port| port.committed(epoch));
        if let Some(ram) = self.ram() {
            ram.commit(epoch);
        }
        Ok(done.since(start))
    }

    /// Folds `epoch` and all sealed after it into the open one.
    pub(crate) fn abort(&self, sender: Sender, epoch: u64) -> Result<Done, Refusal> {
        let start = Instant::<Monotonic>::now();
        let mut state = self.state.lock();
        state.check(sender)?;
        Ok(self.abort_in(&mut state, epoch)?.since(start))
    }

    fn abort_in(&self, state: &mut State, epoch: u64) -> Result<Done, Refusal> {
        state.epochs.abort(epoch).map_err(|r| refused(r, epoch))?;
        let pages = self.ram().map_or(0, |ram| ram.abort(epoch));
        let newest = state.epochs.newest();
        Ok(state.each_port(epoch, pages, |port| port.aborted(newest)))
    }

    /// There was no room for a copy: aborts what lost a page by that, and has listeners told.
    fn out_of_room(self: &Arc<Self>) {
        let aborted = {
            let mut state = self.state.lock();
            let lost = self.ram().and_then(|ram| ram.lost());
            lost.is_some_and(|epoch| self.abort_in(&mut state, epoch).is_ok())
        };
        self.tell(if aborted {
            Event::CowAbort
        } else {
            Event::CowWait
        });
    }

    /// Throws all packets away that are not committed. Epochs stay as they are.
    pub(crate) fn discard(&self, sender: Sender) -> Result<Done, Refusal> {
        let start = Instant::<Monotonic>::now();
        let state = self.state.lock();
        state.check(sender)?;
        let done = state.each_port(state.epochs.open(), 0, |port| port.discard());
        Ok(done.since(start))
    }

    /// Takes the port out of the domain; a domain that a queue discipline created goes with its
    /// last port. RTNL held.
    pub(crate) fn leave(&self, port: &Arc<Port>) {
        let mut domains = DOMAINS.lock();
        let empty = {
            let mut state = self.state.lock();
            state.ports.retain(|p| !Arc::ptr_eq(p, port));
            state.dropped += port.view().drops.total();
            state.ports.is_empty()
        };
        if empty && self.implicit {
            domains.retain(|d| !core::ptr::eq(&**d, self));
            netlink::send_gone(&self.name);
        }
    }
}

impl Done {
    fn since(mut self, start: Instant<Monotonic>) -> Self {
        self.duration_ns = u64::try_from(start.elapsed().as_nanos()).unwrap_or(0);
        self
    }
}

/// Says why a command on `epoch` was refused.
fn refused(why: Refused, epoch: u64) -> Refusal {
    match why {
        Refused::Open => refusal!(EINVAL, "epoch {epoch} is open: seal it first"),
        Refused::Committed => refusal!(already(), "epoch {epoch} was committed before"),
        Refused::Aborted => refusal!(
            EINVAL,
            "epoch {epoch} was aborted: it is part of a later one"
        ),
        Refused::Future => refusal!(EINVAL, "the domain has not come to epoch {epoch} yet"),
        Refused::Zero => refusal!(EINVAL, "epochs start at 1"),
        Refused::TooManyGaps => {
            refusal!(
                EBUSY,
                "too many aborts while older epochs wait: commit or abort these"
            )
        }
        Refused::Exhausted => refusal!(ERANGE, "the epoch numbers are used up"),
    }
}

/// All domains. Exists once, while the module is loaded.
pub(crate) struct Domains(());

impl Domains {
    /// To be called once, before anything else here.
    pub(crate) fn new() -> Self {
        // SAFETY: Called once, from the module's `init`.
        unsafe { DOMAINS.init() };
        Self(())
    }
}

impl Drop for Domains {
    fn drop(&mut self) {
        // A module has no destructor for its statics.
        let domains = core::mem::replace(&mut *DOMAINS.lock(), KVec::new());
        drop(domains);
    }
}

/// The memory with this alarm had no room for a copy. Process context.
pub(crate) fn out_of_room(alarm: &Arc<Alarm>) {
    let domains = DOMAINS.lock();
    let is_its = |ram: &Arc<Ram>| Arc::ptr_eq(ram.alarm(), alarm);
    let domain = domains
        .iter()
        .find(|d| d.ram().is_some_and(is_its))
        .cloned();
    drop(domains);
    if let Some(domain) = domain {
        domain.out_of_room();
    }
}

fn find(domains: &[Arc<Domain>], name: &Name) -> Option<Arc<Domain>> {
    domains.iter().find(|d| d.name == *name).cloned()
}

/// The domain with this name.
pub(crate) fn get(name: &Name) -> Result<Arc<Domain>, Refusal> {
    find(&DOMAINS.lock(), name)
        .ok_or_else(|| refusal!(ENOENT, "there is no domain '{}'", name.as_str()))
}

/// The first domain whose number is at least `id`, and its number.
pub(crate) fn from_id(id: u64) -> Option<(Arc<Domain>, u64)> {
    let domains = DOMAINS.lock();
    let domain = domains.iter().find(|d| d.id >= id)?;
    Some((domain.clone(), domain.id))
}

/// A netlink socket was closed: what it owned stays as it is, and belongs to nobody.
pub(crate) fn closed(socket: Socket) {
    if !OWNED.load(Acquire) {
        return;
    }
    for domain in &*DOMAINS.lock() {
        let orphaned = {
            let mut state = domain.state.lock();
            let owned = state.owner.is_some_and(|owner| owner.socket == socket);
            if owned {
                state.owner = None;
                state.orphaned = true;
            }
            owned
        };
        if orphaned {
            netlink::send_event(domain, uapi::cmd::CONTROLLER_GONE, domain.open_epoch());
        }
    }
}

/// Creates a domain, with `memory` bytes of memory.
pub(crate) fn new(name: Name, memory: Option<u64>, cow: Cow) -> Result<Arc<Domain>, Refusal> {
    if let Some(size) = memory {
        if size == 0 || size % PAGE_SIZE as u64 != 0 {
            return Err(refusal!(
                EINVAL,
                "memory is a multiple of {PAGE_SIZE} bytes, and not none"
            ));
        }
        if size > uapi::MEMORY_MAX {
            return Err(refusal!(
                E2BIG,
                "memory is at most {} bytes",
                uapi::MEMORY_MAX
            ));
        }
    }
    let mut domains = DOMAINS.lock();
    if find(&domains, &name).is_some() {
        return Err(refusal!(
            EEXIST,
            "there is a domain '{}' already",
            name.as_str()
        ));
    }
    domains.reserve(1, GFP_KERNEL)?;
    let domain = Domain::create(name, memory, false)?;
    if let Some(ram) = domain.ram() {
        ram.set(cow.limit, cow.policy, cow.hot);
    }
    // Cannot fail: there is room.
    let _ = domains.push_within_capacity(domain.clone());
    Ok(domain)
}

/// Deletes a domain that has no port.
pub(crate) fn delete(name: &Name, sender: Sender) -> Result<(), Refusal> {
    let mut domains = DOMAINS.lock();
    let domain = find(&domains, name)
        .ok_or_else(|| refusal!(ENOENT, "there is no domain '{}'", name.as_str()))?;
    let ports = {
        let state = domain.state.lock();
        state.check(sender)?;
        state.ports.len()
    };
    if ports > 0 {
        return Err(refusal!(
            EBUSY,
            "{ports} port(s) still belong to it: tc qdisc del them first"
        ));
    }
    domains.retain(|d| !Arc::ptr_eq(d, &domain));
    let device = domain.device.lock().take();
    drop(device);
    // Whoever has the memory open keeps it. Nobody can ask for its epochs any more.
    if let Some(ram) = domain.ram() {
        ram.commit(u64::MAX);
    }
    netlink::send_gone(name);
    Ok(())
}

/// Makes the port that `make` returns a port of the domain `name`, which is created if it does not
/// exist. RTNL held.
pub(crate) fn join(
    name: Name,
    make: impl FnOnce(Arc<Domain>, u64) -> Result<Arc<Port>, Refusal>,
) -> Result<Arc<Port>, Refusal> {
    let mut domains = DOMAINS.lock();
    domains.reserve(1, GFP_KERNEL)?;
    let known = find(&domains, &name);
    let is_new = known.is_none();
    let domain = match known {
        Some(domain) => domain,
        None => Domain::create(name, None, true)?,
    };
    let port = make(domain.clone(), NEXT_ID.fetch_add(1, Relaxed))?;
    {
        let mut state = domain.state.lock();
        state.ports.push(port.clone(), GFP_KERNEL)?;
        port.count(domain.is_limited());
    }
    if is_new {
        // Cannot fail: there is room.
        let _ = domains.push_within_capacity(domain);
    }
    Ok(port)
}
