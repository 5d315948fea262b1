// SPDX-License-Identifier: GPL-2.0-or-later

//! Numbers in as few bytes as they need: seven bits a byte, lowest first, the top bit set in all but the
//! last (LEB128). A number has one form only, the shortest.

/// Most bytes that a number takes.
const BYTES_MAX: u32 = 10;

/// Appends `number`: one byte below 2^7, two below 2^14, and so on.
#[inline]
pub(crate) fn put(mut number: u64, out: &mut Vec<u8>) {
    while number >= 0x80 {
        out.push(number as u8 | 0x80);
        number >>= 7;
    }
    out.push(number as u8);
}

/// Bytes that [`put`] appends for `number`.
pub(crate) const fn size(number: u64) -> usize {
    let bits = 64 - (number | 1).leading_zeros();
    bits.div_ceil(7) as usize
}

/// Takes a number from the start of `bytes`. `None` if it is cut short, does not fit or is longer than
/// it needs to be; `bytes` is then of no use any more.
pub(crate) fn take(bytes: &mut &[u8]) -> Option<u64> {
    let mut number = 0;
    for at in 0..BYTES_MAX {
        let byte = *bytes.split_off_first()?;
        let part = u64::from(byte & 0x7f);
        // The tenth byte has room for one bit.
        if at == BYTES_MAX - 1 && part > 1 {
            return None;
        }
        number |= part << (7 * at);
        if byte & 0x80 == 0 {
            return (byte != 0 || at == 0).then_some(number);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trip_and_one_form_only() {
        for shift in 0..64 {
            for number in [(1 << shift) - 1, 1 << shift, u64::MAX >> shift] {
                let mut bytes = Vec::new();
                put(number, &mut bytes);
                assert_eq!(bytes.len(), size(number));
                assert_eq!(take(&mut &bytes[..]), Some(number));
                assert_eq!(take(&mut &bytes[..bytes.len() - 1]), None);
            }
        }
        for wrong in [&[0x80, 0][..], &[0xff, 0x80, 0], &[0xff; 11]] {
            assert_eq!(take(&mut &wrong[..]), None);
        }
        let mut big = [0xff; 10];
        big[9] = 2;
        assert_eq!(take(&mut &big[..]), None);
    }
}
