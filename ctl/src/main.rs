// SPDX-License-Identifier: GPL-2.0-or-later

//! `remusctl`, the controller of Remus: drives the epochs of a domain over netlink, moves its data to
//! the standby, watches the other host, takes over.
//!
//! Threads and blocking calls, no runtime: what happens on an epoch's path can be read off the page.
//!
//! | folder | holds |
//! |---|---|
//! | [`commands`] | what is done at once, and ends: `domain`, `doctor`, `status`, `set`, the raw steps |
//! | [`primary`] | `protect`: what it gathers, and [`primary::protect`], the loop |
//! | [`standby`] | `standby`: what it gathers, [`standby::serve`] that receives, [`standby::takeover`] |
//! | [`peer`] | the way to the other host |
//! | [`host`] | what is on this host: kernel, virtual machine, memory |
//! | [`report`] | what a running controller says of itself |

mod args;
mod commands;
mod config;
mod host;
mod peer;
mod primary;
mod report;
mod signals;
mod standby;
mod threads;

#[cfg(test)]
mod tests;

use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;

use crate::args::{Cli, Command, Domain};
use crate::commands::domain::Step;
use crate::commands::{doctor, domain, keys, orders, papers, status, top};
use crate::config::{new_pace, Config, Usage};
use crate::host::kernel::Seal;
use crate::report::live::Ask;

fn main() -> ExitCode {
    match run(&Cli::parse()) {
        Ok(code) => ExitCode::from(code),
        Err(e) => {
            report::say::error(format_args!("{e:#}"));
            ExitCode::from(if e.is::<Usage>() { 2 } else { 1 })
        }
    }
}

fn run(cli: &Cli) -> Result<u8> {
    match &cli.command {
        Command::Doctor { config, peer, json } => {
            let fit = doctor::run(config.as_deref(), peer.as_deref(), *json)?;
            return Ok(u8::from(!fit));
        }
        Command::Keys(keys) => domain::print(&keys::run(keys)?),
        Command::Protect(args) => return primary::protect(args, &cli.run_dir),
        Command::Standby(args) => return standby::standby(args, &cli.run_dir),
        Command::Status { name, json } => status::show(&cli.run_dir, name.as_deref(), *json)?,
        Command::Top { name } => top::run(&cli.run_dir, name.as_deref())?,
        Command::Events { name } => orders::events(&cli.run_dir, name.as_deref())?,
        Command::Set { name, pace } => {
            orders::order(&cli.run_dir, name, Ask::Pace(new_pace(pace)?))?;
        }
        Command::Failover { name } => orders::order(&cli.run_dir, name, Ask::Failover)?,
        Command::Unprotect { name } => orders::order(&cli.run_dir, name, Ask::Unprotect)?,
        Command::Man { dir } => papers::man(dir)?,
        Command::Completions { shell } => papers::completions(*shell)?,
        Command::Domain(Domain::Add {
            name,
            memory,
            ports,
            limits,
            passthrough,
            config,
            json,
        }) => {
            let config = config.as_deref().map(Config::read).transpose()?;
            let of_file = |c: &Config| (c.name.clone(), Some(c.memory.0), c.ports.clone());
            let of_line = || (String::new(), memory.map(|m| m.0), ports.clone());
            let (file_name, memory, ports) = config.as_ref().map_or_else(of_line, of_file);
            let limits = config.as_ref().map_or(*limits, |c| c.limits(limits));
            let name = name.as_ref().unwrap_or(&file_name);
            domain::add(name, memory, &ports, &limits, *passthrough, *json)?;
        }
        Command::Domain(Domain::List { json }) => domain::list(*json)?,
        Command::Domain(Domain::Show { name, json }) => domain::show(name, *json)?,
        Command::Domain(Domain::Set {
            name,
            ports,
            limits,
            passthrough,
            json,
        }) => domain::set(name, ports, limits, *passthrough, *json)?,
        Command::Domain(Domain::Del { name, force }) => domain::del(name, *force)?,
        Command::Seal { name, full, json } => {
            let how = Seal {
                full: *full,
                ..Seal::default()
            };
            domain::step(name, Step::Seal(how), *json)?;
        }
        Command::Commit(s) => domain::step(&s.name, Step::Commit(s.epoch), s.json)?,
        Command::Abort(s) => domain::step(&s.name, Step::Abort(s.epoch), s.json)?,
        Command::Discard { name, json } => domain::step(name, Step::Discard, *json)?,
    }
    Ok(0)
}
