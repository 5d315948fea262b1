// SPDX-License-Identifier: GPL-2.0-or-later

//! Pages on the wire: the standby has what the primary has, in no more bytes than are allowed, and
//! nothing that comes makes it panic.

#![allow(clippy::unwrap_used)]

mod common;

use common::{records, Memory, Random};
use proptest::prelude::*;
use remus_core::uapi::ram::{PAGE_SIZE, RECORD_SIZE};
use remus_proto::delta::{self, Diff};
use remus_proto::frame::{PAYLOAD_MAX, RECORDS_MAX};
use remus_proto::pages::cost::{Cost, Plan, Size};
use remus_proto::pages::*;
use std::collections::BTreeSet;

/// A link on which everything that saves a byte pays, and one on which nothing does.
const SLOW: f64 = 1e6;
const FAST: f64 = 0.0;

fn options(cache_pages: usize) -> Options {
    Options {
        share: Share::ALL,
        // Some more, for what the cache needs for itself.
        cache_bytes: cache_pages * (PAGE_SIZE + 256),
        raw: false,
    }
}

fn encode(encoder: &mut Encoder, records: &[u8]) -> (Vec<u8>, Counts) {
    let mut out = Vec::new();
    let mut counts = Counts::default();
    encoder.encode(records, &mut out, &mut counts).unwrap();
    assert_eq!(counts.bytes, out.len() as u64);
    (out, counts)
}

/// What a guest may do to a page.
#[derive(Clone, Debug)]
enum Change {
    Nothing,
    Zero,
    Random(u64),
    Text(u64),
    /// So many bytes, anywhere.
    Bytes(u64, usize),
    /// One more in every word.
    Count,
    /// What another page has.
    Copy(usize),
}

const PAGES: usize = 300;

fn change() -> impl Strategy<Value = Change> {
    prop_oneof![
        Just(Change::Nothing),
        Just(Change::Zero),
        any::<u64>().prop_map(Change::Random),
        any::<u64>().prop_map(Change::Text),
        (any::<u64>(), 1..12usize).prop_map(|(seed, count)| Change::Bytes(seed, count)),
        (any::<u64>(), 12..900usize).prop_map(|(seed, count)| Change::Bytes(seed, count)),
        Just(Change::Count),
        (0..PAGES).prop_map(Change::Copy),
    ]
}

fn mutate(memory: &mut Memory, page: usize, change: &Change) {
    let other = match change {
        Change::Copy(other) => memory.0[*other],
        _ => [0; PAGE_SIZE],
    };
    let content = &mut memory.0[page];
    match change {
        Change::Nothing => {}
        Change::Zero | Change::Copy(_) => *content = other,
        Change::Random(seed) => *content = Random::new(*seed).page(),
        Change::Text(seed) => *content = Random::new(*seed).text(),
        Change::Bytes(seed, count) => {
            let mut random = Random::new(*seed);
            for _ in 0..*count {
                content[random.below(PAGE_SIZE)] = random.next() as u8;
            }
        }
        Change::Count => {
            for word in content.as_chunks_mut::<8>().0 {
                *word = u64::from_le_bytes(*word).wrapping_add(1).to_le_bytes();
            }
        }
    }
}

/// The pages that an epoch changes. Few, and near one another, so that they come again.
fn epoch() -> impl Strategy<Value = Vec<(usize, Change)>> {
    let page = prop_oneof![0..12usize, 60..70usize, 0..PAGES];
    proptest::collection::vec((page, change()), 0..24)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn the_standby_has_what_the_primary_has(
        of in 1..4u64,
        cache_pages in prop_oneof![0..12usize, Just(PAGES)],
        raw in prop::bool::weighted(0.1),
        links in proptest::collection::vec(prop_oneof![Just(SLOW), Just(FAST), 0.01..20.0f64], 1..4),
        epochs in proptest::collection::vec(epoch(), 1..8),
    ) {
        let mut encoders: Vec<_> = (0..of)
            .map(|index| Encoder::new(Options {
                share: Share { index, of },
                raw,
                ..options(cache_pages)
            }))
            .collect();
        let mut primary = Memory::new(PAGES, 0);
        // Nothing is right until it was sent.
        let mut standby = Memory::new(PAGES, 0xaa);
        let mut sent: BTreeSet<usize> = BTreeSet::new();
        let mut scratch = Scratch::new();
        for (number, changes) in epochs.iter().enumerate() {
            let mut dirty = BTreeSet::new();
            for (page, change) in changes {
                mutate(&mut primary, *page, change);
                dirty.insert(*page);
            }
            sent.extend(&dirty);
            let bytes = primary.records(dirty.iter().copied());
            let mut all = Counts::default();
            // In whatever order they are ready.
            for index in 0..encoders.len() {
                let index = (index + number) % encoders.len();
                encoders[index].set_link(links[number % links.len()]);
                let (payload, counts) = encode(&mut encoders[index], &bytes);
                prop_assert!(payload.len() <= dirty.len() * ENTRY_MAX);
                let entries = check(&payload, PAGES as u64, &mut scratch);
                prop_assert_eq!(entries, Ok(counts.entries()));
                let entries = apply(&payload, PAGES as u64, &mut scratch, &mut standby);
                prop_assert_eq!(entries, Ok(counts.entries()));
                all += counts;
            }
            prop_assert_eq!(all.entries() + all.unchanged, dirty.len() as u64);
            prop_assert!(!raw || all.raw == dirty.len() as u64);
            prop_assert!(cache_pages > 0 || all.unchanged + all.delta + all.packed == 0);
            for page in &sent {
                prop_assert!(primary.0[*page] == standby.0[*page], "page {}", page);
            }
        }
    }

    #[test]
    fn delta_round_trip(
        seed: u64,
        edits in proptest::collection::vec((0..PAGE_SIZE, 0..40usize), 0..60),
    ) {
        let mut random = Random::new(seed);
        let old = random.page();
        let mut new = old;
        for (at, length) in edits {
            let end = (at + length).min(PAGE_SIZE);
            random.bytes(&mut new[at..end]);
        }
        delta_of(&old, &new)?;
        delta_of(&new, &random.page())?;
    }

    #[test]
    fn damaged_payloads_are_refused_or_harmless(
        seed: u64,
        changes in proptest::collection::vec((0..PAGES, change()), 1..6),
        flips in proptest::collection::vec(any::<(prop::sample::Index, u8)>(), 0..4),
        cut in proptest::option::of(any::<prop::sample::Index>()),
        limit in prop_oneof![Just(PAGES as u64), 0..PAGES as u64],
    ) {
        let mut random = Random::new(seed);
        let mut primary = Memory((0..PAGES).map(|_| [random.next() as u8; PAGE_SIZE]).collect());
        let mut encoder = Encoder::new(options(PAGES));
        encoder.set_link(SLOW);
        let dirty: BTreeSet<_> = changes.iter().map(|(page, _)| *page).collect();
        encode(&mut encoder, &primary.records(dirty.iter().copied()));
        for (page, change) in &changes {
            mutate(&mut primary, *page, change);
        }
        let (mut payload, _) = encode(&mut encoder, &primary.records(dirty));
        if !payload.is_empty() {
            for (at, value) in flips {
                let at = at.index(payload.len());
                payload[at] ^= value;
            }
            if let Some(cut) = cut {
                payload.truncate(cut.index(payload.len()));
            }
        }
        agree(&payload, limit)?;
    }

    #[test]
    fn rubbish_is_refused_or_harmless(
        bytes in proptest::collection::vec(prop_oneof![0..8u8, any::<u8>()], 0..200),
        limit in 0..PAGES as u64,
    ) {
        agree(&bytes, limit)?;
    }
}

/// The delta between two pages, made and applied.
fn delta_of(old: &Page, new: &Page) -> Result<(), TestCaseError> {
    let diff = Diff::new(old, new);
    prop_assert_eq!(diff.runs() == 0, old == new);
    let mut out = b"before".to_vec();
    if !diff.encode(new, 2 * PAGE_SIZE, &mut out) {
        prop_assert!(diff.runs() == 0 && out == b"before");
        return Ok(());
    }
    let delta = &out[6..];
    prop_assert!(diff.size() <= delta.len());
    prop_assert!(delta.len() <= diff.size() + 2 * PAGE_SIZE / 128);
    // No longer than a run for each byte that differs, nor than the page in one.
    let differ = old.iter().zip(new).filter(|(old, new)| old != new).count();
    prop_assert!(delta.len() <= 4 * differ);
    let mut page = *old;
    prop_assert_eq!(delta::apply(delta, &mut page), Some(()));
    prop_assert!(page == *new);
    prop_assert_eq!(delta::apply(delta, &mut page), Some(()));
    prop_assert!(page == *new, "not the same the second time");
    // It says when it would be too long, and leaves nothing behind.
    for (most, fits) in [(delta.len(), true), (delta.len() - 1, false)] {
        let mut bounded = vec![1, 2];
        prop_assert_eq!(diff.encode(new, most, &mut bounded), fits);
        prop_assert_eq!(&bounded[2..], if fits { delta } else { &[] });
    }
    // Every part of it is needed.
    for end in 0..delta.len() {
        let mut page = *old;
        let part = delta::apply(&delta[..end], &mut page);
        prop_assert!(part.is_none() || page != *new, "cut at {}", end);
    }
    Ok(())
}

/// `check` and `apply` say the same, and nothing outside of the limit is touched.
fn agree(payload: &[u8], limit: u64) -> Result<(), TestCaseError> {
    let mut scratch = Scratch::new();
    // No more pages than the limit: others would be an error of the image.
    let mut image = Memory::new(limit as usize, 1);
    let checked = check(payload, limit, &mut scratch);
    let applied = apply(payload, limit, &mut scratch, &mut image);
    prop_assert_eq!(checked.map_err(ApplyError::Page), applied);
    if let Ok(entries) = checked {
        prop_assert!(entries <= limit.min(payload.len() as u64));
    }
    Ok(())
}

#[test]
fn what_is_unchanged_costs_nothing() {
    let mut random = Random::new(1);
    let memory = Memory((0..200).map(|_| random.page()).collect());
    let bytes = memory.records(0..200);
    for share in [Share::ALL, Share { index: 1, of: 2 }] {
        let mut encoder = Encoder::new(Options {
            share,
            ..options(200)
        });
        let own = (0..200).filter(|page| share.owns(*page)).count() as u64;
        let (_, first) = encode(&mut encoder, &bytes);
        assert_eq!((first.raw, first.entries()), (own, own));
        let (payload, second) = encode(&mut encoder, &bytes);
        assert!(payload.is_empty());
        assert_eq!((second.unchanged, second.entries()), (own, 0));
        // Not after it was lost on its way.
        encoder.forget();
        assert_eq!(encode(&mut encoder, &bytes).1, first);
    }
}

/// What was forgotten takes no room, nor another page's place.
#[test]
fn forgotten_pages_leave_the_cache() {
    let mut random = Random::new(6);
    let mut memory = Memory((0..16).map(|_| random.page()).collect());
    let mut encoder = Encoder::new(options(16));
    encode(&mut encoder, &memory.records(0..16));
    encoder.forget();
    encode(&mut encoder, &memory.records(8..16));
    encode(&mut encoder, &memory.records(0..8));
    memory.0.iter_mut().for_each(|page| page[1] ^= 1);
    assert_eq!(encode(&mut encoder, &memory.records(0..16)).1.delta, 16);
}

/// Gaps of one and two bytes are sent, longer ones are not.
#[test]
fn a_gap_is_sent_where_a_run_would_take_more() {
    for at in [0, 62, 63, 1000, PAGE_SIZE - 6] {
        for (gap, within, across) in [(1, 5, 6), (2, 6, 6), (3, 6, 6), (4, 6, 6)] {
            let old = [0; PAGE_SIZE];
            let mut new = old;
            new[at] = 1;
            new[at + gap + 1] = 1;
            let mut out = Vec::new();
            assert!(Diff::new(&old, &new).encode(&new, PAGE_SIZE, &mut out));
            // Two bytes for a skip of 128 or more.
            let far = usize::from(at >= 128);
            let want = if at / 64 == (at + gap + 1) / 64 {
                within
            } else {
                across
            };
            assert_eq!(out.len(), want + far, "{gap} at {at}: {out:?}");
        }
    }
}

/// LZ4 that saves a byte or two less than its length takes is not used.
#[test]
fn lengths_about_the_longest() {
    let mut random = Random::new(7);
    let mut lengths = BTreeSet::new();
    for repeated in 8..80 {
        let mut page = random.page();
        let (first, second) = page.split_at_mut(PAGE_SIZE / 2);
        second[..repeated].copy_from_slice(&first[..repeated]);
        let length = lz4_flex::block::compress(&page).len();
        lengths.insert(length);
        let mut encoder = Encoder::new(options(0));
        encoder.set_link(SLOW);
        let (payload, counts) = encode(&mut encoder, &records([(0, &page)]));
        assert_eq!(counts.lz4, u64::from(length < PAGE_SIZE - 2), "{length}");
        let mut image = Memory::new(1, 0);
        assert_eq!(apply(&payload, 1, &mut Scratch::new(), &mut image), Ok(1));
        assert!(image.0[0] == page);
    }
    for length in PAGE_SIZE - 4..=PAGE_SIZE {
        assert!(lengths.contains(&length), "{length}");
    }
}

/// Every page belongs to one share, and 64 neighbours to the same.
#[test]
fn shares() {
    for of in 0..5 {
        for page in (0..1000).chain(PAGES_MAX - 100..PAGES_MAX) {
            let owners =
                || (0..of.max(1)).filter(move |index| Share { index: *index, of }.owns(page));
            assert_eq!(owners().count(), 1);
            let index = owners().next().unwrap();
            assert!(Share { index, of }.owns(page / 64 * 64));
        }
    }
}

/// As many records as there may be, with content and numbers that take the most bytes.
#[test]
fn the_longest_payload_fits_a_frame() {
    const { assert!(BATCH_RECORDS == RECORDS_MAX && ENTRY_MAX <= RECORD_SIZE) };
    let mut random = Random::new(2);
    let gap = PAGES_MAX / BATCH_RECORDS as u64;
    let content: Vec<_> = (0..=BATCH_RECORDS).map(|_| random.page()).collect();
    let pages = |from| {
        content
            .iter()
            .enumerate()
            .map(move |(at, page)| (from + at as u64 * gap, page))
    };
    let last = PAGES_MAX - 1 - (BATCH_RECORDS as u64 - 1) * gap;
    for raw in [false, true] {
        let mut encoder = Encoder::new(Options { raw, ..options(4) });
        encoder.set_link(SLOW);
        for from in [0, last] {
            let bytes = records(pages(from).take(BATCH_RECORDS));
            let (payload, counts) = encode(&mut encoder, &bytes);
            assert_eq!(counts.raw, BATCH_RECORDS as u64);
            assert!(payload.len() > BATCH_RECORDS * (PAGE_SIZE + 3));
            assert!(payload.len() <= BATCH_RECORDS * ENTRY_MAX);
            assert!(payload.len() <= PAYLOAD_MAX);
            let entries = check(&payload, PAGES_MAX, &mut Scratch::new());
            assert_eq!(entries, Ok(BATCH_RECORDS as u64));
            let entries = check(&payload, from, &mut Scratch::new());
            assert_eq!(entries, Err(PageError::Limit));
        }
        // The longest entry of all.
        let bytes = records([(PAGES_MAX - 1, &content[0])]);
        assert_eq!(encode(&mut encoder, &bytes).0.len(), ENTRY_MAX);
        // And what is refused. Nothing of it is remembered.
        let good = records([(3, &content[1]), (5, &content[2])]);
        let few = (0..=BATCH_RECORDS as u64).zip(&content);
        for (bytes, error) in [
            (records(few), RecordsError::TooMany),
            (good[1..].to_vec(), RecordsError::Length),
            (
                records([(3, &content[1]), (3, &content[2])]),
                RecordsError::Number(3),
            ),
            (
                records([(3, &content[1]), (2, &content[2])]),
                RecordsError::Number(2),
            ),
            (
                records([(3, &content[1]), (PAGES_MAX, &content[2])]),
                RecordsError::Number(PAGES_MAX),
            ),
        ] {
            let mut out = vec![7];
            let mut counts = Counts::default();
            assert_eq!(encoder.encode(&bytes, &mut out, &mut counts), Err(error));
            assert_eq!((out, counts), (vec![7], Counts::default()));
        }
        assert_eq!(encode(&mut encoder, &good).1.raw, 2);
    }
}

/// A page that changes often stays, though the whole memory passes through a small cache.
#[test]
fn what_changes_often_stays_in_the_cache() {
    let mut random = Random::new(3);
    let mut memory = Memory((0..120).map(|_| random.page()).collect());
    let mut encoder = Encoder::new(options(16));
    let (_, counts) = encode(&mut encoder, &memory.records(0..8));
    assert_eq!(counts.raw, 8);
    for epoch in 0..10 {
        (0..8).for_each(|page| memory.0[page][epoch] ^= 1);
        let (_, counts) = encode(&mut encoder, &memory.records(0..8));
        assert_eq!(counts.delta, 8, "epoch {epoch}");
        let scan = 8 + 7 * epoch..8 + 7 * (epoch + 1);
        assert_eq!(encode(&mut encoder, &memory.records(scan)).1.raw, 7);
    }
    // Pages of zeros take no room.
    memory.0[20..].fill([0; PAGE_SIZE]);
    assert_eq!(encode(&mut encoder, &memory.records(20..120)).1.zero, 100);
    (0..8).for_each(|page| memory.0[page][99] ^= 1);
    assert_eq!(encode(&mut encoder, &memory.records(0..8)).1.delta, 8);
}

/// The bytes themselves, so that a change of the format cannot go unseen.
#[test]
fn golden_payload() {
    let mut random = Random::new(4);
    let mut memory = Memory((0..600).map(|_| random.page()).collect());
    let mut encoder = Encoder::new(options(600));
    encoder.set_link(SLOW);
    encode(&mut encoder, &memory.records([1, 20, 21, 22, 300]));
    memory.0[1] = [0; PAGE_SIZE];
    memory.0[20][10..13].copy_from_slice(&[1, 2, 3]);
    memory.0[20][4000] ^= 1;
    memory.0[21] = [0x55; PAGE_SIZE];
    memory.0[300][1000..2000].fill(7);
    let (payload, counts) = encode(&mut encoder, &memory.records([1, 20, 21, 22, 300, 301]));
    let want = Counts {
        zero: 1,
        unchanged: 1,
        delta: 1,
        packed: 1,
        lz4: 1,
        raw: 1,
        bytes: payload.len() as u64,
    };
    assert_eq!(counts, want);
    let mut rest = &payload[..];
    let mut take = |want: &[u8]| {
        let (head, after) = rest.split_at(want.len());
        assert_eq!(head, want, "{}", rest.len());
        rest = after;
    };
    take(&[1 << 3]);
    let byte = memory.0[20][4000];
    // Page 20; 10 stay, 3 new; 3987 stay, 1 new.
    take(&[0x91, 0x01, 9, 10, 3, 1, 2, 3, 0x93, 0x1f, 1, byte]);
    let packed = lz4_flex::block::compress(&memory.0[21]);
    take(&[2, packed.len() as u8]);
    take(&packed);
    // Page 300: 278 between; 1000 stay, 1000 new, as LZ4.
    let mut delta = vec![0xe8, 0x07, 0xe8, 0x07];
    delta.extend([7; 1000]);
    let packed = lz4_flex::block::compress(&delta);
    take(&[0xb4, 0x11, packed.len() as u8]);
    take(&packed);
    take(&[3]);
    let last = memory.0[301];
    take(&last);
    assert!(rest.is_empty());
}

#[test]
fn malformed_entries() {
    let lz4 = |bytes: &[u8]| {
        let packed = lz4_flex::block::compress(bytes);
        let length = packed.len();
        let mut entry = vec![2, length as u8 & 0x7f | 0x80, (length >> 7) as u8];
        if length < 0x80 {
            entry = vec![2, length as u8];
        }
        entry.extend(packed);
        entry
    };
    let ok = |payload: &[u8]| check(payload, 100, &mut Scratch::new());
    assert_eq!(ok(&[]), Ok(0));
    assert_eq!(ok(&[0, 0, 0]), Ok(3));
    assert_eq!(ok(&lz4(&[5; PAGE_SIZE])), Ok(1));
    for (payload, error) in [
        // Kinds that there are not.
        (vec![5], PageError::Kind(5)),
        (vec![0, 7], PageError::Kind(7)),
        // A head that ends, one that is too long, one that overflows.
        (vec![0x80], PageError::Form),
        (vec![0x80, 0], PageError::Form),
        (vec![0xff; 12], PageError::Form),
        // Pages outside of the memory: the first, and the one after the last.
        (vec![0xa0, 0x06], PageError::Limit),
        (vec![0x98, 0x06, 0], PageError::Limit),
        (
            vec![0, 0xf8, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1],
            PageError::Limit,
        ),
        // No content, too much, less than announced.
        (vec![1, 0], PageError::Length(0)),
        (vec![2, 0xfe, 0x1f], PageError::Length(0)),
        (vec![1, 4, 0, 1, 0], PageError::Form),
        (vec![3, 0, 0], PageError::Form),
        // Runs: none of them empty, none outside of the page, nothing behind them.
        (vec![1, 2, 0, 0], PageError::Delta(0)),
        (vec![1, 6, 0, 1, 9, 0, 1, 9], PageError::Delta(0)),
        (vec![1, 4, 0x80, 0x20, 1, 9], PageError::Delta(0)),
        (vec![1, 3, 0, 2, 9], PageError::Delta(0)),
        (vec![1, 4, 0, 1, 9, 1], PageError::Delta(0)),
        (vec![1, 3, 0xff, 0xff, 0xff], PageError::Delta(0)),
        // LZ4 of more and of less than a page.
        (lz4(&[5; PAGE_SIZE - 1]), PageError::Lz4(0)),
        (lz4(&[5; PAGE_SIZE + 1]), PageError::Lz4(0)),
        (vec![2, 1, 0xff], PageError::Lz4(0)),
        (vec![4, 1, 0xff], PageError::Lz4(0)),
        // LZ4 of what is no delta: one byte, 0.
        (vec![4, 2, 0x10, 0], PageError::Delta(0)),
    ] {
        assert_eq!(ok(&payload), Err(error), "{payload:?}");
    }
    // The last byte of a page can change.
    assert_eq!(ok(&[1, 4, 0xff, 0x1f, 1, 9]), Ok(1));
}

/// What the image says goes up.
#[test]
fn errors_of_the_image() {
    let mut image = Memory::new(1, 0);
    let scratch = &mut Scratch::new();
    assert_eq!(
        apply(&[0, 0], 9, scratch, &mut image),
        Err(ApplyError::Image(1))
    );
    let delta = [0, 1, 3, 0, 1, 9];
    assert_eq!(
        apply(&delta, 9, scratch, &mut image),
        Err(ApplyError::Image(1))
    );
    assert_eq!(
        apply(&[9, 3, 0, 1, 9], 9, scratch, &mut image),
        Err(ApplyError::Image(1))
    );
}

/// Plans for `pages` pages alike, of which LZ4 makes `ratio` bytes a byte in `ns` nanoseconds a byte,
/// where a run takes 10 ns. Returns how often LZ4 was tried on the page, LZ4 on what changed, and what
/// changed.
fn play(cost: &mut Cost, delta: Option<Size>, ratio: f64, ns: f64, pages: u32) -> [u32; 3] {
    let mut tried = [0; 3];
    for _ in 0..pages {
        let plan: Plan = cost.plan(delta);
        let made = |bytes: usize| (bytes as f64 * ratio) as usize;
        let time = |bytes: usize| plan.timed.then_some((bytes as f64 * ns) as u64);
        if plan.content {
            tried[0] += 1;
            cost.content(made(PAGE_SIZE), time(PAGE_SIZE));
        }
        if plan.packed {
            let bytes = delta.unwrap().bytes;
            tried[1] += 1;
            cost.packed(bytes, made(bytes), time(bytes));
        }
        if plan.delta {
            let runs = delta.unwrap().runs;
            tried[2] += 1;
            cost.delta(runs, plan.timed.then_some(10 * runs as u64));
        }
    }
    tried
}

#[test]
fn a_fast_link_stops_lz4_and_a_slow_one_keeps_it() {
    // 2 ns a byte, and half of the bytes saved: pays from 4 ns a byte on.
    for (link, pays) in [(0.1, false), (3.5, false), (4.5, true), (80.0, true)] {
        let mut cost = Cost::new();
        cost.set_link(link);
        // Time to learn what it takes.
        play(&mut cost, None, 0.5, 2.0, 2000);
        let [tried, ..] = play(&mut cost, None, 0.5, 2.0, 1000);
        if pays {
            assert_eq!(tried, 1000, "{link}");
        } else {
            assert!(tried <= 16, "{link}: {tried}");
        }
        // And the other way round: a link that gets slow, or fast.
        cost.set_link(if pays { 0.1 } else { 80.0 });
        let [tried, ..] = play(&mut cost, None, 0.5, 2.0, 1000);
        assert_eq!(tried > 900, !pays, "{link}: {tried}");
    }
}

#[test]
fn what_cannot_be_compressed_is_not_tried_every_page() {
    let mut cost = Cost::new();
    let [first, ..] = play(&mut cost, None, 1.0, 0.2, 100);
    assert!((1..40).contains(&first), "{first}");
    let [later, ..] = play(&mut cost, None, 1.0, 0.2, 6400);
    assert!((50..=100).contains(&later), "{later}");
    // It is found out when it can be again.
    let [again, ..] = play(&mut cost, None, 0.3, 1.0, 400);
    assert!(again > 300, "{again}");
}

#[test]
fn what_changed_goes_as_such_unless_lz4_is_shorter() {
    let few = Some(Size { bytes: 20, runs: 2 });
    let much = Some(Size {
        bytes: 4000,
        runs: 90,
    });
    let runs = Some(Size {
        bytes: 1500,
        runs: 500,
    });
    let mut cost = Cost::new();
    assert_eq!(play(&mut cost, few, 0.5, 1.0, 500), [0, 0, 500]);
    // Compressible, and all new: either way of LZ4, not both at every page.
    let [content, packed, _] = play(&mut cost, much, 0.4, 1.0, 500);
    assert!(
        (500..=520).contains(&(content + packed)),
        "{content} {packed}"
    );
    // Nothing to be gained from LZ4.
    play(&mut cost, much, 1.0, 1.0, 500);
    let [content, packed, delta] = play(&mut cost, much, 1.0, 1.0, 500);
    assert!(content + packed <= 20, "{content} {packed}");
    assert!(delta <= 20, "{delta}: 96 bytes are not worth 90 runs");
    // Runs take the CPU 5 us. That pays on a slow link.
    cost.set_link(8.0);
    assert_eq!(play(&mut cost, runs, 1.0, 1.0, 500)[2], 500);
    cost.set_link(0.1);
    assert!(play(&mut cost, runs, 1.0, 1.0, 500)[2] <= 8);
    // A byte that costs nothing is not worth any work.
    cost.set_link(0.0);
    assert!(play(&mut cost, few, 1.0, 1.0, 500)[2] <= 8);
}

#[test]
fn odd_numbers_do_no_harm() {
    for link in [f64::NAN, f64::INFINITY, -1.0] {
        let mut cost = Cost::new();
        cost.set_link(link);
        for _ in 0..100 {
            cost.content(usize::MAX, Some(u64::MAX));
            cost.packed(0, usize::MAX, Some(u64::MAX));
            cost.delta(usize::MAX, Some(u64::MAX));
            cost.delta(0, Some(0));
        }
        // As slow as can be, and still found out to be fast again.
        assert_eq!(play(&mut cost, None, 0.1, 0.5, 10), [0; 3]);
        for _ in 0..400 {
            cost.content(10, Some(100));
        }
        assert_eq!(play(&mut cost, None, 0.1, 0.5, 10)[0], 10);
    }
}

/// The same through the encoder, with its clock.
#[test]
fn the_encoder_heeds_the_link() {
    let mut random = Random::new(5);
    let memory = Memory((0..250).map(|_| random.text()).collect());
    let bytes = memory.records(0..250);
    for (link, most) in [(SLOW, 250), (FAST, 1)] {
        let mut encoder = Encoder::new(options(0));
        encoder.set_link(link);
        let (_, counts) = encode(&mut encoder, &bytes);
        assert_eq!(counts.lz4 + counts.raw, 250);
        assert!(
            counts.lz4 <= most && (counts.lz4 == most || most == 1),
            "{counts:?}"
        );
    }
}
