// SPDX-License-Identifier: GPL-2.0-or-later

//! What the loops need from the kernel, the virtual machine and its memory, as traits, so that tests
//! can put models in their place.

use std::time::Duration;

use anyhow::Result;
use remus_core::uapi::ram::PAGE_SIZE;
use serde::Serialize;

use crate::args::CowPolicy;
use crate::host::events::Event;
use crate::host::qmp::Qmp;

/// State of a domain, as `domain-get` describes it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Domain {
    /// Name of the domain.
    pub domain: String,
    /// Bytes of memory, if it has any.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory: Option<u64>,
    /// Device of the memory, below `/dev`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    /// The epoch that it runs in.
    pub open_epoch: u64,
    /// The newest committed epoch, 0 if there is none.
    pub committed_epoch: u64,
    /// How many epochs are sealed.
    pub sealed_epochs: u64,
    /// Packets held.
    pub packets: u64,
    /// Bytes of these.
    pub bytes: u64,
    /// Packets dropped.
    pub dropped: u64,
    /// Pages written in the open epoch.
    pub dirty_pages: u64,
    /// Pages that exist.
    pub resident_pages: u64,
    /// Old contents kept, in pages.
    pub snapshot_pages: u64,
    /// How many have its memory open.
    pub memory_users: u64,
    /// Most old contents that may be kept, in bytes, 0 for any number.
    pub cow_limit: u64,
    /// What happens beyond that; none if it has no memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cow_policy: Option<CowPolicy>,
    /// Most old contents kept at once so far, in pages.
    pub cow_peak: u64,
    /// Old contents ever kept, in pages.
    pub cow_copies: u64,
    /// How often somebody waited for room for one.
    pub cow_waits: u64,
    /// Most memory to watch hot pages by their content, in bytes, 0 for none.
    pub hot_limit: u64,
    /// How many pages are watched so.
    pub hot_pages: u64,
    /// Most packets that its ports may hold together, 0 for any number.
    pub limit_packets: u64,
    /// Most memory that these may take, in bytes, 0 for any amount.
    pub limit_bytes: u64,
    /// Number of ports.
    pub ports: u64,
    /// Process that alone may drive it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub owner: Option<u64>,
    /// Its last owner has gone; all is held until somebody decides.
    pub orphaned: bool,
}

/// Which packets of a port are held.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Direction {
    /// What the guest behind the device sends.
    Guest,
    /// What the host sends out of the device.
    Egress,
}

/// State of a port, as `port-get` describes it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Port {
    /// Its domain.
    pub domain: String,
    /// Its network interface.
    pub port: String,
    /// Which packets are held.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub direction: Option<Direction>,
    /// Nothing is held until the next seal.
    pub passthrough: bool,
    /// Packets held.
    pub packets: u64,
    /// Bytes of these.
    pub bytes: u64,
    /// Memory that they take, in bytes.
    pub held_memory: u64,
    /// Most packets held at once.
    pub limit_packets: u64,
    /// Most memory that they may take, in bytes.
    pub limit_bytes: u64,
    /// Packets dropped.
    pub dropped: u64,
    /// How long the first packet of the epoch committed last was held, in nanoseconds.
    pub hold_last_ns: u64,
    /// The longest such time.
    pub hold_max_ns: u64,
}

/// What a seal, commit or abort did.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Done {
    /// Name of the domain.
    pub domain: String,
    /// The epoch acted on.
    pub epoch: u64,
    /// Packets sealed, released or taken back.
    pub packets: u64,
    /// Bytes of these.
    pub bytes: u64,
    /// Pages of the epoch.
    pub dirty_pages: u64,
    /// Time that it took in the kernel, in nanoseconds.
    pub duration_ns: u64,
}

/// How to seal an epoch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Seal {
    /// Every page that exists belongs to the epoch.
    pub full: bool,
    /// Ports in passthrough stay in it: the domain is not protected yet. Otherwise the seal ends it.
    pub keep_passthrough: bool,
}

/// The epochs of domains. Every call fails with the kernel's refusal if it is refused, and has then
/// changed nothing.
pub trait Kernel: Send {
    /// Describes a domain.
    fn get(&mut self, domain: &str) -> Result<Domain>;
    /// Seals the open epoch.
    fn seal(&mut self, domain: &str, how: Seal) -> Result<Done>;
    /// Commits a sealed epoch and all before it.
    fn commit(&mut self, domain: &str, epoch: u64) -> Result<Done>;
    /// Folds a sealed epoch and all after it into the open one.
    fn abort(&mut self, domain: &str, epoch: u64) -> Result<Done>;
    /// Lets all ports pass everything, what they hold first, or has them hold from now on. Letting pass is
    /// refused while epochs are sealed: abort them first.
    fn set_passthrough(&mut self, domain: &str, on: bool) -> Result<()>;
}

/// What a primary hears of its domain without asking.
pub trait Hearing: Send {
    /// The next event, or nothing after `patience`.
    fn hear(&mut self, patience: Duration) -> Result<Option<Event>>;
}

/// The pages of sealed epochs.
pub trait Pages: Send {
    /// Reads records of a sealed epoch to `buffer`, from `cursor` on, which is moved; it is
    /// `uapi::ram::END` after the last. Returns how many.
    fn read(&mut self, epoch: u64, cursor: &mut u64, buffer: &mut [u8]) -> Result<usize>;
}

/// A running virtual machine, on the primary.
pub trait Guest: Send {
    /// Stops its processors and devices.
    fn pause(&mut self) -> Result<()>;
    /// The state of its devices, without its memory. It has to be paused.
    fn save(&mut self) -> Result<Vec<u8>>;
    /// Lets it go on.
    fn resume(&mut self) -> Result<()>;
    /// Whether it runs.
    fn runs(&mut self) -> Result<bool>;
    /// Ends it, without a word to what runs in it.
    fn quit(&mut self) -> Result<()>;
    /// Why it has come to an orderly end, if it has: it must not be brought back then.
    fn ended(&mut self) -> Option<String>;
    /// The QEMU that it is, to be asked about its disks.
    fn qmp(&mut self) -> Option<&mut Qmp> {
        None
    }
}

/// The memory of the virtual machine on the standby.
pub trait Image: Send {
    /// Reads one page.
    fn read(&mut self, page: u64, to: &mut [u8; PAGE_SIZE]) -> Result<()>;
    /// Writes one page.
    fn write(&mut self, page: u64, content: &[u8; PAGE_SIZE]) -> Result<()>;
}

/// The process of the virtual machine that waits on the standby.
pub trait Machine: Send {
    /// Fails if there is no use in another epoch, as it has ended.
    fn ready(&mut self) -> Result<()>;
}

/// The virtual machine that waits on the standby.
pub trait Successor: Send {
    /// Loads the state of its devices. Its memory is complete.
    fn load(&mut self, state: &[u8]) -> Result<()>;
    /// Lets it run.
    fn resume(&mut self) -> Result<()>;
    /// Has it tell the network where it is now.
    fn announce(&mut self) -> Result<()>;
}
