// SPDX-License-Identifier: GPL-2.0

//! A sparse array that only grows: what is in it stays until the whole of it goes.
//!
//! That is what lets everybody look at entries without a lock or a reference count.
//!
//! C header: [`include/linux/xarray.h`](srctree/include/linux/xarray.h)

use super::bindings;
use core::marker::{
    PhantomData,
    PhantomPinned, //
};
use kernel::{
    error::to_result,
    ffi::c_ulong,
    prelude::*,
    types::{
        ForeignOwnable,
        Opaque, //
    },
};

/// A sparse array that only grows.
///
/// # Invariants
///
/// Every entry is what `T::into_foreign` returned, and is neither changed nor removed before `drop`.
#[pin_data(PinnedDrop)]
pub(crate) struct Array<T: ForeignOwnable> {
    #[pin]
    entries: Opaque<bindings::xarray>,
    #[pin]
    _pin: PhantomPinned,
    _owns: PhantomData<T>,
}

// SAFETY: Entries may be dropped on another thread than put them there.
unsafe impl<T: ForeignOwnable + Send> Send for Array<T> {}
// SAFETY: Threads share entries by `get`, and hand them over by `insert`.
unsafe impl<T: ForeignOwnable + Send + Sync> Sync for Array<T> {}

impl<T: ForeignOwnable> Array<T> {
    /// An empty array. What it needs for itself is charged to the memory cgroup of whoever inserts.
    pub(crate) fn new() -> impl PinInit<Self> {
        // The lowest bits of an entry are the array's own.
        const { assert!(T::FOREIGN_ALIGN >= 4) };
        pin_init!(Self {
            // SAFETY: The array is ours to initialise. INVARIANT: It is empty.
            entries <- Opaque::ffi_init(|slot| unsafe { bindings::remus_array_init(slot) }),
            _pin: PhantomPinned,
            _owns: PhantomData,
        })
    }

    /// The entry at `index`. Any context.
    pub(crate) fn get(&self, index: u64) -> Option<T::Borrowed<'_>> {
        // SAFETY: Initialised by `new`; takes the RCU read lock itself.
        let entry = unsafe { bindings::xa_load(self.entries.get(), index as c_ulong) };
        // SAFETY: By the type invariant, and it stays for as long as the array is borrowed.
        (!entry.is_null()).then(|| unsafe { T::borrow(entry) })
    }

    /// The first entry whose index is not below `from`, and its index. Any context.
    pub(crate) fn next(&self, from: u64) -> Option<(u64, T::Borrowed<'_>)> {
        let mut index = from as c_ulong;
        // SAFETY: As for `get`.
        let entry = unsafe { bindings::remus_array_next(self.entries.get(), &mut index) };
        // SAFETY: As for `get`.
        (!entry.is_null()).then(|| (index as u64, unsafe { T::borrow(entry) }))
    }

    /// Puts `value` at `index`, unless something is there: then it is dropped, and that stays. Returns
    /// whether it was put there. Fails if there is no memory. May sleep.
    pub(crate) fn insert(&self, index: u64, value: T) -> Result<bool> {
        let entry = value.into_foreign();
        // SAFETY: Initialised by `new`; takes the array's lock itself. INVARIANT: Ours until now.
        let done = to_result(unsafe {
            bindings::remus_array_insert(self.entries.get(), index as c_ulong, entry)
        });
        if let Err(error) = done {
            // SAFETY: It was not put into the array.
            drop(unsafe { T::from_foreign(entry) });
            return if error == EBUSY {
                Ok(false)
            } else {
                Err(error)
            };
        }
        Ok(true)
    }
}

#[pinned_drop]
impl<T: ForeignOwnable> PinnedDrop for Array<T> {
    fn drop(self: Pin<&mut Self>) {
        let entries = self.entries.get();
        let mut index = 0;
        loop {
            // SAFETY: Initialised by `new`, and nobody else has it any more.
            let entry = unsafe { bindings::remus_array_next(entries, &mut index) };
            if entry.is_null() {
                break;
            }
            // SAFETY: By the type invariant. Nobody sees the entry any more, so it need not be removed
            // before it is dropped.
            drop(unsafe { T::from_foreign(entry) });
            // SAFETY: May be called by whoever may sleep, as those who drop this may.
            unsafe { bindings::remus_cond_resched() };
            match index.checked_add(1) {
                Some(next) => index = next,
                None => break,
            }
        }
        // SAFETY: As above.
        unsafe { bindings::xa_destroy(entries) };
    }
}
