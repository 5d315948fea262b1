// SPDX-License-Identifier: GPL-2.0-or-later

//! Names and numbers that the module shares with user space.
//!
//! The generic netlink part repeats `docs/netlink/remus.yaml`, which is the source; a test of the
//! controller compares the two. The other parts have their source here: the options of the qdisc
//! (`TCA_OPTIONS` of a qdisc of kind `remus`) and the calls of the RAM device `/dev/remus/<domain>`.

/// Generic netlink family name, also the kind of the qdisc.
pub const FAMILY: &str = "remus";
/// Generic netlink family version.
pub const VERSION: u8 = 1;
/// Longest domain name, in bytes.
pub const NAME_MAX: usize = 31;
/// Largest memory of a domain, in bytes (16 TiB).
pub const MEMORY_MAX: u64 = 1 << 44;

/// Commands of the generic netlink family.
pub mod cmd {
    /// Create a domain.
    pub const DOMAIN_NEW: u8 = 1;
    /// Delete a domain.
    pub const DOMAIN_DEL: u8 = 2;
    /// Describe a domain, or dump all.
    pub const DOMAIN_GET: u8 = 3;
    /// Seal the open epoch.
    pub const EPOCH_SEAL: u8 = 4;
    /// Commit a sealed epoch and all before it.
    pub const EPOCH_COMMIT: u8 = 5;
    /// Fold a sealed epoch and all sealed after it into the open one.
    pub const EPOCH_ABORT: u8 = 6;
    /// Change a domain's limits, whether its ports hold, or own it.
    pub const DOMAIN_SET: u8 = 7;
    /// Dump ports.
    pub const PORT_GET: u8 = 8;
    /// Throw all packets away that are not committed.
    pub const DISCARD: u8 = 9;
    /// Event: the first packet of the open epoch is held.
    pub const OUTPUT_PENDING: u8 = 10;
    /// Event: half of what may be held is.
    pub const BUFFER_HIGH: u8 = 11;
    /// Event: a packet was dropped because of a limit.
    pub const OVERFLOW: u8 = 12;
    /// Event: the socket that owned the domain was closed.
    pub const CONTROLLER_GONE: u8 = 13;
    /// Event: the domain was deleted, or left by its last port.
    pub const DOMAIN_GONE: u8 = 14;
    /// Event: a writer waits for room for the old content of a page.
    pub const COW_WAIT: u8 = 15;
    /// Event: an epoch was aborted for want of room for the old content of a page.
    pub const COW_ABORT: u8 = 16;
    /// The highest command.
    pub const MAX: u8 = COW_ABORT;
}

/// Multicast group of the events.
pub const EVENTS: &str = "events";

/// Attributes of the generic netlink family. Numbers are `uint`: four or eight bytes, native order.
pub mod attr {
    /// Domain name, NUL-terminated string.
    pub const DOMAIN: u16 = 1;
    /// Memory size in bytes, uint.
    pub const MEMORY: u16 = 2;
    /// Device of the memory, below `/dev`, NUL-terminated string.
    pub const DEVICE: u16 = 3;
    /// Epoch acted on, uint.
    pub const EPOCH: u16 = 4;
    /// Open epoch, uint.
    pub const OPEN_EPOCH: u16 = 5;
    /// Newest committed epoch, uint.
    pub const COMMITTED_EPOCH: u16 = 6;
    /// Number of sealed epochs, uint.
    pub const SEALED_EPOCHS: u16 = 7;
    /// Packets, uint.
    pub const PACKETS: u16 = 8;
    /// Bytes of packets, uint.
    pub const BYTES: u16 = 9;
    /// Packets dropped, uint.
    pub const DROPPED: u16 = 10;
    /// Pages written, uint.
    pub const DIRTY_PAGES: u16 = 11;
    /// Pages that exist, uint.
    pub const RESIDENT_PAGES: u16 = 12;
    /// Old contents kept, in pages, uint.
    pub const SNAPSHOT_PAGES: u16 = 13;
    /// Number of ports, uint.
    pub const PORTS: u16 = 14;
    /// Time that the command took in the kernel, in nanoseconds, uint.
    pub const DURATION_NS: u16 = 15;
    /// Count every resident page as written, flag.
    pub const FULL: u16 = 16;
    /// Name of the port's network interface, NUL-terminated string.
    pub const PORT: u16 = 17;
    /// Index of the port's network interface, uint.
    pub const IFINDEX: u16 = 18;
    /// Which packets are held, uint: [`super::direction`].
    pub const DIRECTION: u16 = 19;
    /// Nothing is held until the next seal that does not keep it so, flag.
    pub const PASSTHROUGH: u16 = 20;
    /// Most packets held at once, uint.
    pub const LIMIT_PACKETS: u16 = 21;
    /// Most bytes of memory held at once, uint.
    pub const LIMIT_BYTES: u16 = 22;
    /// Bytes of memory that the held packets take, uint.
    pub const HELD_MEMORY: u16 = 23;
    /// Packets dropped because of a limit, uint.
    pub const DROPPED_LIMIT: u16 = 24;
    /// Packets dropped for want of memory, uint.
    pub const DROPPED_MEMORY: u16 = 25;
    /// Packets held and then thrown away, uint.
    pub const DROPPED_DISCARDED: u16 = 26;
    /// How long the epoch committed last was held, in nanoseconds, uint.
    pub const HOLD_LAST_NS: u16 = 27;
    /// The longest such time, uint.
    pub const HOLD_MAX_NS: u16 = 28;
    /// The sending process owns the domain from now on, until this socket is closed, flag.
    pub const OWN: u16 = 29;
    /// Process that owns the domain, uint.
    pub const OWNER: u16 = 30;
    /// The owner's socket was closed, flag.
    pub const ORPHANED: u16 = 31;
    /// Old contents of pages that may be kept for sealed epochs, in bytes, 0 for any number, uint.
    pub const COW_LIMIT: u16 = 32;
    /// What happens beyond, uint: [`super::cow_policy`].
    pub const COW_POLICY: u16 = 33;
    /// Most old contents kept at once so far, in pages, uint.
    pub const COW_PEAK: u16 = 34;
    /// Old contents ever kept, in pages, uint.
    pub const COW_COPIES: u16 = 35;
    /// How often somebody waited for room for one, uint.
    pub const COW_WAITS: u16 = 36;
    /// How many have the memory open, uint.
    pub const MEMORY_USERS: u16 = 37;
    /// The seal leaves ports in passthrough in it, flag.
    pub const KEEP_PASSTHROUGH: u16 = 38;
    /// Everything is held from now on, flag.
    pub const HOLD: u16 = 39;
    /// Memory that may be kept to watch hot pages by their content, in bytes, 0 for none, uint.
    pub const HOT_LIMIT: u16 = 40;
    /// Pages that are watched so, uint.
    pub const HOT_PAGES: u16 = 41;
    /// The highest attribute.
    pub const MAX: u16 = HOT_PAGES;
}

/// What an attribute holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Type {
    /// A number of four or eight bytes, native order.
    Uint,
    /// A NUL-terminated string, of at most so many bytes without the NUL if that is checked.
    Text(Option<usize>),
    /// Nothing: it is there or not.
    Flag,
}

/// What each attribute holds, from attribute 1 on.
pub const TYPES: [Type; attr::MAX as usize] = {
    let mut types = [Type::Uint; attr::MAX as usize];
    types[attr::DOMAIN as usize - 1] = Type::Text(Some(NAME_MAX));
    types[attr::DEVICE as usize - 1] = Type::Text(None);
    types[attr::PORT as usize - 1] = Type::Text(None);
    types[attr::FULL as usize - 1] = Type::Flag;
    types[attr::PASSTHROUGH as usize - 1] = Type::Flag;
    types[attr::OWN as usize - 1] = Type::Flag;
    types[attr::ORPHANED as usize - 1] = Type::Flag;
    types[attr::KEEP_PASSTHROUGH as usize - 1] = Type::Flag;
    types[attr::HOLD as usize - 1] = Type::Flag;
    types
};

/// A command, and the attributes that a request for it may carry; everything else is refused.
pub struct Command {
    /// Its number.
    pub number: u8,
    /// Whether it acts on, or describes, one object.
    pub one: bool,
    /// Whether it can be asked for a dump, with the same attributes.
    pub dump: bool,
    /// What it accepts.
    pub accepts: &'static [u16],
}

impl Command {
    const fn new(number: u8, accepts: &'static [u16]) -> Self {
        Self {
            number,
            one: number != cmd::PORT_GET,
            dump: number == cmd::DOMAIN_GET || number == cmd::PORT_GET,
            accepts,
        }
    }
}

/// Every command of the family. The module builds its policies from this.
pub const COMMANDS: &[Command] = &[
    Command::new(
        cmd::DOMAIN_NEW,
        &[
            attr::DOMAIN,
            attr::MEMORY,
            attr::COW_LIMIT,
            attr::COW_POLICY,
            attr::HOT_LIMIT,
        ],
    ),
    Command::new(cmd::DOMAIN_DEL, &[attr::DOMAIN]),
    Command::new(cmd::DOMAIN_GET, &[attr::DOMAIN]),
    Command::new(
        cmd::EPOCH_SEAL,
        &[attr::DOMAIN, attr::FULL, attr::KEEP_PASSTHROUGH],
    ),
    Command::new(cmd::EPOCH_COMMIT, &[attr::DOMAIN, attr::EPOCH]),
    Command::new(cmd::EPOCH_ABORT, &[attr::DOMAIN, attr::EPOCH]),
    Command::new(
        cmd::DOMAIN_SET,
        &[
            attr::DOMAIN,
            attr::LIMIT_PACKETS,
            attr::LIMIT_BYTES,
            attr::OWN,
            attr::COW_LIMIT,
            attr::COW_POLICY,
            attr::HOT_LIMIT,
            attr::PASSTHROUGH,
            attr::HOLD,
        ],
    ),
    Command::new(cmd::PORT_GET, &[attr::DOMAIN]),
    Command::new(cmd::DISCARD, &[attr::DOMAIN]),
];

/// Attributes nested in `TCA_OPTIONS` of a qdisc of kind `remus`.
pub mod tca {
    /// Domain to join, NUL-terminated string; the device's name if absent.
    pub const DOMAIN: u16 = 1;
    /// Which packets are the guest's output, u8: [`super::direction`].
    pub const DIRECTION: u16 = 2;
    /// Most packets held at once, u32; more are dropped and counted.
    pub const LIMIT_PACKETS: u16 = 3;
    /// Most bytes of memory held at once, u64.
    pub const LIMIT_BYTES: u16 = 4;
    /// 1: pass everything until the domain's next seal that does not keep it so; 0: hold from now on. u8.
    pub const PASSTHROUGH: u16 = 5;
    /// The highest attribute.
    pub const MAX: u16 = PASSTHROUGH;

    /// Content of `TCA_STATS_APP` (`TCA_XSTATS`) of a qdisc of kind `remus`, in native order.
    #[repr(C)]
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct Stats {
        /// The open epoch of the domain.
        pub open_epoch: u64,
        /// The newest committed epoch, 0 if there is none.
        pub committed_epoch: u64,
        /// How many epochs are sealed and neither committed nor aborted.
        pub sealed_epochs: u64,
        /// Packets held.
        pub packets: u64,
        /// Bytes of these packets.
        pub bytes: u64,
        /// Bytes of memory that they take.
        pub memory: u64,
        /// From the first packet's arrival to the commit, of the epoch committed last, in ns.
        pub hold_last_ns: u64,
        /// The longest such time, in ns.
        pub hold_max_ns: u64,
        /// Packets dropped because of a limit.
        pub dropped_limit: u64,
        /// Packets dropped for want of memory.
        pub dropped_memory: u64,
        /// Packets held and then thrown away.
        pub dropped_discarded: u64,
        /// 1 while everything passes, else 0.
        pub passthrough: u32,
        /// [`super::direction`].
        pub direction: u32,
    }
}

/// Values of [`tca::DIRECTION`].
pub mod direction {
    /// Hold what the guest behind the device sends: the device's ingress.
    pub const GUEST: u8 = 1;
    /// Hold what the host sends out of the device.
    pub const EGRESS: u8 = 2;
}

/// Values of [`attr::COW_POLICY`].
pub mod cow_policy {
    /// The writer waits until its page was read out, or its epoch is committed or aborted.
    pub const THROTTLE: u8 = 1;
    /// The epoch is aborted, and all that were sealed after it.
    pub const FAIL: u8 = 2;
}

/// Calls of the RAM device.
///
/// The device is mapped `MAP_SHARED`, at most as long as the domain's memory; `pread` and `pwrite`
/// work too. A page that does not exist yet reads as zeros.
pub mod ram {
    /// Bytes in a page, and in the content of a record.
    pub const PAGE_SIZE: usize = 4096;
    /// Bytes in a record: the page's number (u64, little endian), then its content.
    pub const RECORD_SIZE: usize = 8 + PAGE_SIZE;

    /// Argument of [`READ`]: fetch records of a sealed epoch, in ascending order of page number. Several
    /// threads may read ranges of one epoch at once.
    #[repr(C)]
    #[derive(Clone, Copy, Debug, Default)]
    pub struct Read {
        /// In: a sealed epoch.
        pub epoch: u64,
        /// In: first page number to look at, 0 to begin. Out: where to go on; [`END`] after the
        /// last record.
        pub cursor: u64,
        /// In: page number to stop before, [`END`] for none.
        pub end: u64,
        /// In: address of the buffer.
        pub buffer: u64,
        /// In: bytes in the buffer, at least [`RECORD_SIZE`].
        pub length: u32,
        /// Out: records written to the buffer. Fewer than fit if a signal came, or if the next record
        /// is an error's, which the next call returns.
        pub count: u32,
        /// In: 0, or [`KEEP`].
        pub flags: u32,
        /// In: 0.
        pub reserved: u32,
    }

    /// Flag of [`Read`]: the pages may be read again. Without it a page that was read counts as not
    /// needed any more: its content is not kept when it is written again.
    pub const KEEP: u32 = 1;

    /// Value of [`Read::cursor`] when nothing is left.
    pub const END: u64 = u64::MAX;

    /// Argument of [`BITMAP`]: where the hand-off of a sealed epoch is.
    ///
    /// Mapped `PROT_READ` and `MAP_SHARED` from the device, it shows words of 64 bits, native order: bit
    /// `n % 64` of word `n / 64` is set if page `n` was written in the epoch. A mapping stays as it is
    /// for as long as it exists; a new one can be made until the epoch is committed or aborted.
    #[repr(C)]
    #[derive(Clone, Copy, Debug, Default)]
    pub struct Bitmap {
        /// In: a sealed epoch.
        pub epoch: u64,
        /// Out: offset to map from.
        pub offset: u64,
        /// Out: bytes that can be mapped.
        pub length: u64,
        /// Out: how many pages were written.
        pub pages: u64,
    }

    const fn iowr(number: u32, size: usize) -> u32 {
        3 << 30 | (size as u32) << 16 | (b'R' as u32) << 8 | number
    }

    /// `_IOWR('R', 0x40, struct Read)`. Errors: `ENOENT` the epoch is not sealed, `EINVAL` the
    /// buffer holds no record, or a flag is unknown, `EFAULT` it cannot be written, `ESTALE` the page
    /// was read before and written since, `ECANCELED` the epoch lost pages because of the copy limit:
    /// abort it.
    pub const READ: u32 = iowr(0x40, core::mem::size_of::<Read>());

    /// `_IOWR('R', 0x41, struct Bitmap)`. Errors: `ENOENT` the epoch is not sealed.
    pub const BITMAP: u32 = iowr(0x41, core::mem::size_of::<Bitmap>());
}
