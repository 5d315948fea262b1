// SPDX-License-Identifier: GPL-2.0-or-later

//! Tests of the two loops against each other, with a model in the kernel's place.

#![allow(clippy::unwrap_used, clippy::panic)]

mod disk_speed;
mod disks;
mod faults;
mod guest_with_disk;
mod linux_guest;
mod machine;
mod model;
mod replay;
