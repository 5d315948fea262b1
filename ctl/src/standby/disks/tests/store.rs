// SPDX-License-Identifier: GPL-2.0-or-later

//! Files of this host: what is refused, and what is said.

use std::fs::{self, File};
use std::path::Path;
use std::time::Duration;

use remus_proto::disk::{Change, Record, Sums, CHUNK};
use ring::digest::{digest, SHA256};

use super::super::{Durability, Spec, Stamp, Store};
use super::{changes, raw, read, Content, Random};

const BOUND: u64 = 1 << 20;

fn open(specs: &[Spec], folder: &Path) -> anyhow::Result<Store> {
    Store::open(
        specs,
        &folder.join("guest.journal"),
        Durability::Disk,
        BOUND,
    )
}

/// Why it is refused.
fn refused(specs: &[Spec], folder: &Path) -> String {
    format!("{:#}", open(specs, folder).err().unwrap())
}

fn one(disk: u16, offset: u64, change: Change<'_>) -> Vec<u8> {
    let mut payload = Vec::new();
    let record = Record {
        disk,
        offset,
        change,
    };
    record.encode(&mut payload);
    payload
}

#[test]
fn images_that_do_not_fit() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let specs = raw(folder, &[1 << 20, 70_000]);
    let missing = [
        specs[0].clone(),
        Spec {
            path: folder.join("x.img"),
            ..specs[1].clone()
        },
    ];
    let why = refused(&missing, folder);
    assert!(
        why.contains("qemu-img create -f raw") && why.contains("x.img"),
        "{why}"
    );
    let twice = [
        specs[0].clone(),
        Spec {
            name: "again".into(),
            ..specs[0].clone()
        },
    ];
    assert!(refused(&twice, folder).contains("in use"));

    let store = open(&specs, folder).unwrap();
    assert!(refused(&specs, folder).contains("in use"));
    assert_eq!(
        store.sizes(),
        [("d0".into(), 1 << 20), ("d1".into(), 70_000)]
    );
    store.check(&store.sizes()).unwrap();
    let larger = [("d0".into(), 1 << 21), ("d1".into(), 70_000)];
    let why = store.check(&larger).unwrap_err().to_string();
    assert!(
        why.contains("qemu-img create -f FORMAT PATH 2097152"),
        "{why}"
    );
    let other = [("d1".into(), 70_000), ("d0".into(), 1 << 20)];
    let why = store.check(&other).unwrap_err().to_string();
    assert!(why.contains("same order"), "{why}");
    assert!(store.check(&larger[..1]).is_err());
    store.close().unwrap();

    // Two guests with one journal, and disks of the same names and sizes.
    let store = open(&specs, folder).unwrap();
    let there = tempfile::tempdir().unwrap();
    let other = raw(there.path(), &[1 << 20, 70_000]);
    let why = refused(&other, folder);
    assert!(why.contains("is in use by another standby"), "{why}");
    drop(store);

    // The journal is of other disks, by number, name or size.
    let why = refused(&specs[..1], folder);
    assert!(why.contains("is of other disks"), "{why}");
    let named = [
        Spec {
            name: "new".into(),
            ..specs[0].clone()
        },
        specs[1].clone(),
    ];
    assert!(refused(&named, folder).contains("is of other disks"));
    File::options()
        .write(true)
        .open(&specs[0].path)
        .unwrap()
        .set_len(4096)
        .unwrap();
    assert!(refused(&specs, folder).contains("is of other disks"));
    let journal = folder.join("guest.journal");
    for rubbish in [vec![], vec![0; 100], vec![0x55; 100_000]] {
        fs::write(&journal, rubbish).unwrap();
        assert!(refused(&specs, folder).contains("is damaged, or is not a journal"));
    }
    fs::remove_file(&journal).unwrap();
    assert_eq!(open(&specs, folder).unwrap().whole(), None);
}

#[test]
fn from_the_first_copy_on() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let specs = raw(folder, &[1 << 20, 70_000]);
    let mut random = Random::new(9);
    let mut content = read(&specs);
    let store = open(&specs, folder).unwrap();
    assert!(store.seal(1).is_err(), "without a first copy");
    assert!(store.copy(&one(0, 0, Change::Zero(1))).is_err());
    store.begin_copy(5, 2).unwrap();
    store
        .copy(&changes(&mut random, &mut content, 20, 9000))
        .unwrap();
    assert_eq!((store.whole(), store.sealed()), (None, 0));
    assert!(store.apply(4).is_err());
    store
        .stage(changes(&mut random, &mut content, 20, 9000))
        .unwrap();
    assert!(!store.wait_sealed(4, Duration::ZERO));
    store.seal(4).unwrap();
    assert!(store.wait_sealed(4, Duration::ZERO));
    assert!(
        store.copy(&one(0, 0, Change::Zero(1))).is_err(),
        "the copy is over"
    );
    assert!(store.seal(4).is_err(), "it is sealed");
    assert_eq!((store.whole(), store.sealed()), (None, 4));
    assert!(store.held() > 0);
    store.apply(4).unwrap();
    let whole = |epoch| {
        Some(Stamp {
            run: 5,
            generation: 2,
            epoch,
        })
    };
    assert_eq!((store.whole(), store.held()), (whole(4), 0));
    assert!(read(&specs) == content);

    // What is thrown away is not in the journal either.
    let mut never = content.clone();
    store
        .stage(changes(&mut random, &mut never, 20, 9000))
        .unwrap();
    store.seal(5).unwrap();
    store
        .stage(changes(&mut random, &mut never, 20, 9000))
        .unwrap();
    store.discard().unwrap();
    assert_eq!((store.held(), store.sealed()), (0, 4));
    drop(store);
    let store = open(&specs, folder).unwrap();
    assert_eq!(store.whole(), whole(4));
    assert!(read(&specs) == content);

    // What is sealed, but not applied, is not lost with this process.
    store
        .stage(changes(&mut random, &mut content, 20, 9000))
        .unwrap();
    store.seal(7).unwrap();
    drop(store);
    let store = open(&specs, folder).unwrap();
    assert_eq!(store.whole(), whole(7));
    assert!(read(&specs) == content);
    let sums: Vec<_> = content.iter().map(|disk| digest(&SHA256, disk)).collect();
    let same = store
        .checksum()
        .unwrap()
        .iter()
        .zip(&sums)
        .all(|(a, b)| a == b.as_ref());
    assert!(same);
    store.close().unwrap();
    let store = open(&specs, folder).unwrap();
    assert_eq!(store.whole(), whole(7));
    store.hand_over().unwrap();
    assert!(read(&specs) == content);
    // A machine may have written to them since.
    assert_eq!(open(&specs, folder).unwrap().whole(), None);
}

#[test]
fn changes_outside_of_the_disks() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let specs = raw(folder, &[8192, 4096]);
    let store = open(&specs, folder).unwrap();
    store.begin_copy(1, 1).unwrap();
    let good = one(1, 4000, Change::Write(&[1; 96]));
    let bad = [
        one(2, 0, Change::Zero(1)),
        one(1, 4000, Change::Write(&[1; 97])),
        one(0, 8192, Change::Discard(1)),
        one(0, u64::MAX - 5, Change::Zero(5)),
        vec![0; 16],
        good[..20].to_vec(),
    ];
    for bad in bad {
        // What comes before it is not kept either.
        let both = [&good[..], &bad].concat();
        assert!(store.copy(&both).is_err() && store.stage(both).is_err());
        assert_eq!(store.held(), 0);
    }
    assert!(read(&specs)[1].iter().all(|byte| *byte == 0));
    let many = one(0, 0, Change::Write(&[1; 8192]));
    let most = 2 * BOUND as usize / many.len();
    (0..most).for_each(|_| store.stage(many.clone()).unwrap());
    let why = store.stage(many).unwrap_err().to_string();
    assert!(why.contains("disk_buffer"), "{why}");
    store.seal(1).unwrap();
    store.apply(1).unwrap();
}

#[test]
fn sums_of_data_and_holes() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    // More chunks than fit into a frame, nearly all holes; and an odd end.
    let chunks = Sums::MAX as u64 + 40;
    let specs = raw(folder, &[chunks * CHUNK as u64, 2 * CHUNK as u64 + 777]);
    let store = open(&specs, folder).unwrap();
    store.begin_copy(1, 1).unwrap();
    let far = Sums::MAX as u64 + 7;
    store
        .copy(&one(0, far * CHUNK as u64 + 9, Change::Write(b"far")))
        .unwrap();
    store
        .copy(&one(1, CHUNK as u64, Change::Write(&[7; CHUNK])))
        .unwrap();
    store
        .copy(&one(1, CHUNK as u64 + 4096, Change::Discard(8192)))
        .unwrap();
    let mut all = vec![Vec::new(); 2];
    let mut add = |sums: Sums| {
        let of = &mut all[usize::from(sums.disk)];
        assert_eq!(sums.first, of.len() as u64);
        assert!(sums.encode().is_ok());
        of.extend(sums.sums);
        Ok(())
    };
    store.sums(&mut add).unwrap();
    let first_half = |chunk: &[u8]| digest(&SHA256, chunk).as_ref()[..16].to_vec();
    let mut chunk = vec![0; CHUNK];
    let zeros = first_half(&chunk);
    chunk[9..12].copy_from_slice(b"far");
    assert_eq!(all[0].len() as u64, chunks);
    for (n, sum) in all[0].iter().enumerate() {
        assert!(
            sum[..]
                == if n as u64 == far {
                    first_half(&chunk)
                } else {
                    zeros.clone()
                }
        );
    }
    let content: Content = read(&specs[1..]);
    let want: Vec<_> = content[0].chunks(CHUNK).map(first_half).collect();
    assert!(content[0][CHUNK + 4096] == 0 && content[0][CHUNK] == 7);
    assert!(all[1].iter().map(|sum| sum.to_vec()).eq(want));
}
