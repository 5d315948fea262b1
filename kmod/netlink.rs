// SPDX-License-Identifier: GPL-2.0

//! The generic netlink family: what `docs/netlink/remus.yaml` specifies.
//!
//! `remusctl domain add web --memory 128M`, `remusctl seal web` and so on drive it.

use crate::{
    abi::{
        netlink::{
            multicast,
            Ack,
            Attrs,
            Command,
            DumpError,
            Handler,
            Message,
            Policy,
            Position,
            Request,
            Socket, //
        },
        not_supported, //
    },
    core::uapi::{
        self,
        attr,
        cmd,
        Type, //
    },
    domain::{
        self,
        Change,
        Domain,
        Done,
        Name, //
    },
    qdisc::port::Port,
    ram::CowPolicy,
    refusal::{
        refusal,
        Refusal, //
    },
};
use kernel::{
    page::PAGE_SIZE,
    prelude::*, //
};

/// The family.
pub(crate) struct Family;

const LEN: usize = attr::MAX as usize + 1;

const COUNT: usize = uapi::COMMANDS.len();

/// For each command, a policy that accepts its attributes and nothing else.
static POLICIES: [[Policy; LEN]; COUNT] = {
    const REFUSED: [Policy; LEN] = [Policy::REFUSED; LEN];
    let mut policies = [REFUSED; COUNT];
    let mut i = 0;
    while i < COUNT {
        let accepts = uapi::COMMANDS[i].accepts;
        let mut j = 0;
        while j < accepts.len() {
            let number = accepts[j] as usize;
            policies[i][number] = match uapi::TYPES[number - 1] {
                Type::Uint => Policy::UINT,
                Type::Flag => Policy::FLAG,
                Type::Text(max) => Policy::string(match max {
                    Some(max) => max as u16,
                    None => u16::MAX,
                }),
            };
            j += 1;
        }
        i += 1;
    }
    policies
};

const COMMANDS: [Command; COUNT] = {
    const NONE: Command = Command {
        number: 0,
        policy: &[],
        one: false,
        dump: false,
    };
    let mut commands = [NONE; COUNT];
    let mut i = 0;
    while i < COUNT {
        let command = &uapi::COMMANDS[i];
        commands[i] = Command {
            number: command.number,
            policy: &POLICIES[i],
            one: command.one,
            dump: command.dump,
        };
        i += 1;
    }
    commands
};

impl Handler for Family {
    const NAME: &'static [u8] = uapi::FAMILY.as_bytes();
    const VERSION: u8 = uapi::VERSION;
    const COMMANDS: &'static [Command] = &COMMANDS;
    const EVENTS: &'static [u8] = uapi::EVENTS.as_bytes();

    fn execute(request: &Request<'_>, ack: &Ack<'_>) -> Result {
        let attrs = request.attrs();
        run(request, &attrs, ack).map_err(|refusal| {
            let text = refusal.text.as_bytes();
            if !text.is_empty() {
                ack.say(text);
            }
            refusal.error
        })
    }

    fn describe(
        command: u8,
        attrs: &Attrs<'_>,
        position: &mut Position,
        message: &mut Message<'_>,
        ack: &Ack<'_>,
    ) -> Result<bool, DumpError> {
        let only = match attrs.get(attr::DOMAIN) {
            Some(name) => {
                let refuse = |refusal: Refusal| {
                    ack.blame(name);
                    ack.say(refusal.text.as_bytes());
                    DumpError::Refused(refusal.error)
                };
                let name = Name::new(name.string()).map_err(refuse)?;
                if *position == Position::default() {
                    domain::get(&name).map_err(refuse)?;
                }
                Some(name)
            }
            None => None,
        };
        let [domain_id, port_id] = position;
        while let Some((domain, id)) = domain::from_id(*domain_id) {
            if *domain_id != id {
                (*domain_id, *port_id) = (id, 0);
            }
            let wanted = only.is_none_or(|name| name == *domain.name());
            if wanted && command == cmd::DOMAIN_GET {
                put_domain(message, &domain).map_err(|_| DumpError::Full)?;
                *domain_id += 1;
                return Ok(true);
            }
            while let Some(port) = domain.port_after(*port_id).filter(|_| wanted) {
                let written = put_port(message, &port).map_err(|_| DumpError::Full)?;
                *port_id = port.id();
                if written {
                    return Ok(true);
                }
            }
            *domain_id += 1;
        }
        Ok(false)
    }

    fn closed(socket: Socket) {
        domain::closed(socket);
    }
}

/// Tells listeners about a domain, when `epoch` was open. Process context.
pub(crate) fn send_event(domain: &Domain, command: u8, epoch: u64) {
    let view = domain.view();
    multicast(command, |message| {
        message.put_string(attr::DOMAIN, domain.name().as_bytes())?;
        message.put_uint(attr::OPEN_EPOCH, epoch)?;
        message.put_uint(attr::PACKETS, view.packets)?;
        message.put_uint(attr::HELD_MEMORY, view.memory)?;
        message.put_uint(attr::DROPPED, view.dropped)
    });
}

/// Tells listeners that the domain with this name is gone. Process context.
pub(crate) fn send_gone(name: &Name) {
    multicast(cmd::DOMAIN_GONE, |message| {
        message.put_string(attr::DOMAIN, name.as_bytes())
    });
}

fn run(request: &Request<'_>, attrs: &Attrs<'_>, ack: &Ack<'_>) -> Result<(), Refusal> {
    let name = attrs.get(attr::DOMAIN).ok_or_else(|| {
        ack.miss(attr::DOMAIN);
        refusal!(EINVAL, "the domain's name is missing")
    })?;
    let name = Name::new(name.string()).inspect_err(|_| ack.blame(name))?;
    let blame = |number, refusal| {
        // Whatever else is wrong with a request, it is about this attribute.
        if let Some(attr) = attrs.get(number) {
            ack.blame(attr);
        }
        refusal
    };
    let find = || domain::get(&name).map_err(|r| blame(attr::DOMAIN, r));
    let number = |n| attrs.get(n).map(|a| a.number());
    let cow = |has_memory: bool| {
        let about = [attr::COW_LIMIT, attr::COW_POLICY, attr::HOT_LIMIT];
        if let Some(first) = about
            .into_iter()
            .find(|n| !has_memory && number(*n).is_some())
        {
            let why = refusal!(EINVAL, "the domain has no memory to limit copies of");
            return Err(blame(first, why));
        }
        let [limit, policy, hot] = about.map(number);
        domain::Cow::new(limit, policy, hot).map_err(|r| blame(attr::COW_POLICY, r))
    };
    let sender = request.sender();
    // Before anything is done: whoever gets no answer must be sure that nothing was.
    let reply = request.reply()?;
    match request.command() {
        cmd::DOMAIN_NEW => {
            let memory = number(attr::MEMORY);
            let domain = domain::new(name, memory, cow(memory.is_some())?).map_err(|r| {
                let about_name = r.error == EEXIST;
                blame(
                    if about_name {
                        attr::DOMAIN
                    } else {
                        attr::MEMORY
                    },
                    r,
                )
            })?;
            reply.send(|m| put_domain(m, &domain))?;
        }
        cmd::DOMAIN_DEL => domain::delete(&name, sender).map_err(|r| blame(attr::DOMAIN, r))?,
        cmd::DOMAIN_GET => {
            let domain = find()?;
            reply.send(|m| put_domain(m, &domain))?;
        }
        cmd::EPOCH_SEAL => {
            let domain = find()?;
            let done = domain.seal(
                sender,
                attrs.get(attr::FULL).is_some(),
                attrs.get(attr::KEEP_PASSTHROUGH).is_some(),
            )?;
            reply.send(|m| put_done(m, &domain, &done))?;
        }
        command @ (cmd::EPOCH_COMMIT | cmd::EPOCH_ABORT) => {
            let epoch = attrs.get(attr::EPOCH).ok_or_else(|| {
                ack.miss(attr::EPOCH);
                refusal!(EINVAL, "the epoch is missing")
            })?;
            let epoch = epoch.number();
            let domain = find()?;
            let done = if command == cmd::EPOCH_COMMIT {
                domain.commit(sender, epoch)
            } else {
                domain.abort(sender, epoch)
            }
            .map_err(|r| blame(attr::EPOCH, r))?;
            reply.send(|m| put_done(m, &domain, &done))?;
        }
        cmd::DOMAIN_SET => {
            let passing = attrs.get(attr::PASSTHROUGH).is_some();
            let hold = attrs.get(attr::HOLD).is_some();
            if passing && hold {
                let why = refusal!(EINVAL, "passthrough and hold are opposites: give one");
                return Err(blame(attr::HOLD, why));
            }
            let domain = find()?;
            let change = Change {
                packets: number(attr::LIMIT_PACKETS),
                bytes: number(attr::LIMIT_BYTES),
                cow: cow(domain.ram().is_some())?,
                passing: (passing || hold).then_some(passing),
                own: attrs.get(attr::OWN).is_some(),
            };
            domain
                .set(sender, &change)
                .map_err(|(about, why)| blame(about, why))?;
            reply.send(|m| put_domain(m, &domain))?;
        }
        cmd::DISCARD => {
            let domain = find()?;
            let done = domain.discard(sender)?;
            reply.send(|m| put_done(m, &domain, &done))?;
        }
        _ => return Err(not_supported().into()),
    }
    Ok(())
}

fn put_domain(message: &mut Message<'_>, domain: &Domain) -> Result {
    let view = domain.view();
    message.put_string(attr::DOMAIN, domain.name().as_bytes())?;
    message.put_uint(attr::OPEN_EPOCH, view.open)?;
    message.put_uint(attr::COMMITTED_EPOCH, view.committed)?;
    message.put_uint(attr::SEALED_EPOCHS, view.sealed)?;
    message.put_uint(attr::PORTS, view.ports)?;
    message.put_uint(attr::PACKETS, view.packets)?;
    message.put_uint(attr::BYTES, view.bytes)?;
    message.put_uint(attr::DROPPED, view.dropped)?;
    message.put_uint(attr::HELD_MEMORY, view.memory)?;
    message.put_uint(attr::LIMIT_PACKETS, view.limit_packets)?;
    message.put_uint(attr::LIMIT_BYTES, view.limit_bytes)?;
    if let Some(owner) = view.owner {
        message.put_uint(attr::OWNER, u64::from(owner))?;
    }
    if view.orphaned {
        message.put_flag(attr::ORPHANED)?;
    }
    if let Some(ram) = domain.ram() {
        let mut device = [0; 64];
        let (directory, name) = (b"remus/", domain.name().as_bytes());
        device[..directory.len()].copy_from_slice(directory);
        device[directory.len()..directory.len() + name.len()].copy_from_slice(name);
        let counts = ram.counts();
        message.put_uint(attr::MEMORY, ram.size())?;
        message.put_string(attr::DEVICE, &device[..directory.len() + name.len()])?;
        message.put_uint(attr::DIRTY_PAGES, counts.dirty)?;
        message.put_uint(attr::RESIDENT_PAGES, counts.resident)?;
        message.put_uint(attr::MEMORY_USERS, ram.users().unsigned_abs())?;
        message.put_uint(attr::SNAPSHOT_PAGES, counts.copies)?;
        // Rounded up to whole pages, which the largest number is not.
        let limit = counts.limit.saturating_mul(PAGE_SIZE as u64);
        message.put_uint(attr::COW_LIMIT, limit)?;
        let policy = match counts.policy {
            CowPolicy::Throttle => uapi::cow_policy::THROTTLE,
            CowPolicy::Fail => uapi::cow_policy::FAIL,
        };
        message.put_uint(attr::COW_POLICY, policy.into())?;
        message.put_uint(attr::COW_PEAK, counts.copies_peak)?;
        message.put_uint(attr::COW_COPIES, counts.copies_made)?;
        message.put_uint(attr::COW_WAITS, counts.waits)?;
        let hot_limit = counts.hot_limit.saturating_mul(PAGE_SIZE as u64);
        message.put_uint(attr::HOT_LIMIT, hot_limit)?;
        message.put_uint(attr::HOT_PAGES, counts.hot)?;
    }
    Ok(())
}

/// False if its device is just going away.
fn put_port(message: &mut Message<'_>, port: &Port) -> Result<bool> {
    let Some(label) = port.label() else {
        return Ok(false);
    };
    let (view, (open, committed, sealed)) = (port.view(), port.domain().epochs());
    message.put_string(attr::DOMAIN, port.domain().name().as_bytes())?;
    message.put_string(attr::PORT, label.name())?;
    message.put_uint(attr::IFINDEX, label.ifindex.into())?;
    message.put_uint(attr::DIRECTION, port.direction().number().into())?;
    if view.passing {
        message.put_flag(attr::PASSTHROUGH)?;
    }
    message.put_uint(attr::OPEN_EPOCH, open)?;
    message.put_uint(attr::COMMITTED_EPOCH, committed)?;
    message.put_uint(attr::SEALED_EPOCHS, sealed)?;
    message.put_uint(attr::PACKETS, view.held.packets)?;
    message.put_uint(attr::BYTES, view.held.bytes)?;
    message.put_uint(attr::HELD_MEMORY, view.memory)?;
    message.put_uint(attr::LIMIT_PACKETS, view.limits.packets)?;
    message.put_uint(attr::LIMIT_BYTES, view.limits.bytes)?;
    message.put_uint(attr::DROPPED, view.drops.total())?;
    message.put_uint(attr::DROPPED_LIMIT, view.drops.limit)?;
    message.put_uint(attr::DROPPED_MEMORY, view.drops.memory)?;
    message.put_uint(attr::DROPPED_DISCARDED, view.drops.discarded)?;
    message.put_uint(attr::HOLD_LAST_NS, view.hold_last_ns)?;
    message.put_uint(attr::HOLD_MAX_NS, view.hold_max_ns)?;
    Ok(true)
}

fn put_done(message: &mut Message<'_>, domain: &Domain, done: &Done) -> Result {
    message.put_string(attr::DOMAIN, domain.name().as_bytes())?;
    message.put_uint(attr::EPOCH, done.epoch)?;
    message.put_uint(attr::PACKETS, done.packets)?;
    message.put_uint(attr::BYTES, done.bytes)?;
    message.put_uint(attr::DIRTY_PAGES, done.pages)?;
    message.put_uint(attr::DURATION_NS, done.duration_ns)
}
