// SPDX-License-Identifier: GPL-2.0

//! The dirty set against a tree set.

use std::collections::BTreeSet;

use proptest::prelude::*;
use remus_core::dirty::{words, Dirty};

fn all(dirty: &Dirty<Vec<u64>>) -> Vec<u64> {
    let (mut found, mut from) = (Vec::new(), 0);
    while let Some(page) = dirty.next(from) {
        found.push(page);
        from = page + 1;
    }
    found
}

fn build(pages: u64, members: &[u64]) -> Result<(Dirty<Vec<u64>>, BTreeSet<u64>), TestCaseError> {
    // Rubbish in the words must not count.
    let mut dirty = Dirty::new(vec![u64::MAX; words(pages) as usize], pages);
    let mut model = BTreeSet::new();
    for &page in members {
        prop_assert_eq!(dirty.insert(page), page < pages && model.insert(page));
    }
    Ok((dirty, model))
}

proptest! {
    #[test]
    fn like_a_set(pages in 0u64..300, members in proptest::collection::vec(0u64..320, 0..100)) {
        let (dirty, model) = build(pages, &members)?;
        prop_assert_eq!(dirty.pages(), pages);
        prop_assert_eq!(dirty.count(), model.len() as u64);
        prop_assert_eq!(all(&dirty), model.iter().copied().collect::<Vec<_>>());
        for page in (0..330).chain([u64::MAX - 1, u64::MAX]) {
            prop_assert_eq!(dirty.contains(page), model.contains(&page));
            prop_assert_eq!(dirty.next(page), model.range(page..).next().copied());
        }
    }

    #[test]
    fn merge(
        a in 0u64..300,
        b in 0u64..300,
        members in proptest::collection::vec(0u64..300, 0..60),
        others in proptest::collection::vec(0u64..300, 0..60),
    ) {
        let (mut dirty, mut model) = build(a, &members)?;
        let (other, other_model) = build(b, &others)?;
        dirty.merge(&other);
        model.extend(other_model.iter().copied().filter(|p| *p < a));
        prop_assert_eq!(dirty.count(), model.len() as u64);
        prop_assert_eq!(all(&dirty), model.into_iter().collect::<Vec<_>>());
    }
}

#[test]
fn sizes() {
    assert_eq!([0, 1, 64, 65].map(words), [0, 1, 1, 2]);
    assert_eq!(words(u64::MAX), u64::MAX / 64 + 1);
    // Fewer words than pages: what does not fit is not there.
    let mut dirty = Dirty::new(vec![0; 1], 1000);
    assert_eq!(dirty.pages(), 64);
    assert!(dirty.insert(63) && !dirty.insert(64) && !dirty.insert(u64::MAX));
    assert_eq!(dirty.count(), 1);
}
