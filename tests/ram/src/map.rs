// SPDX-License-Identifier: GPL-2.0

//! A memory mapping that other processes and guests may write at any time.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result};

use crate::PAGE;

/// A mapping, unmapped when dropped. Access goes through copies and atomics, never through
/// references to its bytes, which would promise that nobody else writes them.
#[derive(Debug)]
pub struct Map {
    start: *mut u8,
    length: usize,
}

// SAFETY: The mapping belongs to the process, not to a thread.
unsafe impl Send for Map {}
// SAFETY: All access is by copies and atomics, which may race with others as any memory that is
// shared between processes.
unsafe impl Sync for Map {}

impl Map {
    /// Maps `length` bytes of a file from `offset` on, shared; for writing too if `write`.
    pub fn shared(fd: BorrowedFd<'_>, length: usize, offset: u64, write: bool) -> Result<Self> {
        let protection = libc::PROT_READ | if write { libc::PROT_WRITE } else { 0 };
        Self::new(length, protection, libc::MAP_SHARED, fd.as_raw_fd(), offset)
    }

    /// Maps `length` bytes of memory of this process alone.
    pub fn anonymous(length: usize) -> Result<Self> {
        Self::new(
            length,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        )
    }

    fn new(length: usize, protection: i32, flags: i32, fd: i32, offset: u64) -> Result<Self> {
        // SAFETY: The kernel chooses the place, so nothing that is in use changes.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                length,
                protection,
                flags,
                fd,
                offset as i64,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error())
                .with_context(|| format!("cannot map {length} bytes at offset {offset:#x}"));
        }
        Ok(Self {
            start: start.cast(),
            length,
        })
    }

    /// Bytes in it.
    pub fn length(&self) -> usize {
        self.length
    }

    /// Address of byte `at`, from which `length` bytes are in the mapping.
    pub fn address(&self, at: usize, length: usize) -> *mut u8 {
        assert!(at.checked_add(length).is_some_and(|end| end <= self.length));
        // SAFETY: Within the mapping.
        unsafe { self.start.add(at) }
    }

    /// Copies from byte `at` on.
    pub fn read(&self, at: usize, to: &mut [u8]) {
        let from = self.address(at, to.len());
        // SAFETY: `from` is good for so many bytes, and `to` is not in a mapping of this type.
        unsafe { std::ptr::copy_nonoverlapping(from, to.as_mut_ptr(), to.len()) };
    }

    /// Copies to byte `at` and what follows.
    pub fn write(&self, at: usize, from: &[u8]) {
        let to = self.address(at, from.len());
        // SAFETY: `to` is good for so many bytes, and `from` is not in a mapping of this type.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), to, from.len()) };
    }

    /// The word at byte `at`, a multiple of 8.
    pub fn word(&self, at: usize) -> &AtomicU64 {
        let word = self.address(at, 8);
        assert!(at.is_multiple_of(8));
        // SAFETY: Aligned, within the mapping, which the reference does not outlive; whoever else
        // writes it is of no concern to an atomic.
        unsafe { AtomicU64::from_ptr(word.cast()) }
    }

    /// All words, where they are.
    pub fn all_words(&self) -> &[AtomicU64] {
        // SAFETY: Aligned to a page, and so many words are in the mapping, which the reference does not
        // outlive; whoever else writes them is of no concern to atomics.
        unsafe { std::slice::from_raw_parts(self.start.cast(), self.length / 8) }
    }

    /// What all words are now.
    pub fn words(&self) -> Vec<u64> {
        let words = self.all_words().iter();
        words.map(|word| word.load(Ordering::Relaxed)).collect()
    }

    /// Writes one word to each of these pages.
    pub fn write_pages(&self, pages: &[u64], value: u64) {
        for &page in pages {
            self.word(page as usize * PAGE)
                .store(value, Ordering::Relaxed);
        }
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: The mapping is this type's own.
        unsafe { libc::munmap(self.start.cast(), self.length) };
    }
}

/// A file that is nothing but memory, of `length` bytes.
pub fn memfd(length: usize) -> Result<std::fs::File> {
    use std::os::fd::FromRawFd;
    // SAFETY: The name is NUL-terminated.
    let fd = unsafe { libc::memfd_create(c"remus-ram".as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error()).context("cannot make a memfd");
    }
    // SAFETY: A new descriptor, nobody else's.
    let file = unsafe { std::fs::File::from_raw_fd(fd) };
    file.set_len(length as u64).context("cannot size a memfd")?;
    Ok(file)
}
