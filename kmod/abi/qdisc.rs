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
    netdev::Device,
    netlink::{
        Ack,
        Attr,
        Message, //
    },
    not_supported, //
    put_name,
    skb::Packet,
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
    fn change(&self, control: &Control<'_>, options: Option<Attr<'_>>, ack: &Ack<'_>) -> Result;

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
        // SAFETY: Valid and locked by the type invariant.
        unsafe { bindings::remus_qdisc_held(self.0.as_ptr(), packet.as_ptr()) };
        Enqueued(bindings::NET_XMIT_SUCCESS as c_int)
    }

    /// Accounts for a packet that was [`held`](Self::held) and is about to be returned.
    pub(crate) fn sent(&self, packet: &Packet) {
        // SAFETY: Valid and locked by the type invariant.
        unsafe { bindings::remus_qdisc_sent(self.0.as_ptr(), packet.as_ptr()) };
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
///
/// # Invariants
///
/// `to_free` is where the caller of `enqueue` collects dropped packets.
pub(crate) struct Outgoing<'a> {
    packet: Packet,
    to_free: *mut *mut bindings::sk_buff,
    _call: PhantomData<&'a ()>,
}

impl Outgoing<'_> {
    /// The packet, to be kept: say so with [`Queue::held`].
    pub(crate) fn into_packet(self) -> Packet {
        self.packet
    }

    /// The packet.
    pub(crate) fn packet(&mut self) -> &mut Packet {
        &mut self.packet
    }

    /// Puts the packet into the instance's own first-in first-out queue, or drops it if that is
    /// full (the device's `tx_queue_len`).
    pub(crate) fn pass(self, queue: &Queue<'_>) -> Enqueued {
        // SAFETY: The packet is given up; `queue` is locked; `to_free` is valid by the invariant.
        Enqueued(unsafe {
            bindings::remus_qdisc_fifo_enqueue(
                self.packet.into_raw(),
                queue.0.as_ptr(),
                self.to_free,
            )
        })
    }

    /// Drops the packet and counts it.
    pub(crate) fn drop(self, queue: &Queue<'_>) -> Enqueued {
        // SAFETY: As in `pass`.
        Enqueued(unsafe {
            bindings::remus_qdisc_drop(self.packet.into_raw(), queue.0.as_ptr(), self.to_free)
        })
    }
}

/// Has the device of an instance dequeue, as long as the instance is there.
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

    /// Has the device dequeue now. Process context, may sleep.
    pub(crate) fn wake(&self) {
        if let Some(sch) = &*self.sch.lock() {
            // SAFETY: Valid by the type invariant; the lock keeps `stop` away until the device is
            // done with it.
            unsafe { bindings::remus_qdisc_wake(sch.0.as_ptr()) };
        }
    }

    fn stop(&self) {
        *self.sch.lock() = None;
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
        match state.as_ref().map(|s| s.change(&control, options, &ack)) {
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
        let packet = Outgoing {
            packet,
            to_free,
            _call: PhantomData,
        };
        match state {
            Some(state) => state.enqueue(&queue, packet).0,
            None => packet.drop(&queue).0,
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
}

impl<T: Qdisc> Drop for Registration<T> {
    fn drop(&mut self) {
        // SAFETY: Registered by the type invariant; instances hold the module, so there is none.
        unsafe { bindings::unregister_qdisc(&mut self.ops.0) };
    }
}
