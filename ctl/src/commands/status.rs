// SPDX-License-Identifier: GPL-2.0

//! What the kernel and the running controllers say of the domains on this host.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{bail, Result};
use serde_json::{Map, Value};

use crate::commands::domain::{print, print_json};
use crate::host::netlink::Remus;
use crate::report::live;

/// Shows all domains, or one. As JSON: an object for each, with the attributes of `domain-get` and a
/// member `controller`, or for one domain that object alone.
pub fn show(run_dir: &Path, name: Option<&str>, as_json: bool) -> Result<()> {
    let mut all: BTreeMap<String, Map<String, Value>> = BTreeMap::new();
    // A controller may run where the module has gone, and that is worth seeing.
    let kernel = Remus::connect().and_then(|mut k| k.domains());
    let running = live::all(run_dir);
    match kernel {
        Ok(domains) => {
            for domain in domains {
                if let Value::Object(map) = serde_json::to_value(&domain)? {
                    all.insert(domain.domain, map);
                }
            }
        }
        Err(e) if running.is_empty() => return Err(e),
        Err(_) => {}
    }
    for (name, live) in running {
        let entry = all.entry(name.clone()).or_default();
        entry.entry("domain").or_insert(name.into());
        entry.insert("controller".into(), live);
    }
    if let Some(name) = name {
        let Some(one) = all.remove(name) else {
            bail!("no domain {name} here (see: remusctl domain list)");
        };
        if as_json {
            return print_json(&one);
        }
        print(&line(&one));
        return Ok(());
    }
    if as_json {
        return print_json(&all.into_values().collect::<Vec<_>>());
    }
    if all.is_empty() {
        print("no domains");
    }
    for one in all.values() {
        print(&line(one));
    }
    Ok(())
}

fn line(one: &Map<String, Value>) -> String {
    let word = |from: Option<&Value>, key: &str| match from.and_then(|v| v.get(key)) {
        Some(Value::String(s)) => s.clone(),
        Some(v) if !v.is_null() => v.to_string(),
        _ => "-".to_owned(),
    };
    let kernel = Value::Object(one.clone());
    let k = |key| word(Some(&kernel), key);
    let mut text = format!(
        "{}: epoch {} open, {} committed, {} sealed; {} packets held",
        k("domain"),
        k("open-epoch"),
        k("committed-epoch"),
        k("sealed-epochs"),
        k("packets")
    );
    match one.get("controller") {
        None => text += "; no controller runs",
        live @ Some(_) => {
            let l = |key| word(live, key);
            text += &format!("\n  {} {} (process {})", l("role"), l("state"), l("pid"));
            if live.and_then(|v| v.get("peer")).is_some() {
                text += &format!(", other host {}", l("peer"));
            }
            text += &format!(", epoch {}", l("epoch"));
            if live.and_then(|v| v.get("pause-ms")).is_some() {
                text += &format!(
                    "; every {} ms (asked {}), pause {} ms, {} pages, commit after {} ms",
                    l("interval-reached-ms"),
                    l("interval-ms"),
                    l("pause-ms"),
                    l("dirty-pages"),
                    l("commit-lag-ms")
                );
            }
            if live.and_then(|v| v.get("limited-by")).is_some() {
                text += &format!("; held up by {}", l("limited-by"));
            }
        }
    }
    text
}
