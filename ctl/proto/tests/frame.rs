// SPDX-License-Identifier: GPL-2.0-or-later

//! The wire codec: what is written is read, what is damaged is refused, nothing panics.

#![allow(clippy::unwrap_used)]

use proptest::prelude::*;
use remus_core::uapi::ram::{PAGE_SIZE, RECORD_SIZE};
use remus_core::uapi::NAME_MAX;
use remus_proto::frame::*;

fn kind() -> impl Strategy<Value = Kind> {
    (1u16..=20).prop_map(|n| Kind::from_u16(n).unwrap())
}

/// Reads a frame as the receivers do.
fn read(bytes: &[u8]) -> Result<(Header, &[u8]), WireError> {
    let header = Header::decode(bytes)?;
    let end = HEADER_SIZE + header.length as usize;
    let payload = bytes.get(HEADER_SIZE..end).ok_or(WireError::Length)?;
    header.check(payload)?;
    Ok((header, payload))
}

fn frame(kind: Kind, generation: u64, epoch: u64, payload: &[u8]) -> (Header, Vec<u8>) {
    let header = Header::new(kind, generation, epoch, payload).unwrap();
    let mut bytes = header.encode().to_vec();
    bytes.extend(payload);
    (header, bytes)
}

/// Bit by bit, as the polynomial is defined.
fn slow_crc32c(bytes: &[u8]) -> u32 {
    let mut crc = !0u32;
    for byte in bytes {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = if crc & 1 != 0 {
                (crc >> 1) ^ 0x82f6_3b78
            } else {
                crc >> 1
            };
        }
    }
    !crc
}

proptest! {
    #[test]
    fn frames_round_trip(
        kind in kind(),
        generation: u64,
        epoch: u64,
        payload in proptest::collection::vec(any::<u8>(), 0..300),
    ) {
        let (header, bytes) = frame(kind, generation, epoch, &payload);
        prop_assert_eq!(header.kind, kind);
        prop_assert_eq!((header.generation, header.epoch), (generation, epoch));
        prop_assert_eq!(read(&bytes), Ok((header, &payload[..])));
    }

    /// All of them, not some.
    #[test]
    fn every_truncation_and_bit_flip_is_refused(
        kind in kind(),
        generation: u64,
        epoch: u64,
        payload in proptest::collection::vec(any::<u8>(), 0..60),
    ) {
        let (_, bytes) = frame(kind, generation, epoch, &payload);
        for end in 0..bytes.len() {
            prop_assert!(read(&bytes[..end]).is_err(), "cut at {}", end);
        }
        for bit in 0..bytes.len() * 8 {
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(read(&flipped).is_err(), "bit {}", bit);
        }
    }

    #[test]
    fn rubbish_is_no_frame(bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
        prop_assert!(read(&bytes).is_err());
        let mut disguised = MAGIC.to_vec();
        disguised.extend(&bytes);
        prop_assert!(read(&disguised).is_err());
        let _ = Hello::decode(&bytes);
        let _ = EpochBegin::decode(&bytes);
        let _ = EpochEnd::decode(&bytes);
        let _ = records(&bytes);
    }

    #[test]
    fn payloads_round_trip(
        memory: u64,
        page_size: u32,
        timeout_ms: u32,
        run: u128,
        token: u128,
        held: u64,
        name in "[a-z0-9][a-z0-9._-]{0,30}",
        base: u64,
        pages: u64,
        state: u64,
        stamp: u64,
    ) {
        let hello = Hello { memory, page_size, timeout_ms, run, name: &name };
        let mut out = [0; HELLO_MAX];
        let length = hello.encode(&mut out).unwrap();
        prop_assert_eq!(Hello::decode(&out[..length]), Ok(hello));
        for end in 0..33 {
            prop_assert_eq!(Hello::decode(&out[..end]).err(), Some(WireError::Length));
        }
        let begin = EpochBegin { base }.encode();
        prop_assert_eq!(EpochBegin::decode(&begin), Ok(EpochBegin { base }));
        let end = EpochEnd { pages, state }.encode();
        prop_assert_eq!(EpochEnd::decode(&end), Ok(EpochEnd { pages, state }));
        for cut in 0..16 {
            prop_assert!(EpochEnd::decode(&end[..cut]).is_err());
            prop_assert!(cut == 8 || EpochBegin::decode(&end[..cut]).is_err());
        }
        prop_assert!(EpochBegin::decode(&end).is_err());
        prop_assert_eq!(Stamp::decode(&Stamp(stamp).encode()), Ok(Stamp(stamp)));
        prop_assert!(Stamp::decode(&end).is_err() && Stamp::decode(&end[..7]).is_err());
        let welcome = Welcome { timeout_ms, held, token: Token(token) };
        prop_assert_eq!(Welcome::decode(&welcome.encode()), Ok(welcome));
        prop_assert_eq!(Token::decode(&Token(token).encode()), Ok(Token(token)));
        prop_assert!(Welcome::decode(&end).is_err() && Token::decode(&end[..15]).is_err());
    }

    #[test]
    fn records_round_trip(pages in proptest::collection::vec(any::<(u64, u8)>(), 0..5)) {
        let mut bytes = Vec::new();
        for (page, fill) in &pages {
            let mut out = [0; RECORD_SIZE];
            record(*page, &[*fill; PAGE_SIZE], &mut out);
            prop_assert_eq!(&out[..8], &record_head(*page));
            bytes.extend(out);
        }
        let read: Vec<_> = records(&bytes).unwrap().map(|(n, c)| (n, *c)).collect();
        let want: Vec<_> = pages.iter().map(|(n, f)| (*n, [*f; PAGE_SIZE])).collect();
        prop_assert!(read == want);
        for cut in [1, 8, RECORD_SIZE - 1] {
            if let Some(end) = bytes.len().checked_sub(cut) {
                prop_assert!(records(&bytes[..end]).is_err());
            }
        }
    }

    #[test]
    fn checksum(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        prop_assert_eq!(crc32c(&bytes), slow_crc32c(&bytes));
    }
}

#[test]
fn checksum_of_the_standard() {
    // RFC 3720, B.4.
    assert_eq!(crc32c(b"123456789"), 0xe306_9283);
    assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
    assert_eq!(crc32c(&[0xff; 32]), 0x62a8_ab43);
    assert_eq!(crc32c(&[]), 0);
}

/// The bytes themselves, so that a change of the format cannot go unseen.
#[test]
fn golden_frame() {
    let (_, bytes) = frame(Kind::Ack, 2, 0x0102_0304_0506_0708, b"");
    let want = [
        0x52, 0x4d, 0x55, 0x53, 2, 0, 7, 0, 2, 0, 0, 0, 0, 0, 0, 0, 8, 7, 6, 5, 4, 3, 2, 1, 0, 0,
        0, 0, 0, 0, 0, 0,
    ];
    assert_eq!(&bytes[..32], &want);
    assert_eq!(bytes[32..], slow_crc32c(&want).to_le_bytes());
}

#[test]
fn limits() {
    let big = vec![0; PAYLOAD_MAX + 1];
    assert_eq!(
        Header::new(Kind::Pages, 1, 1, &big),
        Err(WireError::TooLong(1 << 20 | 1))
    );
    assert!(Header::new(Kind::Pages, 1, 1, &big[1..]).is_ok());
    const { assert!(RECORDS_MAX * RECORD_SIZE <= PAYLOAD_MAX) };
    // A header that announces more, though undamaged.
    let mut long = frame(Kind::Pages, 1, 1, b"").1;
    long[24..28].copy_from_slice(&u32::MAX.to_le_bytes());
    let check = crc32c(&long[..32]).to_le_bytes();
    long[32..].copy_from_slice(&check);
    assert_eq!(read(&long), Err(WireError::TooLong(u32::MAX)));
    // And one of another version, and of no kind.
    for (at, error) in [(4, WireError::Version(9)), (6, WireError::Kind(99))] {
        let mut other = frame(Kind::Pages, 1, 1, b"").1;
        other[at] = if at == 4 { 9 } else { 99 };
        let check = crc32c(&other[..32]).to_le_bytes();
        other[32..].copy_from_slice(&check);
        assert_eq!(read(&other), Err(error));
    }
    assert_eq!(Kind::from_u16(0), None);
    assert_eq!(Kind::from_u16(21), None);
    let name = "n".repeat(NAME_MAX + 1);
    let hello = Hello {
        memory: 0,
        page_size: 0,
        timeout_ms: 0,
        run: 0,
        name: &name,
    };
    assert_eq!(hello.encode(&mut [0; HELLO_MAX]), Err(WireError::Length));
}
