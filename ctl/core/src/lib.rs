// SPDX-License-Identifier: GPL-2.0-or-later

//! The parts of Remus that the kernel module and the controller share.
//!
//! These are the very files that the module compiles, `kmod/core/`, in plain `core` Rust. Their
//! tests are here.

#![no_std]
#![forbid(unsafe_code)]

#[path = "../../../kmod/core/cost.rs"]
pub mod cost;
#[path = "../../../kmod/core/dirty.rs"]
pub mod dirty;
#[path = "../../../kmod/core/epoch.rs"]
pub mod epoch;
#[path = "../../../kmod/core/ledger.rs"]
pub mod ledger;
#[path = "../../../kmod/core/uapi.rs"]
pub mod uapi;
