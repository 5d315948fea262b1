// SPDX-License-Identifier: GPL-2.0

//! The way to the other host.

pub mod address;
#[cfg_attr(not(test), expect(dead_code, reason = "used once protect and standby take channels"))]
pub mod identity;
pub mod stream;
