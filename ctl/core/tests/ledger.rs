// SPDX-License-Identifier: GPL-2.0-or-later

//! The ledger of a port against a model that keeps every packet.

use proptest::prelude::*;
use remus_core::epoch::Epochs;
use remus_core::ledger::{Ledger, Record, Sum};

#[derive(Clone, Debug)]
enum Op {
    /// A packet of so many bytes; true: it comes between a seal and the port's part of it.
    Packet(u64, bool),
    Seal,
    Commit(u64),
    Abort(u64),
    Discard,
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        6 => (1u64..2000, any::<bool>()).prop_map(|(bytes, early)| Op::Packet(bytes, early)),
        4 => Just(Op::Seal),
        2 => (0u64..60).prop_map(Op::Commit),
        2 => (0u64..60).prop_map(Op::Abort),
        1 => Just(Op::Discard),
    ]
}

/// A packet: the epoch that was open when it came, its bytes, and when it came.
#[derive(Clone, Copy)]
struct Packet {
    tag: u64,
    bytes: u64,
    at: u64,
}

fn sum<'a>(packets: impl Iterator<Item = &'a Packet>) -> Sum {
    packets.fold(Sum::default(), |s, p| Sum {
        packets: s.packets + 1,
        bytes: s.bytes + p.bytes,
    })
}

proptest! {
    #[test]
    fn counts_every_packet_once(ops in prop::collection::vec(op(), 1..300)) {
        let mut epochs = Epochs::new();
        let mut ledger = Ledger::new(Vec::<Record>::new(), epochs.open());
        let mut packets: Vec<Packet> = Vec::new();
        // Of packets that come early the bytes.
        let mut early: Vec<u64> = Vec::new();
        // What came after the newest sealed epoch belongs to the open one, whatever its tag.
        for (clock, op) in (1u64..).zip(ops) {
            if let Some(room) = ledger.wants_room() {
                ledger.lend(vec![Record::default(); room]);
            }
            match op {
                Op::Packet(bytes, true) => early.push(bytes),
                Op::Packet(bytes, false) => {
                    let of_open = packets.iter().filter(|p| p.tag > epochs.newest()).count();
                    // Which of the two makes no difference to the others.
                    let another = bytes % 2 == 0 && ledger.hold_another(epochs.open(), bytes);
                    let first = !another && ledger.hold(epochs.open(), bytes, || clock);
                    prop_assert_eq!(first, of_open == 0);
                    prop_assert_eq!(another, bytes % 2 == 0 && of_open > 0);
                    packets.push(Packet { tag: epochs.open(), bytes, at: clock });
                }
                Op::Seal => {
                    let newest = epochs.newest();
                    let Ok(sealed) = epochs.seal() else { continue };
                    let model = sum(packets.iter().filter(|p| p.tag > newest));
                    for bytes in early.drain(..) {
                        ledger.hold(epochs.open(), bytes, || clock);
                        packets.push(Packet { tag: epochs.open(), bytes, at: clock });
                    }
                    prop_assert_eq!(ledger.seal(sealed), model);
                }
                Op::Commit(epoch) => {
                    if epochs.commit(epoch).is_ok() {
                        let (gone, kept): (Vec<Packet>, Vec<Packet>) = packets.iter().partition(|p| p.tag <= epoch);
                        let since = gone.first().map(|p| p.at);
                        prop_assert_eq!(ledger.commit(epoch), (sum(gone.iter()), since));
                        packets = kept;
                    }
                }
                Op::Abort(epoch) => {
                    let before = epochs.newest();
                    if epochs.abort(epoch).is_ok() {
                        let newest = epochs.newest();
                        let model = sum(packets.iter().filter(|p| p.tag > newest && p.tag <= before));
                        prop_assert_eq!(ledger.abort(newest), model);
                    }
                }
                Op::Discard => {
                    prop_assert_eq!(ledger.discard(), sum(packets.iter()));
                    packets.clear();
                }
            }
            prop_assert_eq!(ledger.held(), sum(packets.iter()));
        }
    }

    /// Without room nothing is lost, and nothing is counted as committed too early.
    #[test]
    fn without_room_epochs_run_together(sizes in prop::collection::vec(0u64..4, 1..50), commit in 0u64..60) {
        let mut ledger = Ledger::new(vec![Record::default(); 3], 1);
        let mut model = Vec::new();
        for (i, &count) in sizes.iter().enumerate() {
            let epoch = i as u64 + 1;
            for _ in 0..count {
                ledger.hold(epoch, 10, || epoch);
                model.push(Packet { tag: epoch, bytes: 10, at: epoch });
            }
            prop_assert_eq!(ledger.seal(epoch), sum(model.iter().filter(|p| p.tag == epoch)));
        }
        let (gone, _) = ledger.commit(commit);
        prop_assert!(gone.packets <= sum(model.iter().filter(|p| p.tag <= commit)).packets);
        prop_assert_eq!(gone.packets + ledger.held().packets, model.len() as u64);
    }
}
