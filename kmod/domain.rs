// SPDX-License-Identifier: GPL-2.0

//! Domains: an epoch counter, and what it counts for: ports (packets) and memory.
//!
//! Lock order: RTNL or the netlink lock, `DOMAINS`, [`Domain::state`], then `Ram::state` or
//! [`Port`]'s locks. A domain is created and deleted by netlink, or comes and goes with the queue
//! disciplines that name it.

use crate::{
    abi::{
        already,
        page,
        ramdev, //
    },
    core::{
        epoch::{
            Epochs,
            Refused, //
        },
        uapi, //
    },
    qdisc::port::Port,
    ram::Ram,
    refusal::{
        refusal,
        Refusal, //
    },
};
use kernel::{
    new_mutex,
    page::PAGE_SIZE,
    prelude::*,
    sync::{
        atomic::{
            Acquire,
            Atomic,
            Release, //
        },
        Arc,
        Mutex, //
    },
    time::{
        Instant,
        Monotonic, //
    },
};

kernel::sync::global_lock! {
    // SAFETY: Initialised by `Domains::new`, before anything can find a domain.
    unsafe(uninit) static DOMAINS: Mutex<KVec<Arc<Domain>>> = KVec::new();
}

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
    pub(crate) dropped: u64,
}

struct State {
    epochs: Epochs,
    ports: KVec<Arc<Port>>,
}

impl State {
    /// Has each port do its part, and sums up what was done.
    fn each_port(&self, epoch: u64, pages: u64, part: impl Fn(&Port) -> (u64, u64)) -> Done {
        let mut done = Done {
            epoch,
            pages,
            ..Done::default()
        };
        for port in &self.ports {
            let (packets, bytes) = part(port);
            done.packets += packets;
            done.bytes += bytes;
        }
        done
    }
}

/// A domain.
#[pin_data]
pub(crate) struct Domain {
    name: Name,
    /// Deleted with its last port, because a queue discipline created it.
    implicit: bool,
    ram: Option<Arc<Ram>>,
    /// The device of `ram`, until the domain is deleted: a port that is on its way out may keep the
    /// domain for longer, and the name must be free by then.
    #[pin]
    device: Mutex<Option<ramdev::Registration<Ram>>>,
    /// The open epoch, for the packets' path: a copy of what `state` says.
    open: Atomic<u64>,
    #[pin]
    state: Mutex<State>,
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
                implicit,
                ram,
                device <- new_mutex!(device, "remus_device"),
                open: Atomic::new(epochs.open()),
                state <- new_mutex!(State { epochs, ports: KVec::new() }, "remus_domain"),
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
        self.open.load(Acquire)
    }

    /// Counters now.
    pub(crate) fn view(&self) -> View {
        let state = self.state.lock();
        let mut view = View {
            open: state.epochs.open(),
            committed: state.epochs.committed(),
            sealed: state.epochs.sealed(),
            ports: state.ports.len() as u64,
            ..View::default()
        };
        for port in &state.ports {
            let held = port.held();
            view.packets += held.packets;
            view.bytes += held.bytes;
            view.dropped += held.dropped;
        }
        view
    }

    /// Seals the open epoch, of all ports and the memory.
    pub(crate) fn seal(&self, full: bool) -> Result<Done, Refusal> {
        let start = Instant::<Monotonic>::now();
        let mut state = self.state.lock();
        state.epochs.check_seal().map_err(|r| refused(r, 0))?;
        let epoch = state.epochs.open();
        let pages = match self.ram() {
            Some(ram) => ram.seal(epoch, full)?,
            None => 0,
        };
        state.epochs.seal().map_err(|r| refused(r, 0))?;
        self.open.store(state.epochs.open(), Release);
        let done = state.each_port(epoch, pages, |port| port.sealed(epoch));
        Ok(done.since(start))
    }

    /// Commits `epoch` and all before it: their packets leave, their snapshots are forgotten.
    pub(crate) fn commit(&self, epoch: u64) -> Result<Done, Refusal> {
        let start = Instant::<Monotonic>::now();
        let mut state = self.state.lock();
        state.epochs.commit(epoch).map_err(|r| refused(r, epoch))?;
        let done = state.each_port(epoch, 0, |port| port.release(epoch));
        if let Some(ram) = self.ram() {
            ram.commit(epoch);
        }
        Ok(done.since(start))
    }

    /// Folds `epoch` and all sealed after it into the open one.
    pub(crate) fn abort(&self, epoch: u64) -> Result<Done, Refusal> {
        let start = Instant::<Monotonic>::now();
        let mut state = self.state.lock();
        state.epochs.abort(epoch).map_err(|r| refused(r, epoch))?;
        let pages = self.ram().map_or(0, |ram| ram.abort(epoch));
        let newest = state.epochs.newest();
        let done = state.each_port(epoch, pages, |port| port.aborted(newest));
        Ok(done.since(start))
    }

    /// Takes the port out of the domain; a domain that a queue discipline created goes with its
    /// last port. RTNL held.
    pub(crate) fn leave(&self, port: &Arc<Port>) {
        let mut domains = DOMAINS.lock();
        let empty = {
            let mut state = self.state.lock();
            state.ports.retain(|p| !Arc::ptr_eq(p, port));
            state.ports.is_empty()
        };
        if empty && self.implicit {
            domains.retain(|d| !core::ptr::eq(&**d, self));
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

fn find(domains: &[Arc<Domain>], name: &Name) -> Option<Arc<Domain>> {
    domains.iter().find(|d| d.name == *name).cloned()
}

/// The domain with this name.
pub(crate) fn get(name: &Name) -> Result<Arc<Domain>, Refusal> {
    find(&DOMAINS.lock(), name)
        .ok_or_else(|| refusal!(ENOENT, "there is no domain '{}'", name.as_str()))
}

/// The domain at this place of the list.
pub(crate) fn nth(index: usize) -> Option<Arc<Domain>> {
    DOMAINS.lock().get(index).cloned()
}

/// Creates a domain, with `memory` bytes of memory.
pub(crate) fn new(name: Name, memory: Option<u64>) -> Result<Arc<Domain>, Refusal> {
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
        // It stays resident, so it could never be used; and what is kept about it is in proportion.
        let total = page::total() * PAGE_SIZE as u64;
        if size > total {
            return Err(refusal!(
                ENOMEM,
                "memory is more than the {total} bytes that this host has"
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
    // Cannot fail: there is room.
    let _ = domains.push_within_capacity(domain.clone());
    Ok(domain)
}

/// Deletes a domain that nobody uses.
pub(crate) fn delete(name: &Name) -> Result<(), Refusal> {
    let mut domains = DOMAINS.lock();
    let domain = find(&domains, name)
        .ok_or_else(|| refusal!(ENOENT, "there is no domain '{}'", name.as_str()))?;
    let ports = domain.state.lock().ports.len();
    if ports > 0 {
        return Err(refusal!(
            EBUSY,
            "{ports} port(s) still belong to it: tc qdisc del them first"
        ));
    }
    if domain.ram().is_some_and(|ram| ram.users() > 0) {
        return Err(refusal!(
            EBUSY,
            "its memory is in use: end the virtual machine first"
        ));
    }
    domains.retain(|d| !Arc::ptr_eq(d, &domain));
    let device = domain.device.lock().take();
    drop(device);
    Ok(())
}

/// Makes the port that `make` returns a port of the domain `name`, which is created if it does not
/// exist. RTNL held.
pub(crate) fn join(
    name: Name,
    make: impl FnOnce(Arc<Domain>) -> Result<Arc<Port>, Refusal>,
) -> Result<Arc<Port>, Refusal> {
    let mut domains = DOMAINS.lock();
    domains.reserve(1, GFP_KERNEL)?;
    let known = find(&domains, &name);
    let is_new = known.is_none();
    let domain = match known {
        Some(domain) => domain,
        None => Domain::create(name, None, true)?,
    };
    let port = make(domain.clone())?;
    domain.state.lock().ports.push(port.clone(), GFP_KERNEL)?;
    if is_new {
        // Cannot fail: there is room.
        let _ = domains.push_within_capacity(domain);
    }
    Ok(port)
}
