// SPDX-License-Identifier: GPL-2.0

//! The way to the other host.

pub mod address;
pub mod stream;
