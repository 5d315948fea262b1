// SPDX-License-Identifier: GPL-2.0-or-later

//! Creating, showing and deleting domains, and the raw steps on their epochs.

use std::io::Write;
use std::thread;
use std::time::Duration;

use anyhow::{bail, Context, Result};
use rustix::io::Errno;
use serde::Serialize;
use serde_json::{json, Value};

use crate::args::{CowPolicy, Limits};
use crate::config::{check_fits, check_name};
use crate::host::kernel::{Domain, Done, Kernel, Seal};
use crate::host::link::{Links, Port};
use crate::host::netlink::{refusal, Remus};
use crate::say;

/// Writes to standard output. A reader that has gone is no error.
pub fn print(text: &str) {
    let _ = writeln!(std::io::stdout(), "{text}");
}

/// Writes something as one line of JSON to standard output.
pub fn print_json(what: &impl Serialize) -> Result<()> {
    print(&serde_json::to_string(what)?);
    Ok(())
}

/// Creates a domain with memory, and makes interfaces its ports. If anything fails, nothing is left.
pub fn add(
    name: &str,
    memory: Option<u64>,
    ports: &[String],
    limits: &Limits,
    passthrough: bool,
    as_json: bool,
) -> Result<()> {
    check_name(name)?;
    check_fits(memory.unwrap_or(0))?;
    let mut kernel = Remus::connect()?;
    let mut links = Links::open()?;
    // What can be found out before anything is done.
    for port in ports {
        links.index(port)?;
    }
    let mut domain = kernel.domain_new(name, memory)?;
    if *limits != Limits::default() {
        match kernel.domain_set(name, limits) {
            Ok(set) => domain = set,
            Err(e) => {
                undo(&mut kernel, &mut links, name);
                return Err(e);
            }
        }
    }
    for port in ports {
        if let Err(e) = links.add_port(port, name) {
            undo(&mut kernel, &mut links, name);
            return Err(e);
        }
    }
    if passthrough {
        if let Err(e) = kernel.set_passthrough(name, true) {
            undo(&mut kernel, &mut links, name);
            return Err(e);
        }
    }
    if !ports.is_empty() {
        domain = kernel.get(name)?;
    }
    if as_json {
        return print_json(&domain);
    }
    print(&describe(&domain, ports));
    Ok(())
}

fn undo(kernel: &mut Remus, links: &mut Links, name: &str) {
    let undone = links.ports().and_then(|ports| {
        for port in ports.iter().filter(|p| p.domain == name) {
            links.del_port(port)?;
        }
        del_when_free(kernel, name)
    });
    if let Err(e) = undone {
        say!("could not undo all of it: {e:#}");
    }
}

/// Changes limits of a domain, and makes interfaces its ports. If anything fails, it is as before.
pub fn set(
    name: &str,
    ports: &[String],
    limits: &Limits,
    passthrough: Option<bool>,
    as_json: bool,
) -> Result<()> {
    if *limits == Limits::default() && ports.is_empty() && passthrough.is_none() {
        bail!("nothing to change is named: see remusctl domain set --help");
    }
    let mut kernel = Remus::connect()?;
    let mut links = Links::open()?;
    kernel.get(name)?;
    let known = ports_of(name);
    let mut change = || {
        for port in ports {
            links.add_port(port, name)?;
        }
        if let Some(passthrough) = passthrough {
            if passthrough {
                // What a controller has left.
                abort_all(&mut kernel, name)?;
            }
            kernel.set_passthrough(name, passthrough)?;
        }
        kernel.domain_set(name, limits)
    };
    let domain = match change() {
        Ok(domain) => domain,
        Err(e) => {
            let now = Links::open()?.ports()?;
            for port in now
                .iter()
                .filter(|p| p.domain == name && !known.contains(&p.device))
            {
                if let Err(e) = links.del_port(port) {
                    say!("could not undo all of it: {e:#}");
                }
            }
            return Err(e);
        }
    };
    if as_json {
        return print_json(&domain);
    }
    print(&describe(&domain, &ports_of(name)));
    Ok(())
}

/// Deletes a domain and takes it off its ports. What they hold is dropped. A memory that is in use goes
/// only with `force`.
pub fn del(name: &str, force: bool) -> Result<()> {
    let mut kernel = Remus::connect()?;
    let mut links = Links::open()?;
    if !force {
        when_unused(&mut kernel, name)?;
    }
    let ports: Vec<Port> = links
        .ports()?
        .into_iter()
        .filter(|p| p.domain == name)
        .collect();
    for port in &ports {
        links.del_port(port)?;
    }
    let deleted = del_when_free(&mut kernel, name);
    if deleted.is_err() {
        for port in &ports {
            if let Err(e) = links.restore_port(port) {
                say!("could not put {} back to domain {name}: {e:#}", port.device);
            }
        }
    }
    deleted
}

/// Fails if a domain's memory is in use; its last user may have ended only just now.
fn when_unused(kernel: &mut Remus, name: &str) -> Result<()> {
    for _ in 0..10 {
        if kernel.get(name)?.memory_users == 0 {
            return Ok(());
        }
        thread::sleep(Duration::from_millis(50));
    }
    bail!(
        "cannot delete domain {name}: its memory is in use: end the virtual machine first, or give -F"
    )
}

/// Deletes a domain whose last port may have gone only just now.
pub fn del_when_free(kernel: &mut Remus, name: &str) -> Result<()> {
    let mut left = 10;
    loop {
        match kernel.domain_del(name) {
            Err(e) if left > 0 && refusal(&e).map(|r| r.errno()) == Some(Errno::BUSY) => {
                left -= 1;
                thread::sleep(Duration::from_millis(50));
            }
            other => return other,
        }
    }
}

/// Lists all domains.
pub fn list(as_json: bool) -> Result<()> {
    let domains = Remus::connect()?.domains()?;
    if as_json {
        return print_json(&domains);
    }
    if domains.is_empty() {
        print("no domains");
    }
    for domain in &domains {
        print(&summary(domain));
    }
    Ok(())
}

/// Describes one domain.
pub fn show(name: &str, as_json: bool) -> Result<()> {
    let domain = Remus::connect()?.get(name)?;
    let ports = ports_of(name);
    if as_json {
        let mut value = serde_json::to_value(&domain)?;
        if let Value::Object(map) = &mut value {
            map.insert("port-devices".into(), json!(ports));
        }
        return print_json(&value);
    }
    print(&describe(&domain, &ports));
    Ok(())
}

/// Names of a domain's ports in this network namespace.
fn ports_of(name: &str) -> Vec<String> {
    let ports = Links::open()
        .and_then(|mut links| links.ports())
        .unwrap_or_default();
    ports
        .into_iter()
        .filter(|p| p.domain == name)
        .map(|p| p.device)
        .collect()
}

/// One line about a domain.
pub fn summary(d: &Domain) -> String {
    format!(
        "{}: epoch {} (committed {}, sealed {}), memory {}, {} ports, {} packets held",
        d.domain,
        d.open_epoch,
        d.committed_epoch,
        d.sealed_epochs,
        d.memory.map_or_else(|| "none".to_owned(), human),
        d.ports,
        d.packets,
    )
}

/// All about a domain.
pub fn describe(d: &Domain, ports: &[String]) -> String {
    let mut text = format!("domain     {}\n", d.domain);
    if let (Some(memory), Some(device)) = (d.memory, &d.device) {
        text += &format!(
            "memory     {} at /dev/{device}, {} pages exist, {} written in the open epoch, {} old copies kept\n",
            human(memory),
            d.resident_pages,
            d.dirty_pages,
            d.snapshot_pages
        );
        text += &format!(
            "copies     {} so far, at most {} at once (limit: {}), waited for {} times\n",
            d.cow_copies,
            d.cow_peak,
            match (d.cow_limit, d.cow_policy) {
                (0, _) | (_, None) => "none".to_owned(),
                (limit, Some(CowPolicy::Throttle)) => format!("{}, then wait", human(limit)),
                (limit, Some(CowPolicy::Fail)) => format!("{}, then abort", human(limit)),
            },
            d.cow_waits
        );
        text += &format!(
            "hot        {} pages written all the time (limit: {})\n",
            d.hot_pages,
            match d.hot_limit {
                0 => "none are watched".to_owned(),
                limit => human(limit),
            }
        );
    } else {
        text += "memory     none\n";
    }
    text += &format!(
        "ports      {}{}{}\n",
        d.ports,
        if ports.is_empty() { "" } else { ": " },
        ports.join(" ")
    );
    text += &format!(
        "held       {} packets, {} bytes ({} dropped so far)\n",
        d.packets, d.bytes, d.dropped
    );
    text += &format!(
        "epochs     {} open, {} sealed, {} committed last",
        d.open_epoch, d.sealed_epochs, d.committed_epoch
    );
    match d.owner {
        Some(process) => text += &format!("\nowner      process {process}"),
        None if d.orphaned => text += "\nowner      gone; all is held until somebody decides",
        None => {}
    }
    text
}

fn human(bytes: u64) -> String {
    for (shift, unit) in [(40, "T"), (30, "G"), (20, "M"), (10, "K")] {
        if bytes >= 1 << shift && bytes.is_multiple_of(1 << shift) {
            return format!("{}{unit}", bytes >> shift);
        }
    }
    bytes.to_string()
}

/// A raw step on a domain's epochs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Seal the open epoch, with every page that exists if told so.
    Seal(Seal),
    /// Commit an epoch and all before it; the newest sealed one if none is named.
    Commit(Option<u64>),
    /// Abort an epoch and all after it; the oldest sealed one if none is named.
    Abort(Option<u64>),
    /// Throw all packets away that are not committed.
    Discard,
}

/// Does one step and says what it did.
pub fn step(name: &str, step: Step, as_json: bool) -> Result<()> {
    let mut kernel = Remus::connect()?;
    let (verb, done) = match step {
        Step::Seal(how) => ("sealed", kernel.seal(name, how)?),
        Step::Commit(Some(epoch)) => ("committed", kernel.commit(name, epoch)?),
        Step::Abort(Some(epoch)) => ("aborted", kernel.abort(name, epoch)?),
        Step::Discard => {
            let done = kernel.discard(name)?;
            if as_json {
                return print_json(&done);
            }
            print(&format!(
                "discarded {} packets, {} bytes of {}",
                done.packets, done.bytes, done.domain
            ));
            return Ok(());
        }
        Step::Commit(None) => {
            let domain = sealed(&mut kernel, name)?;
            let done = first_sealed(newest_first(&domain), |e| kernel.commit(name, e))?;
            ("committed", done)
        }
        Step::Abort(None) => {
            let domain = sealed(&mut kernel, name)?;
            let done = first_sealed(oldest_first(&domain), |e| kernel.abort(name, e))?;
            ("aborted", done)
        }
    };
    if as_json {
        return print_json(&done);
    }
    print(&format!(
        "{verb} epoch {} of {}: {} packets, {} bytes, {} pages, {:.3} ms in the kernel",
        done.epoch,
        done.domain,
        done.packets,
        done.bytes,
        done.dirty_pages,
        done.duration_ns as f64 / 1e6
    ));
    Ok(())
}

fn sealed(kernel: &mut Remus, name: &str) -> Result<Domain> {
    let domain = kernel.get(name)?;
    if domain.sealed_epochs == 0 {
        bail!("domain {name} has no sealed epoch (seal one: remusctl seal {name})");
    }
    Ok(domain)
}

fn newest_first(domain: &Domain) -> impl Iterator<Item = u64> {
    (domain.committed_epoch + 1..domain.open_epoch).rev()
}

fn oldest_first(domain: &Domain) -> impl Iterator<Item = u64> {
    domain.committed_epoch + 1..domain.open_epoch
}

/// Tries epochs until one is not refused: some of the numbers may be those of aborted epochs.
fn first_sealed(
    epochs: impl Iterator<Item = u64>,
    mut act: impl FnMut(u64) -> Result<Done>,
) -> Result<Done> {
    let mut last = None;
    for epoch in epochs {
        match act(epoch) {
            Ok(done) => return Ok(done),
            Err(e) => last = Some(e),
        }
    }
    Err(last.context("no epoch is sealed")?)
}

/// Folds everything that is sealed and not committed into the open epoch: what an earlier controller
/// left. Returns whether there was any.
pub fn abort_all(kernel: &mut dyn Kernel, name: &str) -> Result<bool> {
    let domain = kernel.get(name)?;
    if domain.sealed_epochs == 0 {
        return Ok(false);
    }
    // The oldest one takes all the others along.
    first_sealed(oldest_first(&domain), |e| kernel.abort(name, e))?;
    Ok(true)
}

/// Folds what is sealed after `epoch`, which a standby holds, into the open epoch.
pub fn abort_after(kernel: &mut dyn Kernel, domain: &Domain, epoch: u64) {
    let later = oldest_first(domain).filter(|e| *e > epoch);
    // There may be none: the numbers after it are those of epochs that were aborted before.
    let _ = first_sealed(later, |e| kernel.abort(&domain.domain, e));
}
