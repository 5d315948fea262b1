// SPDX-License-Identifier: GPL-2.0

//! Queue disciplines.
//!
//! To implement one, a module must do the following:
//!
//! - implement [`Qdisc`] for the state of one instance, which also is the [`IngressHook`] of the
//!   device if [`Qdisc::hooks_ingress`] says so;
//! - create and keep a [`Registration`].
//!
//! An instance can only be the root of its device. Methods get the lock that is held as a type:
//! [`Control`] means the RTNL, [`Queue`] the root lock of the device's queues.
//!
//! C headers: [`include/net/sch_generic.h`](srctree/include/net/sch_generic.h),
//! [`include/net/pkt_sched.h`](srctree/include/net/pkt_sched.h)

use super::{
    bindings,
    hook::{
        self,
        IngressHook, //
    },
    lock::SoftirqsOff,
    netdev::{
        Device,
        Label, //
    },
    netlink::{
        Ack,
        Attr,
        Message, //
    },
    not_supported, //
    put_name,
    skb::{
        Packet,
        PacketQueue, //
    },
    AssertSync,
    Plain,
};
use core::{
    marker::PhantomData,
    ptr::{
        null_mut,
        NonNull, //
    },
};
use kernel::{
    error::to_result,
    ffi::c_int,
    new_mutex,
    prelude::*,
    sync::{
        Arc,
        Mutex, //
    },
    transmute::AsBytes,
};

/// The state of one instance of a queue discipline.
pub(crate) trait Qdisc: IngressHook + Sized {
    /// Its kind, as given to `tc`, at most 15 bytes.
    const KIND: &'static [u8];

    /// Creates an instance. `waker` wakes its device. RTNL held, process context.
    fn init(
        control: &Control<'_>,
        options: Option<Attr<'_>>,
        waker: Arc<Waker>,
        ack: &Ack<'_>,
    ) -> Result<Arc<Self>>;

    /// Whether [`IngressHook::receive`] is to see what the device receives.
    fn hooks_ingress(&self) -> bool;

    /// Changes options. RTNL held, process context.
    fn change(
        this: &Arc<Self>,
        control: &Control<'_>,
        options: Option<Attr<'_>>,
        ack: &Ack<'_>,
    ) -> Result;

    /// Takes a packet that is to leave through the device. Root lock held, softirqs off.
    fn enqueue(&self, queue: &Queue<'_>, packet: Outgoing<'_>) -> Enqueued;

    /// The next packet that may leave now. Root lock held, softirqs off.
    fn dequeue(&self, queue: &Queue<'_>) -> Option<Packet>;

    /// Forgets all packets on their way out, as when the device goes down. Root lock held.
    fn reset(&self, queue: &Queue<'_>);

    /// The instance goes away: nothing is enqueued or received any more. RTNL held, process
    /// context.
    fn destroy(this: &Arc<Self>);

    /// Writes the options. RTNL held.
    fn dump(&self, message: &mut Message<'_>) -> Result;

    /// What [`stats`](Self::stats) returns, in the layout that user space knows.
    type Stats: AsBytes;

    /// Statistics of this kind, for `tc -s`. RTNL held.
    fn stats(&self) -> Self::Stats;
}

/// What became of a packet: only [`Outgoing`] and [`Queue`] make one.
pub(crate) struct Enqueued(c_int);

/// An instance whose configuration the caller may change.
///
/// # Invariants
///
/// Points to a valid `struct Qdisc`, and the RTNL is held, both for `'a`.
pub(crate) struct Control<'a>(NonNull<bindings::Qdisc>, PhantomData<&'a ()>);

impl<'a> Control<'a> {
    /// The device.
    pub(crate) fn device(&self) -> Device<'a> {
        // SAFETY: The instance holds its device; the RTNL is held by the type invariant. A qdisc
        // has a device.
        unsafe {
            Device::from_raw(NonNull::new_unchecked(bindings::remus_qdisc_dev(
                self.0.as_ptr(),
            )))
        }
    }

    /// Whether this is to be the root of the device.
    pub(crate) fn is_root(&self) -> bool {
        // SAFETY: Valid by the type invariant.
        unsafe { (*self.0.as_ptr()).parent == bindings::TC_H_ROOT }
    }
}

/// An instance whose root lock the caller holds.
///
/// # Invariants
///
/// Points to a valid `struct Qdisc` whose root lock is held, for `'a`.
pub(crate) struct Queue<'a>(NonNull<bindings::Qdisc>, PhantomData<&'a ()>);

impl Queue<'_> {
    /// Accounts for a packet that the instance keeps, and will return from
    /// [`dequeue`](Qdisc::dequeue). To be called before the packet is put where it is kept.
    pub(crate) fn held(&self, packet: &Packet) -> Enqueued {
        let sch = self.0.as_ptr();
        // SAFETY: Valid by the type invariant, and these fields only change with the root lock held. There
        // is no reference to the whole, as other processors change other fields meanwhile.
        unsafe {
            (*sch).q.qlen += 1;
            (*sch).qstats.backlog += packet.wire_len();
        }
        Enqueued(bindings::NET_XMIT_SUCCESS as c_int)
    }

    /// Softirqs are off while the root lock is held.
    pub(crate) fn softirqs_off(&self) -> SoftirqsOff<'_> {
        // SAFETY: The root lock is held by the type invariant, which is taken with softirqs off.
        unsafe { SoftirqsOff::new() }
    }

    /// Whether a packet may leave at once, past the instance, as long as nothing waits in it.
    pub(crate) fn set_bypass(&self, on: bool) {
        let sch = self.0.as_ptr();
        // SAFETY: Valid by the type invariant. The scheduler changes the flags of an instance before it is
        // live, for hardware offload, which this kind has not, and in qdisc_warn_nonwc(), with the root
        // lock held. `__dev_xmit_skb()` looks at this one with that lock held, so it holds at once.
        unsafe {
            if on {
                (*sch).flags |= bindings::TCQ_F_CAN_BYPASS;
            } else {
                (*sch).flags &= !bindings::TCQ_F_CAN_BYPASS;
            }
        }
    }

    /// Accounts for a packet that was [`held`](Self::held) and is about to be returned.
    pub(crate) fn sent(&self, packet: &Packet) {
        // SAFETY: Valid and locked by the type invariant.
        unsafe { bindings::remus_qdisc_sent(self.0.as_ptr(), packet.as_ptr()) };
    }

    /// Drops up to `most` packets that were [`held`](Self::held) and will not be returned; counts them as
    /// dropped. Returns how many.
    pub(crate) fn forget(&self, packets: &mut PacketQueue, most: u64) -> u64 {
        for done in 0..most {
            let Some(packet) = packets.pop(u64::MAX) else {
                return done;
            };
            // SAFETY: Valid and locked by the type invariant.
            unsafe { bindings::remus_qdisc_forgotten(self.0.as_ptr(), packet.as_ptr()) };
        }
        most
    }

    /// Whether the instance's own first-in first-out queue has no packet.
    pub(crate) fn fifo_is_empty(&self) -> bool {
        // SAFETY: Valid and locked by the type invariant.
        unsafe { (*self.0.as_ptr()).q.head.is_null() }
    }

    /// Takes a packet out of the instance's own first-in first-out queue.
    pub(crate) fn fifo_dequeue(&self) -> Option<Packet> {
        // SAFETY: Valid and locked by the type invariant.
        let skb = NonNull::new(unsafe { bindings::remus_qdisc_fifo_dequeue(self.0.as_ptr()) })?;
        // SAFETY: The queue gave the packet up.
        Some(unsafe { Packet::from_raw(skb) })
    }

    /// Frees what is in the instance's own first-in first-out queue.
    pub(crate) fn fifo_purge(&self) {
        // SAFETY: Valid and locked by the type invariant.
        unsafe { bindings::remus_qdisc_fifo_purge(self.0.as_ptr()) };
    }
}

/// A packet that is being enqueued.
pub(crate) struct Outgoing<'a> {
    packet: Packet,
    caller: Caller<'a>,
}

impl<'a> Outgoing<'a> {
    /// The packet, to be kept (say so with [`Queue::held`]), passed or dropped.
    pub(crate) fn into_parts(self) -> (Packet, Caller<'a>) {
        (self.packet, self.caller)
    }

    /// See [`Caller::pass`].
    pub(crate) fn pass(self, queue: &Queue<'_>) -> Enqueued {
        self.caller.pass(queue, self.packet)
    }
}

/// Whoever has a packet enqueued.
///
/// # Invariants
///
/// Points to where it collects dropped packets, for `'a`.
pub(crate) struct Caller<'a>(*mut *mut bindings::sk_buff, PhantomData<&'a ()>);

impl Caller<'_> {
    /// Puts the packet into the instance's own first-in first-out queue, or drops it if that is
    /// full (the device's `tx_queue_len`).
    pub(crate) fn pass(self, queue: &Queue<'_>, packet: Packet) -> Enqueued {
        // SAFETY: The packet is given up; `queue` is locked; valid by the type invariant.
        Enqueued(unsafe {
            bindings::remus_qdisc_fifo_enqueue(packet.into_raw(), queue.0.as_ptr(), self.0)
        })
    }

    /// Drops the packet and counts it.
    pub(crate) fn drop(self, queue: &Queue<'_>, packet: Packet) -> Enqueued {
        // SAFETY: As in `pass`.
        Enqueued(unsafe { bindings::remus_qdisc_drop(packet.into_raw(), queue.0.as_ptr(), self.0) })
    }
}

/// An instance, for whoever holds none of its locks, as long as the instance is there: to have its
/// device dequeue.
///
/// # Invariants
///
/// The pointer is to a valid `struct Qdisc`, or there is none any more.
#[pin_data]
pub(crate) struct Waker {
    #[pin]
    sch: Mutex<Option<AssertSync<NonNull<bindings::Qdisc>>>>,
}

impl Waker {
    fn new(sch: NonNull<bindings::Qdisc>) -> Result<Arc<Self>> {
        // INVARIANT: Valid until `destroy`, which calls `stop`.
        Arc::pin_init(
            pin_init!(Self { sch <- new_mutex!(Some(AssertSync(sch)), "remus_waker") }),
            GFP_KERNEL,
        )
    }

    /// Has the device dequeue: most of it has happened when this returns. Process context, may sleep.
    pub(crate) fn wake(&self) {
        if let Some(sch) = &*self.sch.lock() {
            // SAFETY: Valid by the type invariant; the lock keeps `stop` away, which waits until the
            // device is done with it.
            unsafe { bindings::remus_qdisc_wake(sch.0.as_ptr()) };
        }
    }

    /// Calls `f` with the root lock held, if the instance is there. Process context, may sleep.
    pub(crate) fn lock<R>(&self, f: impl FnOnce(&Queue<'_>) -> R) -> Option<R> {
        let sch = self.sch.lock();
        let sch = sch.as_ref()?.0;
        // SAFETY: Valid by the type invariant; the mutex keeps it there.
        unsafe { bindings::remus_qdisc_lock(sch.as_ptr()) };
        // INVARIANT: Valid, and just locked.
        let result = f(&Queue(sch, PhantomData));
        // SAFETY: As above; locked above.
        unsafe { bindings::remus_qdisc_unlock(sch.as_ptr()) };
        Some(result)
    }

    /// How the device is called, as long as the instance is there. Process context, may sleep.
    pub(crate) fn label(&self) -> Option<Label> {
        let sch = self.sch.lock();
        let sch = sch.as_ref()?.0.as_ptr();
        // SAFETY: Valid by the type invariant, as is its device, which the lock keeps there: it is not
        // freed before its queue disciplines are destroyed.
        Some(unsafe { Label::of(bindings::remus_qdisc_dev(sch)) })
    }

    fn stop(&self) {
        let sch = self.sch.lock().take();
        if let Some(sch) = sch {
            // SAFETY: `destroy` calls this, so the instance is still valid; nobody can wake it any more.
            unsafe { bindings::remus_qdisc_settle(sch.0.as_ptr()) };
        }
    }
}

/// What lies in the private area of `struct Qdisc`.
struct Private<T: Qdisc> {
    // Dropped first, so that the hook is gone before the state.
    hook: Option<hook::Registration<T>>,
    state: Option<Arc<T>>,
    waker: Option<Arc<Waker>>,
}

/// A kind of queue discipline that is registered; it is removed when this is dropped.
///
/// # Invariants
///
/// `ops` is registered.
pub(crate) struct Registration<T: Qdisc> {
    ops: KBox<AssertSync<bindings::Qdisc_ops>>,
    _kind: PhantomData<T>,
}

impl<T: Qdisc> Registration<T> {
    /// Registers the kind. Process context.
    pub(crate) fn new(module: &'static ThisModule) -> Result<Self> {
        let mut ops: KBox<AssertSync<bindings::Qdisc_ops>> = KBox::new(
            AssertSync(bindings::Qdisc_ops {
                priv_size: core::mem::size_of::<Private<T>>() as c_int,
                init: Some(Self::init),
                change: Some(Self::change),
                enqueue: Some(Self::enqueue),
                dequeue: Some(Self::dequeue),
                peek: Some(bindings::remus_qdisc_peek),
                reset: Some(Self::reset),
                destroy: Some(Self::destroy),
                dump: Some(Self::dump),
                dump_stats: Some(Self::dump_stats),
                owner: module.as_ptr(),
                ..Plain::ZERO
            }),
            GFP_KERNEL,
        )?;
        put_name(&mut ops.0.id, T::KIND);
        // SAFETY: `ops` is complete and stays where it is, on the heap, until `drop`.
        to_result(unsafe { bindings::register_qdisc(&mut ops.0) })?;
        // INVARIANT: Just registered.
        Ok(Self {
            ops,
            _kind: PhantomData,
        })
    }

    /// # Safety
    ///
    /// `sch` is an instance of this kind for which `init` was called and `destroy` was not.
    unsafe fn private<'a>(sch: *mut bindings::Qdisc) -> &'a Private<T> {
        // SAFETY: `init` wrote it first of all, and it is only changed while nothing else can call:
        // in `init` and in `destroy`.
        unsafe { &*bindings::remus_qdisc_priv(sch).cast() }
    }

    /// # Safety
    ///
    /// Called by the scheduler with the RTNL held, once for a new instance.
    unsafe extern "C" fn init(
        sch: *mut bindings::Qdisc,
        options: *mut bindings::nlattr,
        ack: *mut bindings::netlink_ext_ack,
    ) -> c_int {
        // SAFETY: The scheduler gives a valid instance with room for `Private<T>`, aligned to 64
        // bytes. `destroy` is called even if this fails, so there must be something to destroy.
        let (sch, private) = unsafe {
            let private: *mut Private<T> = bindings::remus_qdisc_priv(sch).cast();
            private.write(Private {
                hook: None,
                state: None,
                waker: None,
            });
            (NonNull::new_unchecked(sch), &mut *private)
        };
        // SAFETY: Both are this request's, during this call.
        let (options, ack) = unsafe {
            (
                NonNull::new(options).map(|o| Attr::from_raw(o)),
                Ack::from_raw(ack),
            )
        };
        // INVARIANT: Valid, and the RTNL held, during this call.
        let control = Control(sch, PhantomData);
        let mut create = || {
            let waker = private.waker.insert(Waker::new(sch)?).clone();
            let state = private
                .state
                .insert(T::init(&control, options, waker, &ack)?)
                .clone();
            if state.hooks_ingress() {
                // SAFETY: `destroy` drops the registration. A device's queue disciplines are
                // destroyed before it is unregistered or leaves its namespace.
                let hook = unsafe { hook::Registration::new(control.device(), state) };
                if hook.as_ref().is_err_and(|e| *e == not_supported()) {
                    ack.say(b"this kernel has no ingress hooks (CONFIG_NETFILTER_INGRESS)");
                }
                private.hook = Some(hook?);
            }
            Ok(())
        };
        match create() {
            Ok(()) => 0,
            Err(error) => Error::to_errno(error),
        }
    }

    /// # Safety
    ///
    /// Called by the scheduler with the RTNL held.
    unsafe extern "C" fn change(
        sch: *mut bindings::Qdisc,
        options: *mut bindings::nlattr,
        ack: *mut bindings::netlink_ext_ack,
    ) -> c_int {
        // SAFETY: The instance is valid and initialised.
        let (state, sch) = unsafe { (&Self::private(sch).state, NonNull::new_unchecked(sch)) };
        // SAFETY: Both are this request's, during this call.
        let (options, ack) = unsafe {
            (
                NonNull::new(options).map(|o| Attr::from_raw(o)),
                Ack::from_raw(ack),
            )
        };
        // INVARIANT: Valid, and the RTNL held, during this call.
        let control = Control(sch, PhantomData);
        match state
            .as_ref()
            .map(|s| T::change(s, &control, options, &ack))
        {
            Some(Err(error)) => error.to_errno(),
            _ => 0,
        }
    }

    /// # Safety
    ///
    /// Called by the scheduler with the root lock held.
    unsafe extern "C" fn enqueue(
        skb: *mut bindings::sk_buff,
        sch: *mut bindings::Qdisc,
        to_free: *mut *mut bindings::sk_buff,
    ) -> c_int {
        // SAFETY: The instance is valid and initialised; the packet is given to it, and its
        // control block is the queue discipline's.
        let (state, queue, packet) = unsafe {
            (
                &Self::private(sch).state,
                Queue(NonNull::new_unchecked(sch), PhantomData),
                Packet::from_raw(NonNull::new_unchecked(skb)),
            )
        };
        // INVARIANT: `to_free` is the caller's.
        let caller = Caller(to_free, PhantomData);
        match state {
            Some(state) => state.enqueue(&queue, Outgoing { packet, caller }).0,
            None => caller.drop(&queue, packet).0,
        }
    }

    /// # Safety
    ///
    /// Called by the scheduler with the root lock held.
    unsafe extern "C" fn dequeue(sch: *mut bindings::Qdisc) -> *mut bindings::sk_buff {
        // SAFETY: The instance is valid and initialised.
        let (state, queue) = unsafe {
            (
                &Self::private(sch).state,
                Queue(NonNull::new_unchecked(sch), PhantomData),
            )
        };
        state
            .as_ref()
            .and_then(|s| s.dequeue(&queue))
            .map_or(null_mut(), Packet::into_raw)
    }

    /// # Safety
    ///
    /// Called by the scheduler with the root lock held, or for an instance that is not used yet.
    unsafe extern "C" fn reset(sch: *mut bindings::Qdisc) {
        // SAFETY: The instance is valid and initialised.
        let (state, queue) = unsafe {
            (
                &Self::private(sch).state,
                Queue(NonNull::new_unchecked(sch), PhantomData),
            )
        };
        if let Some(state) = state {
            state.reset(&queue);
        }
    }

    /// # Safety
    ///
    /// Called by the scheduler with the RTNL held, once for an instance that `init` was called for,
    /// when nothing else uses it any more.
    unsafe extern "C" fn destroy(sch: *mut bindings::Qdisc) {
        // SAFETY: Valid, and nobody else has it.
        let private: &mut Private<T> = unsafe { &mut *bindings::remus_qdisc_priv(sch).cast() };
        if let Some(waker) = private.waker.take() {
            waker.stop();
        }
        drop(private.hook.take());
        if let Some(state) = private.state.take() {
            T::destroy(&state);
        }
    }

    /// # Safety
    ///
    /// Called by the scheduler with the RTNL held.
    unsafe extern "C" fn dump(sch: *mut bindings::Qdisc, skb: *mut bindings::sk_buff) -> c_int {
        // SAFETY: The instance is valid and initialised, and the message the caller's.
        let (state, mut message) = unsafe {
            (
                &Self::private(sch).state,
                Message::from_raw(NonNull::new_unchecked(skb)),
            )
        };
        let Some(state) = state else {
            return 0;
        };
        match message.put_nest(bindings::TCA_OPTIONS as u16, |m| state.dump(m)) {
            Ok(()) => 0,
            Err(error) => error.to_errno(),
        }
    }

    /// # Safety
    ///
    /// Called by the scheduler with the RTNL held.
    unsafe extern "C" fn dump_stats(
        sch: *mut bindings::Qdisc,
        dump: *mut bindings::gnet_dump,
    ) -> c_int {
        // SAFETY: The instance is valid and initialised.
        let Some(state) = (unsafe { &Self::private(sch).state }) else {
            return 0;
        };
        let mut stats = state.stats();
        // SAFETY: `dump` is the caller's; the statistics are copied before this returns.
        unsafe {
            bindings::gnet_stats_copy_app(
                dump,
                core::ptr::from_mut(&mut stats).cast(),
                core::mem::size_of::<T::Stats>() as c_int,
            )
        }
    }
}

impl<T: Qdisc> Drop for Registration<T> {
    fn drop(&mut self) {
        // SAFETY: Registered by the type invariant; instances hold the module, so there is none.
        unsafe { bindings::unregister_qdisc(&mut self.ops.0) };
    }
}

// SAFETY: Eleven eight-byte and two four-byte integers: no padding.
unsafe impl AsBytes for crate::core::uapi::tca::Stats {}
