// SPDX-License-Identifier: GPL-2.0

//! Abstractions over the C side of the kernel that the `kernel` crate does not have yet.
//!
//! All `unsafe` of the module is below this directory, and no raw kernel pointer leaves it. Each
//! file is one abstraction, written so that it could become part of the `kernel` crate:
//!
//! | file | of |
//! |---|---|
//! | `skb.rs` | packets: `struct sk_buff`, owned, alone or in a queue |
//! | `netdev.rs` | `struct net_device`, as far as a qdisc sees it |
//! | `qdisc.rs` | queue disciplines |
//! | `hook.rs` | netfilter's ingress hook of a device |
//! | `netlink.rs` | attributes, policies, extended acknowledgements, generic netlink families |
//! | `array.rs` | a sparse array that only grows |
//! | `page.rs` | pages that user space may map, alone and by number |
//! | `memcg.rs` | to whose memory cgroup allocations are charged |
//! | `ramdev.rs` | a character device whose mappings track writes |
//! | `rwsem.rs` | `struct rw_semaphore` |
//! | `workqueue.rs` | the module's own work queue |

pub(crate) mod array;
mod bindings;
mod hook;
pub(crate) mod memcg;
pub(crate) mod netdev;
pub(crate) mod netlink;
pub(crate) mod page;
pub(crate) mod qdisc;
pub(crate) mod ramdev;
pub(crate) mod rwsem;
pub(crate) mod skb;
pub(crate) mod workqueue;

use crate::core::uapi;
use kernel::{
    error::Error,
    transmute::{
        AsBytes,
        FromBytes, //
    }, //
};

/// A value that threads may share although its type does not say so.
///
/// # Invariants
///
/// The value is never changed while it is shared, or only by C code that has its own rules for it.
#[repr(transparent)]
struct AssertSync<T>(T);

// SAFETY: By the type invariant.
unsafe impl<T> Sync for AssertSync<T> {}
// SAFETY: By the type invariant, nothing in the value belongs to one thread.
unsafe impl<T> Send for AssertSync<T> {}

/// A C structure for which all bits zero is a valid value.
///
/// # Safety
///
/// All bits zero must be a valid value: integers, nullable pointers, and arrays of these.
unsafe trait Plain: Sized {
    /// All bits zero.
    const ZERO: Self = {
        let zero = core::mem::MaybeUninit::<Self>::zeroed();
        // SAFETY: By the safety requirement of the trait.
        unsafe { zero.assume_init() }
    };
}

macro_rules! plain {
    ($($name:ident)*) => {
        // SAFETY: Integers, bit fields, and pointers that C allows to be null.
        $(unsafe impl Plain for bindings::$name {})*
    };
}
plain!(Qdisc_ops genl_family genl_ops genl_multicast_group notifier_block miscdevice file_operations nf_hook_ops nla_policy
    vm_operations_struct);

// SAFETY: Integers without padding: any bits are a value.
unsafe impl FromBytes for uapi::ram::Read {}
// SAFETY: As above.
unsafe impl AsBytes for uapi::ram::Read {}
// SAFETY: As above.
unsafe impl FromBytes for uapi::ram::Bitmap {}
// SAFETY: As above.
unsafe impl AsBytes for uapi::ram::Bitmap {}

/// `EOPNOTSUPP`, which `kernel::error::code` lacks.
pub(crate) fn not_supported() -> Error {
    Error::from_errno(-(bindings::EOPNOTSUPP as i32))
}

/// `EALREADY`, which `kernel::error::code` lacks.
pub(crate) fn already() -> Error {
    Error::from_errno(-(bindings::EALREADY as i32))
}

/// `ESTALE`, which `kernel::error::code` lacks.
pub(crate) fn stale() -> Error {
    Error::from_errno(-(bindings::ESTALE as i32))
}

/// `ECANCELED`, which `kernel::error::code` lacks.
pub(crate) fn cancelled() -> Error {
    Error::from_errno(-(bindings::ECANCELED as i32))
}

/// Copies as much of `name` into a C array as leaves room for the NUL that is there already.
fn put_name(array: &mut [kernel::ffi::c_char], name: &[u8]) {
    let room = array.len().saturating_sub(1);
    for (to, from) in array.iter_mut().take(room).zip(name) {
        *to = *from;
    }
}

/// Whether the calling process may administer the network of the host (`CAP_NET_ADMIN` in the
/// initial user namespace).
pub(crate) fn is_net_admin() -> bool {
    // SAFETY: `capable` may be called in process context, which is where its callers are.
    unsafe { bindings::capable(bindings::CAP_NET_ADMIN as i32) }
}

/// Whether the calling process should stop what it does, because of a signal. Process context.
pub(crate) fn is_signalled() -> bool {
    // SAFETY: Looks at the calling process.
    unsafe { bindings::remus_signal_pending() }
}

/// Lets others run if it is their turn. Process context, where one may sleep.
pub(crate) fn cond_resched() {
    // SAFETY: The callers may sleep.
    unsafe { bindings::remus_cond_resched() }
}
