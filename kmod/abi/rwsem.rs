// SPDX-License-Identifier: GPL-2.0

//! A lock that many readers or one writer hold.
//!
//! C header: [`include/linux/rwsem.h`](srctree/include/linux/rwsem.h)

use super::bindings;
use core::{
    cell::UnsafeCell,
    marker::PhantomPinned,
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

/// A value behind a `struct rw_semaphore`. Both ways to lock may sleep: process context.
#[pin_data]
pub(crate) struct RwSem<T> {
    #[pin]
    sem: Opaque<bindings::rw_semaphore>,
    #[pin]
    _pin: PhantomPinned,
    data: UnsafeCell<T>,
}

// SAFETY: Readers share the value, and a writer uses it, on whatever thread.
unsafe impl<T: Send + Sync> Sync for RwSem<T> {}
// SAFETY: Nothing in it belongs to a thread.
unsafe impl<T: Send> Send for RwSem<T> {}

impl<T> RwSem<T> {
    /// A lock around `data`.
    pub(crate) fn new(
        data: T,
        name: &'static CStr,
        key: Pin<&'static LockClassKey>,
    ) -> impl PinInit<Self> {
        pin_init!(Self {
            // SAFETY: The lock is ours to initialise; name and key live for ever.
            sem <- Opaque::ffi_init(|slot| unsafe {
                bindings::__init_rwsem(slot, name.as_char_ptr(), key.as_ptr())
            }),
            _pin: PhantomPinned,
            data: UnsafeCell::new(data),
        })
    }

    /// Locks for reading.
    pub(crate) fn read(&self) -> ReadGuard<'_, T> {
        // SAFETY: Initialised by `new`.
        unsafe { bindings::down_read(self.sem.get()) };
        // INVARIANT: Just locked.
        ReadGuard(self, NotThreadSafe)
    }

    /// Locks for writing.
    pub(crate) fn write(&self) -> WriteGuard<'_, T> {
        // SAFETY: Initialised by `new`.
        unsafe { bindings::down_write(self.sem.get()) };
        // INVARIANT: Just locked.
        WriteGuard(self, NotThreadSafe)
    }
}

/// Locked for reading; unlocked when this is dropped.
///
/// # Invariants
///
/// The caller holds the lock for reading.
pub(crate) struct ReadGuard<'a, T>(&'a RwSem<T>, NotThreadSafe);

impl<T> Deref for ReadGuard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: Nobody writes while the lock is held, by the type invariant.
        unsafe { &*self.0.data.get() }
    }
}

impl<T> Drop for ReadGuard<'_, T> {
    fn drop(&mut self) {
        // SAFETY: Held by the type invariant.
        unsafe { bindings::up_read(self.0.sem.get()) };
    }
}

/// Locked for writing; unlocked when this is dropped.
///
/// # Invariants
///
/// The caller holds the lock for writing.
pub(crate) struct WriteGuard<'a, T>(&'a RwSem<T>, NotThreadSafe);

impl<T> Deref for WriteGuard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: Nobody else uses the value while the lock is held, by the type invariant.
        unsafe { &*self.0.data.get() }
    }
}

impl<T> DerefMut for WriteGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: As above.
        unsafe { &mut *self.0.data.get() }
    }
}

impl<T> Drop for WriteGuard<'_, T> {
    fn drop(&mut self) {
        // SAFETY: Held by the type invariant.
        unsafe { bindings::up_write(self.0.sem.get()) };
    }
}
