// SPDX-License-Identifier: GPL-2.0-or-later

//! A netlink socket that sends one request at a time and understands extended acknowledgements.

use std::fmt;
use std::time::Duration;

use anyhow::{bail, Context, Result};
use netlink_sys::{Socket, SocketAddr};
use rustix::event::{poll, PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::net::sockopt::{set_socket_timeout, Timeout};

/// How long the kernel may take to answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// Bytes in a netlink message's header.
const HEADER: usize = 16;
/// Of a receive: do not wait.
const MSG_DONTWAIT: i32 = 0x40;
/// Message types of the protocol itself.
const NLMSG_NOOP: u16 = 1;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
/// Flags of a request.
pub const NLM_F_REQUEST: u16 = 0x1;
/// The request wants an acknowledgement.
pub const NLM_F_ACK: u16 = 0x4;
/// The request wants all objects.
pub const NLM_F_DUMP: u16 = 0x300;
/// In an acknowledgement: only the header of the request is quoted.
const NLM_F_CAPPED: u16 = 0x100;
/// In an acknowledgement: attributes follow.
const NLM_F_ACK_TLVS: u16 = 0x200;
/// Attributes of an extended acknowledgement.
const NLMSGERR_ATTR_MSG: u16 = 1;
const NLMSGERR_ATTR_OFFS: u16 = 2;
const NLMSGERR_ATTR_MISS_TYPE: u16 = 5;

/// A request that the kernel refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// The error number, positive.
    pub errno: i32,
    /// What the kernel says about it.
    pub message: Option<String>,
    /// Type of the attribute that was wrong or missing, if it is one of the outermost.
    pub attribute: Option<u16>,
}

impl Refusal {
    /// The error number as `rustix` has it.
    pub fn errno(&self) -> Errno {
        Errno::from_raw_os_error(self.errno)
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.message {
            Some(message) => f.write_str(message),
            None => write!(f, "{}", std::io::Error::from_raw_os_error(self.errno)),
        }
    }
}

impl std::error::Error for Refusal {}

/// One netlink socket, used for one request at a time.
pub struct NlSock {
    socket: Socket,
    sequence: u32,
    buffer: Vec<u8>,
}

impl NlSock {
    /// Opens a socket of `protocol`, such as `NETLINK_GENERIC`.
    pub fn open(protocol: isize) -> Result<Self> {
        let mut socket = Socket::new(protocol).context("cannot open a netlink socket")?;
        socket.bind_auto().context("cannot bind a netlink socket")?;
        socket
            .connect(&SocketAddr::new(0, 0))
            .context("cannot connect a netlink socket")?;
        socket
            .set_ext_ack(true)
            .context("cannot ask for extended acknowledgements")?;
        set_socket_timeout(&socket, Timeout::Recv, Some(PATIENCE))
            .context("cannot limit how long a netlink socket waits")?;
        Ok(Self {
            socket,
            sequence: 0,
            buffer: vec![0; 1 << 16],
        })
    }

    /// Sends `message`, a whole netlink message whose flags ask for an acknowledgement or a dump,
    /// and returns the messages that answer it, headers included. Its sequence number is filled in.
    ///
    /// Errors: [`Refusal`] if the kernel refuses it, others if it does not answer or the answer
    /// makes no sense.
    pub fn request(&mut self, mut message: Vec<u8>) -> Result<Vec<Vec<u8>>> {
        self.sequence = self.sequence.wrapping_add(1);
        let sequence = self.sequence;
        let Some(field) = message.get_mut(8..12) else {
            bail!("a netlink request is too short");
        };
        field.copy_from_slice(&sequence.to_ne_bytes());
        self.socket
            .send(&message, 0)
            .context("cannot send to the kernel")?;

        let mut answers = Vec::new();
        loop {
            let length = match self.socket.recv(&mut &mut self.buffer[..], 0) {
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {
                    bail!("the kernel did not answer within {} s", PATIENCE.as_secs())
                }
                other => other.context("cannot receive from the kernel")?,
            };
            let mut rest = self.buffer.get(..length).unwrap_or(&[]);
            while !rest.is_empty() {
                let message = Message::split(&mut rest)?;
                // Left over from a request that ran out of time.
                if message.sequence != sequence {
                    continue;
                }
                match message.kind {
                    NLMSG_NOOP => {}
                    NLMSG_ERROR | NLMSG_DONE => {
                        return match message.refusal() {
                            Some(refusal) => Err(refusal.into()),
                            None => Ok(answers),
                        };
                    }
                    _ => answers.push(message.whole.to_vec()),
                }
            }
        }
    }
}

/// What has come for a listener.
pub enum Heard {
    /// Whole messages, headers included.
    Messages(Vec<Vec<u8>>),
    /// Some were lost, because nobody received them in time.
    Lost,
}

impl NlSock {
    /// Receives what is sent to a multicast group from now on. A socket that does that sends no requests.
    pub fn join(&mut self, group: u32) -> Result<()> {
        self.socket
            .add_membership(group)
            .context("cannot listen to the kernel's events")
    }

    /// Waits at most `patience` for messages.
    pub fn hear(&mut self, patience: Duration) -> Result<Option<Heard>> {
        let timeout = Timespec {
            tv_sec: i64::try_from(patience.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: patience.subsec_nanos().into(),
        };
        let mut fds = [PollFd::new(&self.socket, PollFlags::IN)];
        match poll(&mut fds, Some(&timeout)) {
            // The caller knows how much patience is left.
            Ok(0) | Err(Errno::INTR) => return Ok(None),
            other => other.context("cannot wait for the kernel's events")?,
        };
        let length = match self.socket.recv(&mut &mut self.buffer[..], MSG_DONTWAIT) {
            Ok(length) => length,
            Err(e) => match Errno::from_io_error(&e) {
                Some(Errno::AGAIN | Errno::INTR) => return Ok(None),
                Some(Errno::NOBUFS) => return Ok(Some(Heard::Lost)),
                _ => return Err(e).context("cannot receive the kernel's events"),
            },
        };
        let mut rest = self.buffer.get(..length).unwrap_or(&[]);
        let mut messages = Vec::new();
        while !rest.is_empty() {
            messages.push(Message::split(&mut rest)?.whole.to_vec());
        }
        Ok(Some(Heard::Messages(messages)))
    }
}

/// A netlink message in a buffer.
struct Message<'a> {
    kind: u16,
    flags: u16,
    sequence: u32,
    whole: &'a [u8],
}

impl<'a> Message<'a> {
    /// Takes the first message off `rest`, which is not empty.
    fn split(rest: &mut &'a [u8]) -> Result<Self> {
        let length = u32_at(rest, 0).unwrap_or(0) as usize;
        let (Some(whole), Some(kind), Some(flags), Some(sequence)) = (
            rest.get(..length),
            u16_at(rest, 4),
            u16_at(rest, 6),
            u32_at(rest, 8),
        ) else {
            bail!("the kernel sent a broken netlink message");
        };
        if length < HEADER {
            bail!("the kernel sent a broken netlink message");
        }
        *rest = rest.get(align(length)..).unwrap_or(&[]);
        Ok(Self {
            kind,
            flags,
            sequence,
            whole,
        })
    }

    /// Why the kernel refused, if this message says that it did.
    fn refusal(&self) -> Option<Refusal> {
        // The end of a dump without trouble may have no payload.
        let code = u32_at(self.whole, HEADER)? as i32;
        if code >= 0 {
            return None;
        }
        let mut refusal = Refusal {
            errno: -code,
            message: None,
            attribute: None,
        };
        // What was refused is quoted before the attributes.
        let quoted = self.whole.get(HEADER + 4..).unwrap_or(&[]);
        let at = match self.kind {
            NLMSG_DONE => 0,
            _ if self.flags & NLM_F_CAPPED != 0 => HEADER,
            _ => align(u32_at(quoted, 0).unwrap_or(0) as usize),
        };
        if self.flags & NLM_F_ACK_TLVS != 0 {
            for (kind, value) in attributes(quoted.get(at..).unwrap_or(&[])) {
                match kind {
                    NLMSGERR_ATTR_MSG => {
                        let text = value.strip_suffix(&[0]).unwrap_or(value);
                        refusal.message = Some(String::from_utf8_lossy(text).into_owned());
                    }
                    NLMSGERR_ATTR_OFFS => {
                        let offset = u32_at(value, 0).unwrap_or(0) as usize;
                        refusal.attribute = u16_at(quoted, offset + 2).map(|t| t & 0x3fff);
                    }
                    NLMSGERR_ATTR_MISS_TYPE => {
                        refusal.attribute = u32_at(value, 0).map(|t| t as u16);
                    }
                    _ => {}
                }
            }
        }
        Some(refusal)
    }
}

/// The attributes in `bytes`: type without flags, and value. Ends at the first broken one.
pub fn attributes(bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    let mut rest = bytes;
    std::iter::from_fn(move || {
        let length = u16_at(rest, 0)? as usize;
        let kind = u16_at(rest, 2)? & 0x3fff;
        let value = rest.get(4..length)?;
        rest = rest.get(align(length)..).unwrap_or(&[]);
        Some((kind, value))
    })
}

fn align(length: usize) -> usize {
    length.saturating_add(3) & !3
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(kind: u16, flags: u16, payload: &[u8]) -> Vec<u8> {
        let mut m = Vec::new();
        m.extend((HEADER as u32 + payload.len() as u32).to_ne_bytes());
        m.extend(kind.to_ne_bytes());
        m.extend(flags.to_ne_bytes());
        m.extend([7, 0, 0, 0, 0, 0, 0, 0]);
        m.extend(payload);
        m
    }

    #[test]
    fn extended_acknowledgement() {
        let request = message(32, 5, &[8, 0, 4, 0, 1, 2, 3, 4]);
        let mut payload = (-22i32).to_ne_bytes().to_vec();
        payload.extend(&request);
        payload.extend([11, 0, 1, 0]);
        payload.extend(b"no way\0\0");
        payload.extend([8, 0, 2, 0]);
        payload.extend((HEADER as u32).to_ne_bytes());
        let bytes = message(NLMSG_ERROR, NLM_F_ACK_TLVS, &payload);
        let mut rest = &bytes[..];
        let refusal = Message::split(&mut rest).unwrap().refusal().unwrap();
        assert_eq!(
            (refusal.to_string().as_str(), refusal.errno),
            ("no way", 22)
        );
        assert_eq!(refusal.attribute, Some(4));
        assert!(rest.is_empty());
    }

    #[test]
    fn broken_messages_do_not_panic() {
        let mut payload = (-1i32).to_ne_bytes().to_vec();
        payload.extend([255; 40]);
        let good = message(NLMSG_ERROR, NLM_F_ACK_TLVS, &payload);
        for end in 0..good.len() {
            let mut cut = good[..end].to_vec();
            assert!(end == 0 || Message::split(&mut &cut[..]).is_err());
            if end >= HEADER {
                cut[..4].copy_from_slice(&(end as u32).to_ne_bytes());
                if let Ok(m) = Message::split(&mut &cut[..]) {
                    m.refusal();
                }
            }
        }
    }
}
