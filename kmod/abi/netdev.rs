// SPDX-License-Identifier: GPL-2.0

//! Network devices, as far as a queue discipline sees them.
//!
//! C header: [`include/linux/netdevice.h`](srctree/include/linux/netdevice.h)

use super::bindings;
use core::{
    marker::PhantomData,
    ptr::NonNull, //
};
use kernel::{
    prelude::*,
    str::CStr, //
};

/// A network device whose configuration cannot change: the caller holds the RTNL.
///
/// # Invariants
///
/// Points to a valid `struct net_device`, and the RTNL is held, both for `'a`.
#[derive(Clone, Copy)]
pub(crate) struct Device<'a>(NonNull<bindings::net_device>, PhantomData<&'a ()>);

impl<'a> Device<'a> {
    /// # Safety
    ///
    /// `dev` is valid and the RTNL held, both for `'a`.
    pub(super) unsafe fn from_raw(dev: NonNull<bindings::net_device>) -> Self {
        // INVARIANT: By the safety requirements.
        Self(dev, PhantomData)
    }

    pub(super) fn as_ptr(self) -> *mut bindings::net_device {
        self.0.as_ptr()
    }

    /// The device's network namespace.
    pub(super) fn net(self) -> *mut bindings::net {
        // SAFETY: The device is valid by the type invariant.
        unsafe { bindings::remus_dev_net(self.0.as_ptr()) }
    }

    /// The device's name, in bytes that need not be UTF-8.
    pub(crate) fn name(self) -> &'a [u8] {
        // SAFETY: The name is an embedded, NUL-terminated array, and only changes under the RTNL.
        unsafe { CStr::from_char_ptr(bindings::remus_dev_name(self.0.as_ptr())) }.to_bytes()
    }

    /// Whether a virtual machine is behind the device (a tap, or the back end of a Xen interface),
    /// so that what the machine sends enters the host as the device's ingress.
    pub(crate) fn is_guest(self) -> bool {
        // SAFETY: The device is valid by the type invariant.
        unsafe { bindings::remus_dev_is_guest(self.0.as_ptr()) }
    }
}

/// How a device is called, at the moment of asking.
#[derive(Clone, Copy, Default)]
pub(crate) struct Label {
    name: [u8; 16],
    /// Its index in its namespace.
    pub(crate) ifindex: u32,
}

impl Label {
    /// Asks a device.
    ///
    /// # Safety
    ///
    /// `dev` points to a valid device.
    pub(super) unsafe fn of(dev: *const bindings::net_device) -> Self {
        let mut label = Self::default();
        // SAFETY: The device is valid; the array has the length of a device's name.
        unsafe {
            bindings::remus_dev_copy_name(dev, label.name.as_mut_ptr().cast());
            label.ifindex = bindings::remus_dev_ifindex(dev) as u32;
        }
        label
    }

    /// Its name, in bytes that need not be UTF-8.
    pub(crate) fn name(&self) -> &[u8] {
        self.name.split(|&b| b == 0).next().unwrap_or(&self.name)
    }
}
