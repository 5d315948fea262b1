// SPDX-License-Identifier: GPL-2.0-or-later

//! Frames over a channel: sending from several threads, receiving with a watch on silence, heartbeats.

use std::fmt;
use std::io::{self, BufReader, ErrorKind, Read, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use remus_proto::frame::{Header, Kind, Stamp, WireError, HEADER_SIZE};
use rustix::event::{poll, PollFd, PollFlags, Timespec};

use crate::peer::channel::{ChannelReader, ChannelWriter, Handle};

/// Signs of life in the time after which silence counts as death.
const BEATS: u32 = 6;

/// Locks a mutex. A thread that panicked while it held one leaves nothing half done in what this
/// program keeps in them.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The sending side of a stream. Clones send on the same stream, whole frames at a time.
#[derive(Clone)]
pub struct Sender {
    writer: Arc<Mutex<ChannelWriter>>,
    handle: Handle,
    generation: u64,
}

impl Sender {
    /// Sends on a channel, for a domain of this generation.
    pub fn new(writer: ChannelWriter, handle: &Handle, generation: u64) -> Self {
        Self {
            writer: Arc::new(Mutex::new(writer)),
            handle: handle.clone(),
            generation,
        }
    }

    /// Sends a frame, and returns its bytes on the wire.
    pub fn send(&self, kind: Kind, epoch: u64, payload: &[u8]) -> Result<usize> {
        let mut frame = vec![0; HEADER_SIZE];
        frame.extend_from_slice(payload);
        self.send_in_place(kind, epoch, &mut frame)
    }

    /// Sends a frame whose payload is in `frame` after [`HEADER_SIZE`] bytes, which are filled in.
    /// Returns its bytes on the wire.
    pub fn send_in_place(&self, kind: Kind, epoch: u64, frame: &mut [u8]) -> Result<usize> {
        let (head, payload) = frame
            .split_at_mut_checked(HEADER_SIZE)
            .context("short frame")?;
        let header = Header::new(kind, self.generation, epoch, payload)?;
        head.copy_from_slice(&header.encode());
        if let Err(e) = lock(&self.writer).write_all(frame) {
            // A part of a frame may be out: nothing sensible can follow it.
            self.shutdown();
            return Err(Unsent(e).into());
        }
        Ok(frame.len())
    }

    /// Ends the stream at once: whoever waits to read or write on it is woken.
    pub fn shutdown(&self) {
        self.handle.shutdown();
    }

    /// Ends the stream and throws away what is still on its way out, acknowledgements above all:
    /// the other host must not get one after this side has begun to take over.
    pub fn cut(&self) {
        self.handle.cut();
    }
}

/// A frame could not be sent; the stream is of no use any more.
#[derive(Debug)]
pub struct Unsent(io::Error);

impl fmt::Display for Unsent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cannot send to the other host: {}", self.0)
    }
}

impl std::error::Error for Unsent {}

/// Why nothing more can be received.
#[derive(Debug)]
pub enum Broken {
    /// Nothing came for so long.
    Silence(Duration),
    /// The other side closed the stream, or it broke.
    Closed(String),
    /// What came is not a frame.
    Wire(WireError),
}

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Silence(d) => write!(f, "it has been silent for {} ms", d.as_millis()),
            Self::Closed(why) => write!(f, "the connection ended ({why})"),
            Self::Wire(e) => e.fmt(f),
        }
    }
}

impl std::error::Error for Broken {}

/// The receiving side of a stream.
pub struct Receiver {
    reader: BufReader<Watched>,
}

struct Watched {
    reader: ChannelReader,
    handle: Handle,
    timeout: Duration,
    heard: Instant,
}

impl Read for Watched {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = loop {
            match self.reader.read(buf) {
                Err(e) if e.kind() == ErrorKind::WouldBlock => {
                    // The socket's timeout counts ticks, and these catch up at once on a host that was kept
                    // from running: it may come early, and then nobody is dead.
                    let left = self.timeout.saturating_sub(self.heard.elapsed());
                    if left.is_zero() {
                        return Err(e);
                    }
                    let wait = Timespec::try_from(left).map_err(io::Error::other)?;
                    let stream = self.handle.stream();
                    poll(&mut [PollFd::new(stream, PollFlags::IN)], Some(&wait))?;
                }
                other => break other?,
            }
        };
        if n > 0 {
            self.heard = Instant::now();
        }
        Ok(n)
    }
}

impl Receiver {
    /// Receives on a channel; silence longer than `timeout` is an error.
    pub fn new(reader: ChannelReader, handle: &Handle, timeout: Duration) -> Result<Self> {
        handle.set_read_timeout(Some(timeout))?;
        let watched = Watched {
            reader,
            handle: handle.clone(),
            timeout,
            heard: Instant::now(),
        };
        Ok(Self {
            reader: BufReader::with_capacity(1 << 16, watched),
        })
    }

    /// When something was last heard.
    pub fn heard(&self) -> Instant {
        self.reader.get_ref().heard
    }

    /// Whether the other side has closed the stream, even if there is more to read before its end.
    pub fn is_closed(&self) -> bool {
        self.reader.get_ref().handle.is_closed()
    }

    /// Changes the silence that is an error.
    pub fn set_timeout(&mut self, timeout: Duration) -> Result<()> {
        let watched = self.reader.get_mut();
        watched.timeout = timeout;
        watched
            .handle
            .set_read_timeout(Some(timeout))
            .context("cannot set a timeout")
    }

    /// The next frame and its payload.
    pub fn next(&mut self) -> Result<(Header, Vec<u8>), Broken> {
        let mut head = [0; HEADER_SIZE];
        self.fill(&mut head)?;
        let header = Header::decode(&head).map_err(Broken::Wire)?;
        // The header vouches for the length, and that for at most PAYLOAD_MAX bytes.
        let mut payload = vec![0; header.length as usize];
        self.fill(&mut payload)?;
        header.check(&payload).map_err(Broken::Wire)?;
        Ok((header, payload))
    }

    fn fill(&mut self, to: &mut [u8]) -> Result<(), Broken> {
        self.reader.read_exact(to).map_err(|e| match e.kind() {
            ErrorKind::WouldBlock | ErrorKind::TimedOut => Broken::Silence(self.heard().elapsed()),
            ErrorKind::UnexpectedEof => Broken::Closed("closed by the other side".into()),
            _ => Broken::Closed(e.to_string()),
        })
    }
}

/// Sends signs of life until it is dropped.
pub struct Heartbeat {
    stop: Arc<(Mutex<bool>, Condvar)>,
    thread: Option<JoinHandle<()>>,
}

impl Heartbeat {
    /// Starts to send several heartbeats in each `timeout`. End the stream before this is dropped, or
    /// the drop may wait for a frame to be sent. A failure to send ends it: whoever
    /// receives on the stream notices too.
    /// Each carries what `stamp` returns then.
    pub fn start(
        sender: Sender,
        timeout: Duration,
        stamp: impl Fn() -> u64 + Send + 'static,
    ) -> Result<Self> {
        let stop = Arc::new((Mutex::new(false), Condvar::new()));
        let seen = Arc::clone(&stop);
        let pause = (timeout / BEATS).clamp(Duration::from_millis(5), Duration::from_millis(500));
        let beat = move || {
            loop {
                let stopped = lock(&seen.0);
                let Ok((stopped, _)) = seen.1.wait_timeout_while(stopped, pause, |s| !*s) else {
                    return;
                };
                if *stopped {
                    return;
                }
                // Sending may block, and whoever drops this must not.
                drop(stopped);
                let stamp = Stamp(stamp()).encode();
                if sender.send(Kind::Heartbeat, 0, &stamp).is_err() {
                    return;
                }
            }
        };
        let thread = thread::Builder::new()
            .name("heartbeat".into())
            .spawn(beat)?;
        Ok(Self {
            stop,
            thread: Some(thread),
        })
    }
}

impl Drop for Heartbeat {
    fn drop(&mut self) {
        *lock(&self.stop.0) = true;
        self.stop.1.notify_all();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::*;
    use crate::peer::channel::{Channel, Way};

    /// What the socket's timeout says is not believed before its time, nor is it waited for twice.
    #[test]
    fn silence_is_as_long_as_said() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let other = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (stream, _) = listener.accept().unwrap();
        let again = stream.try_clone().unwrap();
        let channel = Channel::connect(stream, &Way::Plain, Duration::from_secs(5)).unwrap();
        let (reader, _writer, handle) = channel.split();
        let timeout = Duration::from_millis(300);
        let mut receiver = Receiver::new(reader, &handle, timeout).unwrap();
        // The two are one socket.
        again
            .set_read_timeout(Some(Duration::from_millis(10)))
            .unwrap();
        let start = Instant::now();
        match receiver.next() {
            Err(Broken::Silence(d)) => assert!(d >= timeout && start.elapsed() >= timeout),
            other => panic!("{other:?}"),
        }
        drop(other);
    }
}
