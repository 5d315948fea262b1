// SPDX-License-Identifier: GPL-2.0-or-later

//! The redo journal: what an epoch changes is here, synced, before any of it is in an image. So after
//! a crash all of it is written again, and the images are of one whole epoch.
//!
//! ```text
//!   offset
//!        0  header    two copies, written and synced one after the other, so that one is always whole,
//!     8192  header    and both are before the space of records that they leave out is used again
//!    16384  mark      how far records were synced: one before that is damaged, not just half written
//!    20480  records   a ring of `capacity` bytes
//! ```
//!
//! A *position* counts the bytes of records since the journal was opened and never goes back; the byte
//! is at 20480 + position % capacity. A record begins at a multiple of 4096, so that writing one never
//! touches a block of another:
//!
//! ```text
//!        0      8  salt of the header
//!        8      8  its position
//!       16      8  epoch
//!       24      8  length of the payloads
//!       32      4  CRC32C of the payloads
//!       36      4  CRC32C of bytes 0 to 35
//!       40         payloads of changes (proto/src/disk.rs)
//! ```

use std::collections::VecDeque;
use std::io;

use anyhow::{bail, Context, Result};
use crc32c::crc32c_append;
use remus_proto::frame::crc32c;
use rustix::rand::{getrandom, GetRandomFlags};

use super::header::{self, Content, Header};
use super::medium::Medium;

const MARK: u64 = 2 * header::SIZE as u64;
pub(super) const RECORDS: u64 = MARK + BLOCK;
/// A power of two, and no less than what a disk writes at once.
pub(super) const BLOCK: u64 = 4096;
const HEAD: usize = 40;

/// A record that was read.
pub(super) struct Found {
    pub(super) epoch: u64,
    /// Where it begins.
    at: u64,
    length: u64,
}

/// An open journal.
pub(super) struct Journal {
    medium: Box<dyn Medium>,
    /// For messages.
    name: String,
    header: Header,
    /// Which copy of the header was whole when this was opened. The other may be half written, so it is
    /// always written first.
    good: u64,
    /// Where the next record goes.
    end: u64,
    /// Epoch and position of each record that a header must not leave out yet.
    waiting: VecDeque<(u64, u64)>,
}

impl Journal {
    /// Makes a journal of images of which nothing is known.
    pub(super) fn create(medium: &dyn Medium, disks: &[(String, u64)]) -> Result<()> {
        let header = Header {
            counter: 1,
            salt: 0,
            start: 0,
            capacity: BLOCK,
            content: Content::Unknown,
            disks: disks.to_vec(),
        };
        write_headers(medium, &header, 0).context("cannot write the journal")
    }

    /// Opens the journal of these disks.
    pub(super) fn open(
        medium: Box<dyn Medium>,
        name: String,
        disks: &[(String, u64)],
    ) -> Result<Self> {
        let header = (0..2)
            .filter_map(|copy| {
                let mut bytes = vec![0; header::SIZE];
                medium.read(&mut bytes, copy * header::SIZE as u64).ok()?;
                Some((copy, Header::decode(&bytes)?))
            })
            .max_by_key(|(_, header)| header.counter);
        let Some((good, header)) = header else {
            bail!(
                "{name} is damaged, or is not a journal of disks: delete it, and the disks are copied anew"
            );
        };
        if header.disks != disks {
            bail!(
                "the journal {name} is of other disks ({}; here: {}): give this guest its own, or, if \
                 its disks were changed, delete the journal, and they are copied anew",
                list(&header.disks),
                list(disks)
            );
        }
        if header.capacity == 0 || header.capacity % BLOCK != 0 {
            bail!("the journal {name} makes no sense: delete it, and the disks are copied anew");
        }
        // What only the page cache has, after a crash of this process, must not be lost once images
        // are written from it.
        medium
            .sync()
            .with_context(|| format!("cannot write to the journal {name}"))?;
        Ok(Self {
            medium,
            name,
            good,
            end: header.start,
            header,
            waiting: VecDeque::new(),
        })
    }

    /// What the images hold, before the records.
    pub(super) fn content(&self) -> Content {
        self.header.content
    }

    /// Bytes that records take.
    pub(super) fn used(&self) -> u64 {
        self.end - self.header.start
    }

    /// All whole records.
    pub(super) fn scan(&self) -> Result<Vec<Found>> {
        let mut records = Vec::new();
        let mut at = self.header.start;
        while let Some(found) = self.record(at)? {
            at = after(at, found.length);
            records.push(found);
        }
        if self.marked()?.is_some_and(|marked| at < marked) {
            bail!(
                "the journal {} is damaged, so the images may be of no whole epoch: delete it, and the \
                 disks are copied anew",
                self.name
            );
        }
        Ok(records)
    }

    /// The record at a position, if there is a whole one.
    fn record(&self, at: u64) -> Result<Option<Found>> {
        let left = self.header.capacity - (at - self.header.start);
        if left < BLOCK {
            return Ok(None);
        }
        let mut head = [0; HEAD];
        self.read(&mut head, at)?;
        let field = |n: usize| {
            let bytes = head[n..].first_chunk().copied();
            u64::from_le_bytes(bytes.unwrap_or_default())
        };
        let (length, crcs) = (field(24), field(32));
        if crcs >> 32 != u64::from(crc32c(&head[..36]))
            || field(0) != self.header.salt
            || field(8) != at
            || length > left - HEAD as u64
        {
            return Ok(None);
        }
        let mut crc = 0;
        let mut piece = vec![0; (1 << 20).min(length as usize)];
        let mut done = 0;
        while done < length {
            let size = (length - done).min(piece.len() as u64) as usize;
            self.read(&mut piece[..size], at + HEAD as u64 + done)?;
            crc = crc32c_append(crc, &piece[..size]);
            done += size as u64;
        }
        Ok((crcs as u32 == crc).then(|| Found {
            epoch: field(16),
            at,
            length,
        }))
    }

    /// The payloads of a record, one after the other.
    pub(super) fn payload(&self, found: &Found) -> Result<Vec<u8>> {
        let mut payload = vec![0; found.length as usize];
        self.read(&mut payload, found.at + HEAD as u64)?;
        Ok(payload)
    }

    /// Appends a record. With `sync`, it outlives a loss of power when this returns.
    pub(super) fn append(&mut self, epoch: u64, payloads: &[Vec<u8>], sync: bool) -> Result<()> {
        let length = payloads.iter().map(|p| p.len() as u64).sum();
        let (at, end) = (self.end, after(self.end, length));
        if end - self.header.start > self.header.capacity {
            bail!(
                "the journal {} is full: disk_buffer is less here than on the primary, give both the same",
                self.name
            );
        }
        let crc = payloads.iter().fold(0, |crc, p| crc32c_append(crc, p));
        let mut head = Vec::with_capacity(HEAD);
        head.extend(self.header.salt.to_le_bytes());
        head.extend(at.to_le_bytes());
        head.extend(epoch.to_le_bytes());
        head.extend(length.to_le_bytes());
        head.extend(crc.to_le_bytes());
        head.extend(crc32c(&head).to_le_bytes());
        let done = (|| {
            let mut to = at + HEAD as u64;
            for payload in payloads {
                self.write(payload, to)?;
                to += payload.len() as u64;
            }
            self.write(&head, at)?;
            if sync {
                self.medium.sync()?;
                let mut mark = self.header.salt.to_le_bytes().to_vec();
                mark.extend(end.to_le_bytes());
                mark.extend(crc32c(&mark).to_le_bytes());
                self.medium.write(&mark, MARK)?;
            }
            Ok::<_, io::Error>(())
        })();
        done.with_context(|| format!("cannot write to the journal {}", self.name))?;
        self.end = end;
        self.waiting.push_back((epoch, at));
        Ok(())
    }

    /// Up to where records were synced, if that is known.
    fn marked(&self) -> Result<Option<u64>> {
        let mut mark = [0; 20];
        let read = self.medium.read(&mut mark, MARK);
        match read {
            // A journal that has had no record.
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
            read => read.with_context(|| format!("cannot read the journal {}", self.name))?,
        }
        let [salt, marked, _] = [0, 8, 12].map(|n| {
            let bytes = mark[n..].first_chunk().copied();
            u64::from_le_bytes(bytes.unwrap_or_default())
        });
        let right = mark[16..] == crc32c(&mark[..16]).to_le_bytes() && salt == self.header.salt;
        Ok(right.then_some(marked))
    }

    /// Leaves out the records of epochs up to `applied`, which are in the synced images.
    pub(super) fn shorten(&mut self, applied: u64, content: Content) -> Result<()> {
        while self
            .waiting
            .front()
            .is_some_and(|(epoch, _)| *epoch <= applied)
        {
            self.waiting.pop_front();
        }
        let start = self.waiting.front().map_or(self.end, |(_, at)| *at);
        self.restart(Header {
            start,
            content,
            ..self.header.clone()
        })
    }

    /// Leaves out all records.
    pub(super) fn forget(&mut self, content: Content) -> Result<()> {
        self.shorten(u64::MAX, content)
    }

    /// Whether there is a record of an epoch after `applied`.
    pub(super) fn has_after(&self, applied: u64) -> bool {
        self.waiting
            .back()
            .is_some_and(|(epoch, _)| *epoch > applied)
    }

    /// Begins anew with room for `capacity` bytes of records, once what was recovered is in the images.
    pub(super) fn renew(&mut self, capacity: u64, content: Content) -> Result<()> {
        let capacity = capacity.next_multiple_of(BLOCK);
        let space = self.medium.reserve(0..RECORDS + capacity, capacity);
        space.with_context(|| {
            format!(
                "there is no space for the journal {}, which takes {} MiB: free some, or lower disk_buffer",
                self.name,
                (RECORDS + capacity) >> 20
            )
        })?;
        let mut salt = [0; 8];
        getrandom(&mut salt, GetRandomFlags::empty()).context("no random numbers")?;
        self.end = 0;
        self.restart(Header {
            salt: u64::from_le_bytes(salt),
            start: 0,
            capacity,
            content,
            ..self.header.clone()
        })
    }

    fn restart(&mut self, header: Header) -> Result<()> {
        self.header = Header {
            counter: self.header.counter + 1,
            ..header
        };
        write_headers(self.medium.as_ref(), &self.header, 1 - self.good)
            .with_context(|| format!("cannot write to the journal {}", self.name))
    }

    fn read(&self, to: &mut [u8], at: u64) -> Result<()> {
        let (first, rest) = self.split(at, to.len());
        let (head, tail) = to.split_at_mut(first);
        let read = self.medium.read(head, rest);
        let read = read.and_then(|()| self.medium.read(tail, RECORDS));
        match read {
            // A file that was cut off has no records there.
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => {
                to.fill(0);
                Ok(())
            }
            read => read.with_context(|| format!("cannot read the journal {}", self.name)),
        }
    }

    fn write(&self, data: &[u8], at: u64) -> io::Result<()> {
        let (first, offset) = self.split(at, data.len());
        let (head, tail) = data.split_at(first);
        self.medium.write(head, offset)?;
        self.medium.write(tail, RECORDS)
    }

    /// How many of `length` bytes from position `at` come before the end of the ring, and where.
    fn split(&self, at: u64, length: usize) -> (usize, u64) {
        let within = at % self.header.capacity;
        let first = (self.header.capacity - within).min(length as u64);
        (first as usize, RECORDS + within)
    }
}

/// The position after a record.
fn after(at: u64, length: u64) -> u64 {
    (at + HEAD as u64 + length).next_multiple_of(BLOCK)
}

/// Writes both copies, so that at each instant one of them is whole on the disk.
fn write_headers(medium: &dyn Medium, header: &Header, first: u64) -> io::Result<()> {
    let bytes = header.encode();
    for copy in [first, 1 - first] {
        medium.write(&bytes, copy * header::SIZE as u64)?;
        medium.sync()?;
    }
    Ok(())
}

fn list(disks: &[(String, u64)]) -> String {
    let disks: Vec<_> = disks
        .iter()
        .map(|(name, size)| format!("{name} of {size} bytes"))
        .collect();
    disks.join(", ")
}
