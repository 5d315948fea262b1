// SPDX-License-Identifier: GPL-2.0-or-later

//! A leaf of the dirty set against a tree set.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering};

use proptest::prelude::*;
use remus_core::dirty::{Leaf, PAGES, WORDS};

type Words = Box<[AtomicU64; WORDS]>;

fn empty() -> Leaf<Words> {
    // Rubbish in the words must not count.
    Leaf::new(Box::new([const { AtomicU64::new(u64::MAX) }; WORDS]))
}

fn all(leaf: &Leaf<Words>) -> Vec<u64> {
    let (mut found, mut from) = (Vec::new(), 0);
    while let Some(page) = leaf.next(from) {
        found.push(page);
        from = page + 1;
    }
    found
}

fn build(members: &[u64]) -> Result<(Leaf<Words>, BTreeSet<u64>), TestCaseError> {
    let (leaf, mut model) = (empty(), BTreeSet::new());
    for &page in members {
        prop_assert_eq!(leaf.insert(page), model.insert(page));
    }
    prop_assert_eq!(leaf.is_empty(), model.is_empty());
    Ok((leaf, model))
}

/// Pages in clusters, as programs write them, and at the ends of words, groups and the leaf.
fn page() -> impl Strategy<Value = u64> {
    prop_oneof![
        0..PAGES,
        0u64..200,
        (0..PAGES / 64).prop_map(|w| w * 64),
        (1..=PAGES / 4096).prop_map(|g| g * 4096 - 1),
        Just(PAGES - 1),
    ]
}

proptest! {
    #[test]
    fn like_a_set(members in proptest::collection::vec(page(), 0..100), asked in proptest::collection::vec(page(), 30)) {
        let (leaf, model) = build(&members)?;
        prop_assert_eq!(all(&leaf), model.iter().copied().collect::<Vec<_>>());
        for page in asked.into_iter().chain(members) {
            prop_assert_eq!(leaf.contains(page), model.contains(&page));
            prop_assert_eq!(leaf.next(page), model.range(page..).next().copied());
        }
        for page in [PAGES, PAGES + 1, u64::MAX] {
            prop_assert_eq!(leaf.next(page), None);
        }
        for (w, word) in leaf.words().iter().enumerate() {
            let expected = (0..64).filter(|b| model.contains(&(w as u64 * 64 + b))).fold(0, |word, b| word | 1 << b);
            prop_assert_eq!(word.load(Ordering::Relaxed), expected);
        }
    }

    #[test]
    fn merge(members in proptest::collection::vec(page(), 0..60), others in proptest::collection::vec(page(), 0..60)) {
        let (leaf, mut model) = build(&members)?;
        let (other, other_model) = build(&others)?;
        let new = other_model.difference(&model).count() as u64;
        prop_assert_eq!(leaf.merge(&other), new);
        model.extend(&other_model);
        prop_assert_eq!(all(&leaf), model.into_iter().collect::<Vec<_>>());
        prop_assert_eq!(all(&other), other_model.into_iter().collect::<Vec<_>>());
    }
}

#[test]
fn many_at_once() {
    let leaf = empty();
    let new = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let (leaf, new) = (&leaf, &new);
            scope.spawn(move || {
                for n in 0..PAGES {
                    let page = n * (2 * thread + 1) % PAGES;
                    if page % 3 == 0 && leaf.insert(page) {
                        new.fetch_add(1, Ordering::Relaxed);
                    }
                }
            });
        }
    });
    let expected: Vec<u64> = (0..PAGES).filter(|p| p % 3 == 0).collect();
    assert_eq!(all(&leaf), expected);
    assert_eq!(new.into_inner(), expected.len() as u64);
}
