// SPDX-License-Identifier: GPL-2.0-or-later

//! What images and the journal are kept on. Tests put one in its place that fails and forgets.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use rustix::fs::{fallocate, fdatasync, seek, statvfs, FallocateFlags, SeekFrom};
use rustix::io::{retry_on_intr, Errno};

use super::lock::unlock;

/// Bytes that can be read and written anywhere. Ranges are within its size.
pub(super) trait Medium: Send + Sync {
    /// Reads all of `to`.
    fn read(&self, to: &mut [u8], at: u64) -> io::Result<()>;
    /// Writes all of `data`. It may be lost until [`Self::sync`].
    fn write(&self, data: &[u8], at: u64) -> io::Result<()>;
    /// Makes a range read as zeros, and gives its space back if that can be. Lost until [`Self::sync`].
    fn clear(&self, range: Range<u64>) -> io::Result<()>;
    /// Makes sure that there is space for this range; `all` is how many bytes are to be written in all,
    /// for where space cannot be taken before it is written.
    fn reserve(&self, range: Range<u64>, all: u64) -> io::Result<()>;
    /// The next range from `at` on that may be other than zeros.
    fn data(&self, at: u64) -> io::Result<Option<Range<u64>>>;
    /// Returns when everything written would outlive a loss of power.
    fn sync(&self) -> io::Result<()>;
}

/// A file or a block device.
pub(super) struct Plain {
    pub(super) file: File,
    /// Where to ask for free space if none can be reserved; none on a block device, which has its own.
    pub(super) room: Option<PathBuf>,
}

impl Drop for Plain {
    fn drop(&mut self) {
        unlock(&self.file);
    }
}

/// That `e` says that this file system does not do what was asked of it.
fn unsupported(e: Errno) -> bool {
    matches!(e, Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL)
}

impl Medium for Plain {
    fn read(&self, to: &mut [u8], at: u64) -> io::Result<()> {
        self.file.read_exact_at(to, at)
    }

    fn write(&self, data: &[u8], at: u64) -> io::Result<()> {
        self.file.write_all_at(data, at)
    }

    fn clear(&self, range: Range<u64>) -> io::Result<()> {
        let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let length = range.end - range.start;
        match retry_on_intr(|| fallocate(&self.file, hole, range.start, length)) {
            Err(e) if unsupported(e) => zeros(self, range),
            done => Ok(done?),
        }
    }

    fn reserve(&self, range: Range<u64>, all: u64) -> io::Result<()> {
        let Some(room) = &self.room else {
            return Ok(());
        };
        let length = range.end - range.start;
        let now = FallocateFlags::empty();
        match retry_on_intr(|| fallocate(&self.file, now, range.start, length)) {
            Err(e) if unsupported(e) => {
                let room = statvfs(room)?;
                match room.f_bavail.saturating_mul(room.f_frsize) < all {
                    true => Err(Errno::NOSPC.into()),
                    false => Ok(()),
                }
            }
            done => Ok(done?),
        }
    }

    fn data(&self, at: u64) -> io::Result<Option<Range<u64>>> {
        let start = match seek(&self.file, SeekFrom::Data(at)) {
            Ok(start) => start,
            Err(Errno::NXIO) => return Ok(None),
            // A block device.
            Err(e) if unsupported(e) => return Ok(Some(at..u64::MAX)),
            Err(e) => return Err(e.into()),
        };
        Ok(Some(start..seek(&self.file, SeekFrom::Hole(start))?))
    }

    fn sync(&self) -> io::Result<()> {
        Ok(retry_on_intr(|| fdatasync(&self.file))?)
    }
}

/// Writes zeros.
pub(super) fn zeros(medium: &dyn Medium, range: Range<u64>) -> io::Result<()> {
    static ZEROS: [u8; 1 << 16] = [0; 1 << 16];
    let mut at = range.start;
    while at < range.end {
        let length = (range.end - at).min(ZEROS.len() as u64);
        medium.write(&ZEROS[..length as usize], at)?;
        at += length;
    }
    Ok(())
}
