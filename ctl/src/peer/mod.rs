// SPDX-License-Identifier: GPL-2.0-or-later

//! The way to the other host.

pub mod address;
pub mod channel;
pub mod door;
pub mod identity;
pub mod stream;
pub mod sum;
