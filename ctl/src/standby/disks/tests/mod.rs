// SPDX-License-Identifier: GPL-2.0-or-later

#![allow(clippy::unwrap_used, clippy::panic)]

mod crashes;
mod damage;
pub(crate) mod model;
mod power;
mod qemu;
mod space;
mod store;

use std::fs::File;
use std::path::Path;

use remus_proto::disk::{Change, Record};

use super::{Format, Spec};

/// xorshift64*: the same everywhere from the same seed.
pub(super) struct Random(u64);

impl Random {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(super) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 8
    }

    pub(super) fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}

/// The bytes of all disks.
pub(super) type Content = Vec<Vec<u8>>;

/// A payload of `count` changes of at most `most` bytes each, which are also done to `content`.
pub(super) fn changes(
    random: &mut Random,
    content: &mut Content,
    count: u64,
    most: u64,
) -> Vec<u8> {
    let mut payload = Vec::new();
    for _ in 0..count {
        let disk = random.below(content.len() as u64) as usize;
        let size = content[disk].len() as u64;
        let offset = random.below(size);
        let length = 1 + random.below(most.min(size - offset));
        let range = offset as usize..(offset + length) as usize;
        let data: Vec<u8> = range.clone().map(|_| random.next() as u8).collect();
        let change = match random.below(6) {
            0 => Change::Zero(length as u32),
            1 => Change::Discard(length as u32),
            _ => Change::Write(&data),
        };
        match change {
            Change::Write(data) => content[disk][range].copy_from_slice(data),
            _ => content[disk][range].fill(0),
        }
        let record = Record {
            disk: disk as u16,
            offset,
            change,
        };
        record.encode(&mut payload);
    }
    payload
}

/// Raw images of these sizes in a folder, all holes.
pub(super) fn raw(folder: &Path, sizes: &[u64]) -> Vec<Spec> {
    let specs = sizes.iter().enumerate().map(|(n, size)| {
        let path = folder.join(format!("{n}.img"));
        File::create(&path).unwrap().set_len(*size).unwrap();
        Spec {
            name: format!("d{n}"),
            path,
            format: Format::Raw,
        }
    });
    specs.collect()
}

/// What the images hold, read as any file.
pub(super) fn read(specs: &[Spec]) -> Content {
    let all = specs.iter().map(|spec| std::fs::read(&spec.path).unwrap());
    all.collect()
}
