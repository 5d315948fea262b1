// SPDX-License-Identifier: GPL-2.0-or-later

//! Mutated input for everything that decodes what the other host sends.
//!
//! [`target`] has the form of a libFuzzer target, and can be one where there is a compiler for that.
//! Here it is run on inputs that a seed makes: `REMUS_FUZZ_RUNS` of them (20,000), from `REMUS_SEED`.
//! Run `n` depends on the seed and on `n` only; `REMUS_FUZZ_FROM` skips to the one that failed.
//!
//! What a decoder allocates is bounded by there being nothing to allocate with: all take a slice, and
//! room of a fixed size.

#![allow(clippy::unwrap_used, clippy::print_stdout)]

mod common;

use common::{Memory, Random};
use remus_core::uapi::ram::{PAGE_SIZE, RECORD_SIZE};
use remus_proto::delta;
use remus_proto::disk::{Change, Disks, Record, Sums};
use remus_proto::frame::*;
use remus_proto::pages::{apply, check, ApplyError, Counts, Encoder, Options, Scratch, Share};
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::time::{SystemTime, UNIX_EPOCH};

/// Pages of the standby's memory.
const PAGES: usize = 40;

/// How far inputs came, so that it is seen if all are refused at once.
#[derive(Debug, Default)]
struct Seen {
    frames: u64,
    payloads: u64,
    entries: u64,
    refused: u64,
    changes: u64,
}

/// Decodes `data` in all ways there are. Panics if something is wrong with how that went.
fn target(data: &[u8], seen: &mut Seen) {
    payload(data, seen);
    let Ok(header) = Header::decode(data) else {
        return;
    };
    assert!(header.length as usize <= PAYLOAD_MAX);
    let again = Header::decode(&header.encode());
    assert_eq!(again, Ok(header));
    let body = &data[HEADER_SIZE..];
    let body = &body[..body.len().min(header.length as usize)];
    if header.check(body).is_ok() {
        seen.frames += 1;
        payload(body, seen);
    }
}

/// Decodes a payload as each kind. What is accepted is what would have been encoded.
fn payload(data: &[u8], seen: &mut Seen) {
    if let Ok(hello) = Hello::decode(data) {
        let mut out = [0; HELLO_MAX];
        let length = hello.encode(&mut out).unwrap();
        assert_eq!(&out[..length], data);
    }
    if let Ok(welcome) = Welcome::decode(data) {
        assert_eq!(welcome.encode(), data);
    }
    if let Ok(token) = Token::decode(data) {
        assert_eq!(token.encode(), data);
    }
    if let Ok(stamp) = Stamp::decode(data) {
        assert_eq!(stamp.encode(), data);
    }
    if let Ok(begin) = EpochBegin::decode(data) {
        assert_eq!(begin.encode(), data);
    }
    if let Ok(end) = EpochEnd::decode(data) {
        assert_eq!(end.encode(), data);
    }
    match records(data) {
        Ok(records) => assert_eq!(records.count() * RECORD_SIZE, data.len()),
        Err(_) => assert_ne!(data.len() % RECORD_SIZE, 0),
    }
    if let Ok(disks) = Disks::decode(data) {
        assert_eq!(disks.encode().unwrap(), data);
    }
    if let Ok(sums) = Sums::decode(data) {
        // More than is sent at once fits nowhere else.
        assert!(sums.sums.len() > Sums::MAX || sums.encode().unwrap() == data);
    }
    let mut rest = data;
    let mut again = Vec::new();
    while let Ok(record) = Record::decode(&mut rest) {
        record.encode(&mut again);
        seen.changes += 1;
    }
    assert_eq!([&again, rest].concat(), data);
    let _ = delta::apply(data, &mut [0; PAGE_SIZE]);
    // Some of what comes is on the edge of the memory.
    for limit in [PAGES, PAGES / 2] {
        let mut scratch = Scratch::new();
        let mut image = Memory::new(limit, 3);
        let checked = check(data, limit as u64, &mut scratch);
        let applied = apply(data, limit as u64, &mut scratch, &mut image);
        assert_eq!(checked.map_err(ApplyError::Page), applied);
        match checked {
            Ok(entries) => {
                assert!(entries <= limit.min(data.len()) as u64);
                seen.payloads += 1;
                seen.entries += entries;
            }
            Err(_) => seen.refused += 1,
        }
    }
}

const _: () = assert!(size_of::<Scratch>() <= 2 * PAGE_SIZE);

/// Well-formed payloads of every kind.
fn corpus(random: &mut Random) -> Vec<(Kind, Vec<u8>)> {
    let mut out = [0; HELLO_MAX];
    let hello = Hello {
        memory: (PAGES * PAGE_SIZE) as u64,
        page_size: PAGE_SIZE as u32,
        timeout_ms: 500,
        run: 99,
        name: "guest-1",
    };
    let length = hello.encode(&mut out).unwrap();
    let end = EpochEnd { pages: 5, state: 6 };
    let welcome = Welcome {
        timeout_ms: 9,
        held: 3,
        token: Token(77),
    };
    let mut corpus = vec![
        (Kind::Hello, out[..length].to_vec()),
        (Kind::Welcome, welcome.encode().to_vec()),
        (Kind::Attach, Token(77).encode().to_vec()),
        (Kind::EpochBegin, EpochBegin { base: 3 }.encode().to_vec()),
        (Kind::EpochEnd, end.encode().to_vec()),
        (Kind::Ack, Stamp(4).encode().to_vec()),
        (Kind::Bye, b"maintenance".to_vec()),
        (Kind::Pages, Vec::new()),
    ];
    corpus.extend(disks());
    // Pages of every kind, alone and together.
    let mut memory = Memory((0..PAGES).map(|_| random.page()).collect());
    let mut encoder = Encoder::new(Options {
        share: Share::ALL,
        cache_bytes: 1 << 20,
        raw: false,
    });
    encoder.set_link(1e6);
    let mut encode = |memory: &Memory, pages: &[usize]| {
        let mut out = Vec::new();
        let mut counts = Counts::default();
        let records = memory.records(pages.iter().copied());
        encoder.encode(&records, &mut out, &mut counts).unwrap();
        (out, counts)
    };
    encode(&memory, &[3, 5, 7, 8]);
    let mut all = Counts::default();
    for round in 0..3 {
        memory.0[3][17] ^= 1;
        memory.0[3][4095] ^= 1;
        memory.0[5][500..900].fill(round);
        memory.0[7] = random.text();
        memory.0[8] = [round; PAGE_SIZE];
        for pages in [
            &[3][..],
            &[5],
            &[3, 5],
            &[7],
            &[8],
            &[3, 7, 39],
            &[3, 5, 8, 20],
        ] {
            memory.0[3][30] ^= 1;
            memory.0[5][1000 + pages.len()] ^= 1;
            let (out, counts) = encode(&memory, pages);
            all += counts;
            corpus.push((Kind::Pages, out));
        }
    }
    let kinds = [all.zero, all.delta, all.packed, all.lz4, all.raw];
    assert!(kinds.iter().all(|count| *count > 0), "{all:?}");
    corpus
}

/// Of the disk stream.
fn disks() -> Vec<(Kind, Vec<u8>)> {
    let disks = Disks {
        token: 77,
        disks: vec![("root".into(), 1 << 30), ("data".into(), 12345)],
    };
    let sums = Sums {
        disk: 1,
        first: 16,
        sums: vec![[9; 16]; 5],
    };
    let mut corpus = vec![
        (Kind::AttachDisks, disks.encode().unwrap()),
        (Kind::DiskSums, sums.encode().unwrap()),
    ];
    // One change, two, all.
    let mut changes = Vec::new();
    for (offset, change) in [
        (0, Change::Write(b"a sector")),
        (1 << 20, Change::Zero(4096)),
        (512, Change::Discard(1 << 16)),
    ] {
        let record = Record {
            disk: 1,
            offset,
            change,
        };
        record.encode(&mut changes);
        corpus.push((Kind::DiskChanges, changes.clone()));
    }
    corpus
}

/// Changes some bytes of `input`.
fn mutate(random: &mut Random, input: &mut Vec<u8>, other: &[u8]) {
    const ODD: [u8; 10] = [0, 1, 2, 3, 4, 0x0f, 0x7f, 0x80, 0xf0, 0xff];
    // Most of what decides is at the start.
    let most = if random.below(2) == 0 { 24 } else { usize::MAX };
    let at = random.below(input.len().min(most) + 1);
    let length = match random.below(4) {
        0 => random.below(input.len() + 1),
        _ => random.below(9),
    };
    let end = (at + length).min(input.len());
    match random.below(8) {
        0 | 1 if at < input.len() => input[at] ^= 1 << random.below(8),
        2 | 3 if at < input.len() => input[at] = ODD[random.below(ODD.len())],
        4 => drop(input.drain(at..end)),
        5 => {
            let piece = input[at..end].to_vec();
            input.splice(at..at, piece);
        }
        6 => {
            let from = random.below(other.len() + 1);
            input.splice(at..end, other[from..].iter().copied());
        }
        7 if random.below(2) == 0 => input.truncate(at),
        _ => input.insert(at, random.next() as u8),
    }
}

/// The input of a run.
fn input(seed: u64, run: u64, corpus: &[(Kind, Vec<u8>)]) -> Vec<u8> {
    let mut random = Random::new(seed ^ run.wrapping_mul(0xd134_2543_de82_ef95));
    // Most are pages or changes of disks.
    let mut pick = || loop {
        let (kind, payload) = &corpus[random.below(corpus.len())];
        if matches!(kind, Kind::Pages | Kind::DiskChanges) || random.below(3) == 0 {
            return (*kind, payload.clone());
        }
    };
    let (kind, mut payload) = pick();
    let (_, other) = pick();
    if random.below(50) == 0 {
        payload = vec![0; random.below(100)];
        random.bytes(&mut payload);
    }
    for _ in 0..random.below(5) {
        mutate(&mut random, &mut payload, &other);
    }
    if random.below(2) == 0 || payload.len() > PAYLOAD_MAX {
        return payload;
    }
    // A frame whose checksums are right, or not.
    let header = Header::new(kind, random.next(), random.next(), &payload).unwrap();
    let mut frame = header.encode().to_vec();
    if random.below(2) == 0 {
        mutate(&mut random, &mut frame, &other);
        if frame.len() >= HEADER_SIZE && random.below(4) != 0 {
            let sum = crc32c(&frame[..HEADER_SIZE - 4]).to_le_bytes();
            frame[HEADER_SIZE - 4..HEADER_SIZE].copy_from_slice(&sum);
        }
    }
    frame.extend(payload);
    frame
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap())
}

#[test]
fn fuzz() {
    let runs = number("REMUS_FUZZ_RUNS").unwrap_or(20_000);
    let seed = number("REMUS_SEED").unwrap_or_else(|| {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        now.as_nanos() as u64
    });
    let from = number("REMUS_FUZZ_FROM").unwrap_or(0);
    println!("REMUS_SEED={seed}");
    let corpus = corpus(&mut Random::new(seed));
    let mut seen = Seen::default();
    for (kind, payload) in &corpus {
        let header = Header::new(*kind, 1, 1, payload).unwrap();
        target(&[&header.encode(), &payload[..]].concat(), &mut seen);
    }
    assert_eq!(seen.frames, corpus.len() as u64);
    seen = Seen::default();
    for run in from..runs {
        let data = input(seed, run, &corpus);
        let outcome = catch_unwind(AssertUnwindSafe(|| target(&data, &mut seen)));
        if outcome.is_err() {
            let hex: String = data.iter().map(|byte| format!("{byte:02x}")).collect();
            panic!("REMUS_SEED={seed} REMUS_FUZZ_FROM={run}: {hex}");
        }
    }
    println!("{runs} runs: {seen:?}");
    if from == 0 && runs >= 1000 {
        // Of each there is enough for the rest to say something.
        assert!(seen.frames > runs / 20, "{seen:?}");
        assert!(seen.payloads > runs / 20, "{seen:?}");
        assert!(seen.entries > runs / 10, "{seen:?}");
        assert!(seen.refused > runs / 4, "{seen:?}");
        assert!(seen.changes > runs / 20, "{seen:?}");
    }
}
