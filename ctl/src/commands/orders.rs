// SPDX-License-Identifier: GPL-2.0-or-later

//! What running controllers are asked to do, and the events that they tell.

use std::io::{BufRead, Write};
use std::path::Path;
use std::sync::mpsc;
use std::thread;

use anyhow::{bail, Result};
use serde_json::{Map, Value};

use crate::commands::domain::print;
use crate::report::live::{self, Ask};

/// Has the controller of a domain do something, and says what it did.
pub fn order(run_dir: &Path, name: &str, ask: Ask) -> Result<()> {
    print(&live::command(run_dir, name, ask)?);
    Ok(())
}

/// Prints events of one domain, or of all whose controllers run now, until these end or nobody reads.
/// Each has its domain as a member.
pub fn events(run_dir: &Path, name: Option<&str>) -> Result<()> {
    let names = match name {
        Some(name) => vec![name.to_owned()],
        None => live::all(run_dir)
            .into_iter()
            .map(|(name, _)| name)
            .collect(),
    };
    if names.is_empty() {
        bail!("no controller runs here: start one with remusctl protect or standby");
    }
    let (sender, lines) = mpsc::sync_channel(1024);
    for name in names {
        let reader = live::events(run_dir, &name)?;
        let sender = sender.clone();
        let follow = move || {
            for line in reader.lines().map_while(Result::ok) {
                if sender.send(with_domain(&name, &line)).is_err() {
                    return;
                }
            }
        };
        thread::Builder::new().name("events".into()).spawn(follow)?;
    }
    drop(sender);
    let mut out = std::io::stdout();
    for line in lines {
        // Whoever reads it may have had enough.
        if writeln!(out, "{line}").and_then(|()| out.flush()).is_err() {
            return Ok(());
        }
    }
    match name {
        Some(name) => {
            bail!("the controller of {name} has ended, or this could not keep up with its events")
        }
        None => bail!("all controllers have ended"),
    }
}

fn with_domain(name: &str, line: &str) -> String {
    let mut event: Map<String, Value> = serde_json::from_str(line).unwrap_or_default();
    event.entry("domain").or_insert_with(|| name.into());
    Value::Object(event).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn domains_are_named() {
        assert_eq!(
            with_domain("web", r#"{"a":1}"#),
            r#"{"a":1,"domain":"web"}"#
        );
        let named = r#"{"domain":"db"}"#;
        assert_eq!(with_domain("web", named), named);
    }
}
