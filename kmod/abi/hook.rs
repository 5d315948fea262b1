// SPDX-License-Identifier: GPL-2.0

//! Netfilter's ingress hook of a network device.
//!
//! To see what a device receives, implement [`IngressHook`] and keep a [`Registration`].
//!
//! C header: [`include/linux/netfilter.h`](srctree/include/linux/netfilter.h)

use super::{
    bindings,
    netdev::Device,
    skb::Packet,
    AssertSync,
    Plain, //
};
use core::{
    marker::PhantomData,
    ptr::NonNull, //
};
use kernel::{
    error::to_result,
    ffi::{
        c_uint,
        c_void, //
    },
    prelude::*,
    sync::Arc,
    types::NotThreadSafe, //
};

/// Proof that softirqs are off on this processor, for `'a`.
///
/// # Invariants
///
/// They are.
#[derive(Clone, Copy)]
pub(super) struct SoftirqsOff<'a>(PhantomData<&'a ()>, NotThreadSafe);

/// What sees the packets.
pub(super) trait IngressHook: Send + Sync + 'static {
    /// Called for each packet that the device receives, after the taps and tc's ingress.
    ///
    /// Softirq context, or process context with softirqs off; several processors at once. Returns
    /// the packet to let it pass, or `None` after taking it.
    fn receive(&self, packet: Packet, softirqs: SoftirqsOff<'_>) -> Option<Packet>;
}

/// A hook that is registered; it is removed when this is dropped.
///
/// # Invariants
///
/// - `ops` is registered with the namespace `net`, and its `priv_` points to `_hook`.
/// - The device of `ops` stays in `net` until this is dropped.
pub(super) struct Registration<T: IngressHook> {
    ops: KBox<AssertSync<bindings::nf_hook_ops>>,
    net: AssertSync<*mut bindings::net>,
    _hook: Arc<T>,
}

impl<T: IngressHook> Registration<T> {
    /// Registers `hook` to be the first on the ingress of `dev`.
    ///
    /// Process context. Fails with `EOPNOTSUPP` if the kernel has no ingress hooks
    /// (`CONFIG_NETFILTER_INGRESS`).
    ///
    /// # Safety
    ///
    /// The registration is dropped before `dev` is unregistered or leaves its namespace, as a queue
    /// discipline is destroyed before that.
    pub(super) unsafe fn new(dev: Device<'_>, hook: Arc<T>) -> Result<Self> {
        let ops = KBox::new(
            AssertSync(bindings::nf_hook_ops {
                hook: Some(Self::shim),
                dev: dev.as_ptr(),
                priv_: Arc::as_ptr(&hook).cast_mut().cast(),
                pf: bindings::NFPROTO_NETDEV as u8,
                hooknum: bindings::nf_dev_hooks_NF_NETDEV_INGRESS,
                priority: i32::MIN,
                ..Plain::ZERO
            }),
            GFP_KERNEL,
        )?;
        let net = dev.net();
        // SAFETY: `ops` is on the heap, complete, and stays until it is unregistered in `drop`. The
        // namespace is that of the device.
        to_result(unsafe { bindings::nf_register_net_hook(net, &ops.0) })?;
        // INVARIANT: Just registered; the device stays by the safety requirements.
        Ok(Self {
            ops,
            net: AssertSync(net),
            _hook: hook,
        })
    }

    /// # Safety
    ///
    /// Called by netfilter for a hook that [`Registration::new`] registered: `data` points to the
    /// hook, and `skb` to a packet that is the hook's to decide on.
    unsafe extern "C" fn shim(
        data: *mut c_void,
        skb: *mut bindings::sk_buff,
        _state: *const bindings::nf_hook_state,
    ) -> c_uint {
        // SAFETY: The hook outlives its registration, and `drop` waits for all callers.
        let hook = unsafe { &*data.cast::<T>() };
        let Some(skb) = NonNull::new(skb) else {
            return bindings::NF_ACCEPT;
        };
        // SAFETY: Netfilter gives the packet to the hook until it says NF_ACCEPT; it is on no list,
        // and on ingress the control block is free for each hook to use.
        let packet = unsafe { Packet::from_raw(skb) };
        // INVARIANT: Ingress hooks are called by `__netif_receive_skb_core()`, which runs in a softirq, or in
        // process context with softirqs off (as a tap does for what its user writes).
        match hook.receive(packet, SoftirqsOff(PhantomData, NotThreadSafe)) {
            Some(packet) => {
                packet.into_raw();
                bindings::NF_ACCEPT
            }
            None => bindings::NF_STOLEN,
        }
    }
}

impl<T: IngressHook> Drop for Registration<T> {
    fn drop(&mut self) {
        // SAFETY: Registered with this namespace by the type invariant. `synchronize_net` then
        // waits until no processor is in the hook, before `ops` and `hook` go. Process context, as
        // for `new`.
        unsafe {
            bindings::nf_unregister_net_hook(self.net.0, &self.ops.0);
            bindings::synchronize_net();
        }
    }
}
