// SPDX-License-Identifier: GPL-2.0

//! A spin lock that is taken in process context and in softirqs.
//!
//! C header: [`include/linux/spinlock.h`](srctree/include/linux/spinlock.h)

use super::bindings;
use kernel::{
    ffi::{
        c_char, //
    },
    sync::lock::{
        Backend,
        Lock, //
    },
};

/// A spin lock whose holder cannot be interrupted by a softirq of its processor.
///
/// Not for hard interrupts.
pub(crate) type SpinLockBh<T> = Lock<T, SpinLockBhBackend>;

/// The lock backend of `spin_lock_bh()`.
pub(crate) struct SpinLockBhBackend;

// SAFETY: The underlying `spinlock_t` ensures mutual exclusion, and `relock` uses the default
// implementation, which calls the same method.
unsafe impl Backend for SpinLockBhBackend {
    type State = bindings::spinlock_t;
    type GuardState = ();

    unsafe fn init(ptr: *mut Self::State, name: *const c_char, key: *mut bindings::lock_class_key) {
        // SAFETY: `ptr` is valid for writes, and `name` and `key` are valid for read indefinitely,
        // by the safety requirements of this function.
        unsafe { bindings::__spin_lock_init(ptr, name, key) }
    }

    unsafe fn lock(ptr: *mut Self::State) -> Self::GuardState {
        // SAFETY: `ptr` points to an initialised lock by the safety requirements.
        unsafe { bindings::remus_spin_lock_bh(ptr) }
    }

    unsafe fn unlock(ptr: *mut Self::State, _guard_state: &Self::GuardState) {
        // SAFETY: The caller owns the lock by the safety requirements.
        unsafe { bindings::remus_spin_unlock_bh(ptr) }
    }

    unsafe fn try_lock(ptr: *mut Self::State) -> Option<Self::GuardState> {
        // SAFETY: `ptr` points to an initialised lock by the safety requirements.
        (unsafe { bindings::remus_spin_trylock_bh(ptr) } != 0).then_some(())
    }

    unsafe fn assert_is_held(ptr: *mut Self::State) {
        // SAFETY: `ptr` points to an initialised lock by the safety requirements.
        unsafe { bindings::spin_assert_is_held(ptr) }
    }
}
