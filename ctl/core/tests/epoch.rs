// SPDX-License-Identifier: GPL-2.0-or-later

//! The epoch state machine against a model that keeps every epoch's fate in a list.

#![allow(clippy::unwrap_used)]

use proptest::prelude::*;
use remus_core::epoch::{Epochs, Refused, MAX_RUNS};

#[derive(Clone, Copy, Debug, PartialEq)]
enum Fate {
    Open,
    Sealed,
    Committed,
    Aborted,
}

/// Fate of epoch `i + 1` at `i`; packets by the epoch in which they came.
#[derive(Clone, Debug)]
struct Model {
    fates: Vec<Fate>,
    /// Tag of each packet, and the epoch that it belongs to now.
    packets: Vec<(u64, u64)>,
}

#[derive(Clone, Debug)]
enum Op {
    Seal,
    Commit(u64),
    Abort(u64),
    Packet,
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        4 => Just(Op::Seal),
        2 => (0u64..40).prop_map(Op::Commit),
        2 => (0u64..40).prop_map(Op::Abort),
        3 => Just(Op::Packet),
    ]
}

impl Model {
    fn open(&self) -> u64 {
        self.fates.len() as u64
    }

    fn refused(&self, epoch: u64) -> Option<Refused> {
        if epoch == 0 {
            return Some(Refused::Zero);
        }
        match self.fates.get(epoch as usize - 1) {
            None => Some(Refused::Future),
            Some(Fate::Open) => Some(Refused::Open),
            Some(Fate::Sealed) => None,
            // An epoch that was aborted and lies below a committed one is done with as well.
            Some(Fate::Committed) => Some(Refused::Committed),
            Some(Fate::Aborted) if epoch <= self.committed() => Some(Refused::Committed),
            Some(Fate::Aborted) => Some(Refused::Aborted),
        }
    }

    fn committed(&self) -> u64 {
        self.fates
            .iter()
            .rposition(|f| *f == Fate::Committed)
            .map_or(0, |i| i as u64 + 1)
    }

    fn sealed(&self) -> u64 {
        self.fates.iter().filter(|f| **f == Fate::Sealed).count() as u64
    }

    /// Groups of sealed epochs without a gap in their numbers.
    fn runs(&self) -> usize {
        let sealed = |f: &Fate| *f == Fate::Sealed;
        let starts = self
            .fates
            .windows(2)
            .filter(|w| !sealed(&w[0]) && sealed(&w[1]))
            .count();
        starts + usize::from(self.fates.first().is_some_and(sealed))
    }

    fn can_seal(&self) -> bool {
        self.runs() < MAX_RUNS
            || self
                .fates
                .len()
                .checked_sub(2)
                .is_some_and(|i| self.fates[i] == Fate::Sealed)
    }

    fn set(&mut self, which: impl Fn(u64) -> bool, fate: Fate) {
        for (i, f) in self.fates.iter_mut().enumerate() {
            if *f == Fate::Sealed && which(i as u64 + 1) {
                *f = fate;
            }
        }
    }
}

fn run(ops: &[Op]) -> Result<(), TestCaseError> {
    let mut real = Epochs::new();
    let mut model = Model {
        fates: vec![Fate::Open],
        packets: Vec::new(),
    };
    for op in ops {
        let open = model.open();
        match op {
            Op::Packet => model.packets.push((open, open)),
            Op::Seal => {
                let result = real.seal();
                if model.can_seal() {
                    prop_assert_eq!(result, Ok(open));
                    model.fates[open as usize - 1] = Fate::Sealed;
                    model.fates.push(Fate::Open);
                } else {
                    prop_assert_eq!(result, Err(Refused::TooManyGaps));
                }
            }
            Op::Commit(epoch) => {
                let refused = model.refused(*epoch);
                prop_assert_eq!(real.check_sealed(*epoch).err(), refused);
                prop_assert_eq!(real.commit(*epoch).err(), refused);
                if refused.is_none() {
                    model.set(|e| e <= *epoch, Fate::Committed);
                }
            }
            Op::Abort(epoch) => {
                let refused = model.refused(*epoch);
                prop_assert_eq!(real.abort(*epoch).err(), refused);
                if refused.is_none() {
                    let folded: Vec<u64> = (*epoch..open)
                        .filter(|e| model.fates[*e as usize - 1] == Fate::Sealed)
                        .collect();
                    for packet in &mut model.packets {
                        if folded.contains(&packet.1) {
                            packet.1 = open;
                        }
                    }
                    model.set(|e| e >= *epoch, Fate::Aborted);
                }
            }
        }
        prop_assert_eq!(real.open(), model.open());
        prop_assert_eq!(real.committed(), model.committed());
        prop_assert_eq!(real.sealed(), model.sealed());
        for epoch in 0..model.open() + 2 {
            prop_assert_eq!(real.check_sealed(epoch).err(), model.refused(epoch));
        }
        // S1: a packet may go when the epoch that it belongs to is committed. The module only compares
        // the tag of its arrival with the newest committed epoch: never may that release too much.
        for (tag, belongs) in &model.packets {
            let may_go = model.fates[*belongs as usize - 1] == Fate::Committed;
            prop_assert_eq!(
                *tag <= real.committed(),
                may_go,
                "tag {}, belongs {}",
                tag,
                belongs
            );
            // What an abort counts as taken back.
            prop_assert_eq!(*tag > real.newest(), *belongs == real.open());
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]
    #[test]
    fn like_the_model(ops in proptest::collection::vec(op(), 0..120)) {
        run(&ops)?;
    }
}

/// Every sequence of up to five steps on small numbers.
#[test]
fn all_short_histories() {
    let choices: Vec<Op> = [Op::Seal, Op::Packet]
        .into_iter()
        .chain((1..4).flat_map(|e| [Op::Commit(e), Op::Abort(e)]))
        .collect();
    let mut history = Vec::new();
    fn go(history: &mut Vec<Op>, choices: &[Op], left: usize) {
        run(history).unwrap();
        if left > 0 {
            for op in choices {
                history.push(op.clone());
                go(history, choices, left - 1);
                history.pop();
            }
        }
    }
    go(&mut history, &choices, 5);
}

/// More gaps than are remembered: refused, and nothing lost.
#[test]
fn too_many_gaps() {
    let mut ops = Vec::new();
    for i in 0..MAX_RUNS as u64 + 3 {
        // Seals two and takes back the second: 1, 3, 5 … stay sealed.
        ops.extend([Op::Seal, Op::Seal, Op::Abort(2 * i + 2)]);
    }
    ops.extend([Op::Commit(5), Op::Seal, Op::Seal]);
    run(&ops).unwrap();
}
