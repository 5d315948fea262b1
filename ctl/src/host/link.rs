// SPDX-License-Identifier: GPL-2.0-or-later

//! Network interfaces and their qdiscs, by rtnetlink, in this network namespace.

use anyhow::{bail, Context, Result};
use netlink_packet_core::{
    DefaultNla, NetlinkDeserializable, NetlinkHeader, NetlinkMessage, NetlinkPayload,
    NetlinkSerializable, Nla,
};
use netlink_packet_route::link::{LinkAttribute, LinkMessage};
use netlink_packet_route::tc::{TcAttribute, TcHandle, TcMessage, TcOption};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_sys::protocols::NETLINK_ROUTE;
use remus_core::uapi::{tca, FAMILY};
use rustix::io::Errno;

use crate::host::netlink::refusal;
use crate::host::nlsock::{attributes, NlSock, NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST};

const NLM_F_CREATE: u16 = 0x400;
const NLM_F_EXCL: u16 = 0x200;

/// A network interface with a remus qdisc.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Port {
    /// Its name.
    pub device: String,
    /// Its index.
    pub index: i32,
    /// The domain that it belongs to.
    pub domain: String,
    /// Where the qdisc is attached.
    parent: TcHandle,
    handle: TcHandle,
}

/// A client of rtnetlink.
pub struct Links {
    socket: NlSock,
}

impl Links {
    /// Opens a socket.
    pub fn open() -> Result<Self> {
        Ok(Self {
            socket: NlSock::open(NETLINK_ROUTE)?,
        })
    }

    /// Index of the interface called `device`.
    pub fn index(&mut self, device: &str) -> Result<i32> {
        let mut message = LinkMessage::default();
        message
            .attributes
            .push(LinkAttribute::IfName(device.into()));
        let answers = self
            .call(RouteNetlinkMessage::GetLink(message), NLM_F_ACK)
            .map_err(|e| match refusal(&e) {
                Some(r) if r.errno() == Errno::NODEV => {
                    let hint = "create it first, or look for it with: ip link";
                    anyhow::anyhow!("there is no network interface {device} here: {hint}")
                }
                _ => e.context(format!("network interface {device}")),
            })?;
        for answer in answers {
            if let RouteNetlinkMessage::NewLink(link) = answer {
                return Ok(i32::try_from(link.header.index)?);
            }
        }
        bail!("the kernel does not describe network interface {device}")
    }

    fn name(&mut self, index: i32) -> Result<String> {
        let mut message = LinkMessage::default();
        message.header.index = u32::try_from(index)?;
        for answer in self.call(RouteNetlinkMessage::GetLink(message), NLM_F_ACK)? {
            if let RouteNetlinkMessage::NewLink(link) = answer {
                for attribute in link.attributes {
                    if let LinkAttribute::IfName(name) = attribute {
                        return Ok(name);
                    }
                }
            }
        }
        bail!("the kernel does not name network interface {index}")
    }

    /// Puts a remus qdisc on an interface: it becomes a port of `domain`, and is held at once.
    pub fn add_port(&mut self, device: &str, domain: &str) -> Result<()> {
        let index = self.index(device)?;
        self.add(index, TcHandle::ROOT, domain)
            .with_context(|| format!("cannot make {device} a port of domain {domain}"))
    }

    /// Puts back a port that was removed.
    pub fn restore_port(&mut self, port: &Port) -> Result<()> {
        self.add(port.index, port.parent, &port.domain)
    }

    fn add(&mut self, index: i32, parent: TcHandle, domain: &str) -> Result<()> {
        let name = DefaultNla::new(tca::DOMAIN, [domain.as_bytes(), &[0]].concat());
        let mut message = TcMessage::with_index(index);
        message.header.parent = parent;
        message.attributes = vec![
            TcAttribute::Kind(FAMILY.into()),
            TcAttribute::Options(vec![TcOption::Other(name)]),
        ];
        let flags = NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL;
        match self.call(RouteNetlinkMessage::NewQueueDiscipline(message), flags) {
            Ok(_) => Ok(()),
            Err(e) => Err(match refusal(&e).map(|r| r.errno()) {
                Some(Errno::EXIST) => e.context(
                    "it has a qdisc already (see: tc qdisc show; remove it: tc qdisc del dev … root)",
                ),
                Some(Errno::NOENT) => {
                    e.context("the kernel has no qdisc remus: insmod remus_buf.ko")
                }
                Some(Errno::PERM) => e.context("this needs CAP_NET_ADMIN: run it as root"),
                _ => e,
            }),
        }
    }

    /// Removes a port. What it holds is dropped.
    pub fn del_port(&mut self, port: &Port) -> Result<()> {
        let mut message = TcMessage::with_index(port.index);
        message.header.parent = port.parent;
        message.header.handle = port.handle;
        self.call(RouteNetlinkMessage::DelQueueDiscipline(message), NLM_F_ACK)
            .map(drop)
            .with_context(|| format!("cannot remove the qdisc of {}", port.device))
    }

    /// All ports of all domains in this network namespace.
    pub fn ports(&mut self) -> Result<Vec<Port>> {
        let message = RouteNetlinkMessage::GetQueueDiscipline(TcMessage::default());
        let answers = self
            .call(message, NLM_F_DUMP)
            .context("cannot list qdiscs")?;
        let mut ports = Vec::new();
        for answer in answers {
            let RouteNetlinkMessage::NewQueueDiscipline(qdisc) = answer else {
                continue;
            };
            let kind = |a: &TcAttribute| matches!(a, TcAttribute::Kind(k) if k == FAMILY);
            if !qdisc.attributes.iter().any(kind) {
                continue;
            }
            let index = qdisc.header.index;
            let device = self.name(index)?;
            // Without a name of its own the domain is called as the interface.
            let domain = domain_of(&qdisc).unwrap_or_else(|| device.clone());
            let (parent, handle) = (qdisc.header.parent, qdisc.header.handle);
            ports.push(Port {
                device,
                index,
                domain,
                parent,
                handle,
            });
        }
        Ok(ports)
    }

    fn call(
        &mut self,
        message: RouteNetlinkMessage,
        flags: u16,
    ) -> Result<Vec<RouteNetlinkMessage>> {
        let answers = self.socket.request(encode(message, flags))?;
        answers.iter().map(|bytes| decode(bytes)).collect()
    }
}

fn encode(message: RouteNetlinkMessage, flags: u16) -> Vec<u8> {
    let mut header = NetlinkHeader::default();
    header.flags = flags | NLM_F_REQUEST;
    let mut message = NetlinkMessage::new(header, NetlinkPayload::from(message));
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    bytes
}

fn decode<M: NetlinkDeserializable + NetlinkSerializable>(bytes: &[u8]) -> Result<M> {
    let message = NetlinkMessage::<M>::deserialize(bytes).context("the kernel's answer")?;
    match message.payload {
        NetlinkPayload::InnerMessage(message) => Ok(message),
        _ => bail!("the kernel's answer makes no sense"),
    }
}

/// The domain in the options of a remus qdisc.
fn domain_of(qdisc: &TcMessage) -> Option<String> {
    for attribute in &qdisc.attributes {
        let TcAttribute::Options(options) = attribute else {
            continue;
        };
        for option in options {
            // The library leaves options of kinds that it does not know as one attribute.
            let mut nested = vec![0; option.value_len()];
            option.emit_value(&mut nested);
            let name = attributes(&nested)
                .find(|a| a.0 == tca::DOMAIN)
                .map(|(_, value)| {
                    let value = value.strip_suffix(&[0]).unwrap_or(value);
                    String::from_utf8_lossy(value).into_owned()
                });
            if name.is_some() {
                return name;
            }
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options() {
        let name = DefaultNla::new(tca::DOMAIN, b"web\0".to_vec());
        let mut message = TcMessage::with_index(7);
        message.header.parent = TcHandle::ROOT;
        message.attributes = vec![
            TcAttribute::Kind(FAMILY.into()),
            TcAttribute::Options(vec![TcOption::Other(name)]),
        ];
        let bytes = encode(RouteNetlinkMessage::NewQueueDiscipline(message), 0);
        // kind "remus", then options with the domain's name nested in them
        let want = [
            &[10, 0, 1, 0][..],
            b"remus\0\0\0",
            &[12, 0, 2, 0, 8, 0, 1, 0],
            b"web\0",
        ];
        assert!(bytes.ends_with(&want.concat()), "{bytes:?}");
        match decode(&bytes).unwrap() {
            RouteNetlinkMessage::NewQueueDiscipline(qdisc) => {
                assert_eq!(domain_of(&qdisc).as_deref(), Some("web"));
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn loopback() {
        let mut links = Links::open().unwrap();
        let index = links.index("lo").unwrap();
        assert_eq!(links.name(index).unwrap(), "lo");
        links.ports().unwrap();
        let error = links.index("no-such-port").unwrap_err().to_string();
        assert!(
            error.contains("no network interface no-such-port"),
            "{error}"
        );
    }
}
