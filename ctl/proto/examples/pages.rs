// SPDX-License-Identifier: GPL-2.0-or-later

//! What encoding and decoding pages costs and saves, for some kinds of content, to be looked at.
//!
//! `cargo run --release -p remus-proto --example pages [ns per byte of the link …]`

#![allow(clippy::print_stdout)]

use remus_core::uapi::ram::{PAGE_SIZE, RECORD_SIZE};
use remus_proto::frame::record;
use remus_proto::pages::{
    apply, check, Counts, Encoder, Image, Options, Page, Scratch, Share, BATCH_RECORDS,
};
use std::convert::Infallible;
use std::time::{Duration, Instant};

/// Pages of memory: more than the processor's caches hold.
const PAGES: usize = 64 * BATCH_RECORDS;
/// Epochs that are measured, after one that is not.
const EPOCHS: u32 = 4;

/// xorshift64*.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }

    fn fill(&mut self, page: &mut [u8]) {
        for word in page.as_chunks_mut::<8>().0 {
            *word = self.next().to_le_bytes();
        }
    }

    fn text(&mut self, page: &mut [u8]) {
        const WORDS: [&[u8]; 16] = [
            b"the ",
            b"page ",
            b"of ",
            b"memory ",
            b"standby ",
            b"is ",
            b"\n",
            b"sent ",
            b"epoch ",
            b"= ",
            b"0x",
            b"return ",
            b"to ",
            b"primary ",
            b"; ",
            b"machine ",
        ];
        let mut rest = page;
        while !rest.is_empty() {
            let number = [b'0' + self.below(10) as u8];
            let word = match self.below(20) {
                at @ 0..16 => WORDS.get(at).copied().unwrap_or(&[]),
                _ => &number,
            };
            let length = word.len().min(rest.len());
            let (to, after) = rest.split_at_mut(length);
            to.copy_from_slice(word.get(..length).unwrap_or(&[]));
            rest = after;
        }
    }

    fn byte(&mut self, page: &mut [u8]) {
        let at = self.below(page.len());
        if let Some(byte) = page.get_mut(at) {
            *byte ^= self.next() as u8 | 1;
        }
    }
}

struct Memory(Vec<Page>);

impl Image for Memory {
    type Error = Infallible;

    fn read(&mut self, page: u64, to: &mut Page) -> Result<(), Infallible> {
        if let Some(from) = self.0.get(page as usize) {
            *to = *from;
        }
        Ok(())
    }

    fn write(&mut self, page: u64, content: &Page) -> Result<(), Infallible> {
        if let Some(to) = self.0.get_mut(page as usize) {
            *to = *content;
        }
        Ok(())
    }
}

/// How a kind of content starts, and what happens to it in each epoch.
struct Case {
    name: &'static str,
    first: fn(&mut Random, &mut [u8]),
    then: fn(&mut Random, &mut [u8]),
}

const CASES: [Case; 9] = [
    Case {
        name: "zero",
        first: |_, page| page.fill(0),
        then: |_, _| (),
    },
    Case {
        name: "unchanged",
        first: Random::fill,
        then: |_, _| (),
    },
    Case {
        name: "one word changed",
        first: Random::fill,
        then: |random, page| {
            let at = 8 * random.below(PAGE_SIZE / 8);
            if let Some(word) = page.get_mut(at..at + 8) {
                random.fill(word);
            }
        },
    },
    Case {
        name: "10 % changed, one piece",
        first: Random::fill,
        then: |random, page| {
            let at = random.below(PAGE_SIZE * 9 / 10);
            if let Some(piece) = page.get_mut(at..at + PAGE_SIZE / 10) {
                random.fill(piece);
            }
        },
    },
    Case {
        name: "10 % changed, bytes",
        first: Random::fill,
        then: |random, page| (0..PAGE_SIZE / 10).for_each(|_| random.byte(page)),
    },
    Case {
        name: "counters, each one more",
        first: Random::fill,
        then: |_, page| {
            for word in page.as_chunks_mut::<8>().0 {
                *word = u64::from_le_bytes(*word).wrapping_add(1).to_le_bytes();
            }
        },
    },
    Case {
        name: "text, one word changed",
        first: Random::text,
        then: |random, page| {
            let at = random.below(PAGE_SIZE - 8);
            if let Some(piece) = page.get_mut(at..at + 8) {
                random.text(piece);
            }
        },
    },
    Case {
        name: "text, all new",
        first: Random::text,
        then: Random::text,
    },
    Case {
        name: "random, all new",
        first: Random::fill,
        then: Random::fill,
    },
];

/// Time of each part, and what was encoded.
#[derive(Default)]
struct Sum {
    encode: Duration,
    check: Duration,
    apply: Duration,
    counts: Counts,
}

fn run(case: &Case, link: f64, cache: bool, raw: bool) -> Result<Sum, Box<dyn std::error::Error>> {
    let mut random = Random(0x5eed_5eed);
    let mut encoder = Encoder::new(Options {
        share: Share::ALL,
        cache_bytes: if cache { 2 * PAGES * PAGE_SIZE } else { 0 },
        raw,
    });
    encoder.set_link(link);
    let mut records = vec![0; PAGES * RECORD_SIZE];
    for (page, to) in records.as_chunks_mut().0.iter_mut().enumerate() {
        let mut content = [0; PAGE_SIZE];
        (case.first)(&mut random, &mut content);
        record(page as u64, &content, to);
    }
    let mut image = Memory(vec![[0; PAGE_SIZE]; PAGES]);
    let mut scratch = Scratch::new();
    let mut out = Vec::new();
    let mut sum = Sum::default();
    for epoch in 0..=EPOCHS {
        if epoch == 1 {
            sum = Sum::default();
        }
        for batch in records.chunks(BATCH_RECORDS * RECORD_SIZE) {
            out.clear();
            let start = Instant::now();
            encoder.encode(batch, &mut out, &mut sum.counts)?;
            let encoded = Instant::now();
            check(&out, PAGES as u64, &mut scratch)?;
            let checked = Instant::now();
            apply(&out, PAGES as u64, &mut scratch, &mut image)?;
            sum.apply += checked.elapsed();
            sum.check += checked - encoded;
            sum.encode += encoded - start;
        }
        for record in records.as_chunks_mut::<RECORD_SIZE>().0 {
            if let Some(content) = record.get_mut(8..) {
                (case.then)(&mut random, content);
            }
        }
    }
    Ok(sum)
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut links = Vec::new();
    for link in std::env::args().skip(1) {
        links.push(link.parse()?);
    }
    if links.is_empty() {
        links = vec![8.0, 0.8, 0.08];
    }
    for link in links {
        println!("\nlink: {link} ns a byte ({} Gbit/s)", 8.0 / link);
        println!(
            "{:<24} {:<8} {:>8} {:>8} {:>8} {:>8}   zero unchanged delta packed lz4 raw, in %",
            "content", "how", "bytes", "encode", "check", "apply"
        );
        for case in &CASES {
            for (how, cache, raw) in [
                ("cache", true, false),
                ("no cache", false, false),
                ("raw", false, true),
            ] {
                let sum = run(case, link, cache, raw)?;
                let pages = f64::from(EPOCHS) * PAGES as f64;
                let ns = |time: Duration| time.as_nanos() as f64 / pages;
                let part = |count: u64| (count as f64 * 100.0 / pages).round();
                let counts = &sum.counts;
                println!(
                    "{:<24} {:<8} {:>8.1} {:>8.0} {:>8.0} {:>8.0}   {} {} {} {} {} {}",
                    case.name,
                    how,
                    counts.bytes as f64 / pages,
                    ns(sum.encode),
                    ns(sum.check),
                    ns(sum.apply),
                    part(counts.zero),
                    part(counts.unchanged),
                    part(counts.delta),
                    part(counts.packed),
                    part(counts.lz4),
                    part(counts.raw),
                );
            }
        }
    }
    println!("\nbytes, and nanoseconds, a page");
    Ok(())
}
