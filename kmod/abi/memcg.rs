// SPDX-License-Identifier: GPL-2.0

//! To whose memory cgroup allocations are charged.
//!
//! C header: [`include/linux/memcontrol.h`](srctree/include/linux/memcontrol.h)

use super::bindings;
use kernel::types::NotThreadSafe;

/// A memory cgroup.
///
/// # Invariants
///
/// Owns a reference, or is null: that of nobody, who pays nothing.
pub(crate) struct Memcg(*mut bindings::mem_cgroup);

// SAFETY: References may be held and dropped by any thread.
unsafe impl Send for Memcg {}
// SAFETY: As above; the methods only read the pointer.
unsafe impl Sync for Memcg {}

impl Memcg {
    /// That of the calling process.
    pub(crate) fn current() -> Self {
        // SAFETY: Process context. INVARIANT: It comes with a reference.
        Self(unsafe { bindings::remus_memcg_current() })
    }

    /// Charges what this thread allocates to this cgroup, until the result is dropped.
    pub(crate) fn charge(&self) -> Charge<'_> {
        // SAFETY: The cgroup lives as long as the borrow.
        let previous = unsafe { bindings::remus_memcg_charge(self.0) };
        // INVARIANT: Just set for this thread.
        Charge {
            previous,
            _cgroup: self,
            _thread: NotThreadSafe,
        }
    }
}

impl Drop for Memcg {
    fn drop(&mut self) {
        // SAFETY: Owns a reference by the type invariant, if there is one.
        unsafe { bindings::remus_memcg_put(self.0) };
    }
}

/// While this lives, the thread's allocations are charged to a cgroup of our choice.
///
/// # Invariants
///
/// `previous` is what was chosen before on this thread.
pub(crate) struct Charge<'a> {
    previous: *mut bindings::mem_cgroup,
    _cgroup: &'a Memcg,
    _thread: NotThreadSafe,
}

impl Drop for Charge<'_> {
    fn drop(&mut self) {
        // SAFETY: By the type invariant; scopes on one thread end in the reverse order of their beginning.
        unsafe { bindings::remus_memcg_charge(self.previous) };
    }
}
