// SPDX-License-Identifier: GPL-2.0

//! A spin lock that is taken in process context and in softirqs.
//!
//! C header: [`include/linux/spinlock.h`](srctree/include/linux/spinlock.h)

use super::bindings;
use core::{
    cell::UnsafeCell,
    marker::{
        PhantomData,
        PhantomPinned, //
    },
    ops::{
        Deref,
        DerefMut, //
    },
};
use kernel::{
    prelude::*,
    str::CStr,
    sync::LockClassKey,
    types::{
        NotThreadSafe,
        Opaque, //
    },
};

/// Proof that softirqs are off on this processor, for `'a`.
///
/// # Invariants
///
/// They are.
#[derive(Clone, Copy)]
pub(crate) struct SoftirqsOff<'a>(PhantomData<&'a ()>, NotThreadSafe);

impl SoftirqsOff<'_> {
    /// # Safety
    ///
    /// Softirqs are off, as in a softirq or with a `_bh` lock held, for the lifetime of the result.
    pub(super) unsafe fn new() -> Self {
        // INVARIANT: By the safety requirements.
        Self(PhantomData, NotThreadSafe)
    }
}

/// A spin lock whose holder cannot be interrupted by a softirq of its processor.
///
/// Not for hard interrupts.
#[pin_data]
pub(crate) struct SpinLockBh<T> {
    #[pin]
    lock: Opaque<bindings::spinlock_t>,
    #[pin]
    _pin: PhantomPinned,
    data: UnsafeCell<T>,
}

// SAFETY: The lock lets one thread at a time use the data, which may be sent to it.
unsafe impl<T: Send> Sync for SpinLockBh<T> {}
// SAFETY: Nothing in it belongs to a thread.
unsafe impl<T: Send> Send for SpinLockBh<T> {}

impl<T> SpinLockBh<T> {
    /// A lock around `data`.
    pub(crate) fn new(
        data: T,
        name: &'static CStr,
        key: Pin<&'static LockClassKey>,
    ) -> impl PinInit<Self> {
        pin_init!(Self {
            // SAFETY: The lock is ours to initialise; name and key live for ever.
            lock <- Opaque::ffi_init(|slot| unsafe {
                bindings::__spin_lock_init(slot, name.as_char_ptr(), key.as_ptr())
            }),
            _pin: PhantomPinned,
            data: UnsafeCell::new(data),
        })
    }

    /// Locks. Process context.
    pub(crate) fn lock(&self) -> Guard<'_, T, true> {
        // SAFETY: Initialised by `new`.
        unsafe { bindings::remus_spin_lock_bh(self.lock.get()) };
        // INVARIANT: Just locked, with softirqs off.
        Guard(self, NotThreadSafe)
    }

    /// Locks where softirqs are off already, which is cheaper.
    pub(crate) fn lock_softirq<'a>(&'a self, _: SoftirqsOff<'a>) -> Guard<'a, T, false> {
        // SAFETY: Initialised by `new`; softirqs are off, so none can ask for it on this processor.
        unsafe { bindings::remus_spin_lock(self.lock.get()) };
        // INVARIANT: Just locked.
        Guard(self, NotThreadSafe)
    }
}

/// What is locked; unlocked when this is dropped.
///
/// # Invariants
///
/// The lock is held, and if `BH`, so that softirqs go on when it is unlocked.
pub(crate) struct Guard<'a, T, const BH: bool>(&'a SpinLockBh<T>, NotThreadSafe);

impl<T, const BH: bool> Deref for Guard<'_, T, BH> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: The lock is held by the type invariant.
        unsafe { &*self.0.data.get() }
    }
}

impl<T, const BH: bool> DerefMut for Guard<'_, T, BH> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: The lock is held by the type invariant.
        unsafe { &mut *self.0.data.get() }
    }
}

impl<T, const BH: bool> Drop for Guard<'_, T, BH> {
    fn drop(&mut self) {
        // SAFETY: The lock is held in this way by the type invariant.
        unsafe {
            if BH {
                bindings::remus_spin_unlock_bh(self.0.lock.get());
            } else {
                bindings::remus_spin_unlock(self.0.lock.get());
            }
        }
    }
}
