// SPDX-License-Identifier: GPL-2.0-or-later

//! A recorded data stream, cut and damaged at every byte: the standby stays at the last whole epoch and
//! says why.

use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::AtomicU64;
use std::sync::mpsc::sync_channel;
use std::thread;
use std::time::Duration;

use remus_core::uapi::ram::{PAGE_SIZE, RECORD_SIZE};
use remus_proto::frame::{record, EpochBegin, EpochEnd, Header, Kind};
use remus_proto::pages::{Counts, Encoder, Options, Share};

use super::model::{Copy, Random};
use crate::peer::channel::{Channel, Way};
use crate::peer::stream::{Receiver, Sender};
use crate::report::Report;
use crate::standby::apply::apply_all;
use crate::standby::serve::{Held, Offer, Outcome};
use crate::standby::stage::Staging;

const PAGES: usize = 12;
const MINUTE: Duration = Duration::from_secs(60);

/// What was recorded: the bytes, and for each whole epoch its number, where it ends, and the memory then.
struct Recording {
    bytes: Vec<u8>,
    epochs: Vec<(u64, usize, Vec<u8>)>,
}

/// A first copy in two passes, and epochs of few pages, of all kinds of content.
fn record_stream() -> Recording {
    let mut random = Random(0x1234_5678_9abc_def1);
    let mut encoder = Encoder::new(Options {
        share: Share::ALL,
        cache_bytes: PAGES * PAGE_SIZE,
        raw: false,
    });
    // A link that is so slow that all is tried.
    encoder.set_link(1000.0);
    let mut memory = vec![0u8; PAGES * PAGE_SIZE];
    let (mut bytes, mut epochs, mut base) = (Vec::new(), Vec::new(), 0);
    let frame = |bytes: &mut Vec<u8>, kind, epoch, payload: &[u8]| {
        bytes.extend(Header::new(kind, 1, epoch, payload).unwrap().encode());
        bytes.extend(payload);
    };
    for epoch in 1..=5u64 {
        let mut records = Vec::new();
        for page in (0..PAGES).filter(|p| epoch == 1 || p % 4 == epoch as usize % 4) {
            let content = &mut memory[page * PAGE_SIZE..][..PAGE_SIZE];
            match (page + epoch as usize) % 5 {
                0 => content.fill(0),
                1 => content.fill_with(|| b"epoch"[random.below(5)]),
                2 => content[random.below(PAGE_SIZE)] ^= 1,
                3 => content[..200].fill(random.next() as u8),
                _ => {}
            }
            let mut out = [0; RECORD_SIZE];
            let content: &[u8; PAGE_SIZE] = (&*content).try_into().unwrap();
            record(page as u64, content, &mut out);
            records.extend(out);
        }
        let (mut payload, mut counts) = (Vec::new(), Counts::default());
        encoder.encode(&records, &mut payload, &mut counts).unwrap();
        let state = match epoch {
            1 => Vec::new(),
            _ => vec![epoch as u8; 40],
        };
        frame(
            &mut bytes,
            Kind::EpochBegin,
            epoch,
            &EpochBegin { base }.encode(),
        );
        frame(&mut bytes, Kind::Pages, epoch, &payload);
        if !state.is_empty() {
            frame(&mut bytes, Kind::DeviceState, epoch, &state);
        }
        let end = EpochEnd {
            pages: counts.entries(),
            state: state.len() as u64,
        };
        frame(&mut bytes, Kind::EpochEnd, epoch, &end.encode());
        if epoch > 1 {
            epochs.push((epoch, bytes.len(), memory.clone()));
            base = epoch;
        }
    }
    Recording { bytes, epochs }
}

fn pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (near, listener.accept().unwrap().0)
}

/// What a standby makes of these bytes: how it ended, what it holds, and what it has acknowledged.
fn replay(bytes: &[u8], sender: &Sender) -> (Outcome, Held, Vec<u8>) {
    let offer = Offer {
        domain: "toy".into(),
        memory: (PAGES * PAGE_SIZE) as u64,
        timeout: MINUTE,
    };
    let (mut near, far) = pair();
    let (reader, _writer, handle) = Channel::connect(far, &Way::Plain, MINUTE).unwrap().split();
    let incoming = Receiver::new(reader, &handle, MINUTE).unwrap();
    let (queue, todo) = sync_channel(1);
    let (mut held, mut image) = (Held::default(), Copy(vec![0; PAGES * PAGE_SIZE]));
    let seen = AtomicU64::new(0);
    let outcome = thread::scope(|scope| {
        let seen = &seen;
        let mut staging = Staging::new(&offer, 1, 0, seen, sender);
        let staging = scope.spawn(move || staging.run(incoming, queue));
        near.write_all(bytes).unwrap();
        drop(near);
        apply_all(
            &todo,
            &mut image,
            &offer,
            &mut held,
            None,
            &Report::default(),
        )
        .unwrap();
        staging.join().unwrap()
    });
    (outcome, held, image.0)
}

#[test]
fn cut_and_damaged_at_every_byte() {
    let recording = record_stream();
    let (near, _far) = pair();
    let (_, writer, handle) = Channel::connect(near, &Way::Plain, MINUTE).unwrap().split();
    let sender = Sender::new(writer, &handle, 1);
    let check = |bytes: &[u8], whole_before: usize, what: &str| {
        let (outcome, held, image) = replay(bytes, &sender);
        let last = recording.epochs.iter().rfind(|e| e.1 <= whole_before);
        assert_eq!(held.epoch, last.map_or(0, |e| e.0), "{what}");
        if let Some((epoch, _, memory)) = last {
            assert!(image == *memory, "{what}: the image is not epoch {epoch}'s");
            assert_eq!(held.state, [*epoch as u8; 40], "{what}");
        }
        outcome
    };
    let all = &recording.bytes;
    let kinds = recording.epochs.len();
    assert!(kinds == 4 && all.len() > 3000, "{} bytes", all.len());
    check(all, all.len(), "nothing");
    for at in 0..all.len() {
        let outcome = check(&all[..at], at, &format!("cut at {at}"));
        assert!(matches!(outcome, Outcome::DataLost(_)), "cut at {at}");
        let mut damaged = all.clone();
        damaged[at] ^= 1 << (at % 8);
        let outcome = check(&damaged, at, &format!("damaged at {at}"));
        let Outcome::Nonsense(_, why) = outcome else {
            panic!("damaged at {at}, and not noticed");
        };
        assert!(!format!("{why:#}").is_empty());
    }
}
