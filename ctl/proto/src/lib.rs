// SPDX-License-Identifier: GPL-2.0-or-later

//! What two hosts of Remus say to each other: frames, and pages within them.
//!
//! Nothing here reads or writes a socket or allocates more than a caller allows: it is all functions
//! from bytes to bytes, for property tests and fuzzers. Only the encoder of pages looks at a clock, to
//! learn what compression costs; what it encodes is right whatever the clock says.

#![forbid(unsafe_code)]

pub mod delta;
pub mod disk;
pub mod export;
pub mod frame;
pub mod pages;
mod varint;
