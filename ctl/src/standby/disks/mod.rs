// SPDX-License-Identifier: GPL-2.0-or-later

//! The guest's disks on the standby: changes are staged, sealed with their epoch, and applied to the
//! images so that these are always, whatever crashes, exactly those of one whole epoch.
//!
//! ```text
//!  stage, stage, … seal N         apply N: journal, sync, images
//!  ─────▶ open epoch ─────▶ sealed ─────▶ page cache of the images ─────▶ now and then: sync, and
//!                                                                    the journal leaves out what is there
//! ```
//!
//! | durability | a sealed epoch is | it is in the journal, synced, from |
//! |---|---|---|
//! | memory | in memory | `apply` on |
//! | disk | in memory and in the journal | `seal` on |
//!
//! A first copy is written to the images at once. From `begin_copy` on the journal says that they are
//! not whole, until the epoch of the first seal after it is in the journal: before its record is written
//! the images are synced, so that they are whole as soon as it can be read.
//!
//! One thread may stage and seal while another applies. Locks are taken in the order of the fields of
//! [`Store`].

mod changes;
mod header;
mod image;
mod journal;
mod lock;
mod medium;
mod qcow2;
mod space;
mod sums;

#[cfg(test)]
pub(crate) mod tests;

use std::collections::VecDeque;
use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use anyhow::{anyhow, bail, Context, Result};
use remus_proto::disk::{Sums, DISKS_MAX};
use rustix::fs::{flock, FlockOperation};

use self::header::Content;
use self::image::Image;
use self::journal::Journal;
use self::medium::Plain;
use self::space::Promises;
pub use crate::config::disk::{Durability, Format};
use crate::peer::stream::lock;

/// The journal leaves out what was applied when that takes more than this.
const LIMIT: u64 = 64 << 20;
/// Room in the journal for what records take beside changes.
const SLACK: u64 = 64 << 10;

/// A disk of the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spec {
    /// Its name, at most [`NAME_MAX`](remus_core::uapi::NAME_MAX) bytes.
    pub name: String,
    /// The image.
    pub path: PathBuf,
    /// How that is written.
    pub format: Format,
}

/// What images are of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stamp {
    /// The primary's run.
    pub run: u128,
    /// The domain's generation.
    pub generation: u64,
    /// The epoch.
    pub epoch: u64,
}

/// An epoch that is sealed and not applied.
#[derive(Clone)]
struct Sealed {
    epoch: u64,
    payloads: Arc<Vec<Vec<u8>>>,
    bytes: u64,
}

struct State {
    content: Content,
    open: Vec<Vec<u8>>,
    sealed: VecDeque<Sealed>,
    /// Bytes of all payloads.
    held: u64,
    /// The newest epoch that was sealed.
    newest: u64,
    /// Why nothing can go on: what was written last may be there or not.
    broken: Option<String>,
}

/// The images of a guest's disks and their journal.
pub struct Store {
    images: Vec<Image>,
    disks: Vec<(String, u64)>,
    durability: Durability,
    bound: u64,
    /// Held while what images hold is changed.
    writing: Mutex<()>,
    /// Held while it is changed what is sealed.
    sealing: Mutex<()>,
    promises: Mutex<Promises>,
    journal: Mutex<Journal>,
    state: Mutex<State>,
    changed: Condvar,
}

impl Store {
    /// Opens and locks the images, and the journal, which is created if it is missing; what a crash has
    /// left in it is written to the images. `bound` is how many bytes the primary may hold back
    /// (`disk_buffer`): twice that is accepted, as what is counted there may be less by the heads of
    /// records and by the change that was let in last.
    ///
    /// A qcow2 image can be used until the thread that called this ends.
    ///
    /// Fails if an image is missing or in use, or if the journal is damaged or of other disks.
    pub fn open(
        specs: &[Spec],
        journal: &Path,
        durability: Durability,
        bound: u64,
    ) -> Result<Self> {
        if specs.len() > DISKS_MAX {
            bail!(
                "a guest can have {DISKS_MAX} disks, this one has {}",
                specs.len()
            );
        }
        let images = specs
            .iter()
            .enumerate()
            .map(|(n, spec)| Image::open(spec, &beside(journal, &format!(".disk{n}"))))
            .collect::<Result<Vec<_>>>()?;
        let disks = disks(&images);
        if !journal.exists() {
            create(journal, &disks)?;
        }
        let name = journal.display().to_string();
        let medium = open(journal, false).with_context(|| format!("cannot open {name}"))?;
        if flock(&medium.file, FlockOperation::NonBlockingLockExclusive).is_err() {
            bail!("the journal {name} is in use by another standby: give this guest its own");
        }
        let journal = Journal::open(Box::new(medium), name, &disks)?;
        Self::recover(images, journal, durability, bound)
    }

    /// Brings the images to the newest epoch in the journal.
    fn recover(
        images: Vec<Image>,
        mut journal: Journal,
        durability: Durability,
        bound: u64,
    ) -> Result<Self> {
        let disks = disks(&images);
        let mut content = journal.content();
        let promises = Mutex::default();
        if let Content::Copying(stamp) | Content::Whole(stamp) = content {
            for record in journal.scan()? {
                let payload = journal.payload(&record)?;
                changes::check(&payload, &disks)?;
                changes::write(&payload, &images, &promises)?;
                content = Content::Whole(Stamp {
                    epoch: record.epoch,
                    ..stamp
                });
            }
        }
        // Of a first copy that was cut off, the primary knows what it sent, but not what is here.
        if let Content::Copying(_) = content {
            content = Content::Unknown;
        }
        for image in &images {
            image.sync()?;
        }
        journal.renew(2 * bound + LIMIT.min(bound) + SLACK, content)?;
        let newest = whole(content).map_or(0, |stamp| stamp.epoch);
        Ok(Self {
            images,
            disks,
            durability,
            bound,
            writing: Mutex::default(),
            sealing: Mutex::default(),
            promises,
            journal: Mutex::new(journal),
            state: Mutex::new(State {
                content,
                open: Vec::new(),
                sealed: VecDeque::new(),
                held: 0,
                newest,
                broken: None,
            }),
            changed: Condvar::new(),
        })
    }

    /// Name and size in bytes of each disk.
    #[cfg(test)]
    pub fn sizes(&self) -> Vec<(String, u64)> {
        self.disks.clone()
    }

    /// Fails unless the primary has the same disks in the same order.
    pub fn check(&self, primary: &[(String, u64)]) -> Result<()> {
        let names = |disks: &[(String, u64)]| {
            let names: Vec<_> = disks.iter().map(|(name, _)| name.clone()).collect();
            names.join(", ")
        };
        if names(primary) != names(&self.disks) {
            bail!(
                "the primary protects the disks [{}], the standby has [{}]: list the same [[disk]] in \
                 the same order in both configurations",
                names(primary),
                names(&self.disks)
            );
        }
        for ((name, here), (_, there)) in self.disks.iter().zip(primary) {
            if here != there {
                bail!(
                    "the disk {name} has {there} bytes on the primary and {here} on the standby: delete the \
                     standby's image and journal, and create an image of the primary's size \
                     (qemu-img create -f FORMAT PATH {there})"
                );
            }
        }
        Ok(())
    }

    /// What the images are of; nothing while a first copy is under way or if none was ever whole.
    pub fn whole(&self) -> Option<Stamp> {
        whole(lock(&self.state).content)
    }

    /// Hands the sums of all disks to `send`, as many as fit into a frame at a time. Meant for when
    /// nothing is applied.
    pub fn sums(&self, send: &mut dyn FnMut(Sums) -> Result<()>) -> Result<()> {
        let mut images = (0..).zip(&self.images);
        images.try_for_each(|(disk, image)| sums::send(image, disk, send))
    }

    /// The sum of all of each disk.
    #[cfg(test)]
    pub fn checksum(&self) -> Result<Vec<sums::Whole>> {
        let _writing = lock(&self.writing);
        self.images.iter().map(sums::whole).collect()
    }

    /// A first copy comes. What is held is thrown away; a crash from now on leaves images that are not
    /// whole.
    pub fn begin_copy(&self, run: u128, generation: u64) -> Result<()> {
        let _writing = lock(&self.writing);
        let _sealing = lock(&self.sealing);
        let content = Content::Copying(Stamp {
            run,
            generation,
            epoch: 0,
        });
        lock(&self.promises).clear();
        let mut journal = lock(&self.journal);
        let mut state = self.state()?;
        state.content = content;
        state.clear();
        drop(state);
        self.vital(journal.forget(content))
    }

    /// Fails unless all changes are within the disks.
    pub fn check_changes(&self, payload: &[u8]) -> Result<()> {
        changes::check(payload, &self.disks)
    }

    /// Writes changes of a first copy at once.
    pub fn copy(&self, payload: &[u8]) -> Result<()> {
        self.check_changes(payload)?;
        let _writing = lock(&self.writing);
        let state = self.state()?;
        if !matches!(state.content, Content::Copying(_)) || !state.sealed.is_empty() {
            bail!("the primary sends a first copy that it has not begun");
        }
        drop(state);
        changes::write(payload, &self.images, &self.promises)
    }

    /// Adds changes to the open epoch. Fails, and keeps nothing of them, unless all are within the disks.
    pub fn stage(&self, payload: Vec<u8>) -> Result<()> {
        self.check_changes(&payload)?;
        let mut state = self.state()?;
        if payload.is_empty() {
            bail!("it sends changes that are none");
        }
        let held = state.held + payload.len() as u64;
        if held > 2 * self.bound {
            bail!(
                "{held} bytes of changes wait here: disk_buffer is less than on the primary, give both \
                 the same"
            );
        }
        state.held = held;
        state.open.push(payload);
        Ok(())
    }

    /// Seals the open epoch, which is this one. On return it is held as durability says, and there is
    /// space for all that it writes. Fails for want of space; then the epoch is still open.
    pub fn seal(&self, epoch: u64) -> Result<()> {
        let _sealing = lock(&self.sealing);
        let mut state = self.state()?;
        if epoch <= state.newest {
            bail!(
                "epoch {epoch} of the disks comes after epoch {}",
                state.newest
            );
        }
        if state.content == Content::Unknown {
            bail!("epoch {epoch} of the disks comes without a first copy");
        }
        let payloads = std::mem::take(&mut state.open);
        let first = matches!(state.content, Content::Copying(_)) && state.sealed.is_empty();
        let held = state.held;
        drop(state);
        if let Err(e) = self.promise(epoch, &payloads, held) {
            lock(&self.state).open.splice(0..0, payloads);
            return Err(e);
        }
        if self.durability == Durability::Disk {
            self.vital(self.record(epoch, &payloads, first))?;
        }
        let mut state = lock(&self.state);
        state.newest = epoch;
        state.sealed.push_back(Sealed {
            epoch,
            bytes: payloads.iter().map(|p| p.len() as u64).sum(),
            payloads: Arc::new(payloads),
        });
        self.changed.notify_all();
        Ok(())
    }

    /// Takes space in the images for what is to be written.
    fn promise(&self, epoch: u64, payloads: &[Vec<u8>], held: u64) -> Result<()> {
        let mut writes = Vec::new();
        for payload in payloads {
            changes::writes(payload, &mut writes)?;
        }
        lock(&self.promises).add(epoch, writes, &self.images, held)
    }

    /// Puts an epoch into the journal; the `first` after a first copy makes the images whole.
    fn record(&self, epoch: u64, payloads: &[Vec<u8>], first: bool) -> Result<()> {
        if first {
            self.sync()?;
        }
        // Without one that changes nothing, the images are the same: it need not be synced.
        let sync = first || !payloads.is_empty();
        lock(&self.journal).append(epoch, payloads, sync)
    }

    /// The newest epoch that is sealed or applied.
    #[cfg(test)]
    pub fn sealed(&self) -> u64 {
        lock(&self.state).newest
    }

    /// Waits until an epoch is sealed, and says whether it is; no longer than `patience`.
    pub fn wait_sealed(&self, epoch: u64, patience: Duration) -> bool {
        let deadline = Instant::now() + patience;
        let mut state = lock(&self.state);
        while state.newest < epoch {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            let waited = self.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(|e| e.into_inner()).0;
        }
        true
    }

    /// Writes all epochs up to this one, which is sealed, to the images.
    pub fn apply(&self, epoch: u64) -> Result<()> {
        let _writing = lock(&self.writing);
        loop {
            let state = self.state()?;
            let next = match state.sealed.front() {
                Some(next) if next.epoch <= epoch => next.clone(),
                _ if state.newest < epoch => bail!("epoch {epoch} of the disks is not sealed"),
                _ => return Ok(()),
            };
            let content = state.content;
            drop(state);
            self.vital(self.settle(&next, content))?;
        }
    }

    fn settle(&self, next: &Sealed, content: Content) -> Result<()> {
        let (first, stamp) = match content {
            Content::Copying(stamp) => (true, stamp),
            Content::Whole(stamp) => (false, stamp),
            Content::Unknown => bail!("there was no first copy"),
        };
        if self.durability == Durability::Memory {
            self.record(next.epoch, &next.payloads, first)?;
        }
        for payload in next.payloads.iter() {
            changes::write(payload, &self.images, &self.promises)?;
        }
        let content = Content::Whole(Stamp {
            epoch: next.epoch,
            ..stamp
        });
        // Before it counts as not held any more, so that what is held always fits into the journal.
        if lock(&self.journal).used() > LIMIT.min(self.bound) {
            self.sync()?;
            lock(&self.journal).shorten(next.epoch, content)?;
        }
        let mut state = lock(&self.state);
        state.content = content;
        state.sealed.pop_front();
        state.held -= next.bytes;
        drop(state);
        lock(&self.promises).kept(next.epoch);
        Ok(())
    }

    /// Throws away all that is not applied; a first copy that is under way has to begin again.
    pub fn discard(&self) -> Result<()> {
        let _writing = lock(&self.writing);
        let _sealing = lock(&self.sealing);
        lock(&self.promises).clear();
        let mut journal = lock(&self.journal);
        let mut state = self.state()?;
        if let Content::Copying(_) = state.content {
            state.content = Content::Unknown;
        }
        state.clear();
        let (content, applied) = (state.content, state.newest);
        drop(state);
        if journal.has_after(applied) {
            self.vital(self.sync().and_then(|()| journal.forget(content)))?;
        }
        Ok(())
    }

    /// Bytes of changes that are held.
    #[cfg(test)]
    pub fn held(&self) -> u64 {
        lock(&self.state).held
    }

    /// Ends in good order: what is applied is on the disks, and the next to open them goes on there.
    /// What is not applied is thrown away.
    pub fn close(self) -> Result<()> {
        self.discard()?;
        self.sync()?;
        let content = lock(&self.state).content;
        lock(&self.journal).forget(content)
    }

    /// As [`Self::close`], for a virtual machine that opens the images next: what it writes is not in the
    /// journal, which therefore says no more that they are whole.
    pub fn hand_over(self) -> Result<()> {
        self.discard()?;
        self.sync()?;
        lock(&self.journal).forget(Content::Unknown)
    }

    fn sync(&self) -> Result<()> {
        self.images.iter().try_for_each(Image::sync)
    }

    /// The state, unless nothing can go on.
    fn state(&self) -> Result<MutexGuard<'_, State>> {
        let state = lock(&self.state);
        match &state.broken {
            Some(why) => Err(anyhow!("the disks failed before: {why}")),
            None => Ok(state),
        }
    }

    /// What failed here leaves it open what is on the disks: only opening them again tells.
    fn vital<T>(&self, done: Result<T>) -> Result<T> {
        done.inspect_err(|e| lock(&self.state).broken = Some(format!("{e:#}")))
    }
}

impl State {
    /// Forgets what is not applied.
    fn clear(&mut self) {
        self.open.clear();
        self.sealed.clear();
        self.held = 0;
        self.newest = whole(self.content).map_or(0, |stamp| stamp.epoch);
    }
}

fn whole(content: Content) -> Option<Stamp> {
    match content {
        Content::Whole(stamp) => Some(stamp),
        _ => None,
    }
}

fn disks(images: &[Image]) -> Vec<(String, u64)> {
    let disks = images.iter().map(|image| (image.name.clone(), image.size));
    disks.collect()
}

/// The path with something at its end.
fn beside(path: &Path, end: &str) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(end);
    name.into()
}

/// Opens a journal's file. It holds what a guest has on its disks, so it is for nobody else to read.
fn open(path: &Path, new: bool) -> Result<Plain> {
    let mut options = OpenOptions::new();
    options
        .read(true)
        .write(true)
        .create(new)
        .truncate(new)
        .mode(0o600);
    Ok(Plain {
        file: options.open(path)?,
        room: Some(path.to_owned()),
    })
}

/// Creates a journal, so that a crash leaves a whole one or none.
fn create(path: &Path, disks: &[(String, u64)]) -> Result<()> {
    let made = (|| {
        let new = beside(path, ".new");
        Journal::create(&open(&new, true)?, disks)?;
        fs::rename(&new, path)?;
        let folder = path.parent().filter(|p| !p.as_os_str().is_empty());
        File::open(folder.unwrap_or(Path::new(".")))?.sync_all()?;
        Ok(())
    })();
    made.map_err(|e: anyhow::Error| {
        e.context(format!("cannot create the journal {}", path.display()))
    })
}
