// SPDX-License-Identifier: GPL-2.0

//! Numbers and layouts of the module's interfaces, as docs/netlink/remus.yaml and the
//! documentation of the RAM device have them.

use crate::PAGE;

/// Name of the generic netlink family.
pub const FAMILY: &str = "remus";
/// Its version.
pub const VERSION: u8 = 1;

/// Commands of the family.
pub mod cmd {
    /// Create a domain.
    pub const DOMAIN_NEW: u8 = 1;
    /// Delete a domain.
    pub const DOMAIN_DEL: u8 = 2;
    /// Describe a domain.
    pub const DOMAIN_GET: u8 = 3;
    /// Seal the open epoch.
    pub const EPOCH_SEAL: u8 = 4;
    /// Commit a sealed epoch and all before it.
    pub const EPOCH_COMMIT: u8 = 5;
    /// Fold a sealed epoch and all after it into the open one.
    pub const EPOCH_ABORT: u8 = 6;
}

/// Attributes of the family.
pub mod attr {
    /// Domain name, NUL-terminated.
    pub const DOMAIN: u16 = 1;
    /// Size of the memory in bytes, uint.
    pub const MEMORY: u16 = 2;
    /// Epoch acted on, uint.
    pub const EPOCH: u16 = 4;
    /// Pages written, uint.
    pub const DIRTY_PAGES: u16 = 11;
    /// Pages that exist, uint.
    pub const RESIDENT_PAGES: u16 = 12;
    /// Old contents kept for sealed epochs, in pages, uint.
    pub const SNAPSHOT_PAGES: u16 = 13;
    /// Time that the command took in the kernel, in nanoseconds, uint.
    pub const DURATION_NS: u16 = 15;
    /// Count every existing page as written, flag.
    pub const FULL: u16 = 16;
    /// Most old contents that may be kept, in bytes, 0 for any number, uint.
    pub const COW_LIMIT: u16 = 32;
    /// How often somebody waited for room for one, uint.
    pub const COW_WAITS: u16 = 36;
    /// Memory to watch hot pages by their content, in bytes, uint.
    pub const HOT_LIMIT: u16 = 40;
    /// Pages that are watched so, uint.
    pub const HOT_PAGES: u16 = 41;
}

/// Bytes in a record of a sealed epoch: page number (u64, little endian), then the content.
pub const RECORD: usize = 8 + PAGE;
/// Cursor when nothing is left, and the end of a range without one.
pub const END: u64 = u64::MAX;
/// Flag of [`READ`]: the pages do not count as read out.
pub const KEEP: u32 = 1;

/// Argument of [`READ`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Read {
    /// In: a sealed epoch.
    pub epoch: u64,
    /// In: first page number to look at. Out: where to go on, [`END`] when nothing is left.
    pub cursor: u64,
    /// In: stop before this page number, [`END`] for none.
    pub end: u64,
    /// In: address of the buffer.
    pub buffer: u64,
    /// In: bytes in it.
    pub length: u32,
    /// Out: records in it.
    pub count: u32,
    /// In: [`KEEP`] or 0.
    pub flags: u32,
    /// 0.
    pub zero: u32,
}

/// Argument of [`BITMAP`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Bitmap {
    /// In: a sealed epoch.
    pub epoch: u64,
    /// Out: what offset to map.
    pub offset: u64,
    /// Out: how much to map there, in bytes.
    pub length: u64,
    /// Out: pages in the set.
    pub pages: u64,
}

/// `_IOWR('R', 0x40, struct Read)`: fetch records of a sealed epoch.
pub const READ: u32 = iowr::<Read>(b'R', 0x40);
/// `_IOWR('R', 0x41, struct Bitmap)`: find the mapping of a sealed epoch's set.
pub const BITMAP: u32 = iowr::<Bitmap>(b'R', 0x41);

/// The kernel's `_IOWR`.
pub const fn iowr<T>(kind: u8, number: u8) -> u32 {
    3 << 30 | (size_of::<T>() as u32) << 16 | (kind as u32) << 8 | number as u32
}
