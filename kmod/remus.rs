// SPDX-License-Identifier: GPL-2.0

//! `remus_buf.ko`: holds a virtual machine's network output by epoch, and hands out exactly the
//! memory that an epoch changed.
//!
//! ```text
//!   netlink.rs ──▶ domain.rs ──▶ ram.rs          /dev/remus/<domain>
//!   (requests)         │
//!                      └───────▶ ../qdisc/       tc qdisc add dev vif1.0 root remus
//!   core/  logic without the kernel     abi/  the C side of the kernel
//! ```
//!
//! See `docs/` for the guide. To try it: `insmod remus_buf.ko`, `remusctl domain add web`,
//! `remusctl seal web`, `remusctl commit web`.

use kernel::prelude::*;

mod abi;
#[allow(
    dead_code,
    unreachable_pub,
    reason = "public, and used in part, elsewhere"
)]
mod core {
    //! Logic without kernel types; the controller compiles the same files.

    pub(crate) mod cost;
    pub(crate) mod dirty;
    pub(crate) mod epoch;
    pub(crate) mod ledger;
    pub(crate) mod uapi;
}
mod domain;
mod netlink;
mod pageset;
#[path = "../qdisc/mod.rs"]
mod qdisc;
mod ram;
mod refusal;

module! {
    type: Remus,
    name: "remus_buf",
    authors: ["The Remus developers"],
    description: "Output commit for virtual machines: packets and memory by epoch",
    license: "GPL",
    alias: ["net-sch-remus", "net-pf-16-proto-16-family-remus"],
}

/// The module; fields are dropped in this order on unload, when nothing is in use any more.
struct Remus {
    _family: abi::netlink::Registration<netlink::Family>,
    _qdisc: abi::qdisc::Registration<qdisc::port::Port>,
    _workqueue: abi::workqueue::Registration,
    _domains: domain::Domains,
}

impl kernel::Module for Remus {
    fn init(module: &'static ThisModule) -> Result<Self> {
        let domains = domain::Domains::new();
        let workqueue = abi::workqueue::Registration::new()?;
        // Before the queue discipline: a domain that goes with its last port says so by the family.
        let family = abi::netlink::Registration::new(module)?;
        let qdisc = abi::qdisc::Registration::new(module)?;
        Ok(Self {
            _family: family,
            _qdisc: qdisc,
            _workqueue: workqueue,
            _domains: domains,
        })
    }
}
