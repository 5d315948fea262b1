// SPDX-License-Identifier: GPL-2.0-or-later

//! The journal's header: of which disks it is, what their images hold, where its records begin.
//!
//! ```text
//!  offset  bytes
//!       0      8  magic "RMUSDISK"
//!       8      4  version, 1
//!      12      4  state of the images: 0 of nothing, 1 being copied, 2 whole
//!      16      8  counter: of two headers, the one with the greater is newer
//!      24      8  salt of the records
//!      32      8  position of the first record
//!      40      8  bytes for records
//!      48     16  run of the primary
//!      64      8  generation
//!      72      8  epoch
//!      80      8  number of disks; of each 8 bytes of size, 1 of the name's length, and the name
//!    8188      4  CRC32C of all before
//! ```

use remus_proto::frame::crc32c;

use super::Stamp;

/// Bytes of a header.
pub(super) const SIZE: usize = 8192;
const MAGIC: [u8; 8] = *b"RMUSDISK";
const VERSION: u32 = 1;

/// What the images hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Content {
    /// Nothing that is known.
    Unknown,
    /// A part of a first copy, of this run and generation; the epoch is 0.
    Copying(Stamp),
    /// One whole epoch.
    Whole(Stamp),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) counter: u64,
    /// A random number that is in each record, so that neither what an earlier use of the journal left
    /// nor what a guest has written is ever taken for a record.
    pub(super) salt: u64,
    /// Position of the first record.
    pub(super) start: u64,
    /// Bytes for records.
    pub(super) capacity: u64,
    pub(super) content: Content,
    /// Names and sizes.
    pub(super) disks: Vec<(String, u64)>,
}

impl Header {
    pub(super) fn encode(&self) -> Vec<u8> {
        let (state, stamp) = match self.content {
            Content::Unknown => (0u32, Stamp::default()),
            Content::Copying(stamp) => (1, stamp),
            Content::Whole(stamp) => (2, stamp),
        };
        let mut out = MAGIC.to_vec();
        out.extend(VERSION.to_le_bytes());
        out.extend(state.to_le_bytes());
        out.extend(self.counter.to_le_bytes());
        out.extend(self.salt.to_le_bytes());
        out.extend(self.start.to_le_bytes());
        out.extend(self.capacity.to_le_bytes());
        out.extend(stamp.run.to_le_bytes());
        out.extend(stamp.generation.to_le_bytes());
        out.extend(stamp.epoch.to_le_bytes());
        out.extend((self.disks.len() as u64).to_le_bytes());
        for (name, size) in &self.disks {
            out.extend(size.to_le_bytes());
            // At most NAME_MAX, as images are opened.
            out.push(name.len() as u8);
            out.extend(name.as_bytes());
        }
        out.resize(SIZE - 4, 0);
        out.extend(crc32c(&out).to_le_bytes());
        out
    }

    /// A header that is not damaged.
    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        let (body, crc) = bytes.split_last_chunk()?;
        if bytes.len() != SIZE || crc32c(body) != u32::from_le_bytes(*crc) {
            return None;
        }
        let mut from = body;
        if take(&mut from)? != MAGIC || u32::from_le_bytes(take(&mut from)?) != VERSION {
            return None;
        }
        let state = u32::from_le_bytes(take(&mut from)?);
        let [counter, salt, start, capacity] = [(); 4].map(|()| number(&mut from));
        let stamp = Stamp {
            run: u128::from_le_bytes(take(&mut from)?),
            generation: number(&mut from)?,
            epoch: number(&mut from)?,
        };
        let mut disks = Vec::new();
        for _ in 0..number(&mut from)? {
            let size = number(&mut from)?;
            let [length] = take(&mut from)?;
            let (name, rest) = from.split_at_checked(length.into())?;
            from = rest;
            disks.push((str::from_utf8(name).ok()?.to_owned(), size));
        }
        Some(Self {
            counter: counter?,
            salt: salt?,
            start: start?,
            capacity: capacity?,
            content: match state {
                0 => Content::Unknown,
                1 => Content::Copying(stamp),
                2 => Content::Whole(stamp),
                _ => return None,
            },
            disks,
        })
    }
}

fn take<const N: usize>(from: &mut &[u8]) -> Option<[u8; N]> {
    let (taken, rest) = from.split_first_chunk()?;
    *from = rest;
    Some(*taken)
}

fn number(from: &mut &[u8]) -> Option<u64> {
    take(from).map(u64::from_le_bytes)
}
