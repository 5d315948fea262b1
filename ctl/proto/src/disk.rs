// SPDX-License-Identifier: GPL-2.0-or-later

//! What goes over the disk stream: changes of a guest's disks, in the order in which they were made.
//!
//! Payload of a [`Kind::DiskChanges`](crate::frame::Kind::DiskChanges) frame: one or more records, each of
//!
//! ```text
//!  offset  bytes
//!       0      2  disk, from 0, in the order of [`Disks`]
//!       2      1  kind: 1 write, 2 zero, 3 discard
//!       3      1  0
//!       4      4  length in bytes
//!       8      8  offset on the disk, in bytes
//!      16         of a write: the bytes
//! ```

use crate::frame::{WireError, PAYLOAD_MAX};
use remus_core::uapi::NAME_MAX;

/// Bytes in a record before the bytes of a write.
pub const RECORD_HEAD: usize = 16;
/// Most bytes of data in a record: a record has to fit into a frame.
pub const DATA_MAX: usize = PAYLOAD_MAX - RECORD_HEAD;
/// Most disks of a guest.
pub const DISKS_MAX: usize = 64;
/// Bytes of a disk that one [`Sum`] is for. The last one of a disk may be for less.
pub const CHUNK: usize = 1 << 16;

/// The first half of the SHA-256 of a chunk (FIPS 180-4).
pub type Sum = [u8; 16];

/// What happens to a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change<'a> {
    /// These bytes were written.
    Write(&'a [u8]),
    /// So many bytes are zero.
    Zero(u32),
    /// So many bytes are not needed any more; they read as zeros.
    Discard(u32),
}

impl Change<'_> {
    /// Bytes of the disk that it is about.
    pub fn length(&self) -> u32 {
        match self {
            Self::Write(data) => data.len() as u32,
            Self::Zero(length) | Self::Discard(length) => *length,
        }
    }
}

/// A change of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record<'a> {
    /// Which disk.
    pub disk: u16,
    /// Where, in bytes.
    pub offset: u64,
    /// What.
    pub change: Change<'a>,
}

impl<'a> Record<'a> {
    /// Bytes that [`Self::encode`] appends.
    pub fn encoded_len(&self) -> usize {
        match self.change {
            Change::Write(data) => RECORD_HEAD + data.len(),
            _ => RECORD_HEAD,
        }
    }

    /// Appends it to `out`.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let (kind, data): (u8, &[u8]) = match self.change {
            Change::Write(data) => (1, data),
            Change::Zero(_) => (2, &[]),
            Change::Discard(_) => (3, &[]),
        };
        out.extend(self.disk.to_le_bytes());
        out.extend([kind, 0]);
        out.extend(self.change.length().to_le_bytes());
        out.extend(self.offset.to_le_bytes());
        out.extend(data);
    }

    /// Takes the first record off `bytes`. Its range is not looked at beyond that it does not overflow.
    pub fn decode(bytes: &mut &'a [u8]) -> Result<Self, WireError> {
        let (head, rest) = bytes
            .split_first_chunk::<RECORD_HEAD>()
            .ok_or(WireError::Length)?;
        let [d0, d1, kind, zero, l0, l1, l2, l3, offset @ ..] = *head;
        let length = u32::from_le_bytes([l0, l1, l2, l3]);
        let offset = u64::from_le_bytes(offset);
        if zero != 0 || length == 0 || offset.checked_add(length.into()).is_none() {
            return Err(WireError::Length);
        }
        let (change, rest) = match kind {
            1 => {
                let (data, rest) = rest
                    .split_at_checked(length as usize)
                    .ok_or(WireError::Length)?;
                (Change::Write(data), rest)
            }
            2 => (Change::Zero(length), rest),
            3 => (Change::Discard(length), rest),
            _ => return Err(WireError::Kind(kind.into())),
        };
        *bytes = rest;
        Ok(Self {
            disk: u16::from_le_bytes([d0, d1]),
            offset,
            change,
        })
    }
}

/// Payload of [`Kind::AttachDisks`](crate::frame::Kind::AttachDisks): what the guest has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disks {
    /// The number that ties the stream to its control stream.
    pub token: u128,
    /// Name and size in bytes of each disk.
    pub disks: Vec<(String, u64)>,
}

impl Disks {
    /// As bytes. Fails with [`WireError::Length`] if there are more than [`DISKS_MAX`], or a name is
    /// empty or longer than [`NAME_MAX`].
    pub fn encode(&self) -> Result<Vec<u8>, WireError> {
        if self.disks.len() > DISKS_MAX {
            return Err(WireError::Length);
        }
        let mut out = self.token.to_le_bytes().to_vec();
        for (name, size) in &self.disks {
            let length = u8::try_from(name.len()).map_err(|_| WireError::Length)?;
            if length == 0 || name.len() > NAME_MAX {
                return Err(WireError::Length);
            }
            out.extend(size.to_le_bytes());
            out.push(length);
            out.extend(name.as_bytes());
        }
        Ok(out)
    }

    /// From a whole payload.
    pub fn decode(payload: &[u8]) -> Result<Self, WireError> {
        let (token, mut rest) = payload.split_first_chunk().ok_or(WireError::Length)?;
        let mut disks = Vec::new();
        while let Some((size, after)) = rest.split_first_chunk() {
            let (length, after) = after.split_first().ok_or(WireError::Length)?;
            let (name, after) = after
                .split_at_checked((*length).into())
                .ok_or(WireError::Length)?;
            if name.is_empty() || name.len() > NAME_MAX || disks.len() == DISKS_MAX {
                return Err(WireError::Length);
            }
            let name = core::str::from_utf8(name).map_err(|_| WireError::Name)?;
            disks.push((name.to_owned(), u64::from_le_bytes(*size)));
            rest = after;
        }
        if !rest.is_empty() {
            return Err(WireError::Length);
        }
        Ok(Self {
            token: u128::from_le_bytes(*token),
            disks,
        })
    }
}

/// Payload of [`Kind::DiskSums`](crate::frame::Kind::DiskSums): what the standby's image has from a
/// chunk on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sums {
    /// Which disk.
    pub disk: u16,
    /// The first chunk.
    pub first: u64,
    /// Of it and those that follow.
    pub sums: Vec<Sum>,
}

impl Sums {
    /// Most sums that fit into a frame.
    pub const MAX: usize = (PAYLOAD_MAX - 16) / size_of::<Sum>();

    /// As bytes. Fails with [`WireError::Length`] if there are more than [`Self::MAX`].
    pub fn encode(&self) -> Result<Vec<u8>, WireError> {
        if self.sums.len() > Self::MAX {
            return Err(WireError::Length);
        }
        let mut out = u64::from(self.disk).to_le_bytes().to_vec();
        out.extend(self.first.to_le_bytes());
        out.extend(self.sums.iter().flatten());
        Ok(out)
    }

    /// From a whole payload.
    pub fn decode(payload: &[u8]) -> Result<Self, WireError> {
        let (disk, rest) = payload.split_first_chunk().ok_or(WireError::Length)?;
        let (first, rest) = rest.split_first_chunk().ok_or(WireError::Length)?;
        let (sums, odd) = rest.as_chunks();
        if !odd.is_empty() {
            return Err(WireError::Length);
        }
        Ok(Self {
            disk: u64::from_le_bytes(*disk)
                .try_into()
                .map_err(|_| WireError::Length)?,
            first: u64::from_le_bytes(*first),
            sums: sums.to_vec(),
        })
    }
}
