// SPDX-License-Identifier: GPL-2.0

//! What is done at once, and ends.

pub mod doctor;
pub mod domain;
#[cfg_attr(
    not(test),
    expect(dead_code, reason = "the command line does not mention it yet")
)]
pub mod keys;
pub mod status;
