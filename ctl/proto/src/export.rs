// SPDX-License-Identifier: GPL-2.0-or-later

//! What the plugin of nbdkit says to remusctl, on the Unix socket between the two on the primary.
//!
//! ```text
//!  plugin                                              remusctl
//!     │ one byte: length of the disk's name; the name     │
//!     │ ────────────────────────────────────────────────▶ │
//!     │ ◀─────────────── 8 bytes: the disk's size, or 0:  │
//!     │                  there is no such disk            │
//!     │ Request; of a write: the bytes                    │
//!     │ ────────────────────────────────────────────────▶ │
//!     │ ◀────────────────── 4 bytes: 0, or an errno       │ again and again
//! ```
//!
//! All numbers are little endian. There may be any number of connections.

use crate::frame::WireError;

/// Bytes of a [`Request`].
pub const REQUEST_SIZE: usize = 16;

/// What happens to a range of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// It is written; the bytes follow.
    Write,
    /// It is not needed any more, and reads as zeros.
    Discard,
}

/// A change of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// What.
    pub action: Action,
    /// How many bytes.
    pub length: u32,
    /// Where, in bytes.
    pub offset: u64,
}

impl Request {
    /// As bytes.
    pub fn encode(&self) -> [u8; REQUEST_SIZE] {
        let action: u32 = match self.action {
            Action::Write => 1,
            Action::Discard => 2,
        };
        let [a0, a1, a2, a3] = action.to_le_bytes();
        let [l0, l1, l2, l3] = self.length.to_le_bytes();
        let [o0, o1, o2, o3, o4, o5, o6, o7] = self.offset.to_le_bytes();
        [
            a0, a1, a2, a3, l0, l1, l2, l3, o0, o1, o2, o3, o4, o5, o6, o7,
        ]
    }

    /// From bytes.
    pub fn decode(bytes: &[u8; REQUEST_SIZE]) -> Result<Self, WireError> {
        let [a0, a1, a2, a3, l0, l1, l2, l3, offset @ ..] = *bytes;
        Ok(Self {
            action: match u32::from_le_bytes([a0, a1, a2, a3]) {
                1 => Action::Write,
                2 => Action::Discard,
                other => return Err(WireError::Kind(other as u16)),
            },
            length: u32::from_le_bytes([l0, l1, l2, l3]),
            offset: u64::from_le_bytes(offset),
        })
    }
}
