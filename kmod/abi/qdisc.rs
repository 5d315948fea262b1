// SPDX-License-Identifier: GPL-2.0

//! Queue disciplines.
//!
//! To implement one, a module must do the following:
//!
//! - implement [`Qdisc`] for one instance, and its [`Default`] for what the root lock protects;
//! - create and keep a [`Registration`].
//!
//! An instance can only be the root of its device. Methods get the lock that is held as a type:
//! [`Control`] means the RTNL, [`Queue`] the root lock of the device's queues.
//!
//! The scheduler holds the root lock whenever it enqueues or dequeues. It is the lock inside the instance's
//! own `struct Qdisc` (`qdisc_lock()`), as the instance is the root. It protects [`Qdisc::State`], too, so that a
//! packet costs no lock of the instance's own. Whoever else wants that state takes the root lock as well: in
//! process context through an [`Instance`], in the ingress hook through an [`Unlocked`].
//!
//! Lock order: the RTNL, [`Instance::waking`], [`Instance::sch`], the root lock.
//!
//! C headers: [`include/net/sch_generic.h`](srctree/include/net/sch_generic.h),
//! [`include/net/pkt_sched.h`](srctree/include/net/pkt_sched.h)

use super::{
    bindings,
    hook::{
        self,
        IngressHook,
        SoftirqsOff, //
    },
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
    skb::Packet,
    AssertSync,
    Plain,
};
use core::{
    cell::UnsafeCell,
    marker::PhantomData,
    ptr::{
        addr_of,
        addr_of_mut,
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

/// One instance of a queue discipline.
pub(crate) trait Qdisc: Send + Sync + Sized + 'static {
    /// Its kind, as given to `tc`, at most 15 bytes.
    const KIND: &'static [u8];

    /// What the root lock protects: [`Queue::state`].
    type State: Default + Send;

    /// Creates an instance. Its state is there already. RTNL held, process context.
    fn init(
        control: &Control<'_>,
        options: Option<Attr<'_>>,
        instance: Arc<Instance<Self>>,
        ack: &Ack<'_>,
    ) -> Result<Arc<Self>>;

    /// Whether [`receive`](Self::receive) is to see what the device receives.
    fn hooks_ingress(&self) -> bool;

    /// Called for each packet that the device receives; see [`IngressHook::receive`].
    fn receive(&self, packet: Packet, instance: Unlocked<'_, Self>) -> Option<Packet>;

    /// Changes options. RTNL held, process context.
    fn change(
        this: &Arc<Self>,
        control: &Control<'_>,
        options: Option<Attr<'_>>,
        ack: &Ack<'_>,
    ) -> Result;

    /// Takes a packet that is to leave through the device. Root lock held, softirqs off.
    fn enqueue(&self, queue: &mut Queue<'_, Self>, packet: Outgoing<'_>) -> Enqueued;

    /// The next packet that may leave now. Root lock held, softirqs off.
    fn dequeue(&self, queue: &mut Queue<'_, Self>) -> Option<Packet>;

    /// Forgets all packets on their way out, as when the device goes down. Root lock held.
    fn reset(&self, queue: &mut Queue<'_, Self>);

    /// The instance goes away: nothing is enqueued or received any more. What it left in its own first-in
    /// first-out queue is freed after this, then its state. RTNL held, process context.
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

/// An instance whose root lock the caller holds, and what that lock protects.
///
/// # Invariants
///
/// `sch` points to a valid `struct Qdisc` whose root lock is held for `'a`, and `state` to its state.
pub(crate) struct Queue<'a, T: Qdisc> {
    sch: NonNull<bindings::Qdisc>,
    /// The instance's state.
    pub(crate) state: &'a mut T::State,
}

impl<T: Qdisc> Queue<'_, T> {
    /// # Safety
    ///
    /// `sch` is an initialised instance of this kind. Its root lock is held for the lifetime of the result,
    /// which is the only one as long as it is held.
    unsafe fn new(sch: NonNull<bindings::Qdisc>) -> Self {
        // SAFETY: Initialised, and nobody else has the state, as nobody else has the lock.
        let state = unsafe { &mut *UnsafeCell::raw_get(addr_of!((*private::<T>(sch)).state)) };
        // INVARIANT: By the safety requirements.
        Self { sch, state }
    }

    /// The same for a function that is called with it: as a value it need not be in memory.
    #[inline]
    pub(crate) fn reborrow(&mut self) -> Queue<'_, T> {
        // INVARIANT: As for this one, which cannot be used meanwhile.
        Queue {
            sch: self.sch,
            state: self.state,
        }
    }

    /// Accounts for a packet that the instance keeps, and will return from
    /// [`dequeue`](Qdisc::dequeue). To be called before the packet is put where it is kept.
    pub(crate) fn held(&self, packet: &Packet) -> Enqueued {
        let sch = self.sch.as_ptr();
        // SAFETY: Valid by the type invariant, and these fields only change with the root lock held. There
        // is no reference to the whole, as other processors change other fields meanwhile.
        unsafe {
            (*sch).q.qlen = (*sch).q.qlen.wrapping_add(1);
            (*sch).qstats.backlog = (*sch).qstats.backlog.wrapping_add(packet.wire_len());
        }
        Enqueued(bindings::NET_XMIT_SUCCESS as c_int)
    }

    /// Whether a packet may leave at once, past the instance, as long as nothing waits in it.
    pub(crate) fn set_bypass(&self, on: bool) {
        let sch = self.sch.as_ptr();
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

    /// Accounts for a packet that was [`held`](Self::held) and is about to be returned, as `qdisc_bstats_update()` does
    /// where 64 bits are one word: the only one who writes needs no more than that.
    pub(crate) fn sent(&self, packet: Packet) -> Packet {
        let (sch, size) = (self.sch.as_ptr(), packet.wire_len());
        // SAFETY: As in `held`. Others only read the sums.
        unsafe {
            (*sch).q.qlen = (*sch).q.qlen.wrapping_sub(1);
            (*sch).qstats.backlog = (*sch).qstats.backlog.wrapping_sub(size);
            let bytes = addr_of_mut!((*sch).bstats.bytes.v.a.a.counter);
            bytes.write_volatile(bytes.read().wrapping_add(size.into()));
            let packets = addr_of_mut!((*sch).bstats.packets.v.a.a.counter);
            packets.write_volatile(packets.read().wrapping_add(packet.segments().into()));
        }
        packet
    }

    /// Drops a packet that was [`held`](Self::held) and will not be returned, and counts it as dropped.
    pub(crate) fn forget(&self, packet: Packet) {
        // SAFETY: Valid and locked by the type invariant.
        unsafe { bindings::remus_qdisc_forgotten(self.sch.as_ptr(), packet.as_ptr()) };
    }

    /// Whether the instance's own first-in first-out queue has no packet.
    pub(crate) fn fifo_is_empty(&self) -> bool {
        // SAFETY: Valid and locked by the type invariant.
        unsafe { (*self.sch.as_ptr()).q.head.is_null() }
    }

    /// Takes a packet out of the instance's own first-in first-out queue.
    pub(crate) fn fifo_dequeue(&self) -> Option<Packet> {
        // SAFETY: Valid and locked by the type invariant.
        let skb = NonNull::new(unsafe { bindings::remus_qdisc_fifo_dequeue(self.sch.as_ptr()) })?;
        // SAFETY: The queue gave the packet up.
        Some(unsafe { Packet::from_raw(skb) })
    }

    /// Frees what is in the instance's own first-in first-out queue.
    pub(crate) fn fifo_purge(&self) {
        // SAFETY: Valid and locked by the type invariant.
        unsafe { bindings::remus_qdisc_fifo_purge(self.sch.as_ptr()) };
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
    pub(crate) fn pass<T: Qdisc>(self, queue: &Queue<'_, T>) -> Enqueued {
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
    pub(crate) fn pass<T: Qdisc>(self, queue: &Queue<'_, T>, packet: Packet) -> Enqueued {
        // SAFETY: The packet is given up; `queue` is locked; valid by the type invariant.
        Enqueued(unsafe {
            bindings::remus_qdisc_fifo_enqueue(packet.into_raw(), queue.sch.as_ptr(), self.0)
        })
    }

    /// Drops the packet and counts it.
    pub(crate) fn drop<T: Qdisc>(self, queue: &Queue<'_, T>, packet: Packet) -> Enqueued {
        // SAFETY: As in `pass`.
        Enqueued(unsafe {
            bindings::remus_qdisc_drop(packet.into_raw(), queue.sch.as_ptr(), self.0)
        })
    }
}

/// An instance, for whoever holds none of its locks and does not keep it there.
///
/// # Invariants
///
/// The pointer is to an initialised instance of this kind, or there is none any more. It is taken away with
/// both locks held, before the instance goes.
#[pin_data]
pub(crate) struct Instance<T: Qdisc> {
    /// For as long as the device dequeues, which nobody else here should have to wait for: a seal, above all.
    #[pin]
    waking: Mutex<()>,
    #[pin]
    sch: Mutex<Option<AssertSync<NonNull<bindings::Qdisc>>>>,
    _kind: PhantomData<fn() -> T>,
}

impl<T: Qdisc> Instance<T> {
    /// # Safety
    ///
    /// `sch` is an initialised instance of this kind until [`stop`](Self::stop).
    unsafe fn new(sch: NonNull<bindings::Qdisc>) -> Result<Arc<Self>> {
        // INVARIANT: By the safety requirements.
        Arc::pin_init(
            pin_init!(Self {
                waking <- new_mutex!((), "remus_waking"),
                sch <- new_mutex!(Some(AssertSync(sch)), "remus_instance"),
                _kind: PhantomData,
            }),
            GFP_KERNEL,
        )
    }

    /// Has the device dequeue: most of it has happened when this returns. Process context, may sleep.
    pub(crate) fn wake(&self) {
        let _waking = self.waking.lock();
        let sch = self.sch.lock().as_ref().map(|sch| sch.0);
        if let Some(sch) = sch {
            // SAFETY: Valid by the type invariant; `waking` keeps `stop` away, which waits until the
            // device is done with it.
            unsafe { bindings::remus_qdisc_wake(sch.as_ptr()) };
        }
    }

    /// Calls `f` with the root lock held, if the instance is there. Process context, may sleep.
    pub(crate) fn lock<R>(&self, f: impl FnOnce(&mut Queue<'_, T>) -> R) -> Option<R> {
        let sch = self.sch.lock();
        let sch = sch.as_ref()?.0;
        // SAFETY: Valid by the type invariant; the mutex keeps it there.
        unsafe { bindings::remus_qdisc_lock(sch.as_ptr()) };
        // SAFETY: Initialised by the type invariant, and just locked.
        let result = f(&mut unsafe { Queue::new(sch) });
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
        let sch = {
            let _waking = self.waking.lock();
            self.sch.lock().take()
        };
        if let Some(sch) = sch {
            // SAFETY: The instance is still valid, by what `new` requires; nobody can wake it any more.
            unsafe { bindings::remus_qdisc_settle(sch.0.as_ptr()) };
        }
    }
}

/// An instance whose root lock the caller may take: softirqs are off, and the instance stays.
///
/// # Invariants
///
/// Points to an initialised instance of this kind for `'a`; no lock of it is held.
pub(crate) struct Unlocked<'a, T: Qdisc> {
    sch: NonNull<bindings::Qdisc>,
    _softirqs: SoftirqsOff<'a>,
    _kind: PhantomData<fn() -> T>,
}

impl<T: Qdisc> Unlocked<'_, T> {
    /// Calls `f` with the root lock held.
    pub(crate) fn lock<R>(self, f: impl FnOnce(&mut Queue<'_, T>) -> R) -> R {
        // SAFETY: Valid by the type invariant; softirqs are off, so none can ask for it on this processor.
        unsafe { bindings::remus_qdisc_lock_softirq(self.sch.as_ptr()) };
        // SAFETY: Initialised by the type invariant, and just locked.
        let result = f(&mut unsafe { Queue::new(self.sch) });
        // SAFETY: As above; locked above.
        unsafe { bindings::remus_qdisc_unlock_softirq(self.sch.as_ptr()) };
        result
    }
}

/// The ingress hook of an instance's device.
///
/// # Invariants
///
/// Points to an initialised instance of this kind, whose `qdisc` is set, as long as this is a hook.
struct Ingress<T: Qdisc>(AssertSync<NonNull<bindings::Qdisc>>, PhantomData<fn() -> T>);

impl<T: Qdisc> IngressHook for Ingress<T> {
    fn receive(&self, packet: Packet, softirqs: SoftirqsOff<'_>) -> Option<Packet> {
        let sch = self.0 .0;
        // SAFETY: By the type invariant: only a hook that is registered is called.
        match unsafe { qdisc::<T>(sch) } {
            // INVARIANT: As above. What receives for the device has not locked its queues.
            Some(qdisc) => qdisc.receive(
                packet,
                Unlocked {
                    sch,
                    _softirqs: softirqs,
                    _kind: PhantomData,
                },
            ),
            None => Some(packet),
        }
    }
}

/// What lies in the private area of `struct Qdisc`.
///
/// All but `state` is only written by `init` and `close`, and each field only while nothing else uses it. No
/// reference is made to the whole.
struct Private<T: Qdisc> {
    hook: Option<hook::Registration<Ingress<T>>>,
    qdisc: Option<Arc<T>>,
    instance: Option<Arc<Instance<T>>>,
    /// Protected by the root lock.
    state: UnsafeCell<T::State>,
}

/// Where an instance of this kind has its [`Private`].
fn private<T: Qdisc>(sch: NonNull<bindings::Qdisc>) -> *mut Private<T> {
    const {
        assert!(core::mem::align_of::<Private<T>>() <= core::mem::align_of::<bindings::Qdisc>());
    }
    // SAFETY: Only the address of a field is taken, as qdisc_priv() does.
    unsafe { addr_of_mut!((*sch.as_ptr()).privdata).cast() }
}

/// # Safety
///
/// `sch` is an initialised instance of this kind, which does not go away while the result is used.
unsafe fn qdisc<'a, T: Qdisc>(sch: NonNull<bindings::Qdisc>) -> Option<&'a Arc<T>> {
    // SAFETY: Initialised, and only written while nothing else uses it.
    unsafe { (*addr_of!((*private::<T>(sch)).qdisc)).as_ref() }
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
    /// Called by the scheduler with the RTNL held, once for a new instance.
    unsafe extern "C" fn init(
        sch: *mut bindings::Qdisc,
        options: *mut bindings::nlattr,
        ack: *mut bindings::netlink_ext_ack,
    ) -> c_int {
        // SAFETY: The scheduler gives a valid instance.
        let sch = unsafe { NonNull::new_unchecked(sch) };
        let private = private::<T>(sch);
        // SAFETY: There is room for `Private<T>`, and nobody else knows it. `destroy` is called even if
        // this fails, so there must be something to destroy.
        unsafe {
            private.write(Private {
                hook: None,
                qdisc: None,
                instance: None,
                state: UnsafeCell::new(T::State::default()),
            });
        }
        // SAFETY: Both are this request's, during this call.
        let (options, ack) = unsafe {
            (
                NonNull::new(options).map(|o| Attr::from_raw(o)),
                Ack::from_raw(ack),
            )
        };
        // INVARIANT: Valid, and the RTNL held, during this call.
        let control = Control(sch, PhantomData);
        let create = || {
            // SAFETY: Just initialised; `close` calls `stop`.
            let instance = unsafe { Instance::new(sch) }?;
            // SAFETY: Nothing else uses this field before this returns.
            unsafe { (*private).instance = Some(instance.clone()) };
            let qdisc = T::init(&control, options, instance, &ack)?;
            let hooks = qdisc.hooks_ingress();
            // SAFETY: As above.
            unsafe { (*private).qdisc = Some(qdisc) };
            if hooks {
                // INVARIANT: Initialised, and `close` drops the registration first of all.
                let ingress = Arc::new(Ingress(AssertSync(sch), PhantomData), GFP_KERNEL)?;
                // SAFETY: `close` drops the registration. A device's queue disciplines are destroyed
                // before it is unregistered or leaves its namespace.
                let hook = unsafe { hook::Registration::new(control.device(), ingress) };
                if hook.as_ref().is_err_and(|e| *e == not_supported()) {
                    ack.say(b"this kernel has no ingress hooks (CONFIG_NETFILTER_INGRESS)");
                }
                // SAFETY: As above.
                unsafe { (*private).hook = Some(hook?) };
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
        let (qdisc, sch) = unsafe {
            let sch = NonNull::new_unchecked(sch);
            (qdisc::<T>(sch), sch)
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
        match qdisc.map(|q| T::change(q, &control, options, &ack)) {
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
        // SAFETY: The instance is valid, initialised and locked; the packet is given to it, and its
        // control block is the queue discipline's.
        let (qdisc, mut queue, packet) = unsafe {
            let sch = NonNull::new_unchecked(sch);
            (
                qdisc::<T>(sch),
                Queue::<T>::new(sch),
                Packet::from_raw(NonNull::new_unchecked(skb)),
            )
        };
        // INVARIANT: `to_free` is the caller's.
        let caller = Caller(to_free, PhantomData);
        match qdisc {
            Some(qdisc) => qdisc.enqueue(&mut queue, Outgoing { packet, caller }).0,
            None => caller.drop(&queue, packet).0,
        }
    }

    /// # Safety
    ///
    /// Called by the scheduler with the root lock held.
    unsafe extern "C" fn dequeue(sch: *mut bindings::Qdisc) -> *mut bindings::sk_buff {
        // SAFETY: The instance is valid, initialised and locked.
        let (qdisc, mut queue) = unsafe {
            let sch = NonNull::new_unchecked(sch);
            (qdisc::<T>(sch), Queue::<T>::new(sch))
        };
        qdisc
            .and_then(|q| q.dequeue(&mut queue))
            .map_or(null_mut(), Packet::into_raw)
    }

    /// # Safety
    ///
    /// Called by the scheduler with the root lock held; or without it, with the RTNL held, before `destroy`.
    unsafe extern "C" fn reset(sch: *mut bindings::Qdisc) {
        // SAFETY: The instance is valid and initialised.
        let sch = unsafe { NonNull::new_unchecked(sch) };
        // SAFETY: As above.
        if unsafe { bindings::remus_qdisc_is_dying(sch.as_ptr()) } {
            // After this the scheduler empties queues of its own, without the lock: nobody may wake the
            // instance any more. SAFETY: `destroy` comes next.
            unsafe { Self::close(sch) };
            return;
        }
        // SAFETY: As above, and locked.
        let (qdisc, mut queue) = unsafe { (qdisc::<T>(sch), Queue::<T>::new(sch)) };
        if let Some(qdisc) = qdisc {
            qdisc.reset(&mut queue);
        }
    }

    /// # Safety
    ///
    /// Called by the scheduler with the RTNL held, once for an instance that `init` was called for,
    /// when nothing else uses it any more.
    unsafe extern "C" fn destroy(sch: *mut bindings::Qdisc) {
        // SAFETY: Valid and initialised; what is dropped is not used any more after `close`.
        unsafe {
            let sch = NonNull::new_unchecked(sch);
            Self::close(sch);
            private::<T>(sch).drop_in_place();
        }
    }

    /// Has nobody use the instance any more. Does nothing the second time.
    ///
    /// # Safety
    ///
    /// The scheduler destroys the initialised instance `sch`: the RTNL is held, and nothing is enqueued any
    /// more.
    unsafe fn close(sch: NonNull<bindings::Qdisc>) {
        let private = private::<T>(sch);
        // SAFETY: Only whoever has the RTNL uses this field. Dropping the hook waits for those in it.
        drop(unsafe { (*private).hook.take() });
        // SAFETY: Initialised, and it goes away below.
        if let Some(qdisc) = unsafe { qdisc::<T>(sch) } {
            T::destroy(qdisc);
        }
        // SAFETY: Only whoever has the RTNL uses this field.
        if let Some(instance) = unsafe { (*private).instance.take() } {
            instance.lock(|queue| queue.fifo_purge());
            instance.stop();
        }
        // SAFETY: Nothing is enqueued or received, and nobody can have the device dequeue: nothing uses
        // this field any more.
        drop(unsafe { (*private).qdisc.take() });
    }

    /// # Safety
    ///
    /// Called by the scheduler with the RTNL held.
    unsafe extern "C" fn dump(sch: *mut bindings::Qdisc, skb: *mut bindings::sk_buff) -> c_int {
        // SAFETY: The instance is valid and initialised, and the message the caller's.
        let (qdisc, mut message) = unsafe {
            (
                qdisc::<T>(NonNull::new_unchecked(sch)),
                Message::from_raw(NonNull::new_unchecked(skb)),
            )
        };
        let Some(qdisc) = qdisc else {
            return 0;
        };
        match message.put_nest(bindings::TCA_OPTIONS as u16, |m| qdisc.dump(m)) {
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
        let Some(qdisc) = (unsafe { qdisc::<T>(NonNull::new_unchecked(sch)) }) else {
            return 0;
        };
        let mut stats = qdisc.stats();
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
