// SPDX-License-Identifier: GPL-2.0-or-later

//! Frames: what the two hosts say to each other, and the page records that the RAM device hands out.
//!
//! # The streams
//!
//! Two ordered byte streams (TCP, with TLS 1.3 within), both opened by the primary: *control* for what
//! is small and must not wait, *data* for the epochs. Each side sends frames: a [`Header`] of
//! [`HEADER_SIZE`] bytes, then `length` bytes of payload, at most [`PAYLOAD_MAX`]. All numbers are
//! little endian. The header carries a CRC32C of the payload and one of itself, so the length is
//! known to be right before anything is allocated or read for it.
//!
//! ```text
//!  offset  bytes
//!       0      4  magic "RMUS"
//!       4      2  version, 2
//!       6      2  kind
//!       8      8  generation
//!      16      8  epoch (0 where the kind has none)
//!      24      4  length of the payload
//!      28      4  CRC32C of the payload
//!      32      4  CRC32C of bytes 0 to 31
//! ```
//!
//! # The conversation
//!
//! ```text
//!  primary                                              standby
//!     │ control: Hello (memory, name, run, timeout)        │
//!     │ ─────────────────────────────────────────────────▶ │ fits? else Error or TakenOver, and close
//!     │ ◀──────────── control: Welcome (token, epoch held) │
//!     │ data: Attach (token)                               │
//!     │ ─────────────────────────────────────────────────▶ │
//!     │ data: EpochBegin N (base)                          │
//!     │       Pages N …                                    │ staged; with base 0 written at once, as
//!     │       DeviceState N …                              │ there is nothing yet to resume from
//!     │       EpochEnd N (how many pages, bytes of state)  │
//!     │ ─────────────────────────────────────────────────▶ │ whole? else Error, and close
//!     │ ◀────────────────────────────────── control: Ack N │ then N is applied
//!     │                                                    │
//!     │ ◀────────── control: Heartbeat, both ways ───────▶ │ at any time
//!     │ ◀──────────── control: Bye, Error ───────────────▶ │ the last frame of its sender
//!     │ control: Handover N ─────────────────────────────▶ │ a planned switch: N is committed
//!     │ ◀──────────────────────────────── control: Resumed │ the guest runs there
//! ```
//!
//! What the receiver of epochs accepts on the data stream; all else is an error that ends both:
//!
//! ```text
//!            EpochBegin N, base = newest whole epoch
//!  Attach ──▶ idle ─────────────────────────────────▶ in N ──┐ Pages N,
//!              ▲                                      │  ▲   │ DeviceState N
//!              │   EpochEnd N with device state:      │  └───┘
//!              ├── N is whole: Ack N ◀────────────────┤
//!              │   EpochEnd N without, and base 0:    │
//!              └── a pass of the first copy ◀─────────┘   end of stream anywhere: N is dropped
//! ```
//!
//! - `base` is the epoch on top of which the pages are to be put. It has to be the newest that the
//!   standby holds whole, so that no epoch can be missed; 0 if it holds none. Then the first copy comes
//!   in passes: each is sent while the guest runs and holds what the one before has missed; the last one
//!   has the device state.
//! - Page numbers ascend within a [`Kind::Pages`] frame.
//! - `Ack N` is cumulative, and is the only thing that allows the primary to commit N.
//! - The primary stamps heartbeats with its own clock, and the standby sends the newest stamp that it
//!   has seen back with heartbeats and acknowledgements. The standby waits for its timeout after it has
//!   heard something on the control stream before it takes over, so until stamp + timeout it has not: the
//!   primary commits only before that (a lease, without clocks that agree). An acknowledgement that
//!   was long on its way, or that waited in a stopped process, releases nothing until a newer stamp
//!   is back.
//! - After `Bye` the standby does not take over. After `Error` from the primary it does at once: the
//!   primary commits nothing any more. After any other end it waits for the timeout: a primary of the
//!   same `run` may come back meanwhile, is told the newest epoch held, and goes on from there.
//! - Breaking changes bump [`VERSION`].

pub use crc32c::crc32c;
use remus_core::uapi::ram::{PAGE_SIZE, RECORD_SIZE};
use remus_core::uapi::NAME_MAX;

/// First bytes of every frame.
pub const MAGIC: [u8; 4] = *b"RMUS";
/// Version of the protocol.
pub const VERSION: u16 = 2;
/// Bytes in a frame's header.
pub const HEADER_SIZE: usize = 36;
/// Most bytes in a frame's payload.
pub const PAYLOAD_MAX: usize = 1 << 20;
/// Most page records in a frame.
pub const RECORDS_MAX: usize = PAYLOAD_MAX / RECORD_SIZE;

/// Why bytes are not what they should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WireError {
    /// Fewer bytes than the thing needs, or another number than announced.
    Length,
    /// Does not start with [`MAGIC`]: the peer speaks something else.
    Magic,
    /// The header was damaged on its way.
    HeaderChecksum,
    /// The peer speaks this version of the protocol, not ours.
    Version(u16),
    /// No such kind of frame.
    Kind(u16),
    /// More than [`PAYLOAD_MAX`] bytes of payload announced.
    TooLong(u32),
    /// The payload was damaged on its way.
    PayloadChecksum,
    /// A name is not UTF-8.
    Name,
}

impl core::fmt::Display for WireError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Self::Length => f.write_str("a message has the wrong length"),
            Self::Magic => f.write_str("the other side does not speak the Remus protocol"),
            Self::HeaderChecksum => f.write_str("a frame's header was damaged on its way"),
            Self::Version(v) => {
                write!(
                    f,
                    "the other side speaks version {v} of the protocol, this one {VERSION}"
                )
            }
            Self::Kind(k) => write!(f, "unknown kind of frame {k}"),
            Self::TooLong(n) => write!(f, "a frame of {n} bytes is longer than {PAYLOAD_MAX}"),
            Self::PayloadChecksum => f.write_str("a frame's content was damaged on its way"),
            Self::Name => f.write_str("a name is not UTF-8"),
        }
    }
}

impl core::error::Error for WireError {}

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Kind {
    /// Primary's first frame; payload [`Hello`].
    Hello = 1,
    /// Standby's answer to it; payload [`Welcome`].
    Welcome = 2,
    /// An epoch begins; payload [`EpochBegin`].
    EpochBegin = 3,
    /// Pages of the epoch; payload [`crate::pages`].
    Pages = 4,
    /// A piece of the epoch's device state; payload the bytes.
    DeviceState = 5,
    /// All of the epoch, or of a pass, was sent; payload [`EpochEnd`].
    EpochEnd = 6,
    /// The standby holds this epoch and all before it; payload [`Stamp`].
    Ack = 7,
    /// A sign of life; payload [`Stamp`].
    Heartbeat = 8,
    /// The sender ends the stream in good order; payload the reason, UTF-8.
    Bye = 9,
    /// The sender ends the stream because of an error; payload what it is, UTF-8.
    Error = 10,
    /// Primary's first frame on the data stream; payload [`Token`].
    Attach = 11,
    /// The primary has committed this epoch and stopped: take over from it now. No payload.
    Handover = 12,
    /// The guest runs on the standby, in the generation of the header. No payload.
    Resumed = 13,
    /// Standby's answer to [`Kind::Hello`]: the domain runs here by now; payload what to do, UTF-8.
    TakenOver = 14,
    /// Primary's first frame on the disk stream; payload [`crate::disk::Disks`].
    AttachDisks = 15,
    /// Standby's answer to it: its images are whole and of the epoch of the header, or, if that is 0,
    /// need a first copy. No payload.
    DiskState = 16,
    /// Standby's, before a first copy: what its images have; payload [`crate::disk::Sums`].
    DiskSums = 17,
    /// Changes of the disks; payload [`crate::disk`]. Epoch 0: part of the first copy.
    DiskChanges = 18,
    /// All changes before this frame belong to the epoch of the header, or to one before. No payload.
    DiskSeal = 19,
    /// Standby's: the epoch of the header is in its images. No payload.
    DiskApplied = 20,
}

impl Kind {
    /// The kind with this number; 0 is never one.
    pub const fn from_u16(number: u16) -> Option<Self> {
        Some(match number {
            1 => Self::Hello,
            2 => Self::Welcome,
            3 => Self::EpochBegin,
            4 => Self::Pages,
            5 => Self::DeviceState,
            6 => Self::EpochEnd,
            7 => Self::Ack,
            8 => Self::Heartbeat,
            9 => Self::Bye,
            10 => Self::Error,
            11 => Self::Attach,
            12 => Self::Handover,
            13 => Self::Resumed,
            14 => Self::TakenOver,
            15 => Self::AttachDisks,
            16 => Self::DiskState,
            17 => Self::DiskSums,
            18 => Self::DiskChanges,
            19 => Self::DiskSeal,
            20 => Self::DiskApplied,
            _ => return None,
        })
    }
}

/// The head of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// What the frame is.
    pub kind: Kind,
    /// Generation of the domain.
    pub generation: u64,
    /// The epoch that it is about, or 0.
    pub epoch: u64,
    /// Bytes of payload, at most [`PAYLOAD_MAX`].
    pub length: u32,
    /// CRC32C of the payload.
    pub checksum: u32,
}

impl Header {
    /// The header for `payload`. Fails with [`WireError::TooLong`].
    pub fn new(kind: Kind, generation: u64, epoch: u64, payload: &[u8]) -> Result<Self, WireError> {
        if payload.len() > PAYLOAD_MAX {
            return Err(WireError::TooLong(
                payload.len().min(u32::MAX as usize) as u32
            ));
        }
        let length = payload.len() as u32;
        Ok(Self {
            kind,
            generation,
            epoch,
            length,
            checksum: crc32c(payload),
        })
    }

    /// The header as bytes.
    pub fn encode(&self) -> [u8; HEADER_SIZE] {
        let mut bytes = [0; HEADER_SIZE];
        let mut to = Writer {
            bytes: &mut bytes,
            at: 0,
        };
        to.put(&MAGIC);
        to.put(&VERSION.to_le_bytes());
        to.put(&(self.kind as u16).to_le_bytes());
        to.put(&self.generation.to_le_bytes());
        to.put(&self.epoch.to_le_bytes());
        to.put(&self.length.to_le_bytes());
        to.put(&self.checksum.to_le_bytes());
        let check = crc32c(bytes.get(..HEADER_SIZE - 4).unwrap_or(&[]));
        Writer {
            bytes: &mut bytes,
            at: HEADER_SIZE - 4,
        }
        .put(&check.to_le_bytes());
        bytes
    }

    /// Reads a header from the start of `bytes`. What follows it is not looked at.
    pub fn decode(bytes: &[u8]) -> Result<Self, WireError> {
        let mut from = Reader { bytes };
        if from.take::<4>()? != MAGIC {
            return Err(WireError::Magic);
        }
        let version = u16::from_le_bytes(from.take()?);
        let kind = u16::from_le_bytes(from.take()?);
        let generation = u64::from_le_bytes(from.take()?);
        let epoch = u64::from_le_bytes(from.take()?);
        let length = u32::from_le_bytes(from.take()?);
        let checksum = u32::from_le_bytes(from.take()?);
        let check = u32::from_le_bytes(from.take()?);
        if crc32c(bytes.get(..HEADER_SIZE - 4).unwrap_or(&[])) != check {
            return Err(WireError::HeaderChecksum);
        }
        if version != VERSION {
            return Err(WireError::Version(version));
        }
        let kind = Kind::from_u16(kind).ok_or(WireError::Kind(kind))?;
        if length as usize > PAYLOAD_MAX {
            return Err(WireError::TooLong(length));
        }
        Ok(Self {
            kind,
            generation,
            epoch,
            length,
            checksum,
        })
    }

    /// Whether `payload` is the one that this header announces.
    pub fn check(&self, payload: &[u8]) -> Result<(), WireError> {
        if payload.len() != self.length as usize {
            Err(WireError::Length)
        } else if crc32c(payload) != self.checksum {
            Err(WireError::PayloadChecksum)
        } else {
            Ok(())
        }
    }
}

/// Most bytes in a [`Hello`].
pub const HELLO_MAX: usize = 32 + NAME_MAX;

/// Payload of [`Kind::Hello`]: what is to be protected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hello<'a> {
    /// Bytes of memory.
    pub memory: u64,
    /// Bytes in a page.
    pub page_size: u32,
    /// Silence after which the primary gives the standby up, in milliseconds.
    pub timeout_ms: u32,
    /// A random number of the primary's process: who comes back with it may go on where it was.
    pub run: u128,
    /// Name of the domain.
    pub name: &'a str,
}

impl<'a> Hello<'a> {
    /// Writes it to `out` and returns how many bytes that took. Fails with [`WireError::Length`]
    /// if the name is longer than a domain's can be.
    pub fn encode(&self, out: &mut [u8; HELLO_MAX]) -> Result<usize, WireError> {
        if self.name.len() > NAME_MAX {
            return Err(WireError::Length);
        }
        let mut to = Writer { bytes: out, at: 0 };
        to.put(&self.memory.to_le_bytes());
        to.put(&self.page_size.to_le_bytes());
        to.put(&self.timeout_ms.to_le_bytes());
        to.put(&self.run.to_le_bytes());
        to.put(self.name.as_bytes());
        Ok(to.at)
    }

    /// Reads it from a whole payload.
    pub fn decode(payload: &'a [u8]) -> Result<Self, WireError> {
        let mut from = Reader { bytes: payload };
        let memory = u64::from_le_bytes(from.take()?);
        let page_size = u32::from_le_bytes(from.take()?);
        let timeout_ms = u32::from_le_bytes(from.take()?);
        let run = u128::from_le_bytes(from.take()?);
        if from.bytes.is_empty() || from.bytes.len() > NAME_MAX {
            return Err(WireError::Length);
        }
        let name = core::str::from_utf8(from.bytes).map_err(|_| WireError::Name)?;
        Ok(Self {
            memory,
            page_size,
            timeout_ms,
            run,
            name,
        })
    }
}

/// Payload of [`Kind::Welcome`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Welcome {
    /// Silence after which the standby gives the primary up, in milliseconds.
    pub timeout_ms: u32,
    /// The newest epoch of this run that the standby holds whole, 0 if there is none.
    pub held: u64,
    /// What the data stream has to begin with.
    pub token: Token,
}

impl Welcome {
    /// As bytes.
    pub fn encode(&self) -> [u8; 28] {
        let mut bytes = [0; 28];
        let mut to = Writer {
            bytes: &mut bytes,
            at: 0,
        };
        to.put(&self.timeout_ms.to_le_bytes());
        to.put(&self.held.to_le_bytes());
        to.put(&self.token.encode());
        bytes
    }

    /// From a whole payload.
    pub fn decode(payload: &[u8]) -> Result<Self, WireError> {
        let mut from = Reader { bytes: payload };
        let timeout_ms = u32::from_le_bytes(from.take()?);
        let held = u64::from_le_bytes(from.take()?);
        let token = Token(u128::from_le_bytes(from.take()?));
        from.end()?;
        Ok(Self {
            timeout_ms,
            held,
            token,
        })
    }
}

/// Payload of [`Kind::Attach`]: the random number that ties the data stream to its control stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Token(pub u128);

impl Token {
    /// As bytes.
    pub fn encode(&self) -> [u8; 16] {
        self.0.to_le_bytes()
    }

    /// From a whole payload.
    pub fn decode(payload: &[u8]) -> Result<Self, WireError> {
        let mut from = Reader { bytes: payload };
        let token = u128::from_le_bytes(from.take()?);
        from.end()?;
        Ok(Self(token))
    }
}

/// Payload of [`Kind::Heartbeat`] and [`Kind::Ack`]: a time of the primary's clock, in microseconds from
/// whenever it likes; from the standby, the newest that it has seen; 0 if there is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp(pub u64);

impl Stamp {
    /// As bytes.
    pub fn encode(&self) -> [u8; 8] {
        self.0.to_le_bytes()
    }

    /// From a whole payload.
    pub fn decode(payload: &[u8]) -> Result<Self, WireError> {
        let mut from = Reader { bytes: payload };
        let stamp = u64::from_le_bytes(from.take()?);
        from.end()?;
        Ok(Self(stamp))
    }
}

/// Payload of [`Kind::EpochBegin`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EpochBegin {
    /// The epoch on top of which this one goes; 0 if it is the whole machine.
    pub base: u64,
}

impl EpochBegin {
    /// As bytes.
    pub fn encode(&self) -> [u8; 8] {
        self.base.to_le_bytes()
    }

    /// From a whole payload.
    pub fn decode(payload: &[u8]) -> Result<Self, WireError> {
        let mut from = Reader { bytes: payload };
        let base = u64::from_le_bytes(from.take()?);
        from.end()?;
        Ok(Self { base })
    }
}

/// Payload of [`Kind::EpochEnd`]: what must have arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EpochEnd {
    /// Pages sent; those that were rewritten with what they held are not.
    pub pages: u64,
    /// Bytes of device state; 0 for a pass of the first copy, after which nothing is whole.
    pub state: u64,
}

impl EpochEnd {
    /// As bytes.
    pub fn encode(&self) -> [u8; 16] {
        let mut bytes = [0; 16];
        let mut to = Writer {
            bytes: &mut bytes,
            at: 0,
        };
        to.put(&self.pages.to_le_bytes());
        to.put(&self.state.to_le_bytes());
        bytes
    }

    /// From a whole payload.
    pub fn decode(payload: &[u8]) -> Result<Self, WireError> {
        let mut from = Reader { bytes: payload };
        let pages = u64::from_le_bytes(from.take()?);
        let state = u64::from_le_bytes(from.take()?);
        from.end()?;
        Ok(Self { pages, state })
    }
}

/// The page records in `bytes`: number and content of each. Fails with [`WireError::Length`] unless
/// there is a whole number of them.
pub fn records(bytes: &[u8]) -> Result<impl Iterator<Item = (u64, &[u8; PAGE_SIZE])>, WireError> {
    if !bytes.len().is_multiple_of(RECORD_SIZE) {
        return Err(WireError::Length);
    }
    Ok(bytes.chunks_exact(RECORD_SIZE).filter_map(|record| {
        let (number, content) = record.split_first_chunk::<8>()?;
        Some((
            u64::from_le_bytes(*number),
            content.first_chunk::<PAGE_SIZE>()?,
        ))
    }))
}

/// Writes the head of a page record: the page's number. The content follows it.
pub fn record_head(page: u64) -> [u8; 8] {
    page.to_le_bytes()
}

/// Writes a page record.
pub fn record(page: u64, content: &[u8; PAGE_SIZE], out: &mut [u8; RECORD_SIZE]) {
    let mut to = Writer { bytes: out, at: 0 };
    to.put(&record_head(page));
    to.put(content);
}

/// Puts bytes one after another. What does not fit is left out; the sizes above leave no such case.
struct Writer<'a> {
    bytes: &'a mut [u8],
    at: usize,
}

impl Writer<'_> {
    fn put(&mut self, what: &[u8]) {
        if let Some(to) = self
            .bytes
            .get_mut(self.at..)
            .and_then(|b| b.get_mut(..what.len()))
        {
            to.copy_from_slice(what);
            self.at += what.len();
        }
    }
}

/// Takes bytes one after another.
struct Reader<'a> {
    bytes: &'a [u8],
}

impl Reader<'_> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], WireError> {
        let (head, rest) = self
            .bytes
            .split_first_chunk::<N>()
            .ok_or(WireError::Length)?;
        self.bytes = rest;
        Ok(*head)
    }

    fn end(&self) -> Result<(), WireError> {
        if self.bytes.is_empty() {
            Ok(())
        } else {
            Err(WireError::Length)
        }
    }
}
