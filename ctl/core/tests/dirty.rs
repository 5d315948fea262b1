// SPDX-License-Identifier: GPL-2.0-or-later

//! A leaf of the dirty set against a tree set.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering};

use proptest::prelude::*;
use remus_core::dirty::{runs, Leaf, PAGES, WORDS};

type Words = Box<[AtomicU64; WORDS]>;

fn empty() -> Leaf<Words> {
    // Rubbish in the words must not count.
    Leaf::new(Box::new([const { AtomicU64::new(u64::MAX) }; WORDS]))
}

fn pages_of(base: u64, bits: u64) -> impl Iterator<Item = u64> {
    (0..64)
        .filter(move |bit| bits & (1 << bit) != 0)
        .map(move |bit| base + bit)
}

fn all(leaf: &Leaf<Words>) -> Vec<u64> {
    let (mut found, mut from) = (Vec::new(), 0);
    while let Some((base, bits)) = leaf.next(from) {
        found.extend(pages_of(base, bits));
        from = base + 64;
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
    fn runs_of_a_word(bits in prop_oneof![any::<u64>(), any::<u64>().prop_map(|b| b | b << 1 | b << 2 | b << 3), Just(0), Just(u64::MAX), Just(1), Just(1 << 63)]) {
        let (mut seen, mut end) = (0, None);
        for (first, count) in runs(bits) {
            prop_assert!(count > 0 && first + count <= 64);
            // They are as long as they can be: a zero is between two.
            prop_assert!(end.is_none_or(|end| first > end));
            end = Some(first + count);
            seen |= (first..first + count).fold(0, |bits, bit| bits | 1 << bit);
        }
        prop_assert_eq!(seen, bits);
    }

    #[test]
    fn like_a_set(members in proptest::collection::vec(page(), 0..100), asked in proptest::collection::vec(page(), 30)) {
        let (leaf, model) = build(&members)?;
        prop_assert_eq!(all(&leaf), model.iter().copied().collect::<Vec<_>>());
        for page in asked.into_iter().chain(members) {
            prop_assert_eq!(leaf.contains(page), model.contains(&page));
            let first = model.range(page..).next().map(|first| first / 64 * 64);
            let expected: Vec<u64> = first.map_or(vec![], |first| model.range(page.max(first)..first + 64).copied().collect());
            let (base, bits) = leaf.next(page).unwrap_or((0, 0));
            prop_assert_eq!((leaf.next(page).is_some(), base % 64), (first.is_some(), 0));
            prop_assert_eq!(pages_of(base, bits).collect::<Vec<_>>(), expected);
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
