// SPDX-License-Identifier: GPL-2.0

//! The RAM device of a domain, `/dev/remus/<domain>`.

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::Ordering::Relaxed;

use anyhow::{bail, Context, Result};

use crate::abi::{self, BITMAP, END, READ, RECORD};
use crate::bits::Bits;
use crate::map::Map;
use crate::PAGE;

/// An open device.
#[derive(Debug)]
pub struct Device {
    file: File,
    pages: u64,
}

/// What one READ returned.
#[derive(Clone, Copy, Debug)]
pub struct Batch {
    /// Records at the beginning of the buffer.
    pub count: usize,
    /// Where to go on; nothing if nothing is left.
    pub next: Option<u64>,
}

impl Device {
    /// Opens the device of `domain`, which has `pages` pages, for reading and writing.
    pub fn open(domain: &str, pages: u64) -> Result<Self> {
        let path = format!("/dev/remus/{domain}");
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(&path)
            .with_context(|| format!("cannot open {path}"))?;
        Ok(Self { file, pages })
    }

    /// The device as a file, for `pread` and `pwrite`.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Pages in it.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Bytes in it.
    pub fn length(&self) -> usize {
        self.pages as usize * PAGE
    }

    /// All of it.
    pub fn map(&self, write: bool) -> Result<Map> {
        Map::shared(self.file.as_fd(), self.length(), 0, write)
    }

    /// Fetches records of a sealed epoch whose page numbers are in `range` into `buffer`.
    pub fn read(
        &self,
        epoch: u64,
        range: Range<u64>,
        buffer: &mut [u8],
        flags: u32,
    ) -> io::Result<Batch> {
        let mut argument = abi::Read {
            epoch,
            cursor: range.start,
            end: range.end,
            buffer: buffer.as_mut_ptr() as u64,
            length: buffer.len() as u32,
            flags,
            ..Default::default()
        };
        self.call(READ, &mut argument)?;
        let count = argument.count as usize;
        // What cannot be is not worth an error of its own: nothing sensible can follow it.
        assert!(
            count <= buffer.len() / RECORD,
            "{count} records in a buffer of {} bytes",
            buffer.len()
        );
        Ok(Batch {
            count,
            next: (argument.cursor != END).then_some(argument.cursor),
        })
    }

    /// Maps the set of a sealed epoch.
    pub fn bitmap(&self, epoch: u64) -> Result<Bitmap> {
        let mut argument = abi::Bitmap {
            epoch,
            ..Default::default()
        };
        self.call(BITMAP, &mut argument)
            .with_context(|| format!("BITMAP of epoch {epoch}"))?;
        let needed = self.pages.div_ceil(64) * 8;
        if argument.length < needed || !argument.length.is_multiple_of(PAGE as u64) {
            bail!(
                "BITMAP of epoch {epoch}: {} bytes, where {needed} are needed, in whole pages",
                argument.length
            );
        }
        let length = argument.length as usize;
        Ok(Bitmap {
            map: Map::shared(self.file.as_fd(), length, argument.offset, false)?,
            pages: argument.pages,
            length: self.pages,
        })
    }

    fn call<T>(&self, number: u32, argument: &mut T) -> io::Result<()> {
        // SAFETY: `argument` has the layout that belongs to `number`; a buffer that it points to is
        // borrowed by the caller.
        match unsafe { libc::ioctl(self.file.as_raw_fd(), number.into(), argument) } {
            0 => Ok(()),
            -1 => Err(io::Error::last_os_error()),
            other => Err(io::Error::other(format!("an ioctl returned {other}"))),
        }
    }
}

/// A sealed epoch's set, as the kernel has it.
#[derive(Debug)]
pub struct Bitmap {
    map: Map,
    pages: u64,
    length: u64,
}

impl Bitmap {
    /// Pages in it, as the call that found it said.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// What it holds now. An error names a page beyond the end of the memory.
    pub fn bits(&self) -> Result<Bits, u64> {
        Bits::from_words(&self.map.words(), self.length)
    }

    /// Calls `f` for each page in it, without a copy.
    pub fn each(&self, mut f: impl FnMut(u64)) {
        let words = self.map.all_words().iter();
        for (n, word) in words.take(self.length.div_ceil(64) as usize).enumerate() {
            let mut left = word.load(Relaxed);
            while left != 0 {
                f(n as u64 * 64 + u64::from(left.trailing_zeros()));
                left &= left - 1;
            }
        }
    }
}

/// The first `count` records in `buffer`: page number and content.
pub fn records(buffer: &[u8], count: usize) -> impl Iterator<Item = (u64, &[u8])> {
    buffer.chunks_exact(RECORD).take(count).map(|record| {
        let (number, content) = record.split_at(8);
        let mut bytes = [0; 8];
        bytes.copy_from_slice(number);
        (u64::from_le_bytes(bytes), content)
    })
}
