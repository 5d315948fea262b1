// SPDX-License-Identifier: GPL-2.0

//! What a controller says of itself.

pub mod live;
pub mod trace;
