// SPDX-License-Identifier: GPL-2.0-or-later

//! The generic netlink family `remus`: docs/netlink/remus.yaml.

use std::io::Cursor;

use anyhow::{anyhow, bail, Context, Result};
use neli::consts::nl::NlmF;
use neli::genl::{AttrTypeBuilder, Genlmsghdr, GenlmsghdrBuilder, NlattrBuilder};
use neli::nl::{NlPayload, Nlmsghdr, NlmsghdrBuilder};
use neli::types::{Buffer, GenlBuffer};
use neli::{FromBytes, ToBytes};
use netlink_sys::protocols::NETLINK_GENERIC;
use remus_core::uapi::{self, attr, cmd};
use rustix::io::Errno;

use crate::args::{CowPolicy, Limits};
use crate::host::kernel::{Direction, Domain, Done, Kernel, Port, Seal};
use crate::host::nlsock::{attributes, NlSock, Refusal, NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST};

/// The controller's family (`GENL_ID_CTRL`), which finds families by name.
const CTRL: u16 = 0x10;
const CTRL_CMD_GETFAMILY: u8 = 3;
const CTRL_ATTR_FAMILY_ID: u16 = 1;
const CTRL_ATTR_FAMILY_NAME: u16 = 2;
const CTRL_ATTR_MCAST_GROUPS: u16 = 7;
const CTRL_ATTR_MCAST_GRP_NAME: u16 = 1;
const CTRL_ATTR_MCAST_GRP_ID: u16 = 2;

/// A domain's memory is made with so much to watch hot pages by their content.
const HOT_LIMIT: u64 = 16 << 20;

/// A client of the family. Commands wait for the kernel's answer; use one client for each thread.
pub struct Remus {
    socket: NlSock,
    family: u16,
}

/// What the kernel calls the family now.
pub(super) struct Family {
    pub(super) id: u16,
    /// The multicast group of its events.
    pub(super) events: u32,
}

/// Opens a socket, and finds the family. Fails with a hint if the module is not loaded.
pub(super) fn open() -> Result<(NlSock, Family)> {
    let mut socket = NlSock::open(NETLINK_GENERIC)?;
    let request = encode(
        CTRL,
        CTRL_CMD_GETFAMILY,
        NLM_F_ACK,
        &[(CTRL_ATTR_FAMILY_NAME, Value::Text(uapi::FAMILY))],
    )?;
    let answers = socket.request(request).map_err(|e| match refusal(&e) {
        Some(r) if r.errno() == Errno::NOENT => {
            anyhow!("the kernel module is not loaded: insmod remus_buf.ko (as root)")
        }
        _ => e.context("cannot look for the kernel module"),
    })?;
    let family = answers
        .first()
        .and_then(|message| family(message.get(20..)?))
        .context("the kernel's list of netlink families makes no sense")?;
    Ok((socket, family))
}

/// The family that these attributes of an answer are about.
fn family(bytes: &[u8]) -> Option<Family> {
    let find = |bytes, kind| attributes(bytes).find(|a| a.0 == kind).map(|a| a.1);
    let id = u16::from_ne_bytes(*find(bytes, CTRL_ATTR_FAMILY_ID)?.first_chunk()?);
    let events = attributes(find(bytes, CTRL_ATTR_MCAST_GROUPS)?)
        .find(|(_, group)| {
            find(group, CTRL_ATTR_MCAST_GRP_NAME).is_some_and(|name| text(name) == uapi::EVENTS)
        })
        .and_then(|(_, group)| find(group, CTRL_ATTR_MCAST_GRP_ID)?.first_chunk().copied())?;
    Some(Family {
        id,
        events: u32::from_ne_bytes(events),
    })
}

/// An attribute to send.
pub(super) enum Value<'a> {
    Text(&'a str),
    Uint(u64),
    Flag,
}

impl Remus {
    /// Finds the family. Fails with a hint if the module is not loaded.
    pub fn connect() -> Result<Self> {
        let (socket, Family { id: family, .. }) = open()?;
        Ok(Self { socket, family })
    }

    /// Creates a domain, with memory if a size in bytes is given.
    pub fn domain_new(&mut self, domain: &str, memory: Option<u64>) -> Result<Domain> {
        let mut attrs = vec![(attr::DOMAIN, Value::Text(domain))];
        if let Some(memory) = memory {
            attrs.extend([
                (attr::MEMORY, Value::Uint(memory)),
                (attr::HOT_LIMIT, Value::Uint(HOT_LIMIT)),
            ]);
        }
        self.one(cmd::DOMAIN_NEW, &attrs)
            .with_context(|| format!("cannot create domain {domain}"))
    }

    /// Changes limits of a domain; what is not named stays.
    pub fn domain_set(&mut self, domain: &str, limits: &Limits) -> Result<Domain> {
        let policy = limits.cow_policy.map(|policy| match policy {
            CowPolicy::Throttle => uapi::cow_policy::THROTTLE,
            CowPolicy::Fail => uapi::cow_policy::FAIL,
        });
        let mut attrs = vec![(attr::DOMAIN, Value::Text(domain))];
        for (kind, value) in [
            (attr::LIMIT_PACKETS, limits.limit_packets),
            (attr::LIMIT_BYTES, limits.limit_bytes),
            (attr::COW_LIMIT, limits.cow_limit),
            (attr::HOT_LIMIT, limits.hot_limit),
            (attr::COW_POLICY, policy.map(u64::from)),
        ] {
            attrs.extend(value.map(|value| (kind, Value::Uint(value))));
        }
        self.one(cmd::DOMAIN_SET, &attrs)
            .map_err(|e| explain(e, domain))
            .with_context(|| format!("cannot change domain {domain}"))
    }

    /// Deletes a domain that has no port. Whoever has its memory open keeps that.
    pub fn domain_del(&mut self, domain: &str) -> Result<()> {
        self.call(
            cmd::DOMAIN_DEL,
            NLM_F_ACK,
            &[(attr::DOMAIN, Value::Text(domain))],
        )
        .map(drop)
        .map_err(|e| explain(e, domain))
        .with_context(|| format!("cannot delete domain {domain}"))
    }

    /// Owns a domain from now on, as long as this client lives: no other process may drive it.
    pub fn own(&mut self, domain: &str) -> Result<()> {
        let attrs = [
            (attr::DOMAIN, Value::Text(domain)),
            (attr::OWN, Value::Flag),
        ];
        self.one::<Domain>(cmd::DOMAIN_SET, &attrs)
            .map(drop)
            .map_err(|e| explain(e, domain))
            .with_context(|| format!("cannot take charge of domain {domain}"))
    }

    /// Throws all packets away that are not committed.
    pub fn discard(&mut self, domain: &str) -> Result<Done> {
        self.epoch("discard the packets of", cmd::DISCARD, domain, [])
    }

    /// Describes all domains.
    pub fn domains(&mut self) -> Result<Vec<Domain>> {
        let answers = self
            .call(cmd::DOMAIN_GET, NLM_F_DUMP, &[])
            .context("cannot list domains")?;
        answers.iter().map(|m| Ok(decode(m)?.into())).collect()
    }

    /// Describes the ports of one domain, or of all.
    pub fn ports(&mut self, domain: Option<&str>) -> Result<Vec<Port>> {
        let attrs: Vec<_> = domain
            .map(|d| (attr::DOMAIN, Value::Text(d)))
            .into_iter()
            .collect();
        let answers = self
            .call(cmd::PORT_GET, NLM_F_DUMP, &attrs)
            .context("cannot list ports")?;
        answers.iter().map(|m| Ok(decode(m)?.into())).collect()
    }

    fn call(&mut self, cmd: u8, flags: u16, attrs: &[(u16, Value<'_>)]) -> Result<Vec<Vec<u8>>> {
        let request = encode(self.family, cmd, flags, attrs)?;
        self.socket.request(request).map_err(|e| match refusal(&e) {
            Some(r) if r.errno() == Errno::PERM => {
                e.context("this needs CAP_NET_ADMIN: run it as root")
            }
            _ => e,
        })
    }

    /// A command that has one answer.
    fn one<T: From<Reply>>(&mut self, cmd: u8, attrs: &[(u16, Value<'_>)]) -> Result<T> {
        let answers = self.call(cmd, NLM_F_ACK, attrs)?;
        match answers.first() {
            Some(message) => Ok(decode(message)?.into()),
            None => bail!("the kernel module did not answer; is it of this version?"),
        }
    }

    fn epoch<'a>(
        &mut self,
        what: &str,
        cmd: u8,
        domain: &'a str,
        more: impl IntoIterator<Item = (u16, Value<'a>)>,
    ) -> Result<Done> {
        let mut attrs = vec![(attr::DOMAIN, Value::Text(domain))];
        attrs.extend(more);
        self.one(cmd, &attrs)
            .map_err(|e| explain(e, domain))
            .with_context(|| format!("cannot {what} domain {domain}"))
    }
}

impl Kernel for Remus {
    fn get(&mut self, domain: &str) -> Result<Domain> {
        self.one(cmd::DOMAIN_GET, &[(attr::DOMAIN, Value::Text(domain))])
            .map_err(|e| explain(e, domain))
            .with_context(|| format!("domain {domain}"))
    }

    fn seal(&mut self, domain: &str, how: Seal) -> Result<Done> {
        let flags = [
            (how.full, attr::FULL),
            (how.keep_passthrough, attr::KEEP_PASSTHROUGH),
        ];
        let flags = flags.into_iter().filter(|flag| flag.0);
        self.epoch(
            "seal the epoch of",
            cmd::EPOCH_SEAL,
            domain,
            flags.map(|flag| (flag.1, Value::Flag)),
        )
    }

    fn commit(&mut self, domain: &str, epoch: u64) -> Result<Done> {
        let what = format!("commit epoch {epoch} of");
        self.epoch(
            &what,
            cmd::EPOCH_COMMIT,
            domain,
            [(attr::EPOCH, Value::Uint(epoch))],
        )
    }

    fn abort(&mut self, domain: &str, epoch: u64) -> Result<Done> {
        let what = format!("abort epoch {epoch} of");
        self.epoch(
            &what,
            cmd::EPOCH_ABORT,
            domain,
            [(attr::EPOCH, Value::Uint(epoch))],
        )
    }

    fn set_passthrough(&mut self, domain: &str, on: bool) -> Result<()> {
        let (way, what) = if on {
            (attr::PASSTHROUGH, "let the packets pass of")
        } else {
            (attr::HOLD, "hold the packets of")
        };
        let attrs = [(attr::DOMAIN, Value::Text(domain)), (way, Value::Flag)];
        self.one::<Domain>(cmd::DOMAIN_SET, &attrs)
            .map(drop)
            .map_err(|e| explain(e, domain))
            .with_context(|| format!("cannot {what} domain {domain}"))
    }
}

/// The kernel's refusal within an error, if that is what it comes from.
pub fn refusal(error: &anyhow::Error) -> Option<&Refusal> {
    error.downcast_ref::<Refusal>()
}

/// Adds what to do about a domain that does not exist.
fn explain(error: anyhow::Error, domain: &str) -> anyhow::Error {
    match refusal(&error) {
        Some(r) if r.errno() == Errno::NOENT && r.attribute != Some(attr::EPOCH) => {
            anyhow!("there is none here (create it: remusctl domain add {domain} --memory SIZE)")
        }
        _ => error,
    }
}

/// A whole request; the sequence number is left open.
pub(super) fn encode(
    family: u16,
    cmd: u8,
    flags: u16,
    attrs: &[(u16, Value<'_>)],
) -> Result<Vec<u8>> {
    let mut list = GenlBuffer::<u16, Buffer>::new();
    for (kind, value) in attrs {
        let payload = match value {
            Value::Text(text) => [text.as_bytes(), &[0]].concat(),
            // `uint` takes the shorter form where it will do.
            Value::Uint(number) => match u32::try_from(*number) {
                Ok(short) => short.to_ne_bytes().to_vec(),
                Err(_) => number.to_ne_bytes().to_vec(),
            },
            Value::Flag => Vec::new(),
        };
        let nla_type = AttrTypeBuilder::default().nla_type(*kind).build()?;
        list.push(
            NlattrBuilder::default()
                .nla_type(nla_type)
                .nla_payload(Buffer::from(payload))
                .build()?,
        );
    }
    let body = GenlmsghdrBuilder::<u8, u16>::default()
        .cmd(cmd)
        .version(uapi::VERSION)
        .attrs(list)
        .build()?;
    let message = NlmsghdrBuilder::default()
        .nl_type(family)
        .nl_flags(NlmF::from(flags | NLM_F_REQUEST))
        .nl_payload(NlPayload::Payload(body))
        .build()?;
    let mut out = Cursor::new(Vec::new());
    message.to_bytes(&mut out)?;
    Ok(out.into_inner())
}

/// The attributes of an answer.
#[derive(Debug, Default)]
pub(super) struct Reply {
    pub(super) domain: String,
    device: Option<String>,
    port: String,
    memory: Option<u64>,
    /// By the attributes' numbers.
    numbers: Vec<u64>,
}

pub(super) fn decode(message: &[u8]) -> Result<Reply> {
    let message = Nlmsghdr::<u16, Genlmsghdr<u8, u16>>::from_bytes(&mut Cursor::new(message))
        .context("the kernel module's answer makes no sense")?;
    let mut reply = Reply {
        numbers: vec![0; usize::from(attr::MAX) + 1],
        ..Reply::default()
    };
    let Some(body) = message.get_payload() else {
        bail!("the kernel module's answer is empty");
    };
    for attribute in body.attrs().iter() {
        let kind = *attribute.nla_type().nla_type();
        let payload = attribute.nla_payload().as_ref();
        match kind {
            attr::DOMAIN => reply.domain = text(payload),
            attr::PORT => reply.port = text(payload),
            attr::DEVICE => reply.device = Some(text(payload)),
            attr::MEMORY => reply.memory = Some(uint(payload)?),
            _ => {
                // Unknown ones come from a newer module.
                if let Some(number) = reply.numbers.get_mut(usize::from(kind)) {
                    *number = uint(payload)?;
                }
            }
        }
    }
    Ok(reply)
}

impl Reply {
    pub(super) fn number(&self, kind: u16) -> u64 {
        self.numbers.get(usize::from(kind)).copied().unwrap_or(0)
    }
}

impl From<Reply> for Domain {
    fn from(r: Reply) -> Self {
        Self {
            open_epoch: r.number(attr::OPEN_EPOCH),
            committed_epoch: r.number(attr::COMMITTED_EPOCH),
            sealed_epochs: r.number(attr::SEALED_EPOCHS),
            packets: r.number(attr::PACKETS),
            bytes: r.number(attr::BYTES),
            dropped: r.number(attr::DROPPED),
            dirty_pages: r.number(attr::DIRTY_PAGES),
            resident_pages: r.number(attr::RESIDENT_PAGES),
            snapshot_pages: r.number(attr::SNAPSHOT_PAGES),
            memory_users: r.number(attr::MEMORY_USERS),
            cow_limit: r.number(attr::COW_LIMIT),
            cow_policy: match u8::try_from(r.number(attr::COW_POLICY)) {
                Ok(uapi::cow_policy::THROTTLE) => Some(CowPolicy::Throttle),
                Ok(uapi::cow_policy::FAIL) => Some(CowPolicy::Fail),
                _ => None,
            },
            cow_peak: r.number(attr::COW_PEAK),
            cow_copies: r.number(attr::COW_COPIES),
            cow_waits: r.number(attr::COW_WAITS),
            hot_limit: r.number(attr::HOT_LIMIT),
            hot_pages: r.number(attr::HOT_PAGES),
            limit_packets: r.number(attr::LIMIT_PACKETS),
            limit_bytes: r.number(attr::LIMIT_BYTES),
            ports: r.number(attr::PORTS),
            owner: Some(r.number(attr::OWNER)).filter(|&pid| pid != 0),
            orphaned: r.number(attr::ORPHANED) != 0,
            domain: r.domain,
            memory: r.memory,
            device: r.device,
        }
    }
}

impl From<Reply> for Port {
    fn from(r: Reply) -> Self {
        Self {
            direction: match u8::try_from(r.number(attr::DIRECTION)) {
                Ok(uapi::direction::GUEST) => Some(Direction::Guest),
                Ok(uapi::direction::EGRESS) => Some(Direction::Egress),
                _ => None,
            },
            passthrough: r.number(attr::PASSTHROUGH) != 0,
            packets: r.number(attr::PACKETS),
            bytes: r.number(attr::BYTES),
            held_memory: r.number(attr::HELD_MEMORY),
            limit_packets: r.number(attr::LIMIT_PACKETS),
            limit_bytes: r.number(attr::LIMIT_BYTES),
            dropped: r.number(attr::DROPPED),
            hold_last_ns: r.number(attr::HOLD_LAST_NS),
            hold_max_ns: r.number(attr::HOLD_MAX_NS),
            domain: r.domain,
            port: r.port,
        }
    }
}

impl From<Reply> for Done {
    fn from(r: Reply) -> Self {
        Self {
            epoch: r.number(attr::EPOCH),
            packets: r.number(attr::PACKETS),
            bytes: r.number(attr::BYTES),
            dirty_pages: r.number(attr::DIRTY_PAGES),
            duration_ns: r.number(attr::DURATION_NS),
            domain: r.domain,
        }
    }
}

fn text(payload: &[u8]) -> String {
    String::from_utf8_lossy(payload.strip_suffix(&[0]).unwrap_or(payload)).into_owned()
}

/// The number in an attribute; a flag, which has no content, counts as 1.
fn uint(payload: &[u8]) -> Result<u64> {
    if payload.is_empty() {
        Ok(1)
    } else if let Ok(long) = payload.try_into() {
        Ok(u64::from_ne_bytes(long))
    } else if let Ok(short) = payload.try_into() {
        Ok(u64::from(u32::from_ne_bytes(short)))
    } else {
        bail!("the kernel module sent a number of {} bytes", payload.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A request as bytes, so that a change of the library cannot change it unseen.
    #[test]
    fn request_bytes() {
        let bytes = encode(
            0x21,
            cmd::EPOCH_COMMIT,
            NLM_F_ACK,
            &[
                (attr::DOMAIN, Value::Text("web")),
                (attr::EPOCH, Value::Uint(1 << 40)),
            ],
        )
        .unwrap();
        let mut want = vec![
            40, 0, 0, 0, 0x21, 0, 5, 0, 0, 0, 0, 0, 0, 0, 0, 0, 5, 1, 0, 0,
        ];
        want.extend([8, 0, 1, 0, b'w', b'e', b'b', 0]);
        want.extend([12, 0, 4, 0, 0, 0, 0, 0, 0, 1, 0, 0]);
        assert_eq!(bytes, want);
    }

    #[test]
    fn port() {
        let attrs = [
            (attr::DOMAIN, Value::Text("web")),
            (attr::PORT, Value::Text("tap0")),
            (attr::DIRECTION, Value::Uint(1)),
            (attr::PASSTHROUGH, Value::Flag),
            (attr::PACKETS, Value::Uint(7)),
            (attr::HOLD_MAX_NS, Value::Uint(1 << 33)),
        ];
        let bytes = encode(0x21, 8, 0, &attrs).unwrap();
        let port: Port = decode(&bytes).unwrap().into();
        assert_eq!((port.domain.as_str(), port.port.as_str()), ("web", "tap0"));
        assert_eq!(port.direction, Some(Direction::Guest));
        assert!(port.passthrough);
        assert_eq!((port.packets, port.hold_max_ns), (7, 1 << 33));
    }

    #[test]
    fn reply() {
        let bytes = encode(
            0x21,
            1,
            0,
            &[
                (attr::DOMAIN, Value::Text("web")),
                (attr::MEMORY, Value::Uint(1 << 40)),
                (attr::PORTS, Value::Uint(3)),
                (99, Value::Uint(3)),
            ],
        )
        .unwrap();
        let domain: Domain = decode(&bytes).unwrap().into();
        assert_eq!((domain.memory, domain.ports), (Some(1 << 40), 3));
        assert_eq!(domain.domain, "web");
        for end in 0..bytes.len() {
            let _ = decode(&bytes[..end]);
        }
    }
}
