// SPDX-License-Identifier: GPL-2.0-or-later

//! What the kernel tells about a domain without being asked.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use anyhow::Result;
use remus_core::uapi::{attr, cmd};

use crate::host::kernel::Hearing;
use crate::host::netlink::{decode, open};
use crate::host::nlsock::{Heard, NlSock};

/// Something that happened to a domain. Most come at most once an epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// The first packet of the open epoch is held: the guest has something to say.
    OutputPending {
        /// That epoch.
        open_epoch: u64,
    },
    /// A port, or the domain, holds half of what it may hold.
    BufferHigh {
        /// The epoch that was open then.
        open_epoch: u64,
    },
    /// A packet was dropped because of a limit.
    Overflow {
        /// The epoch that was open then.
        open_epoch: u64,
    },
    /// Somebody who writes the memory waits for room for the old content of a page.
    CowWait,
    /// Sealed epochs were aborted for want of such room.
    CowAbort,
    /// The owner's socket was closed.
    ControllerGone,
    /// The domain does not exist any more.
    DomainGone,
    /// Events were lost, so any of these may have happened: ask for the domain's state.
    Lost,
}

impl Hearing for Events {
    fn hear(&mut self, patience: Duration) -> Result<Option<Event>> {
        self.wait(patience)
    }
}

/// Listens for the events of one domain.
pub struct Events {
    socket: NlSock,
    family: u16,
    domain: String,
    heard: VecDeque<Event>,
}

impl Events {
    /// Listens from now on, whether the domain exists or not. What happened before is not told: ask for the
    /// domain's state afterwards if that matters.
    pub fn open(domain: &str) -> Result<Self> {
        let (mut socket, family) = open()?;
        socket.join(family.events)?;
        Ok(Self {
            socket,
            family: family.id,
            domain: domain.to_owned(),
            heard: VecDeque::new(),
        })
    }

    fn wait(&mut self, patience: Duration) -> Result<Option<Event>> {
        let begin = Instant::now();
        loop {
            if let Some(event) = self.heard.pop_front() {
                return Ok(Some(event));
            }
            let left = patience.saturating_sub(begin.elapsed());
            match self.socket.hear(left)? {
                Some(Heard::Lost) => return Ok(Some(Event::Lost)),
                Some(Heard::Messages(messages)) => {
                    for message in messages {
                        let event = parse(&message, self.family, &self.domain)?;
                        self.heard.extend(event);
                    }
                }
                None if left.is_zero() => return Ok(None),
                None => {}
            }
        }
    }
}

/// The event in a message, if it is one that is known, and of this domain.
fn parse(message: &[u8], family: u16, domain: &str) -> Result<Option<Event>> {
    // Type in the netlink header; the command is the first byte of the generic one.
    let kind = message.get(4..6).and_then(|b| b.first_chunk().copied());
    let (Some(kind), Some(&command)) = (kind.map(u16::from_ne_bytes), message.get(16)) else {
        return Ok(None);
    };
    if kind != family {
        return Ok(None);
    }
    let told = decode(message)?;
    if told.domain != domain {
        return Ok(None);
    }
    let open_epoch = told.number(attr::OPEN_EPOCH);
    Ok(Some(match command {
        cmd::OUTPUT_PENDING => Event::OutputPending { open_epoch },
        cmd::BUFFER_HIGH => Event::BufferHigh { open_epoch },
        cmd::OVERFLOW => Event::Overflow { open_epoch },
        cmd::COW_WAIT => Event::CowWait,
        cmd::COW_ABORT => Event::CowAbort,
        cmd::CONTROLLER_GONE => Event::ControllerGone,
        cmd::DOMAIN_GONE => Event::DomainGone,
        // From a newer module.
        _ => return Ok(None),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::kernel::{Kernel, Seal};
    use crate::host::netlink::{encode, Remus, Value};

    fn message(family: u16, command: u8, domain: &str) -> Vec<u8> {
        let attrs = [
            (attr::DOMAIN, Value::Text(domain)),
            (attr::OPEN_EPOCH, Value::Uint(1 << 33)),
        ];
        encode(family, command, 0, &attrs).unwrap()
    }

    #[test]
    fn known_and_foreign() {
        let open_epoch = 1 << 33;
        for (command, want) in [
            (
                cmd::OUTPUT_PENDING,
                Some(Event::OutputPending { open_epoch }),
            ),
            (cmd::BUFFER_HIGH, Some(Event::BufferHigh { open_epoch })),
            (cmd::OVERFLOW, Some(Event::Overflow { open_epoch })),
            (cmd::COW_WAIT, Some(Event::CowWait)),
            (cmd::COW_ABORT, Some(Event::CowAbort)),
            (cmd::CONTROLLER_GONE, Some(Event::ControllerGone)),
            (cmd::DOMAIN_GONE, Some(Event::DomainGone)),
            (cmd::DOMAIN_GET, None),
            (cmd::MAX + 1, None),
        ] {
            let message = message(0x21, command, "web");
            assert_eq!(parse(&message, 0x21, "web").unwrap(), want, "{command}");
            assert_eq!(parse(&message, 0x22, "web").unwrap(), None);
            assert_eq!(parse(&message, 0x21, "we").unwrap(), None);
        }
    }

    #[test]
    fn broken_messages_do_not_panic() {
        let whole = message(0x21, cmd::OVERFLOW, "web");
        for end in 0..whole.len() {
            let _ = parse(&whole[..end], 0x21, "web");
        }
    }

    /// With the module, in a virtual machine: the test binary with --ignored.
    #[test]
    #[ignore = "needs root and the module"]
    fn from_the_kernel() {
        let mut events = Events::open("t-events").unwrap();
        assert_eq!(events.wait(Duration::from_millis(50)).unwrap(), None);
        let mut remus = Remus::connect().unwrap();
        remus.domain_new("t-events", Some(1 << 20)).unwrap();
        remus.domain_new("t-other", None).unwrap();
        remus.domain_del("t-other").unwrap();
        let how = Seal {
            full: true,
            keep_passthrough: true,
        };
        assert_eq!(remus.seal("t-events", how).unwrap().epoch, 1);
        assert!(remus.set_passthrough("t-events", false).is_ok());
        remus.commit("t-events", 1).unwrap();
        remus.set_passthrough("t-events", true).unwrap();
        let mut owner = Remus::connect().unwrap();
        owner.own("t-events").unwrap();
        drop(owner);
        let patience = Duration::from_secs(5);
        assert_eq!(events.wait(patience).unwrap(), Some(Event::ControllerGone));
        // More than the socket's buffer takes.
        for _ in 0..5000 {
            remus.domain_new("t-other", None).unwrap();
            remus.domain_del("t-other").unwrap();
        }
        remus.domain_del("t-events").unwrap();
        let mut got = Vec::new();
        while let Some(event) = events.wait(Duration::from_millis(200)).unwrap() {
            got.push(event);
        }
        assert!(got.contains(&Event::Lost), "{got:?}");
    }
}
