// SPDX-License-Identifier: GPL-2.0-or-later

//! What goes over the disk stream: what is written is read, what is cut or makes no sense is refused.

#![allow(clippy::unwrap_used)]

use proptest::collection::vec;
use proptest::prelude::*;
use remus_core::uapi::NAME_MAX;
use remus_proto::disk::*;
use remus_proto::frame::{Header, Kind, WireError, PAYLOAD_MAX};

/// A record's disk, kind, length of what is no write, offset, and data.
type Fields = (u16, u8, u32, u64, Vec<u8>);

fn fields() -> impl Strategy<Value = Fields> {
    let data = vec(any::<u8>(), 1..60);
    (any::<u16>(), 1u8..=3, 1u32.., 0..u64::MAX / 2, data)
}

fn made((disk, kind, length, offset, data): &Fields) -> Record<'_> {
    let change = match kind {
        1 => Change::Write(data),
        2 => Change::Zero(*length),
        _ => Change::Discard(*length),
    };
    Record {
        disk: *disk,
        offset: *offset,
        change,
    }
}

fn encoded(record: Record<'_>) -> Vec<u8> {
    let mut out = Vec::new();
    record.encode(&mut out);
    assert_eq!(out.len(), record.encoded_len());
    out
}

fn disks() -> impl Strategy<Value = Vec<(String, u64)>> {
    vec(("[a-zü]{1,15}", any::<u64>()), 0..=DISKS_MAX)
}

proptest! {
    #[test]
    fn records_round_trip(all in vec(fields(), 1..9)) {
        let bytes: Vec<u8> = all.iter().flat_map(|fields| encoded(made(fields))).collect();
        let mut rest = &bytes[..];
        for fields in &all {
            let record = Record::decode(&mut rest).unwrap();
            prop_assert_eq!(record, made(fields));
            prop_assert_eq!(record.change.length() as usize, match fields.1 {
                1 => fields.4.len(),
                _ => fields.2 as usize,
            });
        }
        prop_assert!(rest.is_empty());
    }

    /// Wherever it is cut. What is left to read is as it was.
    #[test]
    fn a_cut_record_is_refused(fields in fields()) {
        let bytes = encoded(made(&fields));
        for end in 0..bytes.len() {
            let mut cut = &bytes[..end];
            prop_assert_eq!(Record::decode(&mut cut), Err(WireError::Length), "cut at {}", end);
            prop_assert_eq!(cut.len(), end);
        }
    }

    #[test]
    fn what_makes_no_sense_is_refused(fields in fields(), kind: u8, odd in 1u8.., by in 1u64..1000) {
        let good = encoded(made(&fields));
        let refused = |at: usize, with: &[u8]| {
            let mut bad = good.clone();
            bad[at..at + with.len()].copy_from_slice(with);
            Record::decode(&mut &bad[..]).err()
        };
        prop_assert_eq!(refused(3, &[odd]), Some(WireError::Length));
        prop_assert_eq!(refused(4, &[0; 4]), Some(WireError::Length));
        let length = u64::from(made(&fields).change.length());
        let over = u64::MAX - length + by.min(length);
        prop_assert_eq!(refused(8, &over.to_le_bytes()), Some(WireError::Length));
        prop_assert_eq!(refused(8, &(u64::MAX - length).to_le_bytes()), None);
        if !(1..=3).contains(&kind) {
            prop_assert_eq!(refused(2, &[kind]), Some(WireError::Kind(kind.into())));
        }
    }

    #[test]
    fn disks_round_trip(token: u128, disks in disks()) {
        let disks = Disks { token, disks };
        let bytes = disks.encode().unwrap();
        prop_assert_eq!(&Disks::decode(&bytes).unwrap(), &disks);
        // A cut between disks is one that has fewer; the frame's checksum tells.
        for end in 0..bytes.len() {
            if let Ok(fewer) = Disks::decode(&bytes[..end]) {
                prop_assert_eq!(&disks.disks[..fewer.disks.len()], &fewer.disks[..]);
                prop_assert_eq!(fewer.encode().unwrap(), &bytes[..end]);
            }
        }
    }

    #[test]
    fn sums_round_trip(disk: u16, first: u64, sums in vec(any::<Sum>(), 0..20)) {
        let sums = Sums { disk, first, sums };
        let bytes = sums.encode().unwrap();
        prop_assert_eq!(&Sums::decode(&bytes).unwrap(), &sums);
        for end in 0..bytes.len() {
            let whole = end >= 16 && end % 16 == 0;
            prop_assert_eq!(Sums::decode(&bytes[..end]).is_ok(), whole, "cut at {}", end);
        }
    }

    #[test]
    fn rubbish(bytes in vec(any::<u8>(), 0..200)) {
        let mut rest = &bytes[..];
        while let Ok(record) = Record::decode(&mut rest) {
            prop_assert!(record.change.length() > 0);
            prop_assert!(record.offset.checked_add(record.change.length().into()).is_some());
        }
        if let Ok(disks) = Disks::decode(&bytes) {
            prop_assert_eq!(disks.encode().unwrap(), &bytes[..]);
        }
        if let Ok(sums) = Sums::decode(&bytes) {
            prop_assert_eq!(sums.encode().unwrap(), &bytes[..]);
        }
    }
}

#[test]
fn limits() {
    let data = vec![7; DATA_MAX];
    let record = Record {
        disk: 0,
        offset: 0,
        change: Change::Write(&data),
    };
    let payload = encoded(record);
    assert_eq!(payload.len(), PAYLOAD_MAX);
    assert!(Header::new(Kind::DiskChanges, 1, 1, &payload).is_ok());

    let mut sums = Sums {
        disk: 1,
        first: 2,
        sums: vec![[3; 16]; Sums::MAX],
    };
    let payload = sums.encode().unwrap();
    assert!(Header::new(Kind::DiskSums, 1, 0, &payload).is_ok());
    sums.sums.push([3; 16]);
    assert_eq!(sums.encode(), Err(WireError::Length));
    // A number of a disk that is none.
    let far = [&(1u64 << 16).to_le_bytes()[..], &[0; 8]].concat();
    assert_eq!(Sums::decode(&far), Err(WireError::Length));

    let with = |name: &str, count| Disks {
        token: 1,
        disks: vec![(name.to_owned(), 5); count],
    };
    let most = with(&"n".repeat(NAME_MAX), DISKS_MAX);
    let mut bytes = most.encode().unwrap();
    assert!(Header::new(Kind::AttachDisks, 1, 0, &bytes).is_ok());
    for bad in [
        with("", 1),
        with(&"n".repeat(NAME_MAX + 1), 1),
        with("n", DISKS_MAX + 1),
    ] {
        assert_eq!(bad.encode(), Err(WireError::Length));
    }
    // The same from the other side, which may not have looked.
    let one = bytes[16..16 + 9 + NAME_MAX].to_vec();
    bytes.extend(one);
    assert_eq!(Disks::decode(&bytes), Err(WireError::Length));
    let mut name = with("ab", 1).encode().unwrap();
    name[25] = 0xff;
    assert_eq!(Disks::decode(&name), Err(WireError::Name));
    name.truncate(25);
    name[24] = 0;
    assert_eq!(Disks::decode(&name), Err(WireError::Length));
    name[24] = NAME_MAX as u8 + 1;
    name.extend([b'n'; NAME_MAX + 1]);
    assert_eq!(Disks::decode(&name), Err(WireError::Length));
}

/// The bytes themselves, so that a change of the format cannot go unseen.
#[test]
fn golden() {
    let write = Record {
        disk: 0x0201,
        offset: 0x0102_0304_0506_0708,
        change: Change::Write(b"ab"),
    };
    let want = [1, 2, 1, 0, 2, 0, 0, 0, 8, 7, 6, 5, 4, 3, 2, 1, b'a', b'b'];
    assert_eq!(encoded(write), want);
    let discard = Record {
        disk: 1,
        offset: 0x10,
        change: Change::Discard(0x0a0b),
    };
    let want = [1, 0, 3, 0, 0x0b, 0x0a, 0, 0, 0x10, 0, 0, 0, 0, 0, 0, 0];
    assert_eq!(encoded(discard), want);
    let disks = Disks {
        token: 3,
        disks: vec![("vd".into(), 0x0605)],
    };
    let mut want = vec![3];
    want.resize(16, 0);
    want.extend([5, 6, 0, 0, 0, 0, 0, 0, 2, b'v', b'd']);
    assert_eq!(disks.encode(), Ok(want));
    let sums = Sums {
        disk: 4,
        first: 9,
        sums: vec![[1; 16]],
    };
    let mut want = vec![4, 0, 0, 0, 0, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0];
    want.extend([1; 16]);
    assert_eq!(sums.encode(), Ok(want));
}
