// SPDX-License-Identifier: GPL-2.0-or-later

//! The RAM device of a domain: reading a sealed epoch's pages, writing a received epoch's.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use remus_core::uapi::ram::{self, PAGE_SIZE};
use rustix::ioctl::{ioctl, Updater};

use crate::host::kernel::{Image, Pages};

/// Path of a domain's memory, from its `device` attribute.
pub fn path(device: &str) -> PathBuf {
    Path::new("/dev").join(device)
}

/// An open RAM device.
///
/// It is read and written by calls, not through a mapping: a page that the kernel cannot get memory
/// for is then an error and not a SIGBUS, and no reference to memory that a guest changes exists.
pub struct Ram {
    file: File,
}

impl Ram {
    /// Opens the memory of a domain.
    pub fn open(path: &Path) -> Result<Self> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(path)
            .with_context(|| format!("cannot open the domain's memory {}", path.display()))?;
        Ok(Self { file })
    }
}

impl Image for Ram {
    fn read(&mut self, page: u64, to: &mut [u8; PAGE_SIZE]) -> Result<()> {
        self.file
            .read_exact_at(to, page.saturating_mul(PAGE_SIZE as u64))
            .with_context(|| format!("cannot read page {page} of the domain's memory"))
    }

    fn write(&mut self, page: u64, content: &[u8; PAGE_SIZE]) -> Result<()> {
        self.file
            .write_all_at(content, page.saturating_mul(PAGE_SIZE as u64))
            .with_context(|| format!("cannot write page {page} of the domain's memory"))
    }
}

impl Pages for Ram {
    fn read(&mut self, epoch: u64, cursor: &mut u64, buffer: &mut [u8]) -> Result<usize> {
        let mut call = ram::Read {
            epoch,
            cursor: *cursor,
            end: ram::END,
            buffer: buffer.as_mut_ptr() as u64,
            length: u32::try_from(buffer.len()).unwrap_or(u32::MAX),
            ..ram::Read::default()
        };
        // SAFETY: READ takes a `ram::Read` and writes at most `length` bytes to `buffer`, which is
        // ours alone during the call.
        // JUSTIFICATION: the kernel writes records to where an address in the argument says.
        unsafe {
            ioctl(
                &self.file,
                Updater::<{ ram::READ }, ram::Read>::new(&mut call),
            )
        }
        .with_context(|| format!("cannot read the pages of epoch {epoch}"))?;
        *cursor = call.cursor;
        Ok(call.count as usize)
    }
}
