// SPDX-License-Identifier: GPL-2.0-or-later

//! What is on this host: the kernel's domains, the virtual machine, its memory.

pub mod events;
pub mod kernel;
pub mod link;
pub mod netlink;
pub mod nlsock;
pub mod qmp;
pub mod ram;
pub mod vmm;
