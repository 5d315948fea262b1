// SPDX-License-Identifier: GPL-2.0

//! What the RAM device costs.
fn main() {}
