// SPDX-License-Identifier: GPL-2.0

//! A client of the generic netlink family `remus`, one request at a time.

use std::io::{self, Cursor};
use std::time::Instant;

use anyhow::{bail, Context, Result};
use neli::consts::nl::NlmF;
use neli::consts::socket::{Msg, NlFamily};
use neli::genl::{AttrTypeBuilder, Genlmsghdr, GenlmsghdrBuilder, NlattrBuilder};
use neli::nl::{NlPayload, Nlmsghdr, NlmsghdrBuilder};
use neli::socket::NlSocket;
use neli::types::{Buffer, GenlBuffer};
use neli::utils::Groups;
use neli::{FromBytes, ToBytes};

use crate::abi::{attr, cmd, FAMILY, VERSION};

/// The family that finds families by name, its command and its attributes.
const CTRL: u16 = 0x10;
const CTRL_GETFAMILY: u8 = 3;
const CTRL_FAMILY_ID: u16 = 1;
const CTRL_FAMILY_NAME: u16 = 2;
/// Message type of an error or acknowledgement; its code follows the header.
const NLMSG_ERROR: u16 = 2;
const HEADER: usize = 16;

/// An attribute to send.
type Attribute = (u16, Vec<u8>);

/// What was done to an epoch.
#[derive(Clone, Copy, Debug)]
pub struct Done {
    /// The epoch.
    pub epoch: u64,
    /// Pages in it.
    pub dirty_pages: u64,
    /// How long the kernel took, in nanoseconds, as it says itself.
    pub kernel_ns: u64,
    /// How long the call took here, in nanoseconds, from before the request until the reply is there.
    pub wall_ns: u64,
}

/// Counters of a domain's memory, in pages.
#[derive(Clone, Copy, Debug)]
pub struct Counts {
    /// Written in the open epoch.
    pub dirty: u64,
    /// Existing.
    pub resident: u64,
    /// Copies kept for sealed epochs.
    pub snapshot: u64,
    /// How often a writer waited for room for one, in times.
    pub waits: u64,
    /// Pages that are compared instead of write-protected.
    pub hot: u64,
}

/// A client.
pub struct Client {
    socket: NlSocket,
    family: u16,
}

impl Client {
    /// Finds the family.
    pub fn connect() -> Result<Self> {
        let socket = NlSocket::connect(NlFamily::Generic, None, Groups::empty())
            .context("cannot open a netlink socket")?;
        socket.block()?;
        let mut client = Self {
            socket,
            family: CTRL,
        };
        let reply = client
            .request(
                CTRL_GETFAMILY,
                &[(CTRL_FAMILY_NAME, text(FAMILY))],
                NlmF::empty(),
            )
            .context("there is no netlink family remus: is the module loaded?")?;
        client.family = reply.number(CTRL_FAMILY_ID)? as u16;
        Ok(client)
    }

    /// Creates a domain with so many bytes of memory, for which so many bytes of copies may be kept, 0 for
    /// any number, and so many bytes of hot pages.
    pub fn create(&self, domain: &str, memory: u64, cow_limit: u64, hot_limit: u64) -> Result<()> {
        self.request(
            cmd::DOMAIN_NEW,
            &[
                name(domain),
                (attr::MEMORY, uint(memory)),
                (attr::COW_LIMIT, uint(cow_limit)),
                (attr::HOT_LIMIT, uint(hot_limit)),
            ],
            NlmF::empty(),
        )
        .map(drop)
        .with_context(|| format!("cannot create domain {domain}"))
    }

    /// Deletes a domain.
    pub fn delete(&self, domain: &str) -> Result<()> {
        self.request(cmd::DOMAIN_DEL, &[name(domain)], NlmF::ACK)
            .map(drop)
            .with_context(|| format!("cannot delete domain {domain}"))
    }

    /// Counters now.
    pub fn counts(&self, domain: &str) -> Result<Counts> {
        let reply = self.request(cmd::DOMAIN_GET, &[name(domain)], NlmF::empty())?;
        Ok(Counts {
            dirty: reply.number(attr::DIRTY_PAGES)?,
            resident: reply.number(attr::RESIDENT_PAGES)?,
            snapshot: reply.number(attr::SNAPSHOT_PAGES)?,
            waits: reply.number(attr::COW_WAITS)?,
            hot: reply.number(attr::HOT_PAGES)?,
        })
    }

    /// Seals the open epoch; with `full`, as if every existing page had been written in it.
    pub fn seal(&self, domain: &str, full: bool) -> Result<Done> {
        let mut attributes = vec![name(domain)];
        if full {
            attributes.push((attr::FULL, Vec::new()));
        }
        self.epoch(cmd::EPOCH_SEAL, &attributes)
            .with_context(|| format!("cannot seal the epoch of {domain}"))
    }

    /// Commits all sealed epochs up to `epoch`.
    pub fn commit(&self, domain: &str, epoch: u64) -> Result<Done> {
        self.epoch(
            cmd::EPOCH_COMMIT,
            &[name(domain), (attr::EPOCH, uint(epoch))],
        )
        .with_context(|| format!("cannot commit epoch {epoch} of {domain}"))
    }

    /// Aborts all sealed epochs from `epoch` on.
    pub fn abort(&self, domain: &str, epoch: u64) -> Result<Done> {
        self.epoch(
            cmd::EPOCH_ABORT,
            &[name(domain), (attr::EPOCH, uint(epoch))],
        )
        .with_context(|| format!("cannot abort epoch {epoch} of {domain}"))
    }

    fn epoch(&self, command: u8, attributes: &[Attribute]) -> Result<Done> {
        let request = encode(self.family, command, attributes, NlmF::empty())?;
        let mut buffer = [0; 8192];
        // Nothing else between two looks at the clock.
        let begin = Instant::now();
        let length = self.exchange(&request, &mut buffer)?;
        let wall_ns = begin.elapsed().as_nanos() as u64;
        let reply = Reply::decode(&buffer[..length])?;
        Ok(Done {
            epoch: reply.number(attr::EPOCH)?,
            dirty_pages: reply.number(attr::DIRTY_PAGES)?,
            kernel_ns: reply.number(attr::DURATION_NS)?,
            wall_ns,
        })
    }

    fn request(&self, command: u8, attributes: &[Attribute], flags: NlmF) -> Result<Reply> {
        let request = encode(self.family, command, attributes, flags)?;
        let mut buffer = [0; 8192];
        let length = self.exchange(&request, &mut buffer)?;
        Reply::decode(&buffer[..length])
    }

    /// One request, one answer.
    fn exchange(&self, request: &[u8], buffer: &mut [u8]) -> io::Result<usize> {
        self.socket.send(request, Msg::empty())?;
        loop {
            match self.socket.recv(&mut buffer[..], Msg::empty()) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                other => return other.map(|(length, _)| length),
            }
        }
    }
}

/// Attributes of an answer.
struct Reply(Vec<(u16, Vec<u8>)>);

impl Reply {
    /// Takes an answer apart. A refusal becomes an [`io::Error`].
    fn decode(message: &[u8]) -> Result<Self> {
        if message.len() < HEADER + 4 {
            bail!("a netlink answer of {} bytes", message.len());
        }
        if u16::from_ne_bytes([message[4], message[5]]) == NLMSG_ERROR {
            let mut code = [0; 4];
            code.copy_from_slice(&message[HEADER..HEADER + 4]);
            return match i32::from_ne_bytes(code) {
                0 => Ok(Self(Vec::new())),
                code => Err(io::Error::from_raw_os_error(-code).into()),
            };
        }
        let message = Nlmsghdr::<u16, Genlmsghdr<u8, u16>>::from_bytes(&mut Cursor::new(message))
            .context("a netlink answer makes no sense")?;
        let body = message.get_payload().context("a netlink answer is empty")?;
        let attributes = body.attrs().iter().map(|a| {
            let content = a.nla_payload().as_ref().to_vec();
            (*a.nla_type().nla_type(), content)
        });
        Ok(Self(attributes.collect()))
    }

    /// A number of two, four or eight bytes.
    fn number(&self, kind: u16) -> Result<u64> {
        let content = self.0.iter().find(|a| a.0 == kind).map(|a| &a.1[..]);
        match content {
            Some(content) if content.len() <= 8 => {
                let mut bytes = [0; 8];
                bytes[..content.len()].copy_from_slice(content);
                Ok(u64::from_le_bytes(bytes))
            }
            Some(_) => bail!("attribute {kind} of a netlink answer is no number"),
            None => bail!("a netlink answer has no attribute {kind}"),
        }
    }
}

fn text(value: &str) -> Vec<u8> {
    [value.as_bytes(), &[0]].concat()
}

fn uint(value: u64) -> Vec<u8> {
    value.to_ne_bytes().to_vec()
}

fn name(domain: &str) -> Attribute {
    (attr::DOMAIN, text(domain))
}

fn encode(family: u16, command: u8, attributes: &[Attribute], flags: NlmF) -> Result<Vec<u8>> {
    let mut list = GenlBuffer::<u16, Buffer>::new();
    for (kind, content) in attributes {
        list.push(
            NlattrBuilder::default()
                .nla_type(AttrTypeBuilder::default().nla_type(*kind).build()?)
                .nla_payload(Buffer::from(content.as_slice()))
                .build()?,
        );
    }
    let body = GenlmsghdrBuilder::<u8, u16>::default()
        .cmd(command)
        .version(VERSION)
        .attrs(list)
        .build()?;
    let message = NlmsghdrBuilder::default()
        .nl_type(family)
        .nl_flags(NlmF::REQUEST | flags)
        .nl_payload(NlPayload::Payload(body))
        .build()?;
    let mut out = Cursor::new(Vec::new());
    message.to_bytes(&mut out)?;
    Ok(out.into_inner())
}
