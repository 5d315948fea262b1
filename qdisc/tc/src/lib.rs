// SPDX-License-Identifier: GPL-2.0

//! `q_remus.so`: teaches iproute2's `tc` the queue discipline `remus`.
//!
//! ```text
//! tc qdisc add dev vif1.0 remus domain web limit 512m limit 100000p
//! tc -s -j qdisc show dev vif1.0
//! ```
//!
//! [`options`] turns words into attributes, [`show`] attributes and statistics into named values;
//! neither has any `unsafe`. [`plugin`] is what `tc` calls, and all that calls `tc`.

#![cfg_attr(not(test), no_std)]

mod options;
#[cfg(not(test))]
mod plugin;
mod show;
#[expect(dead_code, reason = "most of it is the controller's")]
#[path = "../../../kmod/core/uapi.rs"]
mod uapi;
