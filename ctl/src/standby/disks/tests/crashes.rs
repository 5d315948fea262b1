// SPDX-License-Identifier: GPL-2.0-or-later

//! A process that applies epochs as fast as it can is killed 200 times. What the images hold after each
//! is exactly one epoch.

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc::sync_channel;
use std::thread;

use ring::digest::{digest, SHA256};

use super::super::{Durability, Spec, Store};
use super::{changes, raw, read, Content, Random};

const SIZES: [u64; 3] = [262_144, 100_000, 66_048];
/// Small, so that the journal often begins at its start again.
const BOUND: u64 = 32 << 10;
const KILLS: usize = 200;

/// The sums of all disks, as text.
fn sums(content: &Content) -> String {
    let sums = content.iter().flat_map(|disk| {
        let digest = digest(&SHA256, disk);
        digest.as_ref().to_vec()
    });
    sums.map(|byte| format!("{byte:02x}")).collect()
}

fn open(specs: &[Spec], durability: Durability) -> Store {
    let journal = specs[0].path.with_extension("journal");
    Store::open(specs, &journal, durability, BOUND).unwrap()
}

fn specs(folder: &Path) -> Vec<Spec> {
    let specs = (0..SIZES.len()).map(|n| Spec {
        name: format!("d{n}"),
        path: folder.join(format!("{n}.img")),
        format: super::Format::Raw,
    });
    specs.collect()
}

/// The process that is killed. It writes the sums of an epoch to a file before it seals it, and prints
/// the epoch when it is promised.
#[test]
#[ignore = "a part of two_hundred_crashes"]
fn applies_until_killed() {
    let Ok(folder) = std::env::var("REMUS_TEST_DISKS") else {
        return;
    };
    let seed = std::env::var("REMUS_SEED").unwrap().parse().unwrap();
    let durability = match std::env::var("REMUS_TEST_DURABILITY").unwrap().as_str() {
        "disk" => Durability::Disk,
        _ => Durability::Memory,
    };
    let specs = specs(folder.as_ref());
    let store = open(&specs, durability);
    let mut random = Random::new(seed);
    let mut content = read(&specs);
    let mut epoch = store.whole().map_or(0, |stamp| stamp.epoch);
    let mut record = OpenOptions::new()
        .append(true)
        .open(Path::new(&folder).join("epochs"))
        .unwrap();
    println!("\nopened");
    if store.whole().is_none() {
        store.begin_copy(1, 1).unwrap();
        store
            .copy(&changes(&mut random, &mut content, 9, 9000))
            .unwrap();
    }
    let say = |epoch: u64, when: Durability| {
        if durability == when {
            println!("\nheld {epoch}");
        }
    };
    let (store, (sealed, to_apply)) = (&store, sync_channel(1));
    thread::scope(|scope| {
        scope.spawn(move || {
            for epoch in to_apply {
                store.apply(epoch).unwrap();
                say(epoch, Durability::Memory);
            }
        });
        loop {
            epoch += 1;
            for _ in 0..random.below(4) {
                store
                    .stage(changes(&mut random, &mut content, 3, 2000))
                    .unwrap();
            }
            let line = format!("{epoch} {}\n", sums(&content));
            record.write_all(line.as_bytes()).unwrap();
            store.seal(epoch).unwrap();
            say(epoch, Durability::Disk);
            sealed.send(epoch).unwrap();
        }
    });
}

/// Kills it so often; returns how many epochs there were.
fn kill(durability: Durability, kills: usize) -> u64 {
    let folder = tempfile::tempdir().unwrap();
    raw(folder.path(), &SIZES);
    let specs = specs(folder.path());
    let record = folder.path().join("epochs");
    fs::write(&record, "").unwrap();
    let mut random = Random::new(durability as u64 + 5);
    let mut last = 0;
    for round in 0..kills {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "standby::disks::tests::crashes::applies_until_killed",
            ])
            .args(["--ignored", "--nocapture"])
            .env("REMUS_TEST_DISKS", folder.path())
            .env("REMUS_SEED", random.next().to_string())
            .env(
                "REMUS_TEST_DURABILITY",
                format!("{durability:?}").to_lowercase(),
            )
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut held = 0;
        let mut hear = |line: String| {
            if let Some(epoch) = line.strip_prefix("held ") {
                held = epoch.parse().unwrap();
            }
            line
        };
        // Some die while they open the images or make the first copy.
        let patience = random.below(60);
        let mut heard = 0;
        while heard < patience {
            let line = lines.next().expect("it ended by itself").unwrap();
            if !hear(line).is_empty() {
                heard += 1;
            }
        }
        for _ in 0..random.below(20_000) {
            std::hint::spin_loop();
        }
        child.kill().unwrap();
        child.wait().unwrap();
        lines.for_each(|line| drop(line.map(&mut hear)));

        let store = open(&specs, durability);
        let text = fs::read_to_string(&record).unwrap();
        let epochs: BTreeMap<u64, &str> = text
            .lines()
            .filter_map(|line| line.split_once(' '))
            .map(|(epoch, sums)| (epoch.parse().unwrap(), sums))
            .collect();
        match store.whole() {
            Some(stamp) => {
                assert_eq!(epochs[&stamp.epoch], sums(&read(&specs)), "round {round}");
                let floor = if held > 0 { held } else { last };
                let kept = stamp.epoch >= floor || epochs[&floor] == epochs[&stamp.epoch];
                assert!(kept, "round {round}: {floor} was held, {stamp:?} is there");
                last = stamp.epoch;
            }
            None => assert_eq!((held, last), (0, 0), "round {round}"),
        }
        if round % 3 == 0 {
            store.close().unwrap();
        }
    }
    last
}

#[test]
fn two_hundred_crashes() {
    let epochs = thread::scope(|scope| {
        let memory = scope.spawn(|| kill(Durability::Memory, KILLS / 2));
        [kill(Durability::Disk, KILLS / 2), memory.join().unwrap()]
    });
    // Enough that the journal went round.
    assert!(epochs.iter().all(|n| *n > 500), "{epochs:?}");
}
