// SPDX-License-Identifier: GPL-2.0-or-later

//! A journal that is damaged in any byte: it is refused, or the images are of an epoch.

use std::collections::BTreeMap;

use super::super::journal::RECORDS;
use super::super::{header, Durability};
use super::model::{World, SIZES};
use super::{changes, Content, Random};

const BOUND: u64 = 1 << 20;

/// A host that died after so many writes and syncs of its work on some epochs, and what these are.
pub(super) fn died(durability: Durability, after: u64) -> (World, BTreeMap<u64, Content>) {
    let world = World::new();
    let mut random = Random::new(3);
    let mut content: Content = SIZES.iter().map(|size| vec![0; *size as usize]).collect();
    let mut epochs = BTreeMap::new();
    let store = world.open(durability, BOUND).unwrap();
    store.begin_copy(1, 1).unwrap();
    world.die_after(Some(after));
    for epoch in 1..9 {
        store
            .stage(changes(&mut random, &mut content, 3, 150))
            .unwrap();
        epochs.insert(epoch, content.clone());
        // Two are sealed at a time.
        let apply = epoch % 2 == 0;
        if store.seal(epoch).is_err() || apply && store.apply(epoch).is_err() {
            break;
        }
    }
    assert!(world.dead());
    world.die_after(None);
    (world, epochs)
}

/// Returns whether a damaged journal was refused.
fn damaged(world: &World, epochs: &BTreeMap<u64, Content>, at: usize, bit: u64) -> bool {
    let world = world.copy();
    world.journal(|bytes| bytes[at] ^= 1 << bit);
    match world.open(Durability::Memory, BOUND) {
        Ok(store) => {
            if let Some(stamp) = store.whole() {
                let torn = world.content() != epochs[&stamp.epoch];
                assert!(!torn, "byte {at}: not of epoch {}", stamp.epoch);
            }
            false
        }
        Err(e) => {
            assert!(format!("{e:#}").contains("delete it"), "{e:#}");
            true
        }
    }
}

#[test]
fn every_byte() {
    let mut random = Random::new(1);
    for (durability, after) in [(Durability::Memory, 68), (Durability::Disk, 68)] {
        let (world, epochs) = died(durability, after);
        let end = world.journal(|bytes| {
            let used = bytes.iter().rposition(|byte| *byte != 0).unwrap();
            assert!(used as u64 > RECORDS + 5 * 4096);
            used
        });
        // Nearly all of the rest is zeros that nothing is in.
        let bytes = (0..=end).filter(|at| {
            let rest = if *at < header::SIZE * 2 {
                at % header::SIZE
            } else {
                at % 4096
            };
            rest < 600 || at % 97 == 0 || rest >= header::SIZE - 8
        });
        let (mut refused, mut all) = (0, 0);
        for at in bytes {
            refused += u32::from(damaged(&world, &epochs, at, random.below(8)));
            all += 1;
        }
        // That of records is, that of a copy of the header is not.
        assert!(refused > 500 && all - refused > 1000, "{refused} of {all}");
    }
}

/// Wherever it died: also while a header was written.
#[test]
fn at_any_time() {
    let mut random = Random::new(2);
    for durability in [Durability::Memory, Durability::Disk] {
        for after in 1..70 {
            let (world, epochs) = died(durability, after);
            let size = world.journal(|bytes| bytes.len()) as u64;
            for _ in 0..10 {
                let at = random.below(size.min(RECORDS + 9 * 4096));
                let at = if random.below(2) == 0 {
                    at
                } else {
                    at / 4096 * 4096 + at % 300
                };
                let at = at.min(size - 1) as usize;
                damaged(&world, &epochs, at, random.below(8));
            }
        }
    }
}

#[test]
fn both_headers() {
    let (world, _) = died(Durability::Memory, 50);
    world.journal(|bytes| {
        bytes[20] ^= 1;
        bytes[header::SIZE + 20] ^= 1;
    });
    let e = world.open(Durability::Memory, BOUND).err().unwrap();
    assert!(e.to_string().contains("guest.journal is damaged"), "{e:#}");
}
