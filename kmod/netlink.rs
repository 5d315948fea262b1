// SPDX-License-Identifier: GPL-2.0

//! The generic netlink family: what `docs/netlink/remus.yaml` specifies.
//!
//! `remusctl domain add web --memory 128M`, `remusctl seal web` and so on drive it.

use crate::{
    abi::{
        netlink::{
            Ack,
            Attrs,
            Command,
            Handler,
            Message,
            Policy,
            Request, //
        },
        not_supported, //
    },
    core::uapi::{
        self,
        attr,
        cmd, //
    },
    domain::{
        self,
        Domain,
        Done,
        Name, //
    },
    refusal::{
        refusal,
        Refusal, //
    },
};
use kernel::prelude::*;

/// The family.
pub(crate) struct Family;

const LEN: usize = attr::MAX as usize + 1;

/// A policy that accepts a name and the attributes in `also`, and nothing else.
const fn policy<const N: usize>(also: [(u16, Policy); N]) -> [Policy; LEN] {
    let mut policy = [Policy::REFUSED; LEN];
    policy[attr::DOMAIN as usize] = Policy::string(uapi::NAME_MAX as u16);
    let mut i = 0;
    while i < N {
        policy[also[i].0 as usize] = also[i].1.copied();
        i += 1;
    }
    policy
}

static NAME: [Policy; LEN] = policy([]);
static NAME_MEMORY: [Policy; LEN] = policy([(attr::MEMORY, Policy::UINT)]);
static NAME_EPOCH: [Policy; LEN] = policy([(attr::EPOCH, Policy::UINT)]);
static NAME_FULL: [Policy; LEN] = policy([(attr::FULL, Policy::FLAG)]);

const fn command(number: u8, policy: &'static [Policy]) -> Command {
    Command {
        number,
        policy,
        dump: number == cmd::DOMAIN_GET,
    }
}

impl Handler for Family {
    const NAME: &'static [u8] = uapi::FAMILY.as_bytes();
    const VERSION: u8 = uapi::VERSION;
    const COMMANDS: &'static [Command] = &[
        command(cmd::DOMAIN_NEW, &NAME_MEMORY),
        command(cmd::DOMAIN_DEL, &NAME),
        command(cmd::DOMAIN_GET, &NAME),
        command(cmd::EPOCH_SEAL, &NAME_FULL),
        command(cmd::EPOCH_COMMIT, &NAME_EPOCH),
        command(cmd::EPOCH_ABORT, &NAME_EPOCH),
    ];

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

    fn describe(index: usize, message: &mut Message<'_>) -> Result<bool> {
        match domain::nth(index) {
            Some(domain) => put_domain(message, &domain).map(|()| true),
            None => Ok(false),
        }
    }
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
    // Before anything is done: whoever gets no answer must be sure that nothing was.
    let reply = request.reply()?;
    match request.command() {
        cmd::DOMAIN_NEW => {
            let memory = attrs.get(attr::MEMORY).map(|a| a.number());
            let domain = domain::new(name, memory).map_err(|r| {
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
        cmd::DOMAIN_DEL => domain::delete(&name).map_err(|r| blame(attr::DOMAIN, r))?,
        cmd::DOMAIN_GET => {
            let domain = find()?;
            reply.send(|m| put_domain(m, &domain))?;
        }
        cmd::EPOCH_SEAL => {
            let domain = find()?;
            let done = domain.seal(attrs.get(attr::FULL).is_some())?;
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
                domain.commit(epoch)
            } else {
                domain.abort(epoch)
            }
            .map_err(|r| blame(attr::EPOCH, r))?;
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
        message.put_uint(attr::SNAPSHOT_PAGES, counts.snapshot)?;
    }
    Ok(())
}

fn put_done(message: &mut Message<'_>, domain: &Domain, done: &Done) -> Result {
    message.put_string(attr::DOMAIN, domain.name().as_bytes())?;
    message.put_uint(attr::EPOCH, done.epoch)?;
    message.put_uint(attr::PACKETS, done.packets)?;
    message.put_uint(attr::BYTES, done.bytes)?;
    message.put_uint(attr::DIRTY_PAGES, done.pages)?;
    message.put_uint(attr::DURATION_NS, done.duration_ns)
}
