// SPDX-License-Identifier: GPL-2.0

//! The queue discipline `remus`: makes a network interface a port of a domain.
//!
//! `tc qdisc add dev vif1.0 root remus` is enough; the domain then has the interface's name. What
//! the port holds, and when it lets go, is in `port.rs`; here are the options.

pub(crate) mod port;

use crate::{
    abi::{
        is_net_admin,
        netlink::{
            Ack,
            Attr,
            Attrs,
            Message,
            Policy, //
        },
        not_supported, //
        qdisc::{
            Control,
            Enqueued,
            Instance,
            Outgoing,
            Qdisc,
            Queue,
            Unlocked, //
        },
        skb::Packet,
    },
    core::uapi::{
        self,
        direction,
        tca, //
    },
    domain::{
        self,
        Name, //
    },
    refusal::{
        refusal,
        Refusal, //
    },
};
use kernel::{
    prelude::*,
    sync::Arc, //
};
use port::{
    Direction,
    Limits,
    Port,
    State,
    View, //
};

const LEN: usize = tca::MAX as usize + 1;

static POLICY: [Policy; LEN] = {
    let mut policy = [Policy::REFUSED; LEN];
    policy[tca::DOMAIN as usize] = Policy::string(uapi::NAME_MAX as u16);
    policy[tca::DIRECTION as usize] = Policy::U8;
    policy[tca::LIMIT_PACKETS as usize] = Policy::U32;
    policy[tca::LIMIT_BYTES as usize] = Policy::U64;
    policy[tca::PASSTHROUGH as usize] = Policy::U8;
    policy
};

/// What `tc` said; what it did not say is `None`.
#[derive(Default)]
struct Options {
    domain: Option<Name>,
    direction: Option<Direction>,
    limit_packets: Option<u64>,
    limit_bytes: Option<u64>,
    passthrough: Option<bool>,
}

impl Options {
    fn parse(nest: Option<Attr<'_>>, ack: &Ack<'_>) -> Result<Self> {
        let Some(nest) = nest else {
            return Ok(Self::default());
        };
        Attrs::nested(nest, &POLICY, ack, |attrs| {
            let number = |n| attrs.get(n).map(|a| a.number());
            let say = |n, refusal: Refusal| {
                if let Some(attr) = attrs.get(n) {
                    ack.blame(attr);
                }
                ack.say(refusal.text.as_bytes());
                refusal.error
            };
            Ok(Self {
                domain: match attrs.get(tca::DOMAIN) {
                    Some(name) => Some(Name::new(name.string()).map_err(|r| say(tca::DOMAIN, r))?),
                    None => None,
                },
                direction: match number(tca::DIRECTION) {
                    None => None,
                    Some(n) if n == u64::from(direction::GUEST) => Some(Direction::Guest),
                    Some(n) if n == u64::from(direction::EGRESS) => Some(Direction::Egress),
                    Some(_) => {
                        let refusal = refusal!(EINVAL, "the direction is guest or egress");
                        return Err(say(tca::DIRECTION, refusal));
                    }
                },
                limit_packets: number(tca::LIMIT_PACKETS),
                limit_bytes: number(tca::LIMIT_BYTES),
                passthrough: match number(tca::PASSTHROUGH) {
                    None => None,
                    Some(n @ (0 | 1)) => Some(n == 1),
                    Some(_) => {
                        let refusal = refusal!(EINVAL, "passthrough is 0 or 1");
                        return Err(say(tca::PASSTHROUGH, refusal));
                    }
                },
            })
        })
    }

    fn limits(&self, now: Limits) -> Limits {
        Limits {
            packets: self.limit_packets.unwrap_or(now.packets),
            bytes: self.limit_bytes.unwrap_or(now.bytes),
        }
    }
}

impl Qdisc for Port {
    const KIND: &'static [u8] = uapi::FAMILY.as_bytes();

    type State = State;

    fn init(
        control: &Control<'_>,
        options: Option<Attr<'_>>,
        instance: Arc<Instance<Self>>,
        ack: &Ack<'_>,
    ) -> Result<Arc<Self>> {
        let say = |refusal: Refusal| {
            ack.say(refusal.text.as_bytes());
            refusal.error
        };
        // Whoever may configure a namespace of his own must not get at domains of the host.
        if !is_net_admin() {
            return Err(say(refusal!(
                EPERM,
                "needs CAP_NET_ADMIN of the host, not of a container"
            )));
        }
        if !control.is_root() {
            return Err(say(refusal!(
                not_supported(),
                "remus has to be the root of its device"
            )));
        }
        let options = Options::parse(options, ack)?;
        let device = control.device();
        let name = match options.domain {
            Some(name) => name,
            None => Name::new(device.name()).map_err(|_| {
                say(refusal!(
                    EINVAL,
                    "the device's name cannot be a domain's: give domain NAME"
                ))
            })?,
        };
        let direction = options.direction.unwrap_or(if device.is_guest() {
            Direction::Guest
        } else {
            Direction::Egress
        });
        let limits = options.limits(Limits::default());
        let passing = options.passthrough.unwrap_or(false);
        domain::join(name, |domain, id| {
            Port::new(domain, id, direction, limits, passing, instance)
        })
        .map_err(say)
    }

    fn hooks_ingress(&self) -> bool {
        self.direction() == Direction::Guest
    }

    fn receive(&self, packet: Packet, instance: Unlocked<'_, Self>) -> Option<Packet> {
        self.take_incoming(packet, instance)
    }

    fn change(
        this: &Arc<Self>,
        _: &Control<'_>,
        options: Option<Attr<'_>>,
        ack: &Ack<'_>,
    ) -> Result {
        let options = Options::parse(options, ack)?;
        let other = options
            .domain
            .is_some_and(|name| name != *this.domain().name())
            || options.direction.is_some_and(|d| d != this.direction());
        if other {
            ack.say(b"domain and direction cannot change: delete the qdisc and add it again");
            return Err(not_supported());
        }
        if let Some(passing) = options.passthrough {
            this.domain().set_passing(this, passing).map_err(|r| {
                ack.say(r.text.as_bytes());
                r.error
            })?;
        }
        this.set_limits(|now| options.limits(now));
        Ok(())
    }

    #[inline]
    fn enqueue(&self, queue: &mut Queue<'_, Self>, packet: Outgoing<'_>) -> Enqueued {
        match self.direction() {
            Direction::Guest => packet.pass(queue),
            Direction::Egress => self.take_outgoing(queue, packet),
        }
    }

    #[inline]
    fn dequeue(&self, queue: &mut Queue<'_, Self>) -> Option<Packet> {
        self.next_outgoing(queue)
    }

    fn reset(&self, queue: &mut Queue<'_, Self>) {
        // What a guest sent before is still held, by epoch.
        if self.direction() == Direction::Egress {
            self.discard_all(queue);
        }
        // With `egress`, nothing held is in the instance's own queue; the scheduler sets the counters to zero.
        queue.fifo_purge();
    }

    fn destroy(this: &Arc<Self>) {
        this.close();
    }

    fn dump(&self, message: &mut Message<'_>) -> Result {
        let View {
            limits, passing, ..
        } = self.view();
        message.put_string(tca::DOMAIN, self.domain().name().as_bytes())?;
        message.put_u8(tca::DIRECTION, self.direction().number())?;
        message.put_u32(
            tca::LIMIT_PACKETS,
            u32::try_from(limits.packets).unwrap_or(u32::MAX),
        )?;
        message.put_u64(tca::LIMIT_BYTES, limits.bytes)?;
        message.put_u8(tca::PASSTHROUGH, passing.into())
    }

    type Stats = tca::Stats;

    fn stats(&self) -> tca::Stats {
        Port::stats(self)
    }
}
