// SPDX-License-Identifier: GPL-2.0-or-later

//! A full disk: an epoch for which there is no space is not sealed, and one that is sealed is applied.

use proptest::prelude::*;

use super::super::Durability;
use super::model::{World, SIZES};
use super::{changes, Content, Random};

const BOUND: u64 = 1 << 16;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn found_before_it_is_sealed(
        disk: bool,
        seed: u64,
        free in 0u64..6,
        // Epochs that are sealed before one is applied.
        ahead in proptest::collection::vec(1u64..4, 1..30),
    ) {
        let durability = if disk { Durability::Disk } else { Durability::Memory };
        let world = World::new();
        world.set_free(free);
        let mut random = Random::new(seed);
        let mut content: Content = SIZES.iter().map(|size| vec![0; *size as usize]).collect();
        let store = world.open(durability, BOUND).unwrap();
        store.begin_copy(1, 1).unwrap();
        let mut epoch = 0;
        'all: for ahead in ahead {
            let before = epoch;
            for _ in 0..ahead {
                let mut changed = content.clone();
                store.stage(changes(&mut random, &mut changed, 4, 5000)).unwrap();
                if let Err(e) = store.seal(epoch + 1) {
                    prop_assert!(e.to_string().contains("there is no space"), "{:#}", e);
                    prop_assert_eq!(store.sealed(), epoch);
                    // As soon as there is, it can be.
                    world.set_free(100);
                    if epoch > 0 {
                        store.apply(epoch).unwrap();
                        prop_assert!(world.content() == content);
                    }
                    store.seal(epoch + 1).unwrap();
                    store.apply(epoch + 1).unwrap();
                    prop_assert!(world.content() == changed);
                    break 'all;
                }
                content = changed;
                epoch += 1;
            }
            for epoch in before + 1..=epoch {
                // What was free, or was freed, another program has taken.
                world.set_free(0);
                store.apply(epoch).unwrap();
            }
            world.set_free(free);
            prop_assert!(world.content() == content);
        }
    }
}
