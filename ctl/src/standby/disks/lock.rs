// SPDX-License-Identifier: GPL-2.0-or-later

//! QEMU's locks on image files (block/file-posix.c): a user holds byte 100 + n of the file for each
//! permission that it uses, and byte 200 + n for each that it does not let others use, both by read
//! locks; it looks for those of others with write locks that it only tests for. All are locks of the
//! open file, so they end with it.

use std::fs::File;
use std::path::Path;

use anyhow::{bail, Context, Result};
use nix::errno::Errno;
use nix::fcntl::{fcntl, FcntlArg};
use nix::libc;
use rustix::fs::{flock, FlockOperation};

const USED: libc::off_t = 100;
const UNSHARED: libc::off_t = 200;
/// QEMU's numbers of permissions: to read, to write, to resize.
const READ: libc::off_t = 0;
const WRITE: libc::off_t = 1;
const RESIZE: libc::off_t = 3;

fn range(kind: libc::c_int, start: libc::off_t, length: libc::off_t) -> libc::flock {
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: start,
        l_len: length,
        l_pid: 0,
    }
}

/// Locks an image as one does who writes to it alone. Fails if another process uses it.
pub(super) fn lock(file: &File, path: &Path) -> Result<()> {
    // First to hold, then to look: of two that come at once, at least one sees the other.
    for start in [
        USED + READ,
        USED + WRITE,
        UNSHARED + WRITE,
        UNSHARED + RESIZE,
    ] {
        match fcntl(file, FcntlArg::F_OFD_SETLK(&range(libc::F_RDLCK, start, 1))) {
            Ok(_) => {}
            Err(Errno::EAGAIN | Errno::EACCES) => return used(path),
            Err(e) => return Err(e).with_context(|| format!("cannot lock {}", path.display())),
        }
    }
    for start in [
        UNSHARED + READ,
        UNSHARED + WRITE,
        USED + WRITE,
        USED + RESIZE,
    ] {
        let mut other = range(libc::F_WRLCK, start, 1);
        fcntl(file, FcntlArg::F_OFD_GETLK(&mut other))
            .with_context(|| format!("cannot look for locks of {}", path.display()))?;
        if libc::c_int::from(other.l_type) != libc::F_UNLCK {
            return used(path);
        }
    }
    Ok(())
}

/// Gives up what was locked. Closing the file does that only once a child that was just forked has
/// closed it, too.
pub(super) fn unlock(file: &File) {
    let _ = fcntl(file, FcntlArg::F_OFD_SETLK(&range(libc::F_UNLCK, 0, 0)));
    let _ = flock(file, FlockOperation::Unlock);
}

fn used(path: &Path) -> Result<()> {
    bail!(
        "the image {} is in use by another process: end the virtual machine, the qemu-nbd or the other \
         standby that has it open",
        path.display()
    )
}
