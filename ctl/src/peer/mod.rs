// SPDX-License-Identifier: GPL-2.0

//! The way to the other host.

pub mod address;
#[cfg_attr(
    not(test),
    expect(dead_code, reason = "protect and standby do not take channels yet")
)]
pub mod channel;
#[cfg_attr(
    not(test),
    expect(dead_code, reason = "standby does not listen through it yet")
)]
pub mod door;
pub mod identity;
pub mod stream;
