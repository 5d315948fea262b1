// SPDX-License-Identifier: GPL-2.0-or-later

//! A connection between the two hosts, in TLS 1.3 or plain, that several threads use at once.
//!
//! ```text
//!   ChannelWriter ──▶ out: records in order ──▶ socket ──▶ chunk ──▶ ChannelReader
//!        └── encrypts ──▶ conn (rustls) ◀── decrypts ───────────────────┘
//! ```
//!
//! `conn` is locked only to turn bytes into others, never during a call on the socket that may wait:
//! a writer whose socket is full keeps nobody from reading. Locks are taken in the order out, conn.
//!
//! With TLS, the side that accepts says [`WELCOME`] when it has let the other one in. In TLS 1.3 the
//! side that connects is otherwise done before anybody has looked at its certificate, and would learn
//! that it was refused only later, in the middle of something else.

use std::io::{self, ErrorKind, IoSlice, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex, TryLockError};
use std::time::{Duration, Instant};

use anyhow::{anyhow, bail, Context, Result};
use rustix::event::{poll, PollFd, PollFlags, Timespec};
use rustix::net::sockopt::set_socket_linger;
use rustix::net::{connect_unspec, send, SendFlags};
use rustls::{
    AlertDescription, CertificateError, ClientConnection, Connection, Error as TlsError,
    PeerIncompatible, ServerConnection,
};

use crate::peer::identity::{untimely, Identity, Untimely, MAKE};
use crate::peer::stream::lock;

/// What the accepting side says when it has let the other one in.
const WELCOME: u8 = b'R';
/// What a side without keys answers to TLS: not TLS, so the other side knows what it talks to.
const NO_KEYS: &[u8] = b"remus: no keys here\n";
/// Bytes that are encrypted at once, and that are read at once.
const CHUNK: usize = 1 << 17;
/// First bytes of TLS records: an alert, a handshake.
const ALERT: [u8; 2] = [0x15, 3];
const HANDSHAKE: u8 = 0x16;

/// How to talk to the other host.
#[derive(Clone, Debug)]
pub enum Way {
    /// As it is: whoever is on the network can read and change everything.
    Plain,
    /// TLS 1.3, with this identity.
    Tls(Arc<Identity>),
}

impl Way {
    /// TLS with these keys; plain without.
    pub fn of(keys: Option<&Path>) -> Result<Self> {
        Ok(match keys {
            Some(path) => Self::Tls(Arc::new(Identity::load(path)?)),
            None => Self::Plain,
        })
    }

    /// What `status` calls it.
    pub fn word(&self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::Tls(_) => "tls",
        }
    }
}

/// A connection to the other host, which has shown who it is.
#[derive(Debug)]
pub struct Channel {
    shared: Arc<Shared>,
}

/// What reader, writer and handles have in common.
#[derive(Debug)]
struct Shared {
    stream: TcpStream,
    peer: SocketAddr,
    peer_name: Option<String>,
    tls: Option<Tls>,
}

#[derive(Debug)]
struct Tls {
    conn: Mutex<Connection>,
    /// Whoever holds this sends. Records that are not sent yet, in order.
    out: Mutex<Out>,
}

#[derive(Debug, Default)]
struct Out {
    records: Vec<u8>,
    sent: usize,
}

impl Out {
    fn left(&self) -> &[u8] {
        self.records.get(self.sent..).unwrap_or(&[])
    }

    /// Counts bytes as sent.
    fn took(&mut self, n: usize) {
        self.sent += n;
        if self.sent >= self.records.len() {
            self.records.clear();
            self.sent = 0;
        }
    }

    /// Takes what the connection wants to send. It is bounded by what was encrypted since, at most a
    /// chunk, and by what is left, which is sent before more is encrypted.
    fn take(&mut self, conn: &mut Connection) -> io::Result<()> {
        while conn.wants_write() {
            conn.write_tls(&mut Gather(&mut self.records))?;
        }
        Ok(())
    }
}

/// Takes all records of a call at once.
struct Gather<'a>(&'a mut Vec<u8>);

impl Write for Gather<'_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.0.write(buf)
    }

    fn write_vectored(&mut self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        self.0.write_vectored(bufs)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Channel {
    /// Makes a channel of a connection that this side opened, within `patience` in all.
    pub fn connect(stream: TcpStream, way: &Way, patience: Duration) -> Result<Self> {
        let Way::Tls(identity) = way else {
            return Self::over(stream, None, None);
        };
        identity.check()?;
        let conn = ClientConnection::new(identity.client(), identity.other_name())?;
        let greet = |shake: &mut Shake<'_>| {
            if shake.read_byte()? != WELCOME {
                bail!("the other host is not a Remus standby");
            }
            Ok(())
        };
        Self::secure(stream, conn.into(), identity, patience, greet)
    }

    /// Makes a channel of a connection that the other side opened, within `patience` in all. The
    /// other side has to speak first.
    #[cfg(test)]
    pub fn accept(stream: TcpStream, way: &Way, patience: Duration) -> Result<Self> {
        Self::accept_known(stream, way, patience, || {})
    }

    /// The same, and calls `known` as soon as the other side has proved who it is, before it learns
    /// so. With plain it never does.
    pub fn accept_known(
        stream: TcpStream,
        way: &Way,
        patience: Duration,
        known: impl FnOnce(),
    ) -> Result<Self> {
        let Way::Tls(identity) = way else {
            let deadline = Deadline(Instant::now() + patience);
            let mut first = [0];
            deadline.reads(&stream)?;
            let there = loop {
                match stream.peek(&mut first) {
                    Err(e) if e.kind() == ErrorKind::Interrupted => deadline.reads(&stream)?,
                    other => break other,
                }
            };
            stream.set_read_timeout(None)?;
            match there.map_err(unheard)? {
                0 => bail!("it closed the connection at once"),
                _ if first == [HANDSHAKE] => {
                    // Unread, it would make the kernel throw the answer away.
                    let _ = (&stream).read(&mut [0; 4096]);
                    let _ = send(&stream, NO_KEYS, SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
                    bail!(
                        "the other host has keys, and this one has none: give them to both \
                         (remusctl keys) or to neither"
                    );
                }
                _ => return Self::over(stream, None, None),
            }
        };
        identity.check()?;
        let conn = ServerConnection::new(identity.server())?;
        let greet = |shake: &mut Shake<'_>| {
            known();
            shake.write_byte(WELCOME)
        };
        Self::secure(stream, conn.into(), identity, patience, greet)
    }

    fn secure(
        stream: TcpStream,
        mut conn: Connection,
        identity: &Identity,
        patience: Duration,
        greet: impl FnOnce(&mut Shake<'_>) -> Result<()>,
    ) -> Result<Self> {
        let mut shake = Shake {
            stream: &stream,
            conn: &mut conn,
            identity,
            deadline: Deadline(Instant::now() + patience),
            first: None,
        };
        shake.run()?;
        greet(&mut shake)?;
        // What is encrypted at once bounds it.
        conn.set_buffer_limit(None);
        stream.set_read_timeout(None)?;
        stream.set_write_timeout(None)?;
        Self::over(stream, Some(conn), Some(identity.peer().to_owned()))
    }

    fn over(
        stream: TcpStream,
        conn: Option<Connection>,
        peer_name: Option<String>,
    ) -> Result<Self> {
        // Frames are sent whole.
        stream
            .set_nodelay(true)
            .context("cannot set up the connection")?;
        let peer = stream.peer_addr().context("the connection is gone")?;
        let tls = conn.map(|conn| Tls {
            conn: Mutex::new(conn),
            out: Mutex::default(),
        });
        let shared = Shared {
            stream,
            peer,
            peer_name,
            tls,
        };
        Ok(Self {
            shared: Arc::new(shared),
        })
    }

    /// A handle on it.
    pub fn handle(&self) -> Handle {
        Handle {
            shared: Arc::clone(&self.shared),
        }
    }

    /// The two directions and a handle, each of which may go to a thread of its own.
    pub fn split(self) -> (ChannelReader, ChannelWriter, Handle) {
        let handle = self.handle();
        let chunk = match self.shared.tls {
            Some(_) => vec![0; CHUNK],
            None => Vec::new(),
        };
        let reader = ChannelReader {
            shared: Arc::clone(&self.shared),
            chunk,
            at: 0,
            end: 0,
            failed: None,
            begun: false,
        };
        let writer = ChannelWriter {
            shared: self.shared,
        };
        (reader, writer, handle)
    }
}

/// A moment by which something has to be done.
#[derive(Clone, Copy)]
struct Deadline(Instant);

impl Deadline {
    fn left(self) -> Result<Duration> {
        let left = self.0.saturating_duration_since(Instant::now());
        if left.is_zero() {
            bail!("the other host did not answer in time");
        }
        Ok(left)
    }

    fn reads(self, stream: &TcpStream) -> Result<()> {
        Ok(stream.set_read_timeout(Some(self.left()?))?)
    }

    fn writes(self, stream: &TcpStream) -> Result<()> {
        Ok(stream.set_write_timeout(Some(self.left()?))?)
    }
}

/// Trouble with the socket before the channel stands.
fn unheard(e: io::Error) -> anyhow::Error {
    match e.kind() {
        ErrorKind::WouldBlock | ErrorKind::TimedOut => {
            anyhow!("the other host did not answer in time")
        }
        _ => anyhow!("the connection broke ({e})"),
    }
}

/// A handshake on its way.
struct Shake<'a> {
    stream: &'a TcpStream,
    conn: &'a mut Connection,
    identity: &'a Identity,
    deadline: Deadline,
    /// First byte from the other side.
    first: Option<u8>,
}

impl Shake<'_> {
    fn run(&mut self) -> Result<()> {
        while self.conn.is_handshaking() {
            self.send()?;
            if self.conn.is_handshaking() {
                self.receive()?;
            }
        }
        self.send()
    }

    fn send(&mut self) -> Result<()> {
        while self.conn.wants_write() {
            self.deadline.writes(self.stream)?;
            match self.conn.write_tls(&mut self.stream) {
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                other => drop(other.map_err(unheard)?),
            }
        }
        Ok(())
    }

    fn receive(&mut self) -> Result<()> {
        // A handshake fits; what comes behind it waits in the socket.
        let mut bytes = [0; 4096];
        self.deadline.reads(self.stream)?;
        let n = match self.stream.read(&mut bytes) {
            Err(e) if e.kind() == ErrorKind::Interrupted => return Ok(()),
            Err(e) if e.kind() == ErrorKind::ConnectionReset => 0,
            other => other.map_err(unheard)?,
        };
        if n == 0 {
            bail!(
                "the other host closed the connection during the handshake: look at what it says there, and \
                 whether it has keys"
            );
        }
        let mut rest = bytes.get(..n).unwrap_or(&[]);
        self.first = self.first.or(rest.first().copied());
        while !rest.is_empty() {
            let taken = self.conn.read_tls(&mut rest).map_err(unheard)?;
            if let Err(e) = self.conn.process_new_packets() {
                // The alert that says why, as far as it goes without waiting.
                let mut alert = Vec::new();
                while self.conn.wants_write() && self.conn.write_tls(&mut alert).is_ok() {}
                let _ = send(
                    self.stream,
                    &alert,
                    SendFlags::DONTWAIT | SendFlags::NOSIGNAL,
                );
                return Err(self.explain(e));
            }
            if taken == 0 {
                break;
            }
        }
        Ok(())
    }

    fn read_byte(&mut self) -> Result<u8> {
        let mut byte = [0];
        loop {
            match self.conn.reader().read(&mut byte) {
                Ok(1) => return Ok(byte[0]),
                Err(e) if e.kind() == ErrorKind::WouldBlock => self.receive()?,
                _ => bail!("the other host closed the connection after the handshake"),
            }
        }
    }

    fn write_byte(&mut self, byte: u8) -> Result<()> {
        self.conn.writer().write_all(&[byte])?;
        self.send()
    }

    /// What an error of the handshake means to whoever set up the two hosts.
    fn explain(&self, e: TlsError) -> anyhow::Error {
        let (own, peer) = (self.identity.name(), self.identity.peer());
        match e {
            _ if !self.first.is_some_and(|b| (0x14..=0x17).contains(&b)) => anyhow!(
                "the other side speaks plain text, not TLS: it has no keys; give keys to both hosts \
                 (remusctl keys) or to neither"
            ),
            TlsError::InvalidCertificate(e) => match untimely(&e) {
                Some(Untimely::Early { start, now }) => anyhow!(
                    "the other host's certificate is valid only from {start} on, and this host's clock says \
                     {now}: set the clocks of both"
                ),
                Some(Untimely::Late { end, now }) => anyhow!(
                    "the other host's certificate was valid until {end}, and this host's clock says {now}: set \
                     the clock if it is wrong, else {MAKE}"
                ),
                None => match e {
                    CertificateError::NotValidForName
                    | CertificateError::NotValidForNameContext { .. } => anyhow!(
                        "the other host has the same half of the pair as this one, {own}: install {peer} \
                         there"
                    ),
                    _ => anyhow!(
                        "the other host's certificate is not of this pair, {own} and {peer}: {MAKE}"
                    ),
                },
            },
            TlsError::NoCertificatesPresented => {
                anyhow!("the other side shows no certificate: {MAKE}")
            }
            TlsError::AlertReceived(alert) => match alert {
                AlertDescription::UnknownCA | AlertDescription::DecryptError => anyhow!(
                    "the other host does not accept this host's certificate, it is of another pair: {MAKE}"
                ),
                AlertDescription::BadCertificate => anyhow!(
                    "the other host does not accept the name {own}: it has the same half of the pair; \
                     install {peer} there"
                ),
                AlertDescription::CertificateExpired => anyhow!(
                    "the other host says that this host's certificate is not valid now: set the clocks of both"
                ),
                AlertDescription::ProtocolVersion => {
                    anyhow!("the other side does not speak TLS 1.3: it is not a Remus")
                }
                other => anyhow!("the other side ended the handshake ({other:?})"),
            },
            TlsError::PeerIncompatible(
                PeerIncompatible::ServerDoesNotSupportTls12Or13
                | PeerIncompatible::Tls13RequiredForQuic
                | PeerIncompatible::SupportedVersionsExtensionRequired
                | PeerIncompatible::Tls12NotOffered
                | PeerIncompatible::Tls12NotOfferedOrEnabled
                | PeerIncompatible::ServerTlsVersionIsDisabledByOurConfig,
            ) => anyhow!("the other side does not speak TLS 1.3: it is not a Remus"),
            other => anyhow!("the handshake failed: {other}"),
        }
    }
}

impl Shared {
    /// Sends what the connection itself wants to send, as far as that goes without waiting. Whoever
    /// holds `out` meanwhile does it when it is done.
    fn talk(&self, tls: &Tls) {
        while lock(&tls.conn).wants_write() {
            let mut out = match tls.out.try_lock() {
                Ok(out) => out,
                Err(TryLockError::Poisoned(e)) => e.into_inner(),
                Err(TryLockError::WouldBlock) => return,
            };
            if out.take(&mut lock(&tls.conn)).is_err() {
                return;
            }
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            while !out.left().is_empty() {
                match send(&self.stream, out.left(), flags) {
                    Ok(n) => out.took(n),
                    // It goes before what is written next.
                    Err(_) => return,
                }
            }
        }
    }

    /// Sends all records that are left.
    fn drain(&self, out: &mut Out) -> io::Result<()> {
        while !out.left().is_empty() {
            match (&self.stream).write(out.left()) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(n) => out.took(n),
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }
}

/// The receiving side. A read fails with [`ErrorKind::WouldBlock`] when the read timeout has passed
/// and nothing came.
#[derive(Debug)]
pub struct ChannelReader {
    shared: Arc<Shared>,
    /// What came from the socket; `at` to `end` of it is not decrypted yet.
    chunk: Vec<u8>,
    at: usize,
    end: usize,
    /// What came last is not what the other side sent.
    failed: Option<TlsError>,
    /// Something was read; of a plain channel only.
    begun: bool,
}

impl ChannelReader {
    /// Decrypts what is there into `buf`. None: more has to come first.
    fn decrypt(&mut self, tls: &Tls, buf: &mut [u8]) -> io::Result<Option<usize>> {
        let mut conn = lock(&tls.conn);
        let mut n = 0;
        while let Some(room) = buf.get_mut(n..).filter(|r| !r.is_empty()) {
            match conn.reader().read(room) {
                // The other side has said that this is all.
                Ok(0) => return Ok(Some(n)),
                Ok(more) => {
                    n += more;
                    continue;
                }
                Err(e) if e.kind() == ErrorKind::WouldBlock => {}
                Err(e) => return Err(e),
            }
            if let Some(e) = self.failed.clone().filter(|_| n == 0) {
                return Err(io::Error::new(ErrorKind::InvalidData, e));
            }
            let mut rest = self.chunk.get(self.at..self.end).unwrap_or(&[]);
            if rest.is_empty() || self.failed.is_some() {
                break;
            }
            let taken = conn.read_tls(&mut rest)?;
            self.at += taken;
            if let Err(e) = conn.process_new_packets() {
                // What came before it can still be had.
                self.failed = Some(e);
            }
            if taken == 0 {
                break;
            }
        }
        Ok((n > 0).then_some(n))
    }

    fn read_plain(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = (&self.shared.stream).read(buf)?;
        if !self.begun && n > 0 {
            self.begun = true;
            if buf.get(..n.min(2)) == ALERT.get(..n.min(2)) {
                let why = "the other host has keys, and this one has none: give them to both \
                           (remusctl keys) or to neither";
                return Err(io::Error::new(ErrorKind::InvalidData, why));
            }
        }
        Ok(n)
    }
}

impl Read for ChannelReader {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if buf.is_empty() {
            return Ok(0);
        }
        let shared = Arc::clone(&self.shared);
        let Some(tls) = &shared.tls else {
            return self.read_plain(buf);
        };
        let start = Instant::now();
        let mut crumbs = false;
        loop {
            let got = self.decrypt(tls, buf);
            shared.talk(tls);
            if let Some(n) = got? {
                return Ok(n);
            }
            // The socket's timeout begins anew with all that comes, and a record may come in crumbs.
            if crumbs {
                let timeout = shared.stream.read_timeout()?;
                if timeout.is_some_and(|t| start.elapsed() >= t) {
                    return Err(ErrorKind::WouldBlock.into());
                }
            }
            crumbs = true;
            (self.at, self.end) = (0, 0);
            match (&shared.stream).read(&mut self.chunk)? {
                0 => {
                    let why = "the connection ended in the middle";
                    return Err(io::Error::new(ErrorKind::UnexpectedEof, why));
                }
                n => self.end = n,
            }
        }
    }
}

/// The sending side. What a write took is on its way, or goes out before the next write or flush
/// does; a write that fails took nothing.
#[derive(Debug)]
pub struct ChannelWriter {
    shared: Arc<Shared>,
}

impl Write for ChannelWriter {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let Some(tls) = &self.shared.tls else {
            return (&self.shared.stream).write(buf);
        };
        let taken = {
            let mut out = lock(&tls.out);
            self.shared.drain(&mut out)?;
            let now = buf.get(..CHUNK).unwrap_or(buf);
            let taken = {
                let mut conn = lock(&tls.conn);
                let taken = conn.writer().write(now)?;
                out.take(&mut conn)?;
                taken
            };
            match self.shared.drain(&mut out) {
                Err(e) if !matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                    return Err(e);
                }
                // The rest goes before the next write, which fails if it cannot.
                _ => taken,
            }
        };
        self.shared.talk(tls);
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        if let Some(tls) = &self.shared.tls {
            self.shared.drain(&mut lock(&tls.out))?;
            self.shared.talk(tls);
        }
        Ok(())
    }
}

/// A handle on a channel that other threads read and write.
#[derive(Clone, Debug)]
pub struct Handle {
    shared: Arc<Shared>,
}

impl Handle {
    /// Ends the channel: whoever waits to read or write on it is woken. The other side is told that
    /// this is all, if that goes without waiting.
    pub fn shutdown(&self) {
        if let Some(tls) = &self.shared.tls {
            lock(&tls.conn).send_close_notify();
            self.shared.talk(tls);
        }
        let _ = self.shared.stream.shutdown(Shutdown::Both);
    }

    /// Ends the channel and throws away what is still on its way out.
    pub fn cut(&self) {
        let stream = &self.shared.stream;
        let _ = set_socket_linger(stream, Some(Duration::ZERO));
        let _ = stream.shutdown(Shutdown::Both);
        // Resets the connection now, and not only when the last descriptor is closed. The kernel
        // refuses while a thread still waits on the socket, and then the closing does it.
        let _ = connect_unspec(stream);
    }

    /// Whether the other side has closed the channel, even if there is more to read before its end.
    pub fn is_closed(&self) -> bool {
        let mut fds = [PollFd::new(&self.shared.stream, PollFlags::RDHUP)];
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        // Interrupted: there was no time to wait, so this cannot be.
        !matches!(poll(&mut fds, Some(&now)), Ok(0))
    }

    /// The channel again, where nothing of it was split off and kept.
    #[cfg(test)]
    pub fn into_channel(self) -> Channel {
        Channel {
            shared: self.shared,
        }
    }

    /// How long a read may wait.
    pub fn set_read_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        self.shared.stream.set_read_timeout(timeout)
    }

    /// How long a write may wait.
    pub fn set_write_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        self.shared.stream.set_write_timeout(timeout)
    }

    /// Address of the other side.
    pub fn peer_addr(&self) -> SocketAddr {
        self.shared.peer
    }

    /// Name that the other side has shown, with TLS.
    pub fn peer_name(&self) -> Option<&str> {
        self.shared.peer_name.as_deref()
    }

    /// The socket, to wait for it and to set it up; what it carries is the channel's.
    pub fn stream(&self) -> &TcpStream {
        &self.shared.stream
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::thread;
    use std::time::SystemTime;

    use super::*;
    use crate::peer::identity::Pair;

    const SECOND: Duration = Duration::from_secs(1);
    /// Nothing takes nearly as long, even on a busy host.
    const PATIENCE: Duration = Duration::from_secs(60);

    fn sockets() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let one = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (one, listener.accept().unwrap().0)
    }

    fn ways(pair: &Pair) -> (Way, Way) {
        let way = |n: usize| {
            let identity = Identity::parse(pair.halves[n].1.as_bytes()).unwrap();
            Way::Tls(Arc::new(identity))
        };
        (way(0), way(1))
    }

    fn tls() -> (Way, Way) {
        ways(&Pair::make("alpha", "beta").unwrap())
    }

    type Both = (Result<Channel>, Result<Channel>);

    /// What both sides make of sockets that are joined somehow.
    fn meet_on(one: TcpStream, other: TcpStream, ways: &(Way, Way), patience: Duration) -> Both {
        thread::scope(|s| {
            let server = s.spawn(|| Channel::accept(other, &ways.1, patience));
            let client = Channel::connect(one, &ways.0, patience);
            if let (Way::Plain, Ok(channel)) = (&ways.0, &client) {
                // Someone has to speak first.
                (&channel.shared.stream).write_all(b"x").unwrap();
            }
            (client, server.join().unwrap())
        })
    }

    fn meet(ways: &(Way, Way)) -> Both {
        let (one, other) = sockets();
        meet_on(one, other, ways, PATIENCE)
    }

    fn channels(ways: &(Way, Way)) -> (Channel, Channel) {
        let (one, other) = meet(ways);
        (one.unwrap(), other.unwrap())
    }

    fn text<T: std::fmt::Debug>(result: Result<T>) -> String {
        format!("{:#}", result.unwrap_err())
    }

    /// Carries bytes from one socket to another, changed by `f`, which may wait; ends with `f`.
    fn relay(
        from: &TcpStream,
        to: &TcpStream,
        mut f: impl FnMut(&mut Vec<u8>) -> bool + Send + 'static,
    ) {
        let (mut from, mut to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
        thread::spawn(move || {
            let mut bytes = [0; 65536];
            while let Ok(n @ 1..) = from.read(&mut bytes) {
                let mut bytes = bytes[..n].to_vec();
                let go_on = f(&mut bytes);
                if to.write_all(&bytes).is_err() || !go_on {
                    break;
                }
            }
            let _ = to.shutdown(Shutdown::Write);
        });
    }

    /// How many of the next `bytes` belong to the first `limit` since `armed` was set.
    fn first(limit: usize, armed: &AtomicBool, seen: &mut usize, bytes: &[u8]) -> Option<usize> {
        let before = *seen;
        if !armed.load(Ordering::SeqCst) {
            return None;
        }
        *seen += bytes.len();
        (*seen > limit).then(|| limit.saturating_sub(before))
    }

    #[test]
    fn both_ways() {
        for ways in [tls(), (Way::Plain, Way::Plain)] {
            let (one, other) = channels(&ways);
            let name = one.handle().peer_name().map(str::to_owned);
            let known = match &ways.0 {
                Way::Plain => None,
                Way::Tls(identity) => Some(identity.peer()),
            };
            assert_eq!(name.as_deref(), known);
            assert_eq!(
                one.handle().peer_addr(),
                other.handle().stream().local_addr().unwrap()
            );
            let (mut r1, mut w1, h1) = one.split();
            let (mut r2, mut w2, h2) = other.split();
            if name.is_none() {
                r2.read_exact(&mut [0]).unwrap();
            }
            w1.write_all(b"hello").unwrap();
            w2.write_all(b"welcome").unwrap();
            let mut bytes = [0; 7];
            r2.read_exact(&mut bytes[..5]).unwrap();
            assert_eq!(&bytes[..5], b"hello");
            r1.read_exact(&mut bytes).unwrap();
            assert_eq!(&bytes, b"welcome");
            assert!(!h2.is_closed());
            h1.shutdown();
            assert_eq!(r2.read(&mut bytes).unwrap(), 0);
            assert!(h2.is_closed());
            assert!(w1.write_all(b"x").and_then(|()| w1.flush()).is_err());
        }
    }

    /// Much at once in both directions arrives as it was sent.
    #[test]
    fn bulk() {
        let (one, other) = channels(&tls());
        let byte = |i: usize, salt: u8| (i as u8).wrapping_mul(31) ^ (i >> 8) as u8 ^ salt;
        let (size, count) = ((1 << 20) + 77, 16);
        thread::scope(|s| {
            let go = |channel: Channel, out: u8, into: u8| {
                let (mut reader, mut writer, handle) = channel.split();
                s.spawn(move || {
                    for i in 0..count {
                        let bytes: Vec<u8> = (0..size).map(|b| byte(b, out + i)).collect();
                        writer.write_all(&bytes).unwrap();
                        if i == count / 2 {
                            // New keys in the middle of all that are nothing special.
                            let tls = writer.shared.tls.as_ref().unwrap();
                            lock(&tls.conn).refresh_traffic_keys().unwrap();
                        }
                    }
                    writer.flush().unwrap();
                });
                s.spawn(move || {
                    for i in 0..count {
                        let mut bytes = vec![0; size];
                        reader.read_exact(&mut bytes).unwrap();
                        let mut all = bytes.iter().enumerate();
                        assert!(all.all(|(at, b)| *b == byte(at, into + i)), "part {i}");
                    }
                    drop(handle);
                });
            };
            go(one, 1, 101);
            go(other, 101, 1);
        });
    }

    /// How fast it is; run it with --release --nocapture --ignored.
    #[test]
    #[ignore = "measures"]
    fn speed() {
        for ways in [tls(), (Way::Plain, Way::Plain)] {
            let (one, other) = channels(&ways);
            let (_, mut writer, handle) = one.split();
            let total: usize = 4 << 30;
            let reading = thread::spawn(move || {
                let (mut reader, ..) = other.split();
                let mut bytes = vec![0; 1 << 20];
                let mut n = 0;
                while n < total {
                    n += reader.read(&mut bytes).unwrap();
                }
            });
            let start = Instant::now();
            let bytes = vec![7; 1 << 20];
            for _ in 0..total >> 20 {
                writer.write_all(&bytes).unwrap();
            }
            writer.flush().unwrap();
            reading.join().unwrap();
            let rate = total as f64 / start.elapsed().as_secs_f64() / 1e9;
            println!("{}: {rate:.2} GB/s", ways.0.word());
            handle.shutdown();
        }
    }

    /// A full socket in one direction keeps nothing from going in the other, and what was written
    /// then comes whole when there is room again.
    #[test]
    fn a_full_socket_hinders_nobody_else() {
        let (one, other) = channels(&tls());
        let (mut r1, mut w1, h1) = one.split();
        let (mut r2, mut w2, _h2) = other.split();
        let (full, is_full) = std::sync::mpsc::channel();
        let filling = thread::spawn(move || {
            let mut n = 0_usize;
            let bytes = vec![5; 1 << 20];
            h1.set_write_timeout(Some(SECOND)).unwrap();
            let e = loop {
                match w1.write(&bytes) {
                    Ok(taken) => n += taken,
                    Err(e) => break e,
                }
            };
            assert_eq!(e.kind(), ErrorKind::WouldBlock);
            h1.set_write_timeout(Some(10 * PATIENCE)).unwrap();
            full.send(()).unwrap();
            // Until there is room.
            n += w1.write(&bytes).unwrap();
            w1.write_all(b"end").unwrap();
            w1.flush().unwrap();
            n
        });
        is_full.recv().unwrap();
        for i in 0..50 {
            w2.write_all(&[i; 1000]).unwrap();
            let mut bytes = [0; 1000];
            r1.read_exact(&mut bytes).unwrap();
            assert_eq!(bytes, [i; 1000]);
        }
        assert!(!filling.is_finished(), "it was not full all the time");
        let (mut bytes, mut piece) = (Vec::new(), vec![0; 1 << 16]);
        while !bytes.ends_with(b"end") {
            let n = r2.read(&mut piece).unwrap();
            assert!(n > 0);
            bytes.extend(&piece[..n]);
        }
        let n = filling.join().unwrap();
        assert_eq!(bytes.len(), n + 3);
        assert!(bytes[..n].iter().all(|b| *b == 5));
    }

    #[test]
    fn silence_and_crumbs() {
        let timeout = Duration::from_millis(200);
        for ways in [tls(), (Way::Plain, Way::Plain)] {
            let (one, other) = channels(&ways);
            let (mut reader, _w, handle) = one.split();
            handle.set_read_timeout(Some(timeout)).unwrap();
            let e = reader.read(&mut [0; 10]).unwrap_err();
            assert_eq!(e.kind(), ErrorKind::WouldBlock);
            drop(other);
        }
        // A record of which a byte comes now and then is silence too.
        let ((a, b), (c, d)) = (sockets(), sockets());
        let (armed, mut seen) = (Arc::new(AtomicBool::new(false)), 0);
        let begun = Arc::clone(&armed);
        relay(&b, &c, move |bytes| {
            if let Some(n) = first(4000, &begun, &mut seen, bytes) {
                bytes.truncate(n);
            }
            true
        });
        let back = c.try_clone().unwrap();
        relay(&back, &b, |_| true);
        let (one, other) = meet_on(a, d, &tls(), PATIENCE);
        let (_r, mut writer, _h) = one.unwrap().split();
        let (mut reader, _w, handle) = other.unwrap().split();
        armed.store(true, Ordering::SeqCst);
        writer.write_all(&[1; 9000]).unwrap();
        let over = Arc::new(AtomicBool::new(false));
        let enough = Arc::clone(&over);
        // Fewer than what the record lacks, and they take a minute.
        let crumbs = thread::spawn(move || {
            (0..1200).any(|_| {
                thread::sleep(timeout / 4);
                (&c).write_all(&[0]).unwrap();
                enough.load(Ordering::SeqCst)
            })
        });
        handle.set_read_timeout(Some(timeout)).unwrap();
        let e = reader.read(&mut [0; 10]).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::WouldBlock);
        over.store(true, Ordering::SeqCst);
        assert!(crumbs.join().unwrap(), "it read as long as something came");
    }

    /// An end that the other side did not mean is not taken for one, nor are other bytes.
    #[test]
    fn cut_off_and_changed() {
        for (kind, change) in [
            (ErrorKind::UnexpectedEof, false),
            (ErrorKind::InvalidData, true),
        ] {
            let ((a, b), (c, d)) = (sockets(), sockets());
            let (armed, mut seen) = (Arc::new(AtomicBool::new(false)), 0);
            let begun = Arc::clone(&armed);
            relay(&b, &c, move |bytes| {
                let Some(n) = first(3000, &begun, &mut seen, bytes) else {
                    return true;
                };
                match change {
                    true => bytes[n] ^= 1,
                    false => bytes.truncate(n),
                }
                change
            });
            relay(&c, &b, |_| true);
            let (one, other) = meet_on(a, d, &tls(), PATIENCE);
            let (_r, mut writer, _h) = one.unwrap().split();
            let (mut reader, mut back, handle) = other.unwrap().split();
            handle.set_read_timeout(Some(PATIENCE)).unwrap();
            armed.store(true, Ordering::SeqCst);
            writer.write_all(&[1; 9000]).unwrap();
            assert_eq!(reader.read(&mut [0; 10]).unwrap_err().kind(), kind);
            if change {
                assert_eq!(reader.read(&mut [0; 10]).unwrap_err().kind(), kind);
                let _ = back.write(b"x");
            }
        }
    }

    #[test]
    fn who_waits_is_woken() {
        for end in [Handle::shutdown, Handle::cut] {
            let (one, other) = channels(&tls());
            let (mut reader, mut writer, handle) = one.split();
            let reading = thread::spawn(move || reader.read(&mut [0]).map_or(true, |n| n == 0));
            let writing = thread::spawn(move || loop {
                if writer.write(&[0; 1 << 16]).is_err() {
                    return true;
                }
            });
            thread::sleep(SECOND / 2);
            end(&handle);
            assert!(reading.join().unwrap() && writing.join().unwrap());
            drop(other);
        }
    }

    /// What is on its way out when a channel is cut never arrives.
    #[test]
    fn a_cut_throws_away() {
        let (one, other) = channels(&tls());
        let (_r, mut writer, handle) = one.split();
        handle.set_write_timeout(Some(SECOND / 5)).unwrap();
        let mut sent = 0;
        while let Ok(n) = writer.write(&[0; 1 << 16]) {
            sent += n;
        }
        handle.cut();
        // The descriptor is still open here.
        let (mut reader, _w, h) = other.split();
        h.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut came = 0;
        let mut bytes = vec![0; 1 << 16];
        let e = loop {
            match reader.read(&mut bytes) {
                Ok(0) => panic!("a clean end"),
                Ok(n) => came += n,
                Err(e) => break e,
            }
        };
        assert_ne!(e.kind(), ErrorKind::WouldBlock);
        assert!(came < sent, "{came} of {sent}");
    }

    #[test]
    fn keys_of_another_pair() {
        let mixed = (tls().0, tls().1);
        let (one, other) = meet(&mixed);
        for said in [text(one), text(other)] {
            assert!(
                said.contains("pair") && said.contains("keys make"),
                "{said}"
            );
        }
        // A standby that would be fooled does not fool the primary.
        let (one, other) = meet(&(tls().0, tls().1));
        assert!(one.is_err() && other.is_err());
    }

    /// Nobody is taken for the other host with this host's own half.
    #[test]
    fn the_same_half_twice() {
        let (a, _) = tls();
        let (one, other) = meet(&(a.clone(), a));
        for said in [text(one), text(other)] {
            assert!(said.contains("install beta there"), "{said}");
        }
    }

    /// A client that does not check the server is looked at all the same, and learns of it.
    #[test]
    fn a_server_looks_itself() {
        let pair = Pair::make("alpha", "beta").unwrap();
        let (a, b) = ways(&pair);
        let (one, other) = sockets();
        let server = thread::spawn(move || Channel::accept(other, &b, PATIENCE));
        // It shows a certificate of another pair with the right names, and believes everything.
        let (Way::Tls(right), Way::Tls(wrong)) = (a, tls().0) else {
            panic!();
        };
        let mut client = ClientConnection::new(
            {
                let mut config = (*right.client()).clone();
                config.client_auth_cert_resolver =
                    Arc::clone(&wrong.client().client_auth_cert_resolver);
                Arc::new(config)
            },
            right.other_name(),
        )
        .unwrap()
        .into();
        let mut shake = Shake {
            stream: &one,
            conn: &mut client,
            identity: &right,
            deadline: Deadline(Instant::now() + PATIENCE),
            first: None,
        };
        shake.run().unwrap();
        let said = text(shake.read_byte());
        assert!(
            said.contains("does not accept this host's certificate"),
            "{said}"
        );
        let said = text(server.join().unwrap());
        assert!(
            said.contains("is not of this pair, beta and alpha"),
            "{said}"
        );
    }

    #[test]
    fn only_one_has_keys() {
        let (a, b) = tls();
        let (one, other) = meet(&(a, Way::Plain));
        assert!(text(one).contains("it has no keys"));
        assert!(text(other).contains("has keys, and this one has none"));
        let (one, other) = sockets();
        let server = thread::spawn(move || Channel::accept(other, &b, PATIENCE));
        let (mut reader, mut writer, _h) = Channel::connect(one, &Way::Plain, PATIENCE)
            .unwrap()
            .split();
        writer.write_all(b"RMUS and so on, a frame").unwrap();
        let e = reader.read(&mut [0; 36]).unwrap_err();
        assert!(
            e.to_string().contains("has keys, and this one has none"),
            "{e}"
        );
        assert!(text(server.join().unwrap()).contains("it has no keys"));
    }

    /// Clocks: each side says what it finds of the other's certificate.
    #[test]
    fn out_of_time() {
        let (day, now) = (Duration::from_secs(86400), SystemTime::now());
        let good = ways(&Pair::make("alpha", "beta").unwrap());
        for (start, end, why) in [
            (now + day, now + 2 * day, "valid only from"),
            (now - 2 * day, now - day, "was valid until"),
        ] {
            let bad = ways(&Pair::make_for("alpha", "beta", start, end).unwrap());
            // One's own are looked at before anything is sent.
            let (one, _) = sockets();
            assert!(Channel::connect(one, &bad.0, PATIENCE).is_err());
            let Way::Tls(identity) = &good.0 else {
                panic!();
            };
            let (one, _other) = sockets();
            let mut conn = ClientConnection::new(identity.client(), identity.other_name())
                .unwrap()
                .into();
            let shake = Shake {
                stream: &one,
                conn: &mut conn,
                identity,
                deadline: Deadline(Instant::now()),
                first: Some(HANDSHAKE),
            };
            let Way::Tls(bad) = &bad.0 else {
                panic!();
            };
            let e = bad.verify_own().unwrap_err();
            let said = shake.explain(e).to_string();
            assert!(said.contains(why) && said.contains("clock"), "{said}");
        }
    }

    #[test]
    fn no_longer_than_patience() {
        let patience = SECOND / 2;
        let start = Instant::now();
        let check = |said: String| {
            assert!(said.contains("did not answer in time"), "{said}");
            assert!(start.elapsed() < PATIENCE, "{:?}", start.elapsed());
        };
        let (a, b) = tls();
        thread::scope(|s| {
            // Nothing comes at all.
            for way in [&a, &Way::Plain] {
                s.spawn(|| {
                    let (one, other) = sockets();
                    check(text(Channel::accept(one, way, patience)));
                    drop(other);
                });
            }
            s.spawn(|| {
                let (one, other) = sockets();
                check(text(Channel::connect(one, &a, patience)));
                drop(other);
            });
            // The right bytes, but one now and then.
            s.spawn(|| {
                let ((one, two), (three, four)) = (sockets(), sockets());
                relay(&two, &three, |bytes| {
                    bytes.truncate(1);
                    true
                });
                let more = three.try_clone().unwrap();
                thread::spawn(move || {
                    thread::sleep(SECOND / 20);
                    while (&more).write_all(&[3]).is_ok() {
                        thread::sleep(SECOND / 20);
                    }
                });
                let client = s.spawn(|| Channel::connect(one, &a, patience));
                check(text(Channel::accept(four, &b, patience)));
                assert!(client.join().unwrap().is_err());
            });
        });
    }

    #[test]
    fn keys_that_are_no_good_are_not_passed_over() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("default.pem");
        assert!(Way::of(Some(&path)).is_err());
        std::fs::write(&path, "x").unwrap();
        assert!(Way::of(Some(&path)).is_err());
        assert!(matches!(Way::of(None), Ok(Way::Plain)));
    }
}
