// SPDX-License-Identifier: GPL-2.0-or-later

//! Files of a host that may die before any write or sync, and of which a loss of power leaves what was
//! synced and any of the sectors that were written since. Space on it may be scarce.

use std::collections::BTreeSet;
use std::io::{self, Error, ErrorKind};
use std::ops::Range;
use std::sync::{Arc, Mutex};

use super::super::image::Image;
use super::super::journal::Journal;
use super::super::medium::Medium;
use super::super::{Durability, Store};
use super::{Content, Random};
use crate::peer::stream::lock;

const SECTOR: usize = 512;
const BLOCK: u64 = 4096;

#[derive(Clone, Default)]
struct Bytes {
    /// What a loss of power leaves for sure.
    safe: Vec<u8>,
    /// What is read.
    seen: Vec<u8>,
    /// Pieces of sectors that were written since a sync.
    since: Vec<(usize, Vec<u8>)>,
    /// Blocks that take space.
    blocks: BTreeSet<u64>,
}

#[derive(Clone, Default)]
struct Host {
    files: Vec<Bytes>,
    /// Writes and syncs until it dies.
    left: Option<u64>,
    /// Blocks that are free, on images; if that is limited.
    free: Option<u64>,
    /// No more space of images can be reserved, whatever is written to.
    full: bool,
}

/// The host: some disks, and the journal as the last file.
pub(crate) struct World {
    host: Arc<Mutex<Host>>,
    disks: Vec<(String, u64)>,
}

struct Handle {
    host: Arc<Mutex<Host>>,
    file: usize,
}

pub(super) const SIZES: [u64; 2] = [16384, 5000];

impl World {
    /// With disks of these sizes, called d0 and so on.
    pub(super) fn new() -> Self {
        let sizes = SIZES.iter().enumerate();
        Self::of(sizes.map(|(n, size)| (format!("d{n}"), *size)).collect())
    }

    /// With these disks, which are all holes.
    pub(crate) fn of(disks: Vec<(String, u64)>) -> Self {
        let mut files = vec![Bytes::default(); disks.len() + 1];
        for (file, (_, size)) in files.iter_mut().zip(&disks) {
            file.safe = vec![0; *size as usize];
            file.seen = file.safe.clone();
        }
        let host = Arc::new(Mutex::new(Host {
            files,
            ..Host::default()
        }));
        let world = Self { host, disks };
        Journal::create(&world.handle(world.disks.len()), &world.disks).unwrap();
        world
    }

    /// Another one that is the same.
    pub(super) fn copy(&self) -> Self {
        Self {
            host: Arc::new(Mutex::new(lock(&self.host).clone())),
            disks: self.disks.clone(),
        }
    }

    fn handle(&self, file: usize) -> Handle {
        Handle {
            host: self.host.clone(),
            file,
        }
    }

    pub(crate) fn open(&self, durability: Durability, bound: u64) -> anyhow::Result<Store> {
        let image = |(n, (name, size)): (usize, (String, u64))| Image {
            name,
            size,
            medium: Box::new(self.handle(n)),
            _export: None,
        };
        let images = self.disks.clone().into_iter().enumerate().map(image);
        let images = images.collect();
        let journal = Box::new(self.handle(self.disks.len()));
        let journal = Journal::open(journal, "guest.journal".into(), &self.disks)?;
        Store::recover(images, journal, durability, bound)
    }

    /// It dies after so many more writes and syncs.
    pub(super) fn die_after(&self, left: Option<u64>) {
        lock(&self.host).left = left;
    }

    pub(super) fn dead(&self) -> bool {
        lock(&self.host).left == Some(0)
    }

    /// So many blocks of images are free.
    pub(crate) fn set_free(&self, blocks: u64) {
        lock(&self.host).free = Some(blocks);
    }

    /// Other programs take all space that is not reserved, and nothing can be written over in its place.
    pub(crate) fn fill(&self) {
        lock(&self.host).full = true;
    }

    /// The power fails, and is back.
    pub(super) fn lose_power(&self, random: &mut Random) {
        // Also those where nearly all, or nearly nothing, was written.
        let kept = [1, 8, 15][random.below(3) as usize];
        for file in &mut lock(&self.host).files {
            for (at, data) in std::mem::take(&mut file.since) {
                if random.below(16) < kept {
                    let end = at + data.len();
                    if file.safe.len() < end {
                        file.safe.resize(end, 0);
                    }
                    file.safe[at..end].copy_from_slice(&data);
                }
            }
            file.seen = file.safe.clone();
        }
    }

    /// What the images hold.
    pub(super) fn content(&self) -> Content {
        let host = lock(&self.host);
        let images = host.files[..self.disks.len()].iter();
        images.map(|file| file.seen.clone()).collect()
    }

    /// That nothing in the images is to be lost.
    pub(super) fn synced(&self) -> bool {
        let host = lock(&self.host);
        let mut images = host.files[..self.disks.len()].iter();
        images.all(|f| f.since.is_empty())
    }

    /// The journal's bytes, to be looked at or damaged.
    pub(super) fn journal<T>(&self, with: impl FnOnce(&mut [u8]) -> T) -> T {
        with(&mut lock(&self.host).files[self.disks.len()].seen)
    }
}

impl Handle {
    fn with<T>(&self, what: impl FnOnce(&mut Bytes, &mut Option<u64>) -> T) -> io::Result<T> {
        let mut host = lock(&self.host);
        match &mut host.left {
            Some(0) => return Err(Error::other("the host is dead")),
            Some(left) => {
                *left -= 1;
                if *left == 0 {
                    return Err(Error::other("the host dies"));
                }
            }
            None => {}
        }
        let Host { files, free, .. } = &mut *host;
        let mut unlimited = None;
        let free = match self.file < files.len() - 1 {
            true => free,
            false => &mut unlimited,
        };
        Ok(what(&mut files[self.file], free))
    }

    fn take(file: &mut Bytes, free: &mut Option<u64>, range: Range<u64>) -> io::Result<()> {
        if let Some(free) = free {
            for block in range.start / BLOCK..range.end.div_ceil(BLOCK) {
                if !file.blocks.contains(&block) {
                    *free = free.checked_sub(1).ok_or(ErrorKind::StorageFull)?;
                    file.blocks.insert(block);
                }
            }
        }
        Ok(())
    }

    fn put(file: &mut Bytes, data: &[u8], mut at: usize) {
        let end = at + data.len();
        if file.seen.len() < end {
            file.seen.resize(end, 0);
        }
        file.seen[at..end].copy_from_slice(data);
        let mut data = data;
        while !data.is_empty() {
            let length = (SECTOR - at % SECTOR).min(data.len());
            let (piece, rest) = data.split_at(length);
            file.since.push((at, piece.to_vec()));
            (data, at) = (rest, at + length);
        }
    }
}

impl Medium for Handle {
    fn read(&self, to: &mut [u8], at: u64) -> io::Result<()> {
        let host = lock(&self.host);
        let at = at as usize;
        let from = host.files[self.file].seen.get(at..at + to.len());
        to.copy_from_slice(from.ok_or(ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn write(&self, data: &[u8], at: u64) -> io::Result<()> {
        self.with(|file, free| {
            Self::take(file, free, at..at + data.len() as u64)?;
            Self::put(file, data, at as usize);
            Ok(())
        })?
    }

    fn clear(&self, range: Range<u64>) -> io::Result<()> {
        self.with(|file, free| {
            for block in range.start.div_ceil(BLOCK)..range.end / BLOCK {
                if let (true, Some(free)) = (file.blocks.remove(&block), &mut *free) {
                    *free += 1;
                }
            }
            let zeros = vec![0; (range.end - range.start) as usize];
            Self::put(file, &zeros, range.start as usize);
        })
    }

    fn reserve(&self, range: Range<u64>, _: u64) -> io::Result<()> {
        if lock(&self.host).full {
            return Err(ErrorKind::StorageFull.into());
        }
        self.with(|file, free| Self::take(file, free, range))?
    }

    fn data(&self, at: u64) -> io::Result<Option<Range<u64>>> {
        Ok(Some(at..u64::MAX))
    }

    fn sync(&self) -> io::Result<()> {
        self.with(|file, _| {
            file.safe.clone_from(&file.seen);
            file.since.clear();
        })
    }
}
