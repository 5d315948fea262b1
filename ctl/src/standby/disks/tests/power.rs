// SPDX-License-Identifier: GPL-2.0-or-later

//! The process or the power may fail before any write or sync, again and again: the images are of one
//! whole epoch, and not of one before the newest that was promised.

use std::collections::BTreeMap;

use anyhow::Result;
use proptest::prelude::*;

use super::super::{Durability, Stamp, Store};
use super::damage::died;
use super::model::{World, SIZES};
use super::{changes, Content, Random};

const BOUND: u64 = 8192;
const RUN: u128 = 7;

#[derive(Clone, Debug)]
enum Step {
    /// Changes of an epoch; 0 is none.
    Stage(u8),
    Seal,
    /// Up to the newest or, if not so, the oldest that is sealed.
    Apply(bool),
    Discard,
    /// A first copy with so many frames of it, then a seal.
    Copy(u8),
    Reopen,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (0u8..6).prop_map(Step::Stage),
        8 => Just(Step::Seal),
        8 => any::<bool>().prop_map(Step::Apply),
        1 => Just(Step::Discard),
        1 => (0u8..4).prop_map(Step::Copy),
        1 => Just(Step::Reopen),
    ]
}

/// What should be.
struct Truth {
    durability: Durability,
    random: Random,
    /// What the disks hold after each epoch that may be in the images.
    epochs: BTreeMap<u64, Content>,
    /// With what is in the open epoch.
    open: Content,
    /// The newest epoch that was asked to be sealed, of any time.
    newest: u64,
    /// The newest that is sealed, and that is applied, after what was discarded.
    sealed: u64,
    applied: u64,
    /// What must not be lost; nothing before the images are whole.
    floor: Option<u64>,
    /// A first copy was begun, and nothing of an earlier epoch may be taken for whole.
    copying: bool,
}

impl Truth {
    fn promise(&mut self, epoch: u64, how: Durability) {
        if self.durability == how {
            self.floor = self.floor.max(Some(epoch));
        }
    }

    fn seal(&mut self, store: &Store) -> Result<()> {
        self.newest += 1;
        self.epochs.insert(self.newest, self.open.clone());
        store.seal(self.newest)?;
        self.sealed = self.newest;
        self.promise(self.newest, Durability::Disk);
        Ok(())
    }

    fn step(&mut self, store: &Store, step: &Step) -> Result<()> {
        match step {
            Step::Stage(count) => {
                let changed = &mut self.open.clone();
                let payload = changes(&mut self.random, changed, (*count).into(), 3000);
                if *count > 0 && store.held() + (payload.len() as u64) < BOUND {
                    store.stage(payload)?;
                    self.open.clone_from(changed);
                }
            }
            Step::Seal if self.copying || !self.epochs.is_empty() => self.seal(store)?,
            Step::Apply(all) if self.sealed > self.applied => {
                let mut waiting = self.epochs.range(self.applied + 1..=self.sealed);
                let oldest = waiting.next().map_or(self.sealed, |(epoch, _)| *epoch);
                let to = if *all { self.sealed } else { oldest };
                store.apply(to)?;
                self.applied = to;
                self.copying = false;
                self.promise(to, Durability::Memory);
                assert_eq!(store.whole().map(|stamp| stamp.epoch), Some(to));
            }
            Step::Discard => {
                // It may be gone as soon as this begins.
                let whole = store.whole().map(|stamp| stamp.epoch);
                self.floor = self.floor.min(whole);
                store.discard()?;
                self.restart(whole);
            }
            Step::Copy(frames) => {
                self.floor = None;
                store.begin_copy(RUN, 1)?;
                self.copying = true;
                self.epochs.clear();
                (self.sealed, self.applied) = (0, 0);
                for _ in 0..*frames {
                    store.copy(&changes(&mut self.random, &mut self.open, 3, 3000))?;
                }
                // What was not copied has to be: what the images hold is not known.
                for (disk, data) in self.open.clone().iter().enumerate() {
                    store.copy(&whole_disk(disk, data))?;
                }
                assert_eq!(store.whole(), None);
                self.seal(store)?;
            }
            Step::Seal | Step::Apply(_) | Step::Reopen => {}
        }
        Ok(())
    }

    /// Goes on from what the images are of.
    fn restart(&mut self, whole: Option<u64>) {
        if whole.is_none() {
            self.copying = false;
            self.epochs.clear();
        }
        let epoch = whole.unwrap_or(0);
        (self.sealed, self.applied) = (epoch, epoch);
        self.epochs.retain(|number, _| *number <= epoch);
        if let Some(content) = self.epochs.get(&epoch) {
            self.open.clone_from(content);
        }
    }

    /// Looks at what was opened after a crash.
    fn verify(&mut self, world: &World, store: &Store) {
        assert!(world.synced());
        let Some(Stamp { run, epoch, .. }) = store.whole() else {
            assert_eq!(self.floor, None, "what was promised is lost");
            self.restart(None);
            return;
        };
        assert_eq!(run, RUN);
        let content = world.content();
        let want = self.epochs.get(&epoch).expect("an epoch that is none");
        assert!(content == *want, "the images are not of epoch {epoch}");
        if let Some(floor) = self.floor {
            // One that changed nothing may be taken for the one before.
            let kept = epoch >= floor || self.epochs[&floor] == content;
            assert!(kept, "epoch {floor} was promised, {epoch} is there");
        }
        self.copying = false;
        self.floor = Some(epoch);
        self.restart(Some(epoch));
    }
}

fn whole_disk(disk: usize, data: &[u8]) -> Vec<u8> {
    let mut payload = Vec::new();
    remus_proto::disk::Record {
        disk: disk as u16,
        offset: 0,
        change: remus_proto::disk::Change::Write(data),
    }
    .encode(&mut payload);
    payload
}

/// Does the steps, with a crash after each number of writes and syncs.
fn run(durability: Durability, seed: u64, steps: &[Step], crashes: &[u16]) {
    let world = World::new();
    let mut crashes = crashes.iter().map(|n| u64::from(*n) + 1);
    let mut truth = Truth {
        durability,
        random: Random::new(seed),
        epochs: BTreeMap::new(),
        open: SIZES.iter().map(|size| vec![0; *size as usize]).collect(),
        newest: 0,
        sealed: 0,
        applied: 0,
        floor: None,
        copying: false,
    };
    let mut store = world.open(durability, BOUND).unwrap();
    world.die_after(crashes.next());
    let first = [Step::Copy(2), Step::Apply(true)];
    for step in first.iter().chain(steps) {
        let done = truth.step(&store, step);
        if done.is_ok() && !matches!(step, Step::Reopen) {
            continue;
        }
        assert!(done.is_ok() || world.dead(), "{step:?}: {done:?}");
        drop(store);
        // Opening it can be cut short, too.
        store = loop {
            if world.dead() {
                if truth.random.below(3) > 0 {
                    world.lose_power(&mut truth.random);
                }
                world.die_after(crashes.next());
            }
            match world.open(durability, BOUND) {
                Ok(store) => break store,
                Err(e) => assert!(world.dead(), "{e:#}"),
            }
        };
        truth.verify(&world, &store);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]
    #[test]
    fn one_whole_epoch(
        disk: bool,
        seed: u64,
        steps in proptest::collection::vec(step(), 1..120),
        // Some while what the one before has left is being repaired.
        crashes in proptest::collection::vec(prop_oneof![0u16..15, 0u16..120], 0..60),
    ) {
        let durability = if disk { Durability::Disk } else { Durability::Memory };
        run(durability, seed, &steps, &crashes);
    }
}

/// The process is killed, and then the power fails while what that has left is being repaired.
#[test]
fn while_it_is_repaired() {
    let mut random = Random::new(6);
    for durability in [Durability::Memory, Durability::Disk] {
        for after in 1..70 {
            let (killed, epochs) = died(durability, after);
            for second in 1..30 {
                let world = killed.copy();
                world.die_after(Some(second));
                let _ = world.open(durability, BOUND);
                world.die_after(None);
                world.lose_power(&mut random);
                let store = world.open(durability, BOUND).unwrap();
                if let Some(stamp) = store.whole() {
                    let torn = world.content() != epochs[&stamp.epoch];
                    assert!(!torn, "{after} and {second}: not of epoch {}", stamp.epoch);
                }
            }
        }
    }
}
