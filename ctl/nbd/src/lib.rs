// SPDX-License-Identifier: GPL-2.0-or-later

//! The plugin of nbdkit through which QEMU's mirror of a disk reaches remusctl: each change becomes a
//! message on remusctl's socket, and is answered to QEMU as remusctl answers it.
//!
//! remusctl starts it, with a disk of the guest for each name of an export:
//! `nbdkit --filter=nozero libremus_nbdkit.so socket=PATH`. The filter is there because nbdkit offers
//! to write zeros whatever a plugin says, and QEMU's mirror would begin with zeros all over.

use std::io::{self, IoSlice, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use nbdkit::{export_name, Error, Flags, Result, Server};
use remus_proto::export::{Action, Request};

/// EINVAL and EIO of errno(3): the same on every architecture of Linux.
const EINVAL: i32 = 22;
const EIO: i32 = 5;

/// remusctl's socket.
static SOCKET: OnceLock<PathBuf> = OnceLock::new();

/// A disk that a client has opened.
///
/// There is nothing to flush: what a guest has flushed is kept by the epoch that it is part of. QEMU is told so, and asks
/// for no answer at each flush, of which each pause of the guest has one.
struct Disk {
    name: String,
    size: u64,
    /// Connections to remusctl that no request uses just now.
    idle: Mutex<Vec<UnixStream>>,
}

impl Disk {
    /// A connection to remusctl for disk `name`, and the disk's size.
    fn connect(name: &str) -> Result<(UnixStream, u64)> {
        let path = SOCKET.get().ok_or_else(missing)?;
        let mut stream = UnixStream::connect(path)?;
        let length = u8::try_from(name.len()).map_err(|e| Error::new(EINVAL, e))?;
        let mut hello = vec![length];
        hello.extend(name.as_bytes());
        stream.write_all(&hello)?;
        let mut size = [0; 8];
        stream.read_exact(&mut size)?;
        match u64::from_le_bytes(size) {
            0 => Err(Error::new(EINVAL, format!("there is no disk {name:?}"))),
            size => Ok((stream, size)),
        }
    }

    /// Tells remusctl of a change, and returns when it has answered.
    fn tell(&self, action: Action, length: u32, offset: u64, data: &[u8]) -> Result<()> {
        let idle = self.idle().pop();
        let mut stream = match idle {
            Some(stream) => stream,
            None => Self::connect(&self.name)?.0,
        };
        let request = Request {
            action,
            length,
            offset,
        };
        let answer = exchange(&mut stream, &request, data)
            .map_err(|e| Error::new(EIO, format!("remusctl does not answer: {e}")))?;
        self.idle().push(stream);
        match answer {
            0 => Ok(()),
            errno => Err(Error::new(errno, "remusctl does not take changes now")),
        }
    }

    fn idle(&self) -> MutexGuard<'_, Vec<UnixStream>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn exchange(stream: &mut UnixStream, request: &Request, data: &[u8]) -> io::Result<i32> {
    let request = request.encode();
    // Both at once, as far as they go.
    let sent = match stream.write_vectored(&[IoSlice::new(&request), IoSlice::new(data)]) {
        Err(e) if e.kind() == io::ErrorKind::Interrupted => 0,
        sent => sent?,
    };
    stream.write_all(request.get(sent..).unwrap_or_default())?;
    let rest = data.get(sent.saturating_sub(request.len())..);
    stream.write_all(rest.unwrap_or_default())?;
    let mut answer = [0; 4];
    stream.read_exact(&mut answer)?;
    Ok(i32::from_le_bytes(answer))
}

fn missing() -> Error {
    Error::new(EINVAL, "socket=PATH is missing: the socket of remusctl")
}

impl Server for Disk {
    fn name() -> &'static str {
        "remus"
    }

    fn longname() -> Option<&'static str> {
        Some("disks of a guest that Remus protects")
    }

    fn config_help() -> Option<&'static str> {
        Some("socket=<PATH>  (required) The socket of remusctl, which starts this.")
    }

    fn config(key: &str, value: &str) -> Result<()> {
        if key != "socket" {
            let told = format!("unknown parameter {key}: there is only socket=PATH");
            return Err(Error::new(EINVAL, told));
        }
        SOCKET
            .set(value.into())
            .map_err(|_| Error::new(EINVAL, "socket= is there twice"))
    }

    fn config_complete() -> Result<()> {
        SOCKET.get().map(drop).ok_or_else(missing)
    }

    fn open(_readonly: bool) -> Result<Box<dyn Server>> {
        let name = export_name().map_err(|e| Error::new(EINVAL, e.to_string()))?;
        let (stream, size) = Self::connect(&name)?;
        Ok(Box::new(Self {
            name,
            size,
            idle: Mutex::new(vec![stream]),
        }))
    }

    fn get_size(&self) -> Result<i64> {
        i64::try_from(self.size).map_err(|e| Error::new(EINVAL, e))
    }

    fn read_at(&self, _buf: &mut [u8], _offset: u64) -> Result<()> {
        let told = "changes only pass through here, there is nothing to read";
        Err(Error::new(EIO, told))
    }

    fn write_at(&self, buf: &[u8], offset: u64, _flags: Flags) -> Result<()> {
        let length = u32::try_from(buf.len()).map_err(|e| Error::new(EINVAL, e))?;
        self.tell(Action::Write, length, offset, buf)
    }

    fn trim(&self, count: u32, offset: u64, _flags: Flags) -> Result<()> {
        self.tell(Action::Discard, count, offset, &[])
    }

    /// A second connection could overtake the first.
    fn can_multi_conn(&self) -> Result<bool> {
        Ok(false)
    }
}

/// What nbdkit looks for.
mod entry {
    use super::Disk;

    nbdkit::plugin!(Disk {
        config,
        config_complete,
        write_at,
        trim,
        can_multi_conn
    });
}
