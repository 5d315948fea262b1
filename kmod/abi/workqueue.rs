// SPDX-License-Identifier: GPL-2.0

//! The module's own work queue, which is empty before the module's code goes away.
//!
//! C header: [`include/linux/workqueue.h`](srctree/include/linux/workqueue.h)

use super::{
    bindings,
    AssertSync, //
};
use core::ptr::NonNull;
use kernel::{
    error::from_err_ptr,
    prelude::*,
    sync::SetOnce,
    workqueue::Queue, //
};

static QUEUE: SetOnce<AssertSync<NonNull<bindings::workqueue_struct>>> = SetOnce::new();

/// Where the module's work is done: in process context, soon, by whichever processor is free. `None`
/// before there is a [`Registration`]. Any context.
pub(crate) fn queue() -> Option<&'static Queue> {
    // SAFETY: The queue stays until its registration is dropped, which is when the module's code goes.
    QUEUE
        .as_ref()
        .map(|queue| unsafe { Queue::from_raw(queue.0.as_ptr()) })
}

/// The queue's existence. Dropping it waits until all work is done.
///
/// # Invariants
///
/// `QUEUE` is set, and its queue exists.
pub(crate) struct Registration(());

impl Registration {
    /// Creates the queue. Process context; once, from the module's `init`.
    pub(crate) fn new() -> Result<Self> {
        // SAFETY: May be called in process context.
        let queue = from_err_ptr(unsafe { bindings::remus_workqueue_new() })?;
        let queue = NonNull::new(queue).ok_or(ENOMEM)?;
        if !QUEUE.populate(AssertSync(queue)) {
            // SAFETY: Just created, and nobody has it.
            unsafe { bindings::destroy_workqueue(queue.as_ptr()) };
            return Err(EBUSY);
        }
        // INVARIANT: Just set.
        Ok(Self(()))
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        if let Some(queue) = QUEUE.as_ref() {
            // SAFETY: Exists by the type invariant. Whatever could queue more work is gone: the
            // module drops this after all that it registered.
            unsafe { bindings::destroy_workqueue(queue.0.as_ptr()) };
        }
    }
}
