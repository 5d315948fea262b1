// SPDX-License-Identifier: GPL-2.0

//! What two hosts of Remus say to each other: frames, and pages within them.
//!
//! Nothing here reads or writes a socket, takes a clock or allocates more than a caller allows: it is
//! all functions from bytes to bytes, for property tests and fuzzers.

#![forbid(unsafe_code)]

pub mod frame;
