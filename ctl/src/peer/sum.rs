// SPDX-License-Identifier: GPL-2.0-or-later

//! Sums by which both hosts tell whether they have the same on their disks.

use remus_proto::disk::Sum;
use ring::digest::{digest, SHA256};

/// What a chunk with these bytes is called.
pub fn sum(chunk: &[u8]) -> Sum {
    let mut sum = Sum::default();
    let whole = digest(&SHA256, chunk);
    for (to, from) in sum.iter_mut().zip(whole.as_ref()) {
        *to = *from;
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    /// FIPS 180-4's example, its first half.
    #[test]
    fn sums_are_sha256() {
        let want = [
            0xba, 0x78, 0x16, 0xbf, 0x8f, 0x01, 0xcf, 0xea, 0x41, 0x41, 0x40, 0xde, 0x5d, 0xae,
            0x22, 0x23,
        ];
        assert_eq!(sum(b"abc"), want);
    }
}
