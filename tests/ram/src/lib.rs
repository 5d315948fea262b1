// SPDX-License-Identifier: GPL-2.0

//! What the checker and the benchmark of the RAM device share.
//!
//! Nothing here comes from the module or from remusctl: numbers and layouts are written down again
//! in [`abi`], so that a mistake in theirs is not repeated by what checks them.

pub mod abi;
pub mod bits;
pub mod device;
pub mod guest;
pub mod map;
pub mod netlink;

/// Bytes in a page.
pub const PAGE: usize = 4096;
