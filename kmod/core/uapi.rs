// SPDX-License-Identifier: GPL-2.0

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
    /// The highest command.
    pub const MAX: u8 = EPOCH_ABORT;
}

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
    /// The highest attribute.
    pub const MAX: u16 = FULL;
}

/// Attributes nested in `TCA_OPTIONS` of a qdisc of kind `remus`.
pub mod tca {
    /// Domain to join, NUL-terminated string; the device's name if absent.
    pub const DOMAIN: u16 = 1;
    /// Which packets are the guest's output, u8: [`super::direction`].
    pub const DIRECTION: u16 = 2;
    /// Most packets held at once, u32; more are dropped and counted.
    pub const LIMIT_PACKETS: u16 = 3;
    /// Most bytes held at once, u64.
    pub const LIMIT_BYTES: u16 = 4;
    /// The highest attribute.
    pub const MAX: u16 = LIMIT_BYTES;
}

/// Values of [`tca::DIRECTION`].
pub mod direction {
    /// Hold what the guest behind the device sends: the device's ingress.
    pub const GUEST: u8 = 1;
    /// Hold what the host sends out of the device.
    pub const EGRESS: u8 = 2;
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

    /// Argument of [`READ`]: fetch records of a sealed epoch, in ascending order of page number.
    #[repr(C)]
    #[derive(Clone, Copy, Debug, Default)]
    pub struct Read {
        /// In: a sealed epoch.
        pub epoch: u64,
        /// In: first page number to look at, 0 to begin. Out: where to go on; [`END`] after the
        /// last record.
        pub cursor: u64,
        /// In: address of the buffer.
        pub buffer: u64,
        /// In: bytes in the buffer, at least [`RECORD_SIZE`].
        pub length: u32,
        /// Out: records written to the buffer.
        pub count: u32,
    }

    /// Value of [`Read::cursor`] when nothing is left.
    pub const END: u64 = u64::MAX;

    /// `_IOWR('R', 0x40, struct Read)`. Errors: `ENOENT` the epoch is not sealed, `EINVAL` the
    /// buffer holds no record, `EFAULT` it cannot be written.
    pub const READ: u32 =
        (3 << 30) | ((core::mem::size_of::<Read>() as u32) << 16) | ((b'R' as u32) << 8) | 0x40;
}
